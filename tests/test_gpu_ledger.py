"""The ledger for a lent GPU, without one: what fails is written down, and the rest goes on."""

import json
import sys

from benchmarks import gpu_ledger


def run(monkeypatch, out, *more):
    monkeypatch.setattr(gpu_ledger, "slides", lambda *_: {"busy": 1.0})
    monkeypatch.setattr(
        sys, "argv", ["gpu_ledger", "--out", str(out), "--device", "cpu", "--tiny", *more]
    )
    gpu_ledger.main()
    return json.loads((out / "gpu-ledger.json").read_text())


def test_variants_are_compared_and_an_impossible_one_stops_nothing(monkeypatch, tmp_path):
    found = run(monkeypatch, tmp_path, "--variants", "fp32", "captured", "as it is", "in batches")
    right, failed = found["network 256: fp32"], found["network 256: captured"]
    assert right["largest_difference"] == 0
    assert 0 < right["useful_share"] < right["arithmetic_share"]
    assert "cuda" in failed["error"].lower()
    assert found["network 256: as it is"]["largest_difference"] > 0
    assert (found["network 256: as it is"]["batch"], found["network 256: in batches"]["batch"]) == (
        1,
        2,
    )
    assert found["network 256: fp32"]["first_pass_s"] > 0
    # what is most wanted comes first
    assert list(found)[1:4] == ["network 256: as it is", "profile 256", "slides: cerberus, random"]
    assert "conv" in (tmp_path / found["profile 256"]).read_text()
    assert found["slides: cerberus-lite"] == {"busy": 1.0}


def test_nothing_begins_when_time_is_up(monkeypatch, tmp_path):
    found = run(monkeypatch, tmp_path, "--seconds", "0")
    assert set(map(str, found.values())) == {"no time was left"}
