"""The loading benchmark brings files into the page cache, holds them there, and puts them out of it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

SCRIPTS = Path(__file__).resolve().parents[1] / "scripts"
sys.path.insert(0, str(SCRIPTS))

from load_bench import disk  # noqa: E402

WARM_AND_WAIT = """
import sys
from pathlib import Path
from load_bench import disk
disk.make_warm([Path(name) for name in sys.argv[1:]])
print("warm", flush=True)
sys.stdin.read()
"""


def test_files_are_held_in_memory_as_long_as_the_process_lives(tmp_path: Path) -> None:
    files = [tmp_path / "a", tmp_path / "b"]
    for path in files:
        path.write_bytes(os.urandom(1 << 20))
    disk.make_cold(files)
    assert disk.cached_fraction(files) == 0
    command = [sys.executable, "-c", WARM_AND_WAIT, *map(str, files)]
    with subprocess.Popen(
        command, env={**os.environ, "PYTHONPATH": str(SCRIPTS)}, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout.readline() == b"warm\n"
        assert disk.cached_fraction(files) == 1
        for path in files:  # what a kernel that is short of memory does; locked pages stay
            with path.open("rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        assert disk.cached_fraction(files) == 1
        process.stdin.close()
        process.wait()
    disk.make_cold(files)
    assert disk.cached_fraction(files) == 0
