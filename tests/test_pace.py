"""How fast a run goes, how busy its devices are, how long it will take."""

import os
import time

import pytest
from cohort_fixtures import SECONDS, begin, lease, report

from wsi_pipeline import pace
from wsi_pipeline.cohort import read_cohort
from wsi_pipeline.pace import duration, measure_pace, slide_bytes


def seconds(total):
    return {**{name: total * share / 10 for name, share in SECONDS.items()}, "total": total}


def write(out, slide_id, *, ago_s, total=600.0, **facts):
    """A slide that ended so long ago."""
    status = facts.pop("status", "done")
    now = time.time()
    report(out, slide_id, status, written=now - ago_s, seconds=seconds(total), **facts)


def test_without_anything_done_nothing_is_said(tmp_path):
    begin(tmp_path, "a", "b")
    lease(tmp_path, "a")
    found = measure_pace(read_cohort(tmp_path))
    assert (found.slides_per_h, found.left_s, found.device_busy, found.workers) == (
        None,
        None,
        None,
        1,
    )


def test_rates_count_hours_of_work_not_pauses(tmp_path):
    begin(tmp_path, *"abcd")
    # Two at once a day ago, one now; ten minutes each.
    write(tmp_path, "a", ago_s=86400, pid=1)
    write(tmp_path, "b", ago_s=86400, pid=2)
    write(tmp_path, "c", ago_s=60, pid=3)
    found = measure_pace(read_cohort(tmp_path))
    assert found.slides_per_h == pytest.approx(3 / (1200 / 3600), rel=0.01)
    assert found.mm2_per_h == pytest.approx(6 / (1200 / 3600), rel=0.01)
    assert found.slides_per_h_lately == pytest.approx(1, rel=0.01)
    assert found.left_s is None  # nobody is at work


def test_slides_within_the_time_of_another_add_no_hours(tmp_path):
    begin(tmp_path, "a", "b", "c")
    write(tmp_path, "a", ago_s=0, total=1000, pid=1)
    write(tmp_path, "b", ago_s=800, total=100, pid=2)
    write(tmp_path, "c", ago_s=600, total=100, pid=3)
    assert measure_pace(read_cohort(tmp_path)).slides_per_h == pytest.approx(10.8, rel=0.01)


def test_a_run_of_ten_minutes_is_not_spread_over_an_hour(tmp_path):
    begin(tmp_path, "a", "b")
    write(tmp_path, "a", ago_s=300, total=300)
    assert measure_pace(read_cohort(tmp_path)).slides_per_h_lately == pytest.approx(6, rel=0.05)


def test_hosts_with_wrong_clocks_change_nothing(tmp_path):
    begin(tmp_path, "a", "b")
    for name, year in (("a", "1999"), ("b", "2042")):
        moment = f"{year}-01-01T00:00:00+00:00"
        write(tmp_path, name, ago_s=10, host=year, started=moment, finished=moment)
    found = measure_pace(read_cohort(tmp_path))
    assert found.slides_per_h == pytest.approx(12, rel=0.01)


def test_time_left_goes_by_slides_workers_and_what_is_behind(tmp_path):
    begin(tmp_path, *"abcdefgh")
    write(tmp_path, "a", ago_s=700, pid=1)
    write(tmp_path, "b", ago_s=60, pid=1)
    why = {"code": "internal", "stage": "open", "message": "x"}
    write(tmp_path, "h", ago_s=5, status="failed", error=why)
    left = measure_pace(read_cohort(tmp_path))
    assert left.left_s is None
    lease(tmp_path, "c", stage="predict", done=1, total=2)  # predict is 60 % of a slide
    lease(tmp_path, "d", pid=6, stage="write")
    found = measure_pace(read_cohort(tmp_path))
    # c: 0.7, d: 0.4, e, f, g: 1 each; 600 s a slide; two at work.
    assert found.workers == 2
    assert found.left_s == pytest.approx(600 * 4.1 / 2, rel=0.01)
    assert found.left_by == "slides"


def test_time_left_goes_by_bytes_where_the_slides_are_seen(tmp_path):
    slides = tmp_path / "slides"
    slides.mkdir()
    out = begin(tmp_path / "out", "a", "b", "c", folder=str(slides))
    for name, size in (("a", 100), ("b", 500), ("c", 300)):
        (slides / f"{name}.svs").write_bytes(bytes(size))
    write(out, "a", ago_s=60)
    lease(out, "b", stage="open")
    lease(out, "c", stage="open", pid=7)
    found = read_cohort(out)
    sizes = slide_bytes(found)
    assert sizes == {"a": 100, "b": 500, "c": 300}
    left = measure_pace(found, sizes)
    # Six seconds a byte; two at work, and one of them has 500 bytes before it.
    assert (left.left_s, left.left_by) == (pytest.approx(3000, rel=0.01), "bytes")
    (slides / "b.svs").unlink()
    assert slide_bytes(found) is None


def test_busy_is_the_share_of_the_time_in_which_a_process_had_work(tmp_path):
    begin(tmp_path, *"abcd")
    # Process 1 wrote the tables of a while it predicted b: their times overlap.
    write(tmp_path, "a", ago_s=300, total=600, pid=1, device_busy_s=300.0)
    write(tmp_path, "b", ago_s=0, total=600, pid=1, device_busy_s=300.0)
    write(tmp_path, "c", ago_s=0, total=300, pid=2, device_busy_s=0.0)
    write(tmp_path, "d", ago_s=0, total=3000, pid=3, device_busy_s=None)
    found = measure_pace(read_cohort(tmp_path))
    assert found.device_busy == pytest.approx(600 / (900 + 300), rel=0.01)


def test_looking_opens_no_slide_and_lists_each_folder_once(tmp_path, monkeypatch):
    begin(tmp_path, *(f"s{number}" for number in range(30)))
    for number in range(20):
        write(tmp_path, f"s{number}", ago_s=number)
    lease(tmp_path, "s20")
    listed = []
    real = os.listdir
    monkeypatch.setattr(os, "listdir", lambda path: listed.append(str(path)) or real(path))
    measure_pace(read_cohort(tmp_path))
    assert sorted(listed) == [str(tmp_path / name) for name in ("logs", "maps", "reports")]
    assert pace.LATELY_S == 3600


def test_durations_in_words():
    assert [duration(s) for s in (0, 59.6, 61, 7384)] == [
        "0 s",
        "1 min 0 s",
        "1 min 1 s",
        "2 h 3 min",
    ]
