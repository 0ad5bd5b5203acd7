"""The next slide, made ready while one is predicted: when, what for, and how it is put back."""

import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from test_pipeline import StubPredictor, Watcher, job, results

from wsi_pipeline import attempt as attempts
from wsi_pipeline import lease, pipeline
from wsi_pipeline.attempt import Attempt, take_lease
from wsi_pipeline.durable import partial_path
from wsi_pipeline.engines import run_slides
from wsi_pipeline.feeding import Feeder
from wsi_pipeline.history import append_event, deaths, suspected
from wsi_pipeline.job import read_report
from wsi_pipeline.store import PredictionBlock
from wsi_pipeline.synth import write_slide

pytestmark = pytest.mark.usefixtures("small_pictures")

LONG = 20
"""Seconds after which a test that waits has failed; none waits that long otherwise."""


class Notes:
    """What happened, in its order; others may wait for it."""

    def __init__(self):
        self.all: list[tuple[str, str]] = []
        self.changed = threading.Condition()

    def add(self, what: str, slide_id: str) -> None:
        with self.changed:
            self.all.append((what, slide_id))
            self.changed.notify_all()

    def wait_for(self, what: str, slide_id: str) -> bool:
        with self.changed:
            return self.changed.wait_for(lambda: (what, slide_id) in self.all, LONG)

    def place(self, what: str, slide_id: str) -> int:
        return self.all.index((what, slide_id))


class NotedFeeder(Feeder):
    """Notes the batches that are there."""

    def __init__(self, notes, slide, tiles):
        super().__init__(slide, tiles, 1, 1, pin=False)
        self.notes = notes

    def _put(self, batch):
        super()._put(batch)
        if batch is not None:
            self.notes.add("read", self._slide.name[0])


class Device(StubPredictor):
    """A network on a device of its own that reads as the real one does, and does as told."""

    device = "fake"

    def __init__(self, notes, before=lambda _slide_id, _number, _total: None):
        super().__init__()
        self.notes = notes
        self.before = before
        """Called before each tile is predicted."""

    def begin(self, slide, tiles):
        return NotedFeeder(self.notes, slide, tiles).start()

    def predict(self, slide, tiles, *, stop, warn, feed):
        name = slide.name[0]
        with feed or self.begin(slide, tiles) as batches:
            for number, batch in enumerate(batches):
                if stop():
                    return
                self.before(name, number, len(tiles.tiles))
                (tile,) = batch.tiles
                inside = tile.write.relative_to(tile.read).slices
                dark = 255 - batch.pixels[0].numpy()[inside].mean(axis=2)
                self.notes.add("predicted", name)
                yield PredictionBlock(tile=tile, arrays=self.arrays(tile, dark))


class NotedWatcher(Watcher):
    """Notes what it is told, too."""

    def __init__(self, notes):
        super().__init__()
        self.notes = notes

    def start(self, job):
        self.notes.add("start", job.slide_id)

    def advance(self, job, stage, done, total):
        self.notes.add(stage, job.slide_id)

    def finish(self, job, report, *, skipped):
        super().finish(job, report, skipped=skipped)
        self.notes.add("finish", job.slide_id)


@pytest.fixture
def notes(monkeypatch):
    """Notes of everything that tells, slides that are opened included."""
    notes = Notes()
    opened = pipeline.Slide.open

    def open_noted(path, **how):
        notes.add("open", os.path.basename(path)[0])
        return opened(path, **how)

    monkeypatch.setattr(pipeline.Slide, "open", open_noted)
    return notes


@pytest.fixture(autouse=True)
def no_thread_is_left():
    before = set(threading.enumerate())
    yield
    ours = ("ahead", "batches", "decode", "lease", "draft", "writer", "objects")
    left = [t for t in threading.enumerate() if t not in before and t.name.startswith(ours)]
    for thread in left:
        thread.join(LONG)
    assert not [thread.name for thread in left if thread.is_alive()]


@pytest.fixture(scope="module")
def slides(tmp_path_factory):
    folder = tmp_path_factory.mktemp("slides")
    write_slide(folder / "a.svs", width=800, height=700, mpp=0.5, seed=3, truth=False)
    for name in "bc":
        shutil.copy(folder / "a.svs", folder / f"{name}.svs")
    return folder


def go(slides, out, notes, names="ab", before=lambda *_: None, watcher=None, **how):
    jobs = [job(slides / f"{name}.svs", out) for name in names]
    watcher = watcher or NotedWatcher(notes)
    stop = how.pop("stop", lambda: watcher.stopped)
    predictor = how.pop("predictor", None) or Device(notes, before)
    return run_slides(jobs, predictor, watcher=watcher, stop=stop, **how)


def at_last(then, slide_id="a"):
    """Return what does something before the last tile of a slide is predicted."""

    def before(name, number, total):
        if name == slide_id and number == total - 1:
            then()

    return before


def events(out, name):
    text = (out / "logs" / f"{name}.jsonl").read_text()
    return [line.split('"event": "')[1].split('"')[0] for line in text.splitlines()]


def untouched(out, name):
    """Whether a slide is as if nobody had begun it."""
    assert events(out, name)[0] == "ahead"
    assert events(out, name)[-1] == "put_back"
    assert "start" not in events(out, name)
    left = {path.name for path in out.rglob("*") if name in path.name.split(".")}
    return left == {f"{name}.jsonl"}


@pytest.fixture(scope="module")
def undisturbed(slides, tmp_path_factory):
    """Results of a run in which nothing is made ready."""
    out = tmp_path_factory.mktemp("one-by-one")
    notes = Notes()
    assert [r.status for r in go(slides, out, notes, "abc", ahead=False)] == ["done"] * 3
    return out


def test_the_next_slide_is_read_before_the_last_block_of_the_present_one(
    slides, undisturbed, tmp_path, notes
):
    in_time = []

    def before(name, number, total):
        if name != "c" and number == total - 1:
            in_time.append(notes.wait_for("read", "abc"["abc".index(name) + 1]))

    reports = go(slides, tmp_path, notes, "abc", before)
    assert in_time == [True, True]
    assert [report.status for report in reports] == ["done"] * 3
    # Nobody is told of a slide before its turn.
    for name, following in ("ab", "bc"):
        last = max(i for i, note in enumerate(notes.all) if note == ("predicted", name))
        assert notes.place("open", following) < last < notes.place("start", following)
        assert notes.place("start", following) < notes.place("predict", following)
    # One slide is ready, not two.
    assert notes.place("open", "c") > notes.place("start", "b")
    assert results(tmp_path) == results(undisturbed)
    kinds = events(tmp_path, "b")
    assert kinds.index("ahead") < kinds.index("start") < kinds.index("blocks")
    assert (reports[1].restarts, deaths(job(slides / "b.svs", tmp_path))) == (0, 0)
    assert not list((tmp_path / "logs").glob("*.lease"))


@pytest.mark.parametrize("how", [{"device": "cpu"}, {"ahead": False}, {"only": "maps"}])
def test_nothing_is_made_ready_where_the_network_has_no_device_of_its_own(
    slides, tmp_path, notes, how
):
    """Maps alone need the network, too."""
    predictor = Device(notes, at_last(lambda: time.sleep(0.3)))
    predictor.device = how.pop("device", "fake")
    go(slides, tmp_path, notes, predictor=predictor, **how)
    last = max(i for i, note in enumerate(notes.all) if note == ("predicted", "a"))
    assert (notes.place("open", "b") < last) == (how == {"only": "maps"})


def ready(notes, out, name="b"):
    """Wait until a slide is ready and says so to those who watch."""
    assert notes.wait_for("read", name)
    deadline = time.monotonic() + LONG
    while time.monotonic() < deadline:
        holder = lease.read_holder(out / "logs" / f"{name}.lease")
        if holder is not None and holder.facts["stage"] == "waiting for its turn":
            return
        time.sleep(0.01)
    raise AssertionError(f"{name} does not wait for its turn")


class Halt(BaseException):
    """As Ctrl-C in a notebook."""


@pytest.mark.parametrize("why", ["stop", "closed", "fail_fast", "Ctrl-C"])
def test_a_run_that_ends_puts_the_next_slide_back(
    slides, undisturbed, tmp_path, notes, monkeypatch, why
):
    monkeypatch.setattr(lease, "HEARTBEAT_S", 0.02)
    ended = threading.Event()

    def end():
        ready(notes, tmp_path)
        ended.set()
        if why == "fail_fast":
            raise RuntimeError("as told")
        if why == "Ctrl-C":
            raise Halt

    how = {"fail_fast": True} if why == "fail_fast" else {}
    if why in ("stop", "closed"):
        how = {why: ended.is_set}
    if why == "Ctrl-C":
        with pytest.raises(Halt):
            go(slides, tmp_path, notes, "ab", at_last(end))
    else:
        (report,) = go(slides, tmp_path, notes, "ab", at_last(end), **how)
        status = {"stop": "interrupted", "closed": "done", "fail_fast": "failed"}[why]
        assert report.status == status
    assert untouched(tmp_path, "b")
    assert ("start", "b") not in notes.all
    assert suspected(job(slides / "b.svs", tmp_path)) == 0
    assert [r.status for r in go(slides, tmp_path, notes, "abc")] == ["done"] * 3
    assert read_report(tmp_path / "reports" / "b.json").restarts == 0
    assert results(tmp_path) == results(undisturbed)


def told(notes, name):
    return [what for what, slide_id in notes.all if slide_id == name and what != "read"]


def test_a_slide_that_cannot_be_made_ready_fails_in_its_turn_as_ever(slides, tmp_path, notes):
    some = tmp_path / "slides"
    shutil.copytree(slides, some)
    (some / "b.svs").write_bytes(b"II*\0 this is no slide")
    # it costs the slide behind it nothing
    tried = at_last(lambda: notes.wait_for("open", "b") and notes.wait_for("read", "c"))
    reports = go(some, tmp_path / "out", notes, "abc", tried)
    assert notes.place("read", "c") < notes.place("start", "b")
    assert [report.status for report in reports] == ["done", "failed", "done"]
    assert told(notes, "b") == ["open", "start", "open", "finish"]
    assert notes.place("start", "b") > notes.place("predicted", "a")
    assert events(tmp_path / "out", "b")[-3:] == ["start", "error", "end"]
    (plain,) = go(some, tmp_path / "plain", Notes(), "b", ahead=False)
    assert reports[1].error == plain.error


@pytest.mark.parametrize("place", ["detect_tissue", "lay_tiles", "open_store"])
def test_what_fails_beside_another_slide_alone_does_no_harm(
    slides, undisturbed, tmp_path, notes, monkeypatch, place
):
    """For want of memory for two, say."""
    whole = getattr(pipeline, place)
    failed = threading.Event()

    def scarce(*args, **how):
        if threading.current_thread().name == "ahead" and not failed.is_set():
            failed.set()
            raise MemoryError
        return whole(*args, **how)

    monkeypatch.setattr(pipeline, place, scarce)
    reports = go(slides, tmp_path, notes, "abc", at_last(lambda: failed.wait(LONG)))
    assert failed.is_set()
    assert [report.status for report in reports] == ["done"] * 3
    assert not reports[1].warnings
    assert results(tmp_path) == results(undisturbed)


def test_windows_that_cannot_be_decoded_ahead_are_tried_again(
    slides, undisturbed, tmp_path, notes, monkeypatch
):
    failed = threading.Event()
    read = NotedFeeder._read

    def scarce(self):
        if self._slide.name == "b.svs" and not failed.is_set():
            failed.set()
            raise MemoryError
        return read(self)

    monkeypatch.setattr(NotedFeeder, "_read", scarce)
    reports = go(slides, tmp_path, notes, "ab", at_last(lambda: failed.wait(LONG)))
    assert [report.status for report in reports] == ["done", "done"]
    assert events(tmp_path, "b").count("put_back") == 1
    assert results(tmp_path).items() <= results(undisturbed).items()


def test_a_slide_of_another_process_is_passed_by_and_comes_last(slides, tmp_path, notes):
    held = take_lease(job(slides / "b.svs", tmp_path))
    in_time = []

    class Waiting(NotedWatcher):
        def advance(self, job, stage, done, total):
            super().advance(job, stage, done, total)
            if stage == "waiting for another process":
                held.release()

    before = at_last(lambda: in_time.append(notes.wait_for("read", "c")))
    watcher = Waiting(notes)
    reports = go(slides, tmp_path, notes, "abc", before, watcher)
    assert in_time == [True]
    assert [report.status for report in reports] == ["done"] * 3
    starts = [slide_id for what, slide_id in notes.all if what == "start"]
    assert starts == ["a", "c", "b"]
    # Who gives out slides knows at once that this one is not at work.
    assert notes.place("waiting for another process", "b") < notes.place("start", "c")


def test_beside_a_slide_that_is_ready_no_other_is_made_so(slides, tmp_path, notes):
    """One that was busy is free again before its turn, and the one after it is ready."""
    held = take_lease(job(slides / "b.svs", tmp_path))
    seen = []

    def before(name, number, total):
        if name == "a" and number == total - 1:
            assert notes.wait_for("read", "c")
            held.release()
        if name == "b" and number == total - 1:
            time.sleep(0.2)
            seen.append(("open", "d") in notes.all)

    reports = go(slides, tmp_path, notes, "abcd", before)
    assert seen == [False]
    assert [report.status for report in reports] == ["done"] * 3 + ["failed"]  # there is no "d"
    starts = [slide_id for what, slide_id in notes.all if what == "start"]
    assert starts == ["a", "b", "c", "d"]


def test_a_slide_that_is_done_is_passed_by_and_said_to_be_in_its_turn(
    slides, undisturbed, tmp_path, notes
):
    go(slides, tmp_path, Notes(), "b")
    in_time = []
    before = at_last(lambda: in_time.append(notes.wait_for("read", "c")))
    watcher = NotedWatcher(notes)
    reports = go(slides, tmp_path, notes, "abc", before, watcher)
    assert in_time == [True]
    assert [report.status for report in reports] == ["done"] * 3
    assert ("b", "done", True) in watcher.ended
    last = max(i for i, note in enumerate(notes.all) if note == ("predicted", "a"))
    assert notes.place("finish", "b") > last
    assert results(tmp_path) == results(undisturbed)


def test_results_that_are_made_anew_stay_until_their_turn(slides, undisturbed, tmp_path, notes):
    shutil.copytree(undisturbed, tmp_path / "out")
    before = results(tmp_path / "out")
    reports = {n: (tmp_path / "out" / "reports" / f"{n}.json").read_bytes() for n in "bc"}
    stopped = threading.Event()

    def look():
        assert notes.wait_for("read", "b")
        stopped.set()

    how = {"overwrite": True, "stop": stopped.is_set}
    (report,) = go(slides, tmp_path / "out", notes, "abc", at_last(look), **how)
    assert report.status == "interrupted"
    after = results(tmp_path / "out")
    assert {k: v for k, v in after.items() if "a." not in k} == {
        k: v for k, v in before.items() if "a." not in k
    }
    for name, content in reports.items():
        assert (tmp_path / "out" / "reports" / f"{name}.json").read_bytes() == content
    again = Device(notes)
    how = {"overwrite": True, "predictor": again}
    assert [r.status for r in go(slides, tmp_path / "out", notes, "abc", **how)] == ["done"] * 3
    assert [what for what in notes.all if what == ("predicted", "b")], "it was predicted anew"
    assert results(tmp_path / "out") == results(undisturbed)


def test_maps_that_were_begun_are_opened_in_their_turn(slides, undisturbed, tmp_path, notes):
    stopping = NotedWatcher(Notes())
    stopping.stop_after = 5
    stopping.advance = lambda *facts: Watcher.advance(stopping, *facts)
    (report,) = go(slides, tmp_path, Notes(), "b", watcher=stopping)
    assert report.status == "interrupted"
    kept = set(partial_path(tmp_path / "maps" / "b.zarr").rglob("*"))
    notes.all.clear()
    seen = []
    before = at_last(lambda: seen.append(("open", "b") in notes.all))
    predictor = Device(notes, before)
    reports = go(slides, tmp_path, notes, "ab", predictor=predictor)
    assert seen == [False]
    assert kept
    assert [r.status for r in reports] == ["done", "done"]
    assert 0 < notes.all.count(("predicted", "b")) < notes.all.count(("predicted", "a"))
    assert results(tmp_path).items() <= results(undisturbed).items()


def test_a_lone_slide_has_nobody_beside_it(slides, undisturbed, tmp_path, notes):
    (report,) = go(slides, tmp_path, notes, "a")
    assert report.status == "done"
    assert results(tmp_path).items() <= results(undisturbed).items()


def test_a_slide_that_changes_while_it_waits_fails(slides, tmp_path, notes):
    some = tmp_path / "slides"
    shutil.copytree(slides, some)

    def change():
        assert notes.wait_for("read", "b")
        with (some / "b.svs").open("ab") as file:
            file.write(b"more")

    reports = go(some, tmp_path / "out", notes, "abc", at_last(change))
    assert [report.status for report in reports] == ["done", "failed", "done"]
    assert "changed while it was read" in reports[1].error["message"]
    assert not partial_path(tmp_path / "out" / "maps" / "b.zarr").exists()


def test_a_slide_that_is_lost_while_it_waits_is_begun_as_any_other(
    slides, undisturbed, tmp_path, notes
):
    def lose():
        assert notes.wait_for("read", "b")
        (tmp_path / "logs" / "b.lease").unlink()

    reports = go(slides, tmp_path, notes, "ab", at_last(lose))
    assert [report.status for report in reports] == ["done", "done"]
    assert told(notes, "b").count("open") == 2
    assert told(notes, "b").count("start") == 1
    assert results(tmp_path).items() <= results(undisturbed).items()


@pytest.mark.parametrize("suspect", ["a", "b"])
def test_nothing_is_beside_a_slide_that_may_have_killed(slides, tmp_path, notes, suspect):
    own = job(slides / f"{suspect}.svs", tmp_path)
    own.log_path.parent.mkdir(parents=True)
    append_event(own.log_path, {"event": "ahead", "job_id": own.job_id})
    assert (suspected(own), deaths(own)) == (1, 0)
    go(slides, tmp_path, notes, "ab", at_last(lambda: time.sleep(0.3)))
    last = max(i for i, note in enumerate(notes.all) if note == ("predicted", "a"))
    assert notes.place("open", "b") > last
    assert suspected(own) == 0


def test_a_process_that_is_killed_leaves_a_slide_that_is_suspect_and_not_guilty(
    slides, undisturbed, tmp_path, notes
):
    code = f"""if True:
        import os, signal, sys
        from pathlib import Path
        sys.path[:0] = {[str(Path(__file__).parent), str(Path(__file__).parents[1])]!r}
        import test_ahead as own
        notes = own.Notes()

        def kill():
            if notes.wait_for("read", "b"):
                os.kill(os.getpid(), signal.SIGKILL)

        own.go(Path({str(slides)!r}), Path({str(tmp_path)!r}), notes, "ab", own.at_last(kill))
    """
    assert subprocess.run([sys.executable, "-c", code]).returncode == -signal.SIGKILL
    first, second = (job(slides / f"{name}.svs", tmp_path) for name in "ab")
    assert (deaths(first), suspected(first)) == (1, 1)
    assert (deaths(second), suspected(second)) == (0, 1)
    assert events(tmp_path, "b")[0] == "ahead"
    assert [r.status for r in go(slides, tmp_path, notes, "ab")] == ["done", "done"]
    assert results(tmp_path).items() <= results(undisturbed).items()
    assert (suspected(first), suspected(second)) == (0, 0)
    restarts = [read_report(one.report_path).restarts for one in (first, second)]
    assert restarts == [1, 0]


def test_the_time_in_which_a_slide_waits_is_not_its_own(slides, tmp_path, monkeypatch):
    clock = [100.0]
    monkeypatch.setattr(attempts.time, "perf_counter", lambda: clock[0])
    attempt = Attempt(job(slides / "a.svs", tmp_path), ahead=True)
    with attempt.stage("open"):
        clock[0] += 2
    attempt.stand_by()
    clock[0] += 50
    attempt.begin()
    with attempt.stage("predict"):
        clock[0] += 3
    report = attempt.close("done")
    assert report.seconds["total"] == 5
    assert (report.seconds["open"], report.seconds["predict"]) == (2, 3)


def test_slides_are_asked_for_one_by_one(slides, tmp_path, notes):
    """Whoever gives them out may have others who want some."""
    asked = []

    def jobs():
        for name in "abc":
            asked.append((name, ("start", "b") in notes.all))
            yield job(slides / f"{name}.svs", tmp_path)

    watcher = NotedWatcher(notes)
    before = at_last(lambda: notes.wait_for("read", "b"))
    predictor = Device(notes, before)
    reports = run_slides(jobs(), predictor, watcher=watcher, stop=lambda: False)
    assert [report.status for report in reports] == ["done"] * 3
    assert asked == [("a", False), ("b", False), ("c", True)]


def test_a_run_that_ends_does_not_wait_for_a_slide_that_nobody_gives(slides, tmp_path, notes):
    gives, given = threading.Event(), []

    def jobs():
        yield job(slides / "a.svs", tmp_path)
        notes.add("asked", "b")
        gives.wait(LONG)
        given.append("b")
        yield job(slides / "b.svs", tmp_path)

    def halt():
        assert notes.wait_for("asked", "b")
        raise Halt

    with pytest.raises(Halt):
        run_slides(
            jobs(), Device(notes, at_last(halt)), watcher=NotedWatcher(notes), stop=lambda: False
        )
    assert not given
    gives.set()  # too late: it is not touched
    for thread in threading.enumerate():
        if thread.name == "ahead":
            thread.join(LONG)
    assert ("open", "b") not in notes.all
    assert not (tmp_path / "logs" / "b.jsonl").exists()


def test_a_feed_of_other_windows_is_not_used(slides, tmp_path, notes, monkeypatch):
    """As when maps come to light that were not there when the slide was made ready."""
    from wsi_pipeline.engines import here

    go(slides, tmp_path, Notes(), "b")
    # Ready as if all were made anew, begun as if not.
    calls = []

    def ended(_job):
        calls.append(threading.current_thread().name)
        return calls[-1] == "ahead"

    monkeypatch.setattr(here, "ended", ended)
    before = at_last(lambda: notes.wait_for("read", "b"))
    reports = go(slides, tmp_path, notes, "ab", before, overwrite=True)
    assert "ahead" in calls
    assert [report.status for report in reports] == ["done", "done"]
    assert ("predicted", "b") not in notes.all
