"""The full verification's command: what it repeats, what it keeps, and its exit code."""

from __future__ import annotations

import json

import pytest
import verify_sm100
from ptx_model import ModelError
from ptx_model.configurations import FULL


class Fake:
    """A configuration that counts its runs."""

    kernel = "gemm1_n128"

    def __init__(self, name: str, passes: bool = True):
        self.name, self.passes, self.seeds = name, passes, []

    def run(self, seed: int) -> dict:
        self.seeds.append(seed)
        return {"passed": self.passes, "codes": 10, "different": 0, "unexplained": 0, "band_needed": 0.0}


@pytest.fixture
def hashes(monkeypatch):
    found = {"gemm1_n128": "a"}
    monkeypatch.setattr(verify_sm100, "ptx_hash", found.__getitem__)
    monkeypatch.setattr(verify_sm100, "header", dict)
    return found


def test_goes_on_where_the_report_ends(tmp_path, hashes):
    report, one, two = tmp_path / "r.json", Fake("k1"), Fake("k2")
    verify_sm100.verify([one], 1, report)
    results = verify_sm100.verify([one, two], 2, report)
    assert (len(one.seeds), len(two.seeds)) == (2, 2)
    assert [(r["configuration"], r["number"]) for r in results] == [("k1", 0), ("k2", 0), ("k1", 1), ("k2", 1)]
    assert len(json.loads(report.read_text())["results"]) == 4
    assert len(verify_sm100.verify([two], 1, report)) == 1
    assert len(json.loads(report.read_text())["results"]) == 4
    hashes["gemm1_n128"] = "b"
    verify_sm100.verify([one], 2, report)
    assert len(one.seeds) == 4


def test_failures_are_run_again_and_end_with_an_error(tmp_path, hashes, monkeypatch, capsys):
    good, bad = Fake("k1"), Fake("k2", passes=False)
    monkeypatch.setattr(verify_sm100, "FULL", [good, bad])
    report = tmp_path / "r.json"
    assert verify_sm100.main(["--report", str(report), "--seeds", "2"]) == 1
    assert capsys.readouterr().out.count("FAILED: gemm1_n128 k2, seed ") == 2
    bad.passes = True
    assert verify_sm100.main(["--report", str(report), "--seeds", "2"]) == 0
    assert (len(good.seeds), len(bad.seeds)) == (2, 4)
    assert "| gemm1_n128 | 2 | 2 of 2 | 20 | 0 | 0 |" in capsys.readouterr().out


def test_fault_of_the_model_is_a_failure_with_its_message(tmp_path, hashes):
    fake = Fake("k1")

    def run(seed):
        raise ModelError("a deadlock")

    fake.run = run
    (result,) = verify_sm100.verify([fake], 1, tmp_path / "r.json")
    assert not result["passed"]
    assert result["error"] == "a deadlock"


def test_unknown_name_lists_the_configurations(tmp_path, capsys):
    with pytest.raises(SystemExit):
        verify_sm100.main(["--report", str(tmp_path / "r.json"), "--only", "gemm9"])
    assert f"{FULL[0].kernel} {FULL[0].name}" in capsys.readouterr().err
