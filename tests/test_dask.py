"""Slides on a Dask cluster: receipts, halves, deaths, poison, a lost scheduler, interruption."""

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from click.testing import CliRunner
from engine_fixtures import (
    POISON_PX,
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
from wsi_pipeline.engines import connection, dasked, run_on_dask, run_slides
from wsi_pipeline.errors import JobError

distributed = pytest.importorskip("distributed", reason="the extra 'cluster' is not installed")

NAMES = ["big", "a", "b", "c"]
GPU, OBJECTS = {"GPU": 1}, {"objects": 1}


@pytest.fixture(scope="module")
def slides(tmp_path_factory) -> dict[str, Path]:
    widths = {"big": 2000, "poison": POISON_PX} | dict.fromkeys("abc", 500)
    return make_slides(tmp_path_factory.mktemp("slides"), **widths)


@pytest.fixture(scope="module")
def alone(slides, tmp_path_factory) -> dict[str, bytes]:
    """What one process makes of the slides."""
    out = tmp_path_factory.mktemp("alone")
    jobs = [job(slides[name], out) for name in NAMES]
    run_slides(jobs, SlowStub("cuda:5", 0), watcher=Watcher(), stop=lambda: False)
    return tables(out)


@pytest.fixture(scope="module")
def cluster():
    """Two workers; a nanny starts each anew that dies."""
    with distributed.LocalCluster(
        n_workers=2, threads_per_worker=1, dashboard_address=None, memory_limit=0
    ) as cluster:
        yield cluster


def go(slides, out, names, cluster, watcher=None, load=None, stop=lambda: False, **how):
    out.mkdir(exist_ok=True)
    return run_on_dask(
        [job(slides[name], out) for name in names],
        load or StubLoader(out),
        address=cluster if isinstance(cluster, str) else cluster.scheduler_address,
        device="cuda:1",
        workers=1,
        watcher=watcher or Watcher(),
        stop=stop,
        **how,
    )


def starts(out: Path, slide_id: str) -> int:
    return [event["event"] for event in events(out, slide_id)].count("start")


def test_a_cluster_makes_what_one_process_makes(slides, alone, cluster, tmp_path):
    watcher = Watcher()
    reports = go(slides, tmp_path, NAMES[::-1], cluster, watcher, StubLoader(tmp_path, 0.05))
    assert [(report.slide_id, report.status) for report in reports] == [
        (name, "done") for name in NAMES[::-1]
    ]
    assert sorted(watcher.ended) == sorted((name, "done", False) for name in NAMES)
    assert sorted(watcher.started) == sorted(NAMES)
    assert watcher.predicting.is_set()
    assert tables(tmp_path) == alone
    assert nothing_left_over(tmp_path)
    # Each worker has loaded the network once, for however many slides.
    assert 1 <= len(list(tmp_path.glob("loaded-*"))) <= 2
    again = Watcher()
    go(slides, tmp_path, NAMES, cluster, again)
    assert sorted(again.ended) == sorted((name, "done", True) for name in NAMES)


def test_the_function_takes_a_cluster(slides, cluster, tmp_path, monkeypatch):
    how = {"model": "stain-baseline", "device": "cpu", "tile_size": 256, "workers": 1}
    wsi_pipeline.run([slides["a"]], tmp_path / "here", **how)
    # Names that only this process understands reach the workers as whole ones.
    monkeypatch.chdir(tmp_path)
    (report,) = wsi_pipeline.run(
        [os.path.relpath(slides["a"])], "there", dask=cluster.scheduler_address, **how
    )
    assert report.status == "done"
    assert tables(tmp_path / "there") == tables(tmp_path / "here")


def test_a_disk_that_is_not_shared_is_noticed(slides, cluster, tmp_path):
    (report,) = run_on_dask(
        [job(slides["a"], tmp_path / "absent")],
        StubLoader(tmp_path),
        address=cluster.scheduler_address,
        watcher=Watcher(),
        stop=lambda: False,
    )
    assert "does not see the results folder" in report.error["message"]


def test_a_bad_slide_fails_alone_or_ends_the_run_if_asked(slides, cluster, tmp_path):
    bad = tmp_path / "bad.svs"
    bad.write_bytes(b"II*\0 this is no slide" * 500_000)
    some = {**slides, "bad": bad}
    reports = go(some, tmp_path / "out", ["a", "bad"], cluster)
    assert [report.status for report in reports] == ["done", "failed"]
    assert (tmp_path / "out" / "reports" / "bad.json").exists()
    slow = StubLoader(tmp_path, 0.2)
    reports = go(some, tmp_path / "2", ["bad", *NAMES], cluster, load=slow, fail_fast=True)
    assert reports[0].status == "failed"
    assert len(reports) < 5


def test_a_worker_without_the_model_says_so(slides, cluster, tmp_path):
    (report,) = go(slides, tmp_path, "a", cluster, load=StubLoader(tmp_path, fails=("cuda:1",)))
    assert (report.status, report.error["code"]) == ("failed", "bad_model")
    assert (tmp_path / "reports" / "a.json").exists()
    (report,) = go(slides, tmp_path, "a", cluster)
    assert report.status == "done"
    (report,) = go(slides, tmp_path, "a", cluster, load=StubLoader(tmp_path, fails=("cuda:1",)))
    assert report.status == "done"


def test_a_killed_worker_costs_nothing_but_its_blocks_in_work(slides, alone, cluster, tmp_path):
    def kill():
        os.kill(holder(tmp_path, "big"), signal.SIGKILL)

    killer = threading.Thread(target=kill)
    killer.start()
    reports = go(slides, tmp_path, NAMES, cluster, load=StubLoader(tmp_path, 0.1))
    killer.join()
    assert {report.status for report in reports} == {"done"}
    assert starts(tmp_path, "big") == 2
    assert tables(tmp_path) == alone
    assert nothing_left_over(tmp_path)


def test_a_slide_that_kills_is_given_up_and_the_others_are_done(
    slides, cluster, tmp_path, monkeypatch
):
    # Dask gives a task up, guilty or not, before the slide's own log does.
    monkeypatch.setattr(cluster.scheduler, "allowed_failures", 1)
    reports = go(slides, tmp_path, ["poison", "a", "b"], cluster)
    assert [report.status for report in reports] == ["failed", "done", "done"]
    assert "killed 3 times in a row" in reports[0].error["message"]
    assert (tmp_path / "reports" / "poison.json").exists()
    assert starts(tmp_path, "poison") == 4
    assert events(tmp_path, "poison")[-1]["event"] == "end"
    assert nothing_left_over(tmp_path / "logs")


def test_a_task_that_only_kills_workers_ends_in_a_report(slides, cluster, tmp_path, monkeypatch):
    """It dies while the network is loaded, so the slide's log does not tell."""
    monkeypatch.setattr(dasked, "MOST_SUBMISSIONS", 2)
    monkeypatch.setattr(cluster.scheduler, "allowed_failures", 0)
    (report,) = go(slides, tmp_path, "a", cluster, load=StubLoader(tmp_path, kills=("cuda:1",)))
    assert report.status == "failed"
    assert "workers died again and again: KilledWorker" in report.error["message"]
    assert len(list(tmp_path.glob("loaded-*"))) == 2
    assert (tmp_path / "reports" / "a.json").exists()
    assert events(tmp_path, "a")[-1]["event"] == "end"


def test_interrupted_it_goes_on_to_the_same_bytes(slides, alone, cluster, tmp_path):
    watcher = Watcher()
    load = StubLoader(tmp_path, 0.3)
    reports = go(slides, tmp_path, NAMES, cluster, watcher, load, stop=watcher.predicting.is_set)
    assert "interrupted" in {report.status for report in reports}
    assert len(reports) < len(NAMES)
    assert nothing_left_over(tmp_path / "logs")
    assert {report.status for report in go(slides, tmp_path, NAMES, cluster)} == {"done"}
    assert tables(tmp_path) == alone


@pytest.fixture(scope="module")
def kinds():
    """A worker that has a GPU, and one for objects."""
    options = {"nthreads": 1, "memory_limit": 0, "dashboard": False}
    workers = {
        name: {"cls": distributed.Nanny, "options": {**options, "resources": resources}}
        for name, resources in {"gpu": GPU, "cpu": OBJECTS}.items()
    }
    scheduler = {"cls": distributed.Scheduler, "options": {"dashboard_address": ":0", "port": 0}}
    with distributed.SpecCluster(scheduler=scheduler, workers=workers) as cluster:
        yield cluster


def test_halves_of_a_slide_go_to_the_workers_that_offer_them(slides, alone, kinds, tmp_path):
    out = tmp_path / "out"
    reports = go(slides, out, NAMES, kinds)
    assert {(report.status, report.left) for report in reports} == {("done", "")}
    # Only one of two workers has loaded a network.
    assert len(list(out.glob("loaded-*"))) == 1
    by_event = {e["event"]: e["pid"] for e in events(out, "big")}
    maps = next(e["pid"] for e in events(out, "big") if e["event"] == "blocks")
    assert maps != by_event["end"]
    assert tables(out) == alone
    # Again from the beginning, once.
    go(slides, out, ["a"], kinds, overwrite=True)
    assert starts(out, "a") == 4
    (report,) = go(slides, tmp_path / "maps", ["a"], kinds, only="maps")
    assert (report.status, report.left) == ("interrupted", "objects")
    (report,) = go(slides, tmp_path / "maps", ["a"], kinds, only="objects")
    assert report.status == "done"


@pytest.fixture
def loose():
    """A scheduler and workers that are started by hand, on a port of their own."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    running = []

    def start(what, *arguments):
        code = f"from distributed.cli.dask_{what} import main; main()"
        environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent)}
        process = subprocess.Popen(
            [sys.executable, "-c", code, *arguments], env=environment, stderr=subprocess.DEVNULL
        )
        running.append(process)
        return process

    def scheduler():
        return start("scheduler", "--host", "127.0.0.1", "--port", str(port), "--no-dashboard")

    def worker():
        return start("worker", f"tcp://127.0.0.1:{port}", "--nthreads", "1", "--no-dashboard")

    yield f"tcp://127.0.0.1:{port}", scheduler, worker
    for process in running:
        process.kill()
        process.wait()


def reached(address: str) -> None:
    host, port = address.removeprefix("tcp://").split(":")
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        try:
            return socket.create_connection((host, int(port))).close()
        except OSError:
            time.sleep(0.05)
    raise AssertionError("the scheduler did not start")


def test_a_scheduler_that_comes_back_is_gone_on_with(slides, alone, loose, tmp_path):
    address, scheduler, worker = loose
    first = scheduler()
    reached(address)
    worker()

    def restart():
        holder(tmp_path, "big")
        first.kill()
        first.wait()
        scheduler()
        worker()

    thread = threading.Thread(target=restart)
    thread.start()
    reports = go(slides, tmp_path, NAMES, address, load=StubLoader(tmp_path, 0.1))
    thread.join()
    assert {report.status for report in reports} == {"done"}
    ends = [event["status"] for event in events(tmp_path, "big") if event["event"] == "end"]
    assert ends == ["interrupted", "done"]
    assert tables(tmp_path) == alone
    assert nothing_left_over(tmp_path)


def test_a_scheduler_that_stays_away_leaves_its_slides_interrupted(slides, loose, tmp_path):
    address, scheduler, _ = loose
    first = scheduler()
    reached(address)
    killer = threading.Timer(2, first.kill)
    killer.start()
    reports = go(slides, tmp_path, "ab", address, patience_s=1)
    assert [report.status for report in reports] == ["interrupted"] * 2
    assert "Run the same command again" in reports[0].error["message"]


def test_the_command_ends_with_75_when_the_scheduler_stays_away(slides, tmp_path, monkeypatch):
    def leave(jobs, _load, **_how):
        reports = [refuse(job, JobError("gone")) for job in jobs]
        reports[0].status = "interrupted"
        return reports

    monkeypatch.setattr("wsi_pipeline.api.run_on_dask", leave)
    monkeypatch.setattr("wsi_pipeline.api.require_scheduler", lambda _address: None)
    some = [str(slides[name]) for name in "ab"]
    result = CliRunner().invoke(run, [*some, "--out", str(tmp_path / "out"), "--dask", "tcp://h:1"])
    assert result.exit_code == 75


@pytest.mark.parametrize(
    ("address", "more", "message"),
    [
        ("tcp://127.0.0.1:1", (), "no Dask scheduler answers at 'tcp://127.0.0.1:1'"),
        ("nonsense", (), "is the address such as"),
        ("foo://host:1", (), "is the address such as"),
        ("tcp://127.0.0.1:1", ("--device", "cuda:all"), "each worker runs on one GPU"),
    ],
)
def test_wrong_use_is_code_2_and_says_what_is_right(
    slides, tmp_path, monkeypatch, address, more, message
):
    monkeypatch.setattr(connection, "CONNECT_S", 0.5)
    arguments = [str(slides["a"]), "--out", str(tmp_path / "out"), "--dask", address, *more]
    result = CliRunner().invoke(run, arguments)
    assert result.exit_code == 2
    assert message in result.output
    assert not (tmp_path / "out").exists()


def test_without_dask_it_says_what_to_install(slides, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "distributed", None)
    with pytest.raises(JobError, match=r"pip install 'wsi-pipeline\[cluster\]'"):
        go(slides, tmp_path, "a", "tcp://h:1")
