"""Puts this project's patch series and overlay files into an installed vLLM, all or nothing. Standard library only.

errors       what can go wrong, and the exit code it has
diff         strict unified diffs: parse, apply
install      where vLLM is and which version, without importing it
series       the patches, the overlay files and the hashes in targets.json
files        durable writes, hashes, bytecode caches
lock         one run at a time on one installation
record       what an earlier run left in the installation
transaction  the journal that makes a set of file changes atomic
plan         what state the files are in, and which changes lead to the wanted one
"""
