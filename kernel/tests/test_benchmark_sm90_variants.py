"""What the comparison of builds does without a GPU: names of libraries, refusals, policies that are one, its table."""

import argparse
import sys
from pathlib import Path

import pytest
from nvfp4_megamoe.backends.sm90 import backend

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))

import sm90_variants as variants


def test_a_library_is_name_path_and_digest():
    lib = variants.Library.parse("base=/a:b/c.so:0123")
    assert lib == ("base", Path("/a:b/c.so"), "0123")
    assert variants.Library.parse(str(lib)) == lib
    for text in ("c.so", "base=c.so", "=c.so:0123", "base=:0123"):
        with pytest.raises(argparse.ArgumentTypeError, match="NAME=PATH:DIGEST"):
            variants.Library.parse(text)


def test_policies_that_compute_the_same_are_timed_once():
    assert variants.distinct_policies(8) == dict.fromkeys(variants.TIMED, "exact")
    assert variants.distinct_policies(8192) == {policy: policy for policy in variants.TIMED}


def test_a_policy_shares_the_packed_weights():
    prepared = backend.Sm90Backend(variants.GEOMETRY, "exact")
    prepared.weights = object()
    own = variants.with_policy(prepared, "fast")
    assert own.weights is prepared.weights and own.in_e4m3(8192, 48) == (True, True)
    assert prepared.in_e4m3(8192, 48) == (False, False)


def test_a_library_that_fails_its_check_is_left_out_with_its_reason(tmp_path):
    lib = variants.Library("a", tmp_path / "none.so", "0123")
    wrong = variants.check_apart([lib], (8,), 1, 120)
    assert "none.so does not exist" in wrong["a"]


def test_the_table_compares_with_the_first():
    rows = [
        {"library": name, "policy": "exact", "tokens": 8, "us": us} for name, us in (("base", 100.0), ("other", 90.0))
    ]
    assert variants.table(rows).splitlines() == [
        "| tokens | policy | base us | other us |", "| --- | --- | --- | --- |", "| 8 | exact | 100.0 | 90.0 (0.900) |"
    ]  # fmt: skip
