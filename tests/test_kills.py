"""Killed at any instant and run again, a slide ends with the same bytes."""

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from benchmarks.kills.choice import choose
from benchmarks.kills.countdown import STAGES, Point
from benchmarks.kills.scenarios import Scenario
from benchmarks.kills.trial import contents, whole_after_kill

ROOT = Path(__file__).parents[1]
POINTS = 200


@pytest.mark.skipif(not hasattr(os, "fork"), reason="processes are forked")
def test_at_every_one_of_200_points_and_in_every_stage(tmp_path):
    found = subprocess.run(
        [sys.executable, "-m", "benchmarks.kills", "--points", str(POINTS), "--keep", tmp_path],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert found.returncode == 0, found.stdout + found.stderr
    assert f"{POINTS} of {POINTS} kill points: same bytes" in found.stdout
    rows = [re.findall(r"\d+", line) for line in found.stdout.splitlines()[1:-1]]
    by_stage = dict(zip(STAGES, np.array(rows, int).sum(axis=0).tolist(), strict=False))
    assert all(by_stage[stage] >= 5 for stage in STAGES if stage != "end"), by_stage
    assert not list(tmp_path.glob("wrong *"))


def test_points_are_spread_over_the_stages():
    changes = tuple([("predict", "open")] * 300 + [("seal", "os.rename")] * 3)
    scenario = Scenario(name="", start=None, work=lambda _out: True, changes=changes, seconds=1.0)
    points = choose(scenario, 30, np.random.default_rng(0))
    assert len(points) == 30
    numbers = {point.at for point in points if point.at is not None}
    assert numbers >= {300, 301, 302}
    assert len([n for n in numbers if n < 300]) >= 10
    assert {point.at for point in points if point.is_torn} <= {300, 301, 302}
    times = sorted(point.after_s for point in points if point.after_s is not None)
    assert len(times) == 5
    assert 0 < times[0] < 0.2 < 0.8 < times[-1] < 1


def test_a_process_that_was_too_fast_is_killed_earlier():
    assert Point(at=40, is_torn=True).earlier() == Point(at=30, is_torn=True)
    assert Point(after_s=1.0).earlier().after_s == pytest.approx(0.6)


def test_half_a_file_under_a_final_name_is_seen(tmp_path):
    for name in (
        "objects/a.parquet",
        "maps/a.zarr/zarr.json",
        "reports/a.json",
        "tissue/.a.partial",
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"whole")
    wanted = contents(tmp_path)
    assert wanted["reports/a.json"] == b"", "it holds times"
    assert whole_after_kill(tmp_path, wanted) == []
    for name in wanted:
        (tmp_path / name).write_bytes(b"who")
    assert sorted(whole_after_kill(tmp_path, wanted)) == [
        "maps/a.zarr/zarr.json",
        "objects/a.parquet",
    ]
