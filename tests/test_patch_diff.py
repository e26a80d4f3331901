from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from .patch_tree import diff, make_diff

OLD = b"one\ntwo\nthree\nfour\nfive\n"
GOOD = b"why\n--- a/vllm/x.py\n+++ b/vllm/x.py\n@@ -2,2 +2,2 @@\n two\n-three\n+THREE\n"

line = st.sampled_from([b"", b"a", b"b", b"c", b"-- x", b"++ y", b"@@ -1 +1 @@", b"\\ No", b"\r", b"\xff\x00", b" "])
text = st.builds(
    lambda lines, end: b"\n".join(lines) + (b"\n" if end and lines else b""), st.lists(line, max_size=30), st.booleans()
)


def apply(data: bytes, old: bytes | None) -> bytes:
    [file] = diff.parse("01-x.diff", data).files
    return diff.apply("01-x.diff", file, old)


@given(text, text, st.integers(0, 4))
@settings(max_examples=200, deadline=None)
def test_applies_what_difflib_writes(old: bytes, new: bytes, context: int) -> None:
    if old == new:
        return
    assert apply(b"why\n" + make_diff("vllm/x.py", old, new, context), old) == new


@given(text, text, text, st.integers(1, 4))
@settings(max_examples=200, deadline=None)
def test_never_applies_to_another_file(old: bytes, new: bytes, other: bytes, context: int) -> None:
    """Applied to anything else it fails, or all lines of all hunks were there: then undoing it gives the file back."""
    if old == new:
        return
    forward, back = (b"why\n" + make_diff("vllm/x.py", *pair, context) for pair in ((old, new), (new, old)))
    try:
        result = apply(forward, other)
    except diff.DiffError:
        assert other != old
        return
    assert apply(back, result) == other


@given(text.filter(bool))
def test_new_file(new: bytes) -> None:
    data = b"why\n" + make_diff("vllm/x.py", None, new)
    assert apply(data, None) == new
    with pytest.raises(diff.DiffError, match="exists already"):
        apply(data, b"")


def test_every_one_byte_change_of_the_context_is_refused() -> None:
    seed = random.randrange(2**32)
    print("seed", seed)
    rng = random.Random(seed)
    assert apply(GOOD, OLD) == OLD.replace(b"three", b"THREE")
    for at in range(OLD.index(b"two"), OLD.index(b"four")):
        changed = bytearray(OLD)
        changed[at] = rng.choice([c for c in range(256) if c != OLD[at]])
        with pytest.raises(diff.DiffError, match="does not fit at line"):
            apply(GOOD, bytes(changed))


def test_no_offset_search_and_no_fuzz() -> None:
    with pytest.raises(diff.DiffError, match=r"01-x.diff: vllm/x.py: hunk 1 does not fit at line 2\n  expected  'two"):
        apply(GOOD, b"zero\n" + OLD)
    with pytest.raises(diff.DiffError, match="<end of file>"):
        apply(GOOD, b"one\ntwo\n")
    with pytest.raises(diff.DiffError, match="hunk 1 does not fit"):
        apply(GOOD.replace(b"+THREE\n", b"+THREE\n\\ No newline at end of file\n", 1).replace(b"three", b"tree"), OLD)
    with pytest.raises(diff.DiffError, match="no such file"):
        apply(GOOD, None)


def test_git_headers_and_timestamps_are_accepted() -> None:
    data = GOOD.replace(
        b"--- a/vllm/x.py", b"diff --git a/vllm/x.py b/vllm/x.py\nindex 12ab..34cd 100644\n--- a/vllm/x.py\t2026-01-01"
    ).replace(b"2,2 @@", b"2,2 @@ def f():")
    assert apply(data, OLD) == OLD.replace(b"three", b"THREE")
    patch = diff.parse("x", b"line 1\n--- not a header\nline 2\n" + GOOD)
    assert patch.reason == "line 1\n--- not a header\nline 2\nwhy"


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (b"why\n", b"", "no reason"),
        (b"+++ b/vllm/x.py", b"+++ /dev/null", "deletions are not accepted"),
        (b"+++ b/vllm/x.py", b"+++ b/vllm/y.py", "renames are not accepted"),
        (b"--- a/vllm/x.py", b"diff --git a/q b/q\nold mode 100644\n--- a/vllm/x.py", "unexpected line 'old mode"),
        (b"--- a/vllm/x.py", b"diff --git a/q b/q\nrename from q\n--- a/vllm/x.py", "unexpected line 'rename"),
        (b"--- a/vllm/x.py", b"diff --git a/q b/q\nGIT binary patch\n--- a/vllm/x.py", "unexpected line 'GIT"),
        (b"vllm/x.py", b"../x.py", "is not of the form"),
        (b"a/vllm/x.py", b"a//etc/passwd", "is not of the form"),
        (b"a/vllm/x.py", b"vllm/x.py", "not a unified diff"),
        (b"b/vllm/x.py", b"vllm/x.py", "is not of the form"),
        (b"+++ b/vllm/x.py\n", b"", "expected a line starting with"),
        (b"@@ -2,2 +2,2 @@", b"@@ -2,3 +2,3 @@", "ends too early"),
        (b"@@ -2,2 +2,2 @@", b"@@ -2,1 +2,2 @@", "other line counts"),
        (b"@@ -2,2 +2,2 @@", b"@@ -2 2 @@", "malformed hunk header"),
        (b"@@ -2,2 +2,2 @@", b"@@ -2,2 +3,2 @@", "wrong line numbers"),
        (b" two\n", b"\n", "white space stripped"),
        (b"-three\n+THREE\n", b" three\n", "other line counts|changes nothing|ends too early"),
        (b" two\n", b" two\n\\ No newline at end of file\n", "without newline that is not the last"),
        (b"+THREE\n", b"+THREE\n\\ No newline at end of file\n", "middle of the file"),
        (b"+THREE\n", b"+THREE\n-- \n2.39\n", "unexpected line '-- '"),
        (b"@@ -2,2 +2,2 @@\n two\n-three\n+THREE\n", b"", "no hunk for"),
        (b"--- a/vllm/x.py", b"--- /dev/null", "has old lines"),
    ],
)
def test_refuses(old: bytes, new: bytes, message: str) -> None:
    data = GOOD.replace(old, new)
    assert data != GOOD
    with pytest.raises(diff.DiffError, match=message) as error:
        apply(data, OLD)
    assert str(error.value).startswith("01-x.diff")


def test_refuses_twice_the_same_file_and_text_that_is_no_diff() -> None:
    with pytest.raises(diff.DiffError, match="appears twice"):
        diff.parse("x", GOOD + GOOD.removeprefix(b"why\n"))
    with pytest.raises(diff.DiffError, match="not a unified diff"):
        diff.parse("x", b"only words\n")
    with pytest.raises(diff.DiffError, match="changes nothing"):
        diff.parse("x", b"why\n--- a/vllm/x.py\n+++ b/vllm/x.py\n@@ -1,1 +1,1 @@\n one\n")


def test_overlapping_and_unordered_hunks_are_refused() -> None:
    hunk = b"@@ -2,1 +2,1 @@\n-two\n+TWO\n"
    with pytest.raises(diff.DiffError, match="does not follow from the hunks before"):
        apply(b"why\n--- a/vllm/x.py\n+++ b/vllm/x.py\n" + hunk + hunk, OLD)
