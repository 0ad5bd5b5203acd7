"""How far the slides of a run are, told from its files."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner
from cohort_fixtures import begin, job, lease, report
from hypothesis import example, given, settings
from hypothesis import strategies as st

from wsi_pipeline import cohort
from wsi_pipeline.cli import wsi
from wsi_pipeline.cohort import read_cohort, slide_states
from wsi_pipeline.describe import status_document, status_lines
from wsi_pipeline.durable import partial_path
from wsi_pipeline.errors import JobError
from wsi_pipeline.lease import DEAD_AFTER_S
from wsi_pipeline.pace import measure_pace, slide_bytes
from wsi_pipeline.summary import write_summary


def states(out, **how):
    return {own.slide_id: (own.state, own.reason) for own in read_cohort(out, **how).states}


def test_every_state_has_its_name_and_reason(tmp_path):
    begin(tmp_path, *"abcdefgh")
    report(tmp_path, "a")
    why = {"code": "missing_mpp", "stage": "open", "message": "say it"}
    report(tmp_path, "b", "failed", error=why)
    report(tmp_path, "c", "interrupted")
    lease(tmp_path, "d", age_s=DEAD_AFTER_S - 60, job="77", stage="predict", done=3, total=4)
    lease(tmp_path, "e", age_s=DEAD_AFTER_S + 60)
    partial_path(job(tmp_path, "f").maps_path).mkdir(parents=True)
    report(tmp_path, "g", "interrupted", left="objects")
    found = read_cohort(tmp_path)
    assert states(tmp_path) == {
        "a": ("done", ""),
        "b": ("failed", "missing_mpp: say it"),
        "c": ("interrupted", ""),
        "d": ("running", "by process 5 on node7 (Slurm job 77)"),
        "e": ("interrupted", "process 5 on node7 ended without a word"),
        "f": ("interrupted", ""),
        "g": ("interrupted", "its maps are complete, its objects are left to another run"),
        "h": ("missing", ""),
    }
    assert found.totals == {"done": 1, "running": 1, "interrupted": 4, "missing": 1, "failed": 1}
    by_id = {own.slide_id: own for own in found.states}
    assert by_id["d"].fraction == 0.75
    assert found.age_s(by_id["d"]) == pytest.approx(60, abs=30)
    assert found.age_s(by_id["e"]) == pytest.approx(180, abs=30)
    assert not found.local_clock
    assert not [name for name in os.listdir(tmp_path / "logs") if "clock" in name]


def test_a_slide_that_is_done_again_is_running_not_done(tmp_path):
    begin(tmp_path, "a", "b", "c")
    report(tmp_path, "a", "failed", error={"code": "internal", "stage": "open", "message": "x"})
    lease(tmp_path, "a")
    report(tmp_path, "b")
    lease(tmp_path, "b")  # its process is about to let go
    report(tmp_path, "c")
    lease(tmp_path, "c", age_s=DEAD_AFTER_S + 1)  # killed in between
    assert [own.state for own in slide_states(tmp_path)] == ["running", "done", "done"]


def test_what_a_report_claims_must_be_there(tmp_path):
    begin(tmp_path, "a", "b", "c", "d")
    for name in "abcd":
        report(tmp_path, name)
    job(tmp_path, "b").objects_path.unlink()
    job(tmp_path, "c").objects_path.write_bytes(b"half")
    table = job(tmp_path, "d").objects_path
    table.write_bytes(table.read_bytes()[::-1])
    found = states(tmp_path)
    assert found["b"] == ("missing", "its table is gone: objects/b.parquet")
    assert found["c"][0] == "missing"
    assert found["c"][1] == "objects/c.parquet has 4 bytes, not the 10 of its report"
    assert (found["a"][0], found["d"][0]) == ("done", "done")
    found = states(tmp_path, verify=True)
    assert found["a"][0] == "done"
    assert found["d"] == (
        "missing",
        "the bytes of objects/d.parquet are not those of its report (SHA-256)",
    )


def test_maps_may_be_dropped_but_must_not_be_spoilt(tmp_path):
    begin(tmp_path, "a")
    report(tmp_path, "a")
    path = job(tmp_path, "a").report_path
    content = json.loads(path.read_text())
    content["outputs"]["maps/a.zarr"] = {"bytes": 9, "sha256": "0"}
    path.write_text(json.dumps(content))
    assert states(tmp_path, verify=True)["a"][0] == "done"
    (tmp_path / "maps" / "a.zarr").mkdir(parents=True)
    assert states(tmp_path)["a"][0] == "done"
    assert states(tmp_path, verify=True)["a"][0] == "missing"


def test_a_report_of_another_model_or_pixel_size_is_none(tmp_path):
    begin(tmp_path, "a", "b")
    begin(tmp_path, "c", mpp=0.5)
    report(tmp_path, "a", model={"name": "n", "sha256": "6" * 64})
    report(tmp_path, "b", mpp={"x": 0.4, "y": 0.4, "source": "argument"})
    report(tmp_path, "c", mpp={"x": 0.5, "y": 0.5, "source": "argument"})
    found = states(tmp_path)
    assert found["a"] == ("missing", "what is there is of model n; run it again")
    assert found["b"] == ("missing", "what is there is of another pixel size; run it again")
    assert found["c"] == ("done", "")


@pytest.mark.parametrize(
    "spoilt",
    [
        "{",
        "[1]",
        {"status": "wonderful"},
        {"outputs": [5]},
        {"outputs": {"objects/b.parquet": {}}},
        {"mpp": {"x": 1}},
        {"seconds": None},
        {"error": "no"},
        {"mpp": {"x": "q", "y": 1, "source": "s"}},
        {"counts": {"nucleus": 10**30}},
        {"seconds": {"total": 1e300}},
        {"seconds": {"total": -1}},
        {"tissue_mm2": 1e300},
        {"outputs": {"a\0b": {"bytes": 1, "sha256": "x"}}},
        {"outputs": {"a\ud800": {"bytes": 1, "sha256": "x"}}},
        {"outputs": {"../other": {"bytes": 1, "sha256": "x"}}},
        {"outputs": {"/etc/passwd": {"bytes": 1, "sha256": "x"}}},
        {"outputs": {"objects/b.parquet": {"bytes": 10**40, "sha256": "x"}}},
    ],
)
def test_a_broken_report_spoils_one_slide_alone(tmp_path, spoilt):
    begin(tmp_path, "a", "b")
    report(tmp_path, "a")
    report(tmp_path, "b")
    path = job(tmp_path, "b").report_path
    if isinstance(spoilt, dict):
        spoilt = json.dumps({**json.loads(path.read_text()), **spoilt})
    path.write_text(spoilt)
    found = [(own.state, own.reason) for own in slide_states(tmp_path)]
    assert found == [("done", ""), ("missing", "its report is broken; run it again")]
    told(tmp_path)


def told(out):
    """Say all that is said of a run."""
    cohort = read_cohort(out)
    pace = measure_pace(cohort, slide_bytes(cohort))
    lines = [*status_lines(cohort, pace)]
    document = status_document(cohort, pace)
    json.dumps(document, allow_nan=False)
    write_summary(cohort)
    return document["slides"], lines


@pytest.mark.parametrize(
    "strange",
    [
        {"started": "9999-12-31T23:59:59-23:00"},
        {"finished": "0001-01-01T00:00:00+23:00"},
        {"path": "/M\udcfcller/\ud800/b.svs", "host": "\udcfc", "device": "\udcfc"},
        {"counts": {"nu\udcfc": 3, "slide_id": 4}},
        {"status": "failed", "error": {"code": "x", "message": "M\udcfcller", "stage": "open"}},
        {"model": {"name": "\udcfc", "sha256": "5" * 64}},
    ],
)
def test_strange_values_in_a_report_are_told(tmp_path, strange):
    begin(tmp_path, "a", "b")
    report(tmp_path, "a")
    report(tmp_path, "b")
    path = job(tmp_path, "b").report_path
    path.write_text(json.dumps({**json.loads(path.read_text()), **strange}))
    slides, _ = told(tmp_path)
    assert [own["state"] for own in slides] == ["done", strange.get("status", "done")]
    for command in ("status", "summary"):
        done = CliRunner().invoke(wsi, [command, str(tmp_path)])
        assert done.exit_code == 0, done.output
    rows = pq.read_table(tmp_path / "summary.parquet").to_pylist()
    assert [row["slide_id"] for row in rows] == ["a", "b"]


JUNK = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=4,
)
FACTS = ("host", "machine", "pid", "born", "job", "restart", "for_s", "stage", "done", "total")


@settings(max_examples=60, deadline=None)
@given(facts=st.fixed_dictionaries({}, optional=dict.fromkeys(FACTS, JUNK)))
@example(facts={"pid": "abc", "done": float("nan"), "total": float("inf"), "for_s": float("inf")})
@example(facts={"pid": float("inf"), "done": 10**400, "total": 10**400})
@example(facts={"pid": [1], "stage": ["predict"], "host": "\udcfc"})
def test_a_lease_may_say_anything(facts):
    with TemporaryDirectory() as folder:
        out = begin(Path(folder), "a", "b")
        report(out, "a")
        lease(out, "b", **facts)
        slides, _ = told(out)
        assert slides[0]["state"] == "done"
        assert slides[1]["state"] in ("running", "interrupted")


def test_a_folder_without_a_run_is_refused(tmp_path):
    with pytest.raises(JobError, match=r"no run\.json"):
        read_cohort(tmp_path)


def test_where_nothing_can_be_written_the_own_clock_must_do(tmp_path, monkeypatch):
    begin(tmp_path, "a")
    lease(tmp_path, "a", age_s=30)

    def refuse(_folder):
        raise OSError(30, "read-only")

    monkeypatch.setattr(cohort, "filesystem_time", refuse)
    found = read_cohort(tmp_path)
    assert found.local_clock
    assert found.states[0].state == "running"


def test_a_killed_process_is_interrupted_and_a_held_one_is_running(tmp_path):
    """Real processes: one that is stopped still lives, one that is killed does not."""
    begin(tmp_path, "a")
    code = (
        "import sys, time; from pathlib import Path; from wsi_pipeline.lease import Lease\n"
        "held = Lease.take(Path(sys.argv[1])); print('held', flush=True); time.sleep(600)"
    )
    path = job(tmp_path, "a").lease_path
    command = [sys.executable, "-c", code, str(path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        try:
            process.stdout.readline()
            process.send_signal(signal.SIGSTOP)
            assert states(tmp_path)["a"][0] == "running"
            old = path.stat().st_mtime - DEAD_AFTER_S - 180
            os.utime(path, (old, old))
            own = read_cohort(tmp_path)
            assert own.states[0].state == "interrupted"
            assert own.age_s(own.states[0]) >= DEAD_AFTER_S + 180
            os.utime(path)
            assert states(tmp_path)["a"][0] == "running"
        finally:
            process.kill()
    assert states(tmp_path)["a"][0] == "interrupted"
