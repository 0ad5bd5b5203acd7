"""What decides that work is done, and how failures become reports."""

import errno
import json
from dataclasses import asdict

import pytest

from wsi_pipeline.attempt import Attempt, record
from wsi_pipeline.errors import Interrupted, MissingPixelSizeError
from wsi_pipeline.job import RunReport, SlideJob, finished_report, read_report


@pytest.fixture
def job(tmp_path):
    slide = tmp_path / "a.svs"
    slide.write_bytes(b"pixels" * 50_000)
    (tmp_path / "out").mkdir()
    return SlideJob(
        path=str(slide),
        slide_id="a",
        out=tmp_path / "out",
        model_name="m",
        model_digest="0",
        keep_maps=False,
    )


def changed(job, **facts):
    return SlideJob(**{**{k: getattr(job, k) for k in job.__dataclass_fields__}, **facts})


def test_the_job_id_is_about_content_not_about_places(job, tmp_path):
    moved = tmp_path / "elsewhere"
    moved.mkdir()
    (moved / "a.svs").write_bytes((tmp_path / "a.svs").read_bytes())
    assert changed(job, path=str(moved / "a.svs"), out=moved).job_id == job.job_id
    assert changed(job, keep_maps=True).job_id == job.job_id


def test_the_job_id_changes_with_whatever_changes_results(job, tmp_path):
    mask = tmp_path / "a.png"
    mask.write_bytes(b"mask")
    ids = {job.job_id}
    ids.add(changed(job, mpp=0.5).job_id)
    ids.add(changed(job, model_digest="1").job_id)
    ids.add(changed(job, mask=mask).job_id)
    mask.write_bytes(b"other")
    ids.add(changed(job, mask=mask).job_id)
    content = (tmp_path / "a.svs").read_bytes()
    for place in (0, 150_000, len(content) - 1):
        other = bytearray(content)
        other[place] ^= 255
        (tmp_path / "a.svs").write_bytes(other)
        ids.add(changed(job).job_id)
    (tmp_path / "a.svs").unlink()
    ids.add(changed(job).job_id)
    assert len(ids) == 9


def test_done_needs_report_job_and_files(job):
    assert finished_report(job) is None
    job.objects_path.parent.mkdir(parents=True)
    job.objects_path.write_bytes(b"table")
    attempt = Attempt(job)
    report = record(attempt, lambda: attempt.add_output(job.objects_path), last=True)
    assert report.outputs["objects/a.parquet"]["bytes"] == 5
    assert finished_report(job) == report
    assert finished_report(changed(job, mpp=1.0)) is None
    job.objects_path.write_bytes(b"tab")
    assert finished_report(job) is None
    job.objects_path.unlink()
    assert finished_report(job) is None


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"slide_id": "a"}'])
def test_a_damaged_report_claims_nothing(job, text):
    job.report_path.parent.mkdir(parents=True)
    job.report_path.write_text(text)
    assert read_report(job.report_path) is None
    assert finished_report(job) is None


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (MissingPixelSizeError("no size"), "missing_mpp"),
        (MemoryError(), "out_of_memory"),
        (ZeroDivisionError("odd"), "internal"),
    ],
)
def test_errors_become_reports_with_their_code_and_stage(job, error, code):
    attempt = Attempt(job)

    def work():
        with attempt.stage("tissue"):
            raise error

    report = record(attempt, work, last=True)
    assert (report.status, report.error["code"], report.error["stage"]) == (
        "failed",
        code,
        "tissue",
    )
    assert asdict(read_report(job.report_path)) == asdict(report)
    lines = [json.loads(line) for line in job.log_path.read_text().splitlines()]
    assert [x["event"] for x in lines] == ["start", "error", "end"]
    assert type(error).__name__ in lines[1]["traceback"]


def test_an_interruption_is_no_failure(job):
    def work():
        raise Interrupted

    report = record(Attempt(job), work, last=False)
    assert (report.status, report.error) == ("interrupted", None)


def test_work_that_goes_on_makes_no_claim(job):
    assert record(Attempt(job), lambda: None, last=False) is None
    assert not job.report_path.exists()


def test_a_report_that_cannot_be_written_is_a_failure_not_a_crash(job, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "full")

    attempt = Attempt(job)
    monkeypatch.setattr(RunReport, "write", full)
    report = record(attempt, lambda: None, last=True)
    assert report.status == "failed"
    assert report.error["code"] == "disk_full"


def test_a_torn_log_line_does_not_end_the_count(job):
    for _ in range(2):
        record(Attempt(job), lambda: 1 / 0, last=True)
        with job.log_path.open("a") as file:
            file.write('{"event": "sta\n')
    assert Attempt(job).report.restarts == 2


def test_maps_that_went_later_are_no_work_that_is_left(job):
    job.maps_path.mkdir(parents=True)
    attempt = Attempt(job)
    record(attempt, lambda: attempt.add_output(job.maps_path), last=True)
    assert finished_report(changed(job, keep_maps=True)) is not None
    job.maps_path.rmdir()
    assert finished_report(changed(job, keep_maps=True)) is not None
    assert finished_report(job) is not None


def test_a_mask_that_is_missing_is_not_no_mask(job, tmp_path):
    report = record(Attempt(job), lambda: None, last=True)
    assert finished_report(job) == report
    masked = changed(job, mask=tmp_path / "absent.png")
    assert finished_report(masked) is None
    assert (job.missing_input(), masked.missing_input()) == (None, str(tmp_path / "absent.png"))
    (tmp_path / "a.svs").unlink()
    assert job.missing_input() == str(tmp_path / "a.svs")


def test_a_log_that_cannot_be_written_stops_nothing(job):
    job.log_path.mkdir(parents=True)  # a folder where a file should be
    assert record(Attempt(job), lambda: None, last=True).done
