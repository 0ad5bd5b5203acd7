"""One table over all slides of a run."""

import csv
import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner
from cohort_fixtures import MODEL, begin, job, lease, report

from wsi_pipeline.cli import wsi
from wsi_pipeline.cohort import read_cohort
from wsi_pipeline.lease import Lease
from wsi_pipeline.summary import SUMMARY_SCHEMA, summary_table, write_summary

WHY = {"code": "missing_mpp", "stage": "open", "message": "say it, with 'commas', \"quotes\""}


@pytest.fixture
def out(tmp_path):
    begin(tmp_path, "a", "b", "c", "d", "e")
    warning = {"code": "corrupt_region", "stage": "predict", "message": "1 %"}
    report(tmp_path, "a", warnings=[warning, warning], error=warning, truncated=3)
    report(tmp_path, "b", "failed", error=WHY, mpp=None)
    report(tmp_path, "d", counts={"nucleus": 1, "mitosis": 4})
    lease(tmp_path, "e")
    return tmp_path


def table(out):
    write_summary(read_cohort(out))
    return pq.read_table(out / "summary.parquet")


def test_one_row_a_slide_with_what_was_found(out):
    rows = {row["slide_id"]: row for row in table(out).to_pylist()}
    assert list(rows) == ["a", "b", "c", "d", "e"]
    states = ["done", "failed", "missing", "done", "running"]
    assert [row["status"] for row in rows.values()] == states
    a = rows["a"]
    assert (a["n_nucleus"], a["n_gland"], a["n_lumen"], a["n_mitosis"]) == (10, 2, None, None)
    assert (a["error_code"], a["warnings"], a["truncated"]) == (None, "corrupt_region", 3)
    assert (a["mpp_x"], a["mpp_source"], a["tissue_mm2"]) == (0.25, "aperio.MPP", 2.0)
    assert (a["seconds_predict"], a["seconds_total"], a["bottleneck"]) == (6.0, 10.0, "predict")
    assert (a["model_name"], a["model_sha256"]) == (MODEL["name"], MODEL["sha256"])
    assert a["table_bytes"] == len(b"table of a")
    assert (a["finished"] - a["started"]).total_seconds() == 10
    assert a["path"] == "/slides/a.svs"
    b = rows["b"]
    assert (b["error_code"], b["error_message"]) == (WHY["code"], WHY["message"])
    assert (b["tissue_mm2"], b["n_nucleus"], b["mpp_x"]) == (None, None, None)
    assert rows["c"]["path"] == "/slides/c.svs"
    assert rows["c"]["seconds_total"] is None
    assert rows["d"]["n_mitosis"] == 4
    assert rows["e"]["error_message"] == "by process 5 on node7"


def test_columns_and_types_do_not_depend_on_the_slides(out, tmp_path_factory):
    empty = tmp_path_factory.mktemp("empty")
    (empty / "run.json").write_text(json.dumps({"slides": [], "options": {}, "model": MODEL}))
    assert table(empty).schema.equals(SUMMARY_SCHEMA)
    assert table(empty).num_rows == 0
    (empty / "reports").mkdir()
    begin(empty, "x")
    assert table(empty).schema.equals(SUMMARY_SCHEMA)
    found = table(out).schema
    assert found.remove(found.get_field_index("n_mitosis")).equals(SUMMARY_SCHEMA)
    assert found.names[-1] == "n_mitosis"


def test_both_files_say_the_same(out):
    parquet = table(out)
    with (out / "summary.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == parquet.column_names
    assert rows[1]["error_message"] == WHY["message"]
    frame = pd.read_csv(out / "summary.csv", parse_dates=["started"])
    assert (frame.slide_id == pd.Series(parquet["slide_id"].to_pylist())).all()
    assert frame.n_nucleus.sum() == 11
    assert rows[0]["finished"] == "2026-01-02T03:04:15.000+00:00"


def test_again_changes_nothing_and_touches_nothing(out):
    files = write_summary(read_cohort(out))
    before = [(path.read_bytes(), path.stat().st_ino) for path in files]
    write_summary(read_cohort(out))
    assert [(path.read_bytes(), path.stat().st_ino) for path in files] == before
    report(out, "c")
    assert [row["status"] for row in table(out).to_pylist()][2] == "done"


def test_many_at_once_leave_two_whole_files_and_no_rest(out):
    code = (
        "import sys; from pathlib import Path; from wsi_pipeline.cohort import read_cohort\n"
        "from wsi_pipeline.summary import write_summary\n"
        "for n in range(20):\n"
        "    for name in ('summary.csv', 'summary.parquet'):\n"
        "        (Path(sys.argv[1]) / name).unlink(missing_ok=True)\n"
        "    write_summary(read_cohort(Path(sys.argv[1])))\n"
    )
    both = [subprocess.Popen([sys.executable, "-c", code, str(out)]) for _ in range(2)]
    assert [process.wait(timeout=120) for process in both] == [0, 0]
    assert pq.read_table(out / "summary.parquet").equals(summary_table(read_cohort(out)))
    assert not [name for name in os.listdir(out) if name.endswith(".partial")]


def test_what_a_killed_summary_left_is_swept_up_later(out):
    dead = f"{socket.gethostname()}.{2**22 + 1}.0123abcd"
    names = ("summary.csv", "summary.parquet", "run.json", "clock")
    left = [out / f".{name}~{dead}.partial" for name in names]
    left += [out / "logs" / f".clock~{dead}.partial"]
    fresh = out / ".summary.csv~elsewhere.5.0123abcd.partial"
    for path in (*left, fresh):
        path.touch()
    write_summary(read_cohort(out))
    assert [path.exists() for path in left] == [False] * len(left)
    assert fresh.exists()


def test_the_command_names_what_is_not_done_failed_slides_last(out):
    result = CliRunner().invoke(wsi, ["summary", str(out)])
    assert result.exit_code == 0, result.output
    lines = result.output.splitlines()
    assert lines[1] == "5 slides: 2 done, 1 running, 0 interrupted, 1 missing, 1 failed"
    assert lines[2].startswith("done: 11 nucleus, 2 gland, 4 mitosis, 4.00 mm2 of tissue")
    assert [line.split("\t")[:2] for line in lines[3:]] == [
        ["e", "running"],
        ["c", "missing"],
        ["b", "failed"],
    ]
    assert lines[-1].endswith(f"missing_mpp: {WHY['message']}")
    assert CliRunner().invoke(wsi, ["summary", str(out), "--check"]).exit_code == 1
    for name in "bce":
        report(out, name)
    assert CliRunner().invoke(wsi, ["summary", str(out), "--check"]).exit_code == 0
    path = job(out, "a").objects_path
    path.write_bytes(path.read_bytes()[::-1])
    assert CliRunner().invoke(wsi, ["summary", str(out), "--check"]).exit_code == 0
    result = CliRunner().invoke(wsi, ["summary", str(out), "--check", "--verify"])
    assert result.exit_code == 1
    assert "SHA-256" in result.output
    assert CliRunner().invoke(wsi, ["summary", str(out / "logs")]).exit_code == 2


def test_dead_leases_of_slides_that_have_ended_and_of_the_run_go(out):
    for name in "ab":
        report(out, name)
    report(out, "c", status="failed", error=WHY)
    dead = lease(out, "a", age_s=10_000)
    of_failed = lease(out, "c", age_s=10_000)
    of_run = Path(shutil.copy2(dead, out / ".run.lease"))
    alive = Lease.take(job(out, "b").lease_path)
    try:
        write_summary(read_cohort(out))
        assert not any(path.exists() for path in (dead, of_failed, of_run))
        assert job(out, "b").lease_path.exists()
    finally:
        alive.release()
