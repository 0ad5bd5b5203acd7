"""The log of a slide's tries: whole lines, a bounded file, counters that outlive it."""

import json
import os
import shutil
import subprocess
import sys

import pytest

from wsi_pipeline import history
from wsi_pipeline.history import append_event, deaths, earlier_starts, older_path, suspected
from wsi_pipeline.job import SlideJob


@pytest.fixture
def job(tmp_path):
    slide = tmp_path / "a.svs"
    slide.write_bytes(b"a slide")
    (tmp_path / "out" / "logs").mkdir(parents=True)
    return SlideJob(
        path=str(slide), slide_id="a", out=tmp_path / "out", model_name="m", model_digest="0"
    )


def start(job, job_id=None):
    append_event(job.log_path, {"event": "start", "job_id": job_id or job.job_id})


def events(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def log(job, event):
    append_event(job.log_path, {"event": event, "job_id": job.job_id})


@pytest.mark.parametrize("rotated", [False, True])
def test_a_slide_that_was_only_made_ready_is_suspected_but_has_killed_nobody(
    job, monkeypatch, rotated
):
    log(job, "ahead")
    if rotated:
        monkeypatch.setattr(history, "ROTATED_BYTES", 1)
        append_event(job.log_path, {"event": "noise"})
        older_path(job.log_path).unlink()
        monkeypatch.undo()
    assert (earlier_starts(job), deaths(job), suspected(job)) == (0, 0, 1)
    log(job, "ahead")  # it is suspected, not guilty, however often
    assert (deaths(job), suspected(job)) == (0, 1)
    log(job, "start")
    assert (earlier_starts(job), deaths(job), suspected(job)) == (1, 1, 1)
    append_event(job.log_path, {"event": "end", "status": "done"})
    assert suspected(job) == 0


def test_a_slide_that_was_put_back_is_not_suspected(job):
    log(job, "ahead")
    log(job, "put_back")
    assert (earlier_starts(job), suspected(job)) == (0, 0)
    start(job)  # and was killed
    log(job, "ahead")
    assert suspected(job) == 2
    log(job, "put_back")
    assert (deaths(job), suspected(job)) == (1, 1)


def test_of_another_job_nothing_is_suspected(job):
    append_event(job.log_path, {"event": "ahead", "job_id": "another"})
    assert suspected(job) == 0


def test_a_torn_line_costs_itself_alone(job):
    start(job)
    with job.log_path.open("a") as file:
        file.write('{"event": "sta')
    start(job)
    assert (earlier_starts(job), deaths(job)) == (2, 2)
    assert job.log_path.read_text().count("\n") == 3


def test_a_line_that_did_not_fit_is_an_error_and_costs_itself_alone(job, monkeypatch):
    start(job)
    with monkeypatch.context() as patch:
        real = os.write
        patch.setattr(os, "write", lambda descriptor, data: real(descriptor, data[:9]))
        with pytest.raises(OSError, match="disk full"):
            start(job)
    start(job)
    assert earlier_starts(job) == 2


def test_a_slide_begun_again_and_again_fills_no_disk_and_forgets_no_death(job, monkeypatch):
    monkeypatch.setattr(history, "ROTATED_BYTES", 4000)
    append_event(job.log_path, {"event": "blocks", "done": 3})
    for number in range(500):
        assert (earlier_starts(job), deaths(job)) == (number, number)
        start(job)
        append_event(job.log_path, {"event": "noise", "text": "n" * 100})
    assert sorted(os.listdir(job.log_path.parent)) == ["a.jsonl", "a.jsonl.1"]
    assert job.log_path.stat().st_size < 4300
    assert older_path(job.log_path).stat().st_size < 4300
    assert events(job.log_path)[0]["event"] == "rotated"
    append_event(job.log_path, {"event": "blocks", "done": 4})
    assert (earlier_starts(job), deaths(job)) == (500, 1)
    append_event(job.log_path, {"event": "end", "status": "interrupted"})
    assert (earlier_starts(job), deaths(job)) == (500, 0)
    append_event(job.log_path, {"event": "end", "status": "done"})
    assert earlier_starts(job) == 0


def test_another_job_of_the_same_slide_counts_for_itself(job):
    start(job)
    start(job)
    start(job, "other")
    assert (earlier_starts(job), deaths(job)) == (2, 0)
    start(job)
    assert (earlier_starts(job), deaths(job)) == (3, 1)
    for number in range(100):
        start(job, f"other{number}")
    assert len(history._read(job.log_path).starts) == history.MOST_JOBS


@pytest.mark.parametrize("killed_at", [1, 2])
def test_killed_while_a_log_is_put_aside(job, monkeypatch, killed_at):
    for _ in range(3):
        start(job)
    monkeypatch.setattr(history, "ROTATED_BYTES", 10)
    real, calls = os.replace, []

    def replace(source, target):
        calls.append(source)
        if len(calls) == killed_at:
            raise KeyboardInterrupt
        real(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", replace)
        with pytest.raises(KeyboardInterrupt):
            start(job)
    assert (earlier_starts(job), deaths(job)) == (3, 3)
    start(job)
    assert (earlier_starts(job), deaths(job)) == (4, 4)


def test_logrotate_may_rename_or_truncate_in_the_middle(job):
    start(job)
    os.replace(job.log_path, older_path(job.log_path))
    start(job)
    assert earlier_starts(job) == 2
    shutil.copy(job.log_path, older_path(job.log_path))
    os.truncate(job.log_path, 0)
    start(job)
    assert job.log_path.read_bytes().count(b"\0") == 0
    assert earlier_starts(job) == 2  # the first of all is in no file any more


def test_lines_of_many_processes_do_not_mix(tmp_path):
    path = tmp_path / "a.jsonl"
    code = (
        "import sys; from pathlib import Path; from wsi_pipeline.history import append_event\n"
        "for n in range(100): append_event(Path(sys.argv[1]), {'n': n, 'text': sys.argv[2] * 2000})"
    )
    writers = [subprocess.Popen([sys.executable, "-c", code, str(path), c]) for c in "xyz"]
    assert [writer.wait(timeout=120) for writer in writers] == [0, 0, 0]
    # A line that is being written may look torn to another writer, who then begins a new one.
    found = [json.loads(line) for line in path.read_text().split("\n") if line]
    assert len([event for event in found if "n" in event]) == 300


def test_long_texts_keep_their_end(tmp_path):
    path = tmp_path / "a.jsonl"
    append_event(path, {"traceback": "x" * 10**6 + "the reason"})
    (event,) = events(path)
    assert event["traceback"].endswith("the reason")
    assert path.stat().st_size < 20000


@pytest.mark.parametrize("carried", [None, 5, {}, {"starts": 5}, {"starts": {"a": "x"}}])
def test_a_spoilt_log_is_no_reason_to_stop(job, carried):
    append_event(job.log_path, {"event": "rotated", "carried": carried})
    with job.log_path.open("ab") as file:
        file.write(b'\xff\xfe\n[1]\n{"event": "blocks", "done": "many"}\n{"event": 7}\n')
    start(job)
    assert (earlier_starts(job), deaths(job)) == (1, 1)
