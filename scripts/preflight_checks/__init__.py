"""The checks of scripts/preflight.py: each module looks at one part of the machine and returns findings."""
