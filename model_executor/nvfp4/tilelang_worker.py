"""Compiles the TileLang kernels that it is given on its standard input: python -m ...tilelang_worker PIPE PARENT.

Writes a byte into the inherited descriptor PIPE for each that is in TileLang's directory, and ends when the process
PARENT has ended. Status 1 where a kernel could not be compiled; the others are.
"""

from __future__ import annotations

import os
import pickle
import sys
import traceback

_NICENESS = 10  # the ranks that read weights go first; setpriority(2)


def main() -> int:
    pipe, parent = int(sys.argv[1]), int(sys.argv[2])
    os.nice(_NICENESS)
    kernels: dict[type, object] = {}
    failed = 0
    for kind, key in pickle.load(sys.stdin.buffer):
        if os.getppid() != parent:
            return 1
        try:
            if kind not in kernels:
                kernels[kind] = kind()
            kernels[kind].compile(key)
        except Exception:
            traceback.print_exc()
            failed = 1
        else:
            os.write(pipe, b".")
    return failed


if __name__ == "__main__":
    sys.exit(main())
