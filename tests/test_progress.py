"""Lines, bars and the last table."""

import io
import json
import threading

import pytest
from rich.console import Console

from wsi_pipeline import progress
from wsi_pipeline.job import RunReport, SlideJob
from wsi_pipeline.progress import BarWatcher, LineWatcher, describe, final_table


def report(slide_id, status, **facts):
    return RunReport(
        slide_id=slide_id, path="", job_id="", status=status, seconds={"total": 2.0}, **facts
    )


DONE = report("z", "done", counts={"nucleus": 1234}, tissue_mm2=2.5)
FAILED = report("a", "failed", error={"code": "missing_mpp", "stage": "open", "message": "say it"})
PAUSED = report("m", "interrupted")


@pytest.fixture
def job(tmp_path):
    return SlideJob(path="", slide_id="z", out=tmp_path, model_name="", model_digest="")


def test_one_line_says_how_a_slide_ended():
    assert describe(DONE) == "z: done, 1,234 nucleus, 2.50 mm2 in 2.0 s"
    assert describe(DONE, skipped=True) == "z: was done before"
    assert describe(FAILED) == "a: failed (missing_mpp: say it)"
    assert describe(FAILED, skipped=True) == "a: failed (missing_mpp: say it)"
    assert describe(PAUSED) == "m: interrupted"


def test_failed_slides_stand_last_with_their_whole_reason():
    stream = io.StringIO()
    Console(file=stream, width=80).print(final_table([FAILED, PAUSED, DONE]))
    text = stream.getvalue()
    rows = [text.index(f"│ {slide}") for slide in "zma"]
    assert rows == sorted(rows)
    assert text.rstrip().endswith("a: missing_mpp: say it")
    assert "1,234" in text


def test_lines_tell_what_is_left(job):
    stream = io.StringIO()
    watcher = LineWatcher(2, stream=stream)
    watcher.start(job)
    watcher.finish(job, DONE, skipped=False)
    watcher.finish(job, FAILED, skipped=False)
    lines = stream.getvalue().splitlines()
    assert lines[0] == "z: begun"
    assert lines[1].startswith("[1/2] z: done")
    assert lines[1].endswith("left")
    assert lines[2].startswith("[2/2] a: failed")
    assert "left" not in lines[2]


def test_progress_lines_are_rare(job, monkeypatch):
    stream = io.StringIO()
    clock = iter([0.0, 31.0, 32.0, 70.0])
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(clock))
    watcher = LineWatcher(1, stream=stream)
    for done in (1, 2, 3):
        watcher.advance(job, "predict", done, 9)
    assert stream.getvalue().splitlines() == ["z: predict 1 of 9", "z: predict 3 of 9"]


def test_json_lines_are_json(job):
    stream = io.StringIO()
    watcher = LineWatcher(1, json_lines=True, stream=stream)
    watcher.start(job)
    watcher.finish(job, FAILED, skipped=False)
    events = [json.loads(line) for line in stream.getvalue().splitlines()]
    assert [e["event"] for e in events] == ["start", "end"]
    assert events[1]["error"]["code"] == "missing_mpp"


def test_bars_end_in_lines(job):
    console = Console(file=io.StringIO(), force_terminal=True, width=100)
    watcher = BarWatcher(1, console)
    watcher.start(job)
    watcher.advance(job, "predict", 1, 3)
    watcher.finish(job, DONE, skipped=False)
    watcher.close()
    assert "z: done, 1,234 nucleus" in console.file.getvalue()


def test_lines_of_several_threads_are_whole(job):
    """Each line is one write, so those of other threads cannot get in between."""
    written = []

    class Stream:
        def write(self, text):
            written.append(text)

        def flush(self):
            pass

    watcher = LineWatcher(100, json_lines=True, stream=Stream())
    threads = [threading.Thread(target=watcher.start, args=[job]) for _ in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [json.loads(text)["event"] for text in written] == ["start"] * 20
    assert all(text.endswith("}\n") for text in written)
