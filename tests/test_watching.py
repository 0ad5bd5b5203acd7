"""``wsi status`` while jobs run."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
from click.testing import CliRunner
from cohort_fixtures import begin, lease, report

from wsi_pipeline import cohort, watching
from wsi_pipeline.cli import wsi
from wsi_pipeline.lease import DEAD_AFTER_S, read_holder
from wsi_pipeline.synth import write_slide

RUN = (
    "from wsi_pipeline import lease; lease.HEARTBEAT_S = 0.05\n"
    "from wsi_pipeline.cli import main_run; main_run()"
)


def status(*arguments, code=0):
    result = CliRunner().invoke(wsi, ["status", *map(str, arguments)])
    assert result.exit_code == code, result.output
    return result.output


def test_running_and_dead_slides_are_dated(tmp_path):
    begin(tmp_path, "a", "b", "c")
    report(tmp_path, "a", pid=3, device_busy_s=4.0)
    lease(tmp_path, "b", age_s=30, job="7", stage="predict", done=1, total=4, for_s=312.0)
    lease(tmp_path, "c", age_s=DEAD_AFTER_S + 180, stage="write", done=0, total=0)
    lines = status(tmp_path).splitlines()
    assert lines[0] == "a\tdone"
    start = "b\trunning\tby process 5 on node7 (Slurm job 7), predict 25% after 5 min 12 s, last "
    assert lines[1].startswith(start + "sign of life 3")
    assert lines[2].startswith("c\tinterrupted\tprocess 5 on node7 ended without a word, write, no")
    assert lines[2].endswith(("no sign of life for 300 s", "no sign of life for 301 s"))
    assert lines[3] == "3 slides: 1 done, 1 running, 1 interrupted, 0 missing, 0 failed"
    assert lines[4].startswith("pace: 360 slides/h, 720 mm2/h; in the last hour ")
    assert lines[5] == "devices: busy 40% of the time in which slides were in work"
    # c begins anew, and a quarter of 60 % of b is behind it; ten seconds a slide.
    assert lines[6] == "about 18 s left with 1 at work (by the slides that are left)"


def test_machines_get_json(tmp_path):
    begin(tmp_path, "a", "b")
    report(tmp_path, "a")
    lease(tmp_path, "b", age_s=30, stage="predict", done=1, total=4)
    found = json.loads(status(tmp_path, "--json"))
    assert found["totals"] == {"done": 1, "running": 1, "interrupted": 0, "missing": 0, "failed": 0}
    assert [slide["state"] for slide in found["slides"]] == ["done", "running"]
    own = found["slides"][1]
    assert (own["host"], own["stage"], own["done"]) == ("node7", "predict", 1)
    assert own["last_sign_of_life_s"] == pytest.approx(30, abs=20)
    assert found["pace"]["slides_per_h"] == pytest.approx(360, rel=0.01)
    assert found["local_clock"] is False


def test_a_folder_that_cannot_be_written_says_whose_clock_it_is(tmp_path, monkeypatch):
    begin(tmp_path, "a")

    def refuse(_folder):
        raise OSError(30, "read-only file system")

    monkeypatch.setattr(cohort, "filesystem_time", refuse)
    assert "this machine's clock" in status(tmp_path)


def test_watching_redraws_until_nothing_is_left_to_do(tmp_path, monkeypatch):
    begin(tmp_path, "a", "b")
    report(tmp_path, "a")
    slept = []

    def sleep(seconds):
        slept.append(seconds)
        report(tmp_path, "b")

    monkeypatch.setattr(watching.time, "sleep", sleep)
    lines = status(tmp_path, "--watch", 7).splitlines()
    assert slept == [7]
    assert [line for line in lines if line.startswith("2 slides")] == [
        "2 slides: 1 done, 0 running, 0 interrupted, 1 missing, 0 failed",
        "2 slides: 2 done, 0 running, 0 interrupted, 0 missing, 0 failed",
    ]
    assert "a\tdone" not in lines
    objects = [json.loads(line) for line in status(tmp_path, "--watch", 1, "--json").splitlines()]
    assert [found["totals"]["done"] for found in objects] == [2]


def test_a_real_run_is_seen_at_work_held_killed_and_done(tmp_path):
    slide = tmp_path / "big.svs"
    write_slide(slide, width=2200, height=2200, mpp=0.5, seed=5, truth=False)
    out = tmp_path / "out"
    how = ["--tile-size", "128", "--batch-size", "1", "--no-progress", "--model", "stain-baseline"]
    command = [sys.executable, "-c", RUN, str(slide), "--out", str(out), *how]
    path = out / "logs" / "big.lease"

    def has_begun():
        holder = read_holder(path)
        return holder is not None and holder.facts.get("done", 0) > 0

    with subprocess.Popen(command, stderr=subprocess.DEVNULL) as process:
        try:
            deadline = time.monotonic() + 300
            while not has_begun() and process.poll() is None and time.monotonic() < deadline:
                time.sleep(0.02)
            process.send_signal(signal.SIGSTOP)
            text = status(out)
            assert f"big\trunning\tby process {process.pid} on " in text, text
            assert "predict " in text
            os.utime(path, (1e9, 1e9))  # it has been held for years
            assert "big\tinterrupted\t" in status(out)
            process.send_signal(signal.SIGCONT)
            time.sleep(0.3)
            if process.poll() is None and path.exists():  # its sign of life is back
                assert "big\trunning\t" in status(out) or "big\tdone" in status(out)
        finally:
            process.kill()
    if path.exists():
        assert "no sign of life for" in status(out)
    again = subprocess.run(command, capture_output=True, text=True)
    assert again.returncode == 0, again.stderr
    text = status(out)
    assert "big\tdone" in text
    assert "devices: busy " in text
    found = json.loads((out / "reports" / "big.json").read_text())
    assert 0 < found["device_busy_s"] <= found["seconds"]["total"]
