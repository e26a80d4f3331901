"""One folder per architecture behind the protocol of ``protocol.py``; the choice between them is made in ``select.py``."""
