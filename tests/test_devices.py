"""Several GPUs of one machine, pretended: balance, deaths, faults, interruption, the same bytes."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path

import psutil
import pytest
import torch
from click.testing import CliRunner
from engine_fixtures import (
    BIG_PX,
    POISON_PX,
    CpuLoader,
    SlowStub,
    StubLoader,
    Watcher,
    events,
    holder,
    job,
    make_slides,
    nothing_left_over,
    tables,
)

import wsi_pipeline
from wsi_pipeline.attempt import refuse
from wsi_pipeline.cli import run
from wsi_pipeline.device import name_devices
from wsi_pipeline.engines import run_on_devices, run_slides
from wsi_pipeline.engines.child import Child
from wsi_pipeline.engines.devices import _Crew
from wsi_pipeline.engines.turns import in_good_order
from wsi_pipeline.errors import JobError, ModelBundleError
from wsi_pipeline.loading import BundleLoader, visible_alone

TWO = {"cuda:0": {}, "cuda:1": {}}
SMALL = "abcde"


@pytest.fixture(scope="module")
def slides(tmp_path_factory) -> dict[str, Path]:
    widths = {"big": BIG_PX, "poison": POISON_PX} | dict.fromkeys(SMALL, 500)
    return make_slides(tmp_path_factory.mktemp("slides"), **widths)


@pytest.fixture(scope="module")
def alone(slides, tmp_path_factory) -> dict[str, bytes]:
    """What one process makes of the slides."""
    out = tmp_path_factory.mktemp("alone")
    jobs = [job(slides[name], out) for name in ("big", *SMALL)]
    run_slides(jobs, SlowStub("cuda:5", 0), watcher=Watcher(), stop=lambda: False)
    return tables(out)


def go(slides, out, names, watcher=None, load=None, devices=TWO, stop=lambda: False, **how):
    out.mkdir(exist_ok=True)
    return run_on_devices(
        [job(slides[name], out) for name in names],
        load or StubLoader(out),
        devices=devices,
        watcher=watcher or Watcher(),
        stop=stop,
        **how,
    )


def test_the_largest_goes_first_and_who_is_free_takes_the_next(slides, alone, tmp_path):
    watcher = Watcher()
    # The largest is last in the list, and both devices are ready before either begins.
    # The large one waits for three of the five: its device may hold one more ready for itself.
    load = StubLoader(tmp_path, delay_s=0.05, meet=2, before_big=len(SMALL) - 2)
    reports = go(slides, tmp_path, [*SMALL, "big"], watcher, load)
    assert [(r.slide_id, r.status) for r in reports] == [(n, "done") for n in [*SMALL, "big"]]
    assert "big" in watcher.started[:2]
    got = Counter(report.device for report in reports)
    assert set(got) == set(TWO)
    assert got[reports[-1].device] < len(SMALL) / 2
    assert {("big", "predict"), ("big", "polygonize")} <= watcher.stages
    assert sorted(watcher.ended) == sorted((n, "done", False) for n in ["big", *SMALL])
    assert tables(tmp_path) == alone
    assert nothing_left_over(tmp_path)
    assert len(list(tmp_path.glob("loaded-*"))) == 2


def test_done_slides_are_skipped_and_halves_are_halves(slides, tmp_path):
    (report,) = go(slides, tmp_path, "a", only="maps")
    assert (report.status, report.left) == ("interrupted", "objects")
    watcher = Watcher()
    go(slides, tmp_path, "a", watcher)
    go(slides, tmp_path, "a", watcher)
    go(slides, tmp_path, "a", watcher, overwrite=True)
    assert watcher.ended == [("a", "done", skipped) for skipped in (False, True, False)]
    # One slide needs one process, however many devices there are.
    assert len(list(tmp_path.glob("loaded-*"))) == 4


def test_a_killed_process_costs_nothing_but_its_blocks_in_work(slides, alone, tmp_path):
    def kill():
        os.kill(holder(tmp_path, "big"), signal.SIGKILL)

    killer = threading.Thread(target=kill)
    killer.start()
    reports = go(slides, tmp_path, ["big", *SMALL], load=StubLoader(tmp_path, delay_s=0.05))
    killer.join()
    assert {report.status for report in reports} == {"done"}
    assert [e["event"] for e in events(tmp_path, "big")].count("start") == 2
    assert tables(tmp_path) == alone
    assert nothing_left_over(tmp_path)


def test_a_slide_that_kills_is_given_up_and_the_others_are_done(slides, tmp_path):
    reports = go(slides, tmp_path, ["poison", "a", "b"])
    assert [report.status for report in reports] == ["failed", "done", "done"]
    assert "killed 3 times in a row" in reports[0].error["message"]
    assert (tmp_path / "reports" / "poison.json").exists()
    log = [event["event"] for event in events(tmp_path, "poison")]
    assert (log.count("start"), log.count("end")) == (4, 1)
    # Whoever was in the same process was tried once more at most.
    assert [e["event"] for e in events(tmp_path, "a")].count("start") <= 2
    assert nothing_left_over(tmp_path / "logs")


def test_a_bad_slide_fails_alone_or_ends_the_run_if_asked(slides, tmp_path):
    bad = tmp_path / "bad.svs"
    bad.write_bytes(b"II*\0 this is no slide" * 500_000)  # the largest, so the first
    some = {**slides, "bad": bad}
    reports = go(some, tmp_path / "out", ["a", "bad"])
    assert [report.status for report in reports] == ["done", "failed"]
    one = {"cuda:0": {}}
    reports = go(some, tmp_path / "out", ["b", "bad", "c"], devices=one, fail_fast=True)
    assert [report.slide_id for report in reports] == ["bad"]


class Listed(Child):
    """A child without a process: lists the slides that it is given."""

    def __init__(self):
        self.device = "cuda:0"
        self.held, self.predicting = {}, set()
        self.fresh, self.asks = True, False
        self.given = []

    def _send(self, message):
        self.given.append(getattr(message, "slide_id", message))


def a_crew(slides, out, names):
    """The books of a run on two devices, and two children that were given their first slides."""
    crew = _Crew([job(slides[n], out) for n in names], TWO, {}, Watcher(), fail_fast=False)
    children = Listed(), Listed()
    for child in children:
        crew._hear(child, "next")
        (slide_id,) = child.given
        crew._hear(child, "start", slide_id)
        crew._hear(child, "advance", slide_id, "predict", 0, 4)
    return crew, *children


def test_what_a_busy_device_cannot_begin_is_left_to_an_idle_one(slides, tmp_path):
    """The last slide is not made ready beside a large one: it would wait for its end."""
    crew, one, other = a_crew(slides, tmp_path, ["big", "a", "b"])
    crew._hear(one, "next")
    crew._hear(one, "advance", "big", "predict", 3, 4)
    crew._hear(other, "next")
    assert (one.given, other.given) == (["big"], ["a"])
    crew._hear(other, "advance", "a", "predict", 4, 4)
    assert (one.given, other.given) == (["big"], ["a", "b"])
    crew._hear(one, "advance", "big", "predict", 4, 4)
    assert one.given == ["big", None]


@pytest.mark.parametrize("how", ["failed", "busy"])
def test_a_child_that_waits_for_a_slide_gets_it_however_its_last_one_ended(slides, tmp_path, how):
    crew, one, _ = a_crew(slides, tmp_path, ["big", "a", "b"])
    crew._hear(one, "next")
    if how == "failed":
        crew._hear(
            one, "finish", "big", refuse(job(slides["big"], tmp_path), JobError("no")), False
        )
    else:
        crew._hear(one, "advance", "big", "waiting for another process", 0, 0)
    assert one.given == ["big", "b"]


def test_as_long_as_one_is_left_for_each_device_a_busy_one_gets_another(slides, tmp_path):
    crew, one, other = a_crew(slides, tmp_path, ["big", "a", "b", "c"])
    crew._hear(one, "next")
    assert one.given == ["big", "b"]
    crew._hear(other, "next")
    assert other.given == ["a"]


def test_the_process_of_a_device_makes_the_next_slide_ready(slides, tmp_path):
    watcher = Watcher()
    one = {"cuda:0": {}}
    reports = go(slides, tmp_path, ["big", "a", "b"], watcher, devices=one)
    assert [report.status for report in reports] == ["done"] * 3
    kinds = {name: [e["event"] for e in events(tmp_path, name)] for name in ("big", "a", "b")}
    assert {name: own.count("ahead") for name, own in kinds.items()} == {"big": 0, "a": 1, "b": 1}
    assert watcher.started == ["big", "a", "b"]
    assert nothing_left_over(tmp_path)


def test_after_a_failure_elsewhere_what_is_ready_is_put_back(slides, tmp_path):
    size = slides["a"].stat().st_size - 1  # the smallest, so the last
    (tmp_path / "bad.svs").write_bytes(b"II*\0 this is no slide".ljust(size))
    out = tmp_path / "out"
    out.mkdir()
    some = {**slides, "bad": tmp_path / "bad.svs"}
    load = StubLoader(out, delay_s=0.1, meet=2)
    reports = go(some, out, ["big", "a", "b", "c", "bad"], load=load, fail_fast=True)
    ends = {report.slide_id: report.status for report in reports}
    assert ends.pop("bad") == "failed"
    assert ends.pop("big") == "done"
    # Two were made ready: one beside "a", and done after it, and one beside "big".
    assert len(ends) == 2
    assert set(ends.values()) == {"done"}
    (back,) = {"a", "b", "c"} - set(ends)
    kinds = [event["event"] for event in events(out, back)]
    assert (kinds[0], kinds[-1], "start" in kinds) == ("ahead", "put_back", False)
    assert nothing_left_over(out)


def test_interrupted_it_goes_on_to_the_same_bytes(slides, alone, tmp_path):
    watcher, names = Watcher(), ["big", *SMALL]
    load = StubLoader(tmp_path, delay_s=0.1)
    reports = go(slides, tmp_path, names, watcher, load, stop=watcher.predicting.is_set)
    assert "interrupted" in {report.status for report in reports}
    assert len(reports) < len(names)
    assert nothing_left_over(tmp_path / "logs")
    assert {report.status for report in go(slides, tmp_path, names)} == {"done"}
    assert tables(tmp_path) == alone


def test_a_device_of_no_use_leaves_the_work_to_the_others(slides, tmp_path):
    load = StubLoader(tmp_path, fails=("cuda:0",), kills=("cuda:1",), delay_s=0.05)
    three = {**TWO, "cuda:2": {}}
    reports = go(slides, tmp_path, SMALL, load=load, devices=three)
    assert {(report.status, report.device) for report in reports} == {("done", "cuda:2")}


@pytest.mark.parametrize(("fate", "error"), [("fails", ModelBundleError), ("kills", JobError)])
def test_without_any_device_nothing_is_begun(slides, tmp_path, fate, error):
    load = StubLoader(tmp_path, **{fate: ("cuda:0",)})
    with pytest.raises(error, match=r"no such model here|died"):
        go(slides, tmp_path, "ab", load=load, devices={"cuda:0": {}})
    # Who dies is tried again, a few times; who says why is not.
    assert len(list(tmp_path.glob("loaded-*"))) == {"fails": 1, "kills": 3}[fate]
    assert not (tmp_path / "logs").exists()


SCRIPT = """
import sys
from pathlib import Path
from engine_fixtures import StubLoader, Watcher, job
from wsi_pipeline.command import exit_if_interrupted, signals
from wsi_pipeline.engines import run_on_devices
slide, out, delay = Path(sys.argv[1]), Path(sys.argv[2]), float(sys.argv[3])
with signals() as caught:
    run_on_devices([job(slide, out)], StubLoader(out, delay), devices={"cuda:0": {}},
        watcher=Watcher(), stop=lambda: bool(caught))
exit_if_interrupted(caught)
"""
# No guard for `__main__`: the processes of devices do not run a caller's script again.


@pytest.fixture
def script(slides, tmp_path):
    """A command on one slide, in a process group of its own, as a shell starts it."""
    started = []

    def start(delay_s):
        process = subprocess.Popen(
            [sys.executable, "-c", SCRIPT, slides["big"], tmp_path, str(delay_s)],
            env={**os.environ, "PYTHONPATH": str(Path(__file__).parent)},
            process_group=0,
            stderr=subprocess.PIPE,
            text=True,
        )
        started.append(process)
        return process, holder(tmp_path, "big")

    yield start
    for process in started:
        process.kill()
        process.wait()
        process.stderr.close()


def is_gone(pid: int, within_s: float = 60) -> bool:
    deadline = time.monotonic() + within_s
    while psutil.pid_exists(pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    return not psutil.pid_exists(pid)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 75)])
def test_a_signal_to_the_whole_group_is_one_request(script, tmp_path, number, code):
    process, child = script(0.1)
    os.killpg(process.pid, number)
    assert process.wait(60) == code
    assert is_gone(child)
    assert events(tmp_path, "big")[-1]["status"] == "interrupted"
    assert process.stderr.read().count("finishing what is in work") == 1


def test_a_second_ctrl_c_ends_the_children_at_once(script):
    process, child = script(1000)
    os.killpg(process.pid, signal.SIGINT)
    assert "finishing" in process.stderr.readline()
    os.killpg(process.pid, signal.SIGINT)
    assert process.wait(60) == 130
    assert is_gone(child)


def test_children_do_not_outlive_their_parent(script, tmp_path):
    process, child = script(0.1)
    process.kill()
    assert is_gone(child)
    assert events(tmp_path, "big")[-1]["status"] == "interrupted"


def test_the_order_goes_by_bytes_and_past_deaths(slides, tmp_path):
    folder = tmp_path / "heavy"
    folder.mkdir()
    (tmp_path / "heavy.mrxs").touch()
    (folder / "Data0000.dat").write_bytes(bytes(50_000_000))
    names = ["a", "big", "b"]
    jobs = [job(slides[name], tmp_path) for name in names] + [
        job(tmp_path / "heavy.mrxs", tmp_path),
        job(tmp_path / "far.svs", tmp_path, path="https://host/far.svs"),
        job(tmp_path / "absent.svs", tmp_path),
    ]
    log = jobs[2].log_path
    log.parent.mkdir()
    log.write_text(f'{{"event": "start", "job_id": "{jobs[2].job_id}"}}\n')
    innocent, suspect = in_good_order(jobs)
    assert [j.slide_id for j in innocent] == ["heavy", "big", "a", "far", "absent"]
    assert [j.slide_id for j in suspect] == ["b"]


def test_names_of_devices(monkeypatch):
    assert name_devices("auto") == ("auto",)
    if not torch.cuda.is_available():
        with pytest.raises(JobError, match="not here"):
            name_devices("cuda:all")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    assert name_devices("cuda:all") == ("cuda:0", "cuda:1", "cuda:2")
    assert name_devices("cuda:2, cuda:0") == ("cuda:2", "cuda:0")
    for wrong in ("cuda:0,cuda:3", "cuda:0,cuda:0", "cuda:0,cpu"):
        with pytest.raises(JobError):
            name_devices(wrong)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert name_devices("cuda:all") == ("cuda:0",)


def test_each_process_sees_its_own_gpu():
    devices = ["cuda:0", "cuda:2"]
    assert [d["CUDA_VISIBLE_DEVICES"] for d in visible_alone(devices, {}).values()] == ["0", "2"]
    given = {"CUDA_VISIBLE_DEVICES": "GPU-a, GPU-b,GPU-c"}
    assert visible_alone(devices, given)["cuda:2"] == {"CUDA_VISIBLE_DEVICES": "GPU-c"}


def test_a_loader_wants_the_very_bundle():
    from wsi_pipeline.bundle import find_bundle

    bundle = find_bundle("stain-baseline")
    load = BundleLoader.of(bundle, {"device": "cuda:9", "precision": "fp32", "share": 2})
    assert load("cpu").device == "cpu"
    with pytest.raises(ModelBundleError, match="another one"):
        BundleLoader(place="stain-baseline", digest="0" * 64, options=())("cpu")


def test_the_function_takes_several_gpus(slides, tmp_path, monkeypatch):
    how = {"model": "stain-baseline", "tile_size": 256, "precision": "fp32"}
    some = [slides[name] for name in "ab"]
    wsi_pipeline.run(some, tmp_path / "one", device="cpu", **how)
    monkeypatch.setattr("wsi_pipeline.device.name_devices", lambda _text: tuple(TWO))
    monkeypatch.setattr("wsi_pipeline.api.BundleLoader", CpuLoader)
    reports = wsi_pipeline.run(some, tmp_path / "two", device="cuda:all", memory="6G", **how)
    assert [report.status for report in reports] == ["done", "done"]
    assert tables(tmp_path / "two") == tables(tmp_path / "one")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_the_command_says_that_there_is_no_gpu(slides, tmp_path):
    arguments = [str(slides["a"]), "--out", str(tmp_path / "out"), "--device", "cuda:all"]
    result = CliRunner().invoke(run, arguments)
    assert result.exit_code == 2
    assert "not here: torch" in result.output
