"""Kills the work at a slide at points spread over all its stages, and runs it again.

::

    python -m benchmarks.kills                          # 240 points
    python -m benchmarks.kills --points 60 --keep DIR   # fewer; what went wrong stays in DIR

Every point is a process of its own, forked from one that has run the job before, and ended by
SIGKILL: at a change to the file system (counted by an audit hook: files opened for writing,
renames, removals, folders, syncs), at one that leaves the file it was about half written, or after
a time. Then the job is run again (some of these runs are killed, too), and must end as if
nothing had happened: the same bytes of tables, maps and pictures, a report that says done, and no
other file anywhere.

Ends with 1 if any point does not.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import os
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

STAGES = ("begin", "open", "tissue", "predict", "polygonize", "seal", "write", "report", "end")
"""Seal and report are parts of the pipeline's stage "write" and of the end of a try."""
TIMES_SHARE = 6
"""One point in so many is a time, the others are changes to the file system."""
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
CHANGES = {"os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.link", "os.truncate"}
PATIENCE_S = 120
TILE_PX = 384
TRIES = 5
"""How often a process is begun for a point that it does not live to see."""


@dataclass(frozen=True, kw_only=True)
class Scenario:
    """A command, and the state of the results folder that it is given in."""

    name: str
    start: Path | None
    """A results folder to begin with; None: an empty one."""
    work: Callable[[Path], bool]
    """Runs the command on a results folder; whether every slide is done."""
    weight: float = 1.0
    """Of its number of points."""
    wanted: dict[str, bytes] = field(default_factory=dict)
    """What lies in the folder after an undisturbed run, but for what holds times."""
    changes: tuple[tuple[str, str], ...] = ()
    """Stage and name of each change to the file system that it makes."""
    seconds: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Point:
    """When a process ends."""

    at: int | None = None
    """Before the change of this number."""
    is_torn: bool = False
    """Half of the file that the change is about is then missing."""
    after_s: float | None = None

    def earlier(self) -> Point:
        """Return another point, for a process that was done before its time came."""
        if self.at is not None:
            return replace(self, at=self.at * 3 // 4)
        return replace(self, after_s=(self.after_s or 0) * 0.6)


class Countdown:
    """Counts the changes this process makes to files in a folder, and ends it at one of them."""

    def __init__(self, folder: Path, point: Point | None, pipe: int) -> None:
        self.stage = "begin"
        self._folder = os.fspath(folder)
        self._point = point
        self._pipe = pipe
        self._lock = threading.RLock()  # tearing a file is a change, too
        self._count = 0

    def install(self) -> None:
        """Watch from now on; audit hooks cannot be taken out again."""
        sys.addaudithook(self._audit)
        fsync = os.fsync

        def synced(descriptor: int) -> None:
            self._hit("os.fsync", Path(f"/proc/self/fd/{descriptor}").readlink())
            fsync(descriptor)

        os.fsync = synced

    def enter(self, stage: str) -> None:
        """Note which stage the work is in."""
        self.stage = stage
        os.write(self._pipe, f"{stage}\t\n".encode())

    def _audit(self, event: str, args: tuple[Any, ...]) -> None:
        is_change = event in CHANGES or (
            event == "open" and isinstance(args[2], int) and args[2] & WRITES
        )
        if is_change:
            self._hit(event, args[0])

    def _hit(self, event: str, path: object) -> None:
        text = os.fsdecode(path) if isinstance(path, str | bytes | os.PathLike) else ""
        # Names without a folder: removals by an open folder (shutil.rmtree).
        if not text.startswith(self._folder) and "/" in text:
            return
        with self._lock:
            os.write(self._pipe, f"{self.stage}\t{event}\n".encode())
            point = self._point
            if point is not None and self._count == point.at:
                self._point = None
                # Threads may have come in another order: what was synced before is not torn.
                renames = event == "os.rename" and Path(text).is_file()
                if point.is_torn and renames:
                    os.truncate(text, Path(text).stat().st_size // 2)
                kill()
            self._count += 1


def kill() -> NoReturn:
    """End this process as a crash does."""
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError


@contextmanager
def told(countdown: Countdown) -> Iterator[None]:
    """Let the pipeline tell a countdown which stage it is in."""
    from wsi_pipeline.attempt import Attempt
    from wsi_pipeline.store import PredictionStore

    stage, close, seal = Attempt.stage, Attempt.close, PredictionStore.seal

    @contextmanager
    def staged(self: Attempt, name: str) -> Iterator[None]:
        before = countdown.stage
        countdown.enter(name)
        with stage(self, name):
            yield
        countdown.enter(before)

    def closed(self: Attempt, *args: Any, **how: Any) -> Any:
        countdown.enter("report")
        try:
            return close(self, *args, **how)
        finally:
            countdown.enter("end")

    def sealed(self: PredictionStore) -> PredictionStore:
        before = countdown.stage
        countdown.enter("seal")
        try:
            return seal(self)
        finally:
            countdown.enter(before)

    Attempt.stage, Attempt.close, PredictionStore.seal = staged, closed, sealed  # type: ignore[method-assign]
    try:
        yield
    finally:
        Attempt.stage, Attempt.close, PredictionStore.seal = stage, close, seal  # type: ignore[method-assign]


def in_child(work: Callable[[Path], bool], out: Path, point: Point | None) -> Ended:
    """Do work in a process of its own, which may be killed."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        code = 3
        try:
            os.close(reading)
            countdown = Countdown(out, point, writing)
            with told(countdown):
                countdown.install()
                code = 0 if work(out) else 2
        except BaseException:
            import traceback

            traceback.print_exc()
        finally:
            os._exit(code)
    os.close(writing)
    limit_s = PATIENCE_S if point is None or point.after_s is None else point.after_s
    timer = threading.Timer(limit_s, os.kill, (child, signal.SIGKILL))
    timer.start()
    begun = time.perf_counter()
    with os.fdopen(reading, "rb") as pipe:
        lines = pipe.read().decode(errors="replace").splitlines()
    _, status = os.waitpid(child, 0)
    timer.cancel()
    timer.join()
    told_of = [line.split("\t") for line in lines if "\t" in line]
    return Ended(
        killed=os.WIFSIGNALED(status),
        code=None if os.WIFSIGNALED(status) else os.WEXITSTATUS(status),
        stage=told_of[-1][0] if told_of else "begin",
        changes=tuple((stage, event) for stage, event in told_of if event),
        seconds=time.perf_counter() - begun,
    )


@dataclass(frozen=True, kw_only=True)
class Ended:
    """How a process ended."""

    killed: bool
    code: int | None
    """0: every slide is done."""
    stage: str
    """The last that it was in."""
    changes: tuple[tuple[str, str], ...]
    seconds: float


def contents(out: Path) -> dict[str, bytes]:
    """Read a results folder; what holds times (reports, logs, the summary) by its names alone."""
    timed = ("reports", "logs", "run.json", "summary")
    return {
        name: b"" if name.startswith(timed) else path.read_bytes()
        for path in sorted(out.rglob("*"))
        if path.is_file()
        for name in [path.relative_to(out).as_posix()]
    }


def whole_after_kill(out: Path, wanted: dict[str, bytes]) -> list[str]:
    """Return the files under final names that are not what they will be in the end."""
    finals = ("objects/", "tissue/", "previews/", "maps/")
    return [
        name
        for name, data in contents(out).items()
        if name.startswith(finals) and "/." not in name and name in wanted and data != wanted[name]
    ]


def try_point(scenario: Scenario, point: Point, second: Point | None, folder: Path) -> Outcome:
    """Kill a scenario at a point (and its recovery at another), and finish it."""
    out = folder / "out"
    if scenario.start is None:
        out.mkdir(parents=True)
    else:
        shutil.copytree(scenario.start, out)
    first = in_child(scenario.work, out, point)
    wrong = whole_after_kill(out, scenario.wanted)
    complaints = [f"half under its final name: {name}" for name in wrong]
    if not first.killed and first.code != 0:
        complaints.append(f"ended with {first.code} before the point")
    if second is not None:
        in_child(scenario.work, out, second)
    last = in_child(scenario.work, out, None)
    if last.code != 0:
        complaints.append(f"the last run ended with {'a signal' if last.killed else last.code}")
    found = contents(out)
    complaints += [f"left over: {name}" for name in sorted(found.keys() - scenario.wanted.keys())]
    complaints += [f"missing: {name}" for name in sorted(scenario.wanted.keys() - found.keys())]
    both = found.keys() & scenario.wanted.keys()
    complaints += [f"other bytes: {n}" for n in sorted(both) if found[n] != scenario.wanted[n]]
    return Outcome(stage=first.stage, killed=first.killed, complaints=tuple(complaints))


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What came of a kill point."""

    stage: str
    killed: bool
    """False: the process was done before its time came."""
    complaints: tuple[str, ...]


def measured(scenario: Scenario, folder: Path) -> Scenario:
    """Run a scenario undisturbed; note what it leaves, what it changes and how long it takes."""
    out = folder / "out"
    if scenario.start is None:
        out.mkdir(parents=True)
    else:
        shutil.copytree(scenario.start, out)
    ended = in_child(scenario.work, out, None)
    if ended.code != 0:
        raise RuntimeError(f"{scenario.name}: the undisturbed run ended with {ended.code}")
    return replace(scenario, wanted=contents(out), changes=ended.changes, seconds=ended.seconds)


def choose(scenario: Scenario, count: int, rng: np.random.Generator) -> list[Point]:
    """Choose kill points: times, and changes spread evenly over the stages that make any."""
    times = count // TIMES_SHARE
    points = [
        Point(after_s=scenario.seconds * (number + rng.random()) / times) for number in range(times)
    ]
    by_stage: dict[str, list[int]] = defaultdict(list)
    for number, (stage, _) in enumerate(scenario.changes):
        by_stage[stage].append(number)
    left = count - times
    chosen: list[int] = []
    for index, numbers in enumerate(sorted(by_stage.values(), key=len)):
        share = min(len(numbers), -(-(left - len(chosen)) // (len(by_stage) - index)))
        places = np.linspace(0, len(numbers) - 1, share).round().astype(int)
        chosen += [numbers[place] for place in places]
    extra = left - len(chosen)
    # What is renamed was just written; a kill may come before its last byte.
    torn = [n for n, (_, event) in enumerate(scenario.changes) if event == "os.rename"]
    torn = [int(n) for n in rng.permutation(torn)][: max(extra, len(chosen) // 4)]
    points += [Point(at=number, is_torn=True) for number in torn]
    plain = [number for number in chosen if number not in torn] + chosen
    points += [Point(at=number) for number in plain[: count - len(points)]]
    return points[:count]


def scenarios(folder: Path) -> list[Scenario]:
    """Make a slide and the results folders to begin with, and list what is done with them."""
    from benchmarks.standin import StandIn
    from wsi_pipeline.synth import write_slide

    slide = folder / "a.svs"
    write_slide(slide, width=900, height=700, mpp=0.5, seed=3, truth=False)
    glass = folder / "b.svs"  # too little for tissue to be found
    write_slide(glass, width=320, height=256, mpp=0.5, seed=3, truth=False)
    on_gpu = StandIn(tile_px=TILE_PX, device="cuda:0")

    def run(out: Path, predictor: StandIn | None = None, **how: Any) -> bool:
        return run_stand_in(slide, out, predictor or StandIn(tile_px=TILE_PX), **how)

    done, half = folder / "done", folder / "half"
    run(done)
    run(half, stop_after=3)
    return [
        Scenario(name="first run", start=None, work=run),
        Scenario(name="resumed", start=half, work=run),
        Scenario(name="overwrite", start=done, work=lambda out: run(out, overwrite=True)),
        Scenario(name="drop maps", start=None, work=lambda out: run(out, keep_maps=False)),
        Scenario(name="objects beside", start=None, work=lambda out: run(out, on_gpu)),
        Scenario(
            name="command",
            start=None,
            work=lambda out: run_command([slide, glass], out),
            weight=0.5,
        ),
    ]


def run_stand_in(
    slide: Path,
    out: Path,
    predictor: Any,
    *,
    overwrite: bool = False,
    keep_maps: bool = True,
    stop_after: int | None = None,
) -> bool:
    """Run one slide with a stand-in for the network; whether it is done."""
    from wsi_pipeline.engines import run_slides
    from wsi_pipeline.job import SlideJob

    job = SlideJob(
        path=str(slide),
        slide_id="a",
        out=out,
        model_name="stand-in",
        model_digest="0" * 64,
        keep_maps=keep_maps,
    )
    watcher = Stopper(stop_after)
    (report,) = run_slides(
        [job],
        predictor,
        watcher=watcher,
        stop=lambda: watcher.is_stopped,
        workers=2,
        overwrite=overwrite,
    )
    return report.done


class Stopper:
    """Asks to stop after so many blocks."""

    def __init__(self, after: int | None) -> None:
        self._after = after
        self.is_stopped = False

    def start(self, job: object) -> None:
        """A slide is begun."""

    def advance(self, job: object, stage: str, done: int, total: int) -> None:
        """A stage has come further."""
        if self._after is not None and stage == "predict" and done >= self._after:
            self.is_stopped = True

    def finish(self, job: object, report: object, *, skipped: bool) -> None:
        """A slide has ended."""


def run_command(slides: Sequence[Path], out: Path) -> bool:
    """Run slides with a real network, as the command does: run.json and all."""
    import wsi_pipeline as wsi

    reports = wsi.run(
        slides, out=out, model="stain-baseline", device="cpu", tile_size=512, workers=1
    )
    return all(report.done for report in reports)


def settle() -> None:
    """End the threads that a run leaves behind: a process with threads must not be forked."""
    from zarr.core import sync

    loop = sync.loop[0]
    if loop is not None:
        asyncio.run_coroutine_threadsafe(loop.shutdown_default_executor(), loop).result()
    sync.cleanup_resources()
    others = [
        thread.name for thread in threading.enumerate() if thread is not threading.main_thread()
    ]
    if others:
        raise RuntimeError(f"threads are left that a fork would lose: {others}")
    gc.collect()
    gc.freeze()  # or every child would copy what its collector looks at


def prepare() -> None:
    """Make runs cheap, and let a small slide do what a large one does."""
    import torch

    from wsi_pipeline import attempt, pipeline
    from wsi_pipeline.instances import spool

    torch.set_num_threads(1)
    # Drawing is most of the time here, giving memory back much of the rest; neither changes files.
    pipeline.draw_preview = lambda picture, *_, **__: picture[::4, ::4]
    attempt.release_memory = lambda: None
    spool.HELD_BYTES = 1  # a file beside the table, as for a slide of many objects


def walk(folder: Path, *, points: int, seed: int) -> dict[str, list[Outcome]]:
    """Go through kill points; return their outcomes by scenario."""
    prepare()
    rng = np.random.default_rng(seed)
    listed = scenarios(folder)
    listed[-1].work(folder / "warm")
    settle()
    outcomes: dict[str, list[Outcome]] = {}
    for index, plan in enumerate(listed):
        scenario = measured(plan, folder / f"whole {index}")
        left = sum(other.weight for other in listed[index:])
        share = round((points - sum(map(len, outcomes.values()))) * scenario.weight / left)
        outcomes[scenario.name] = [
            try_until_killed(scenario, point, again(scenario, number, rng), folder / str(number))
            for number, point in enumerate(choose(scenario, share, rng))
        ]
        shutil.rmtree(folder / f"whole {index}")
    return outcomes


def again(scenario: Scenario, number: int, rng: np.random.Generator) -> Point | None:
    """Choose where the run after a kill is killed, too; two in five are."""
    if number % 5 == 0:
        return Point(after_s=scenario.seconds * rng.random())
    return Point(at=int(rng.integers(len(scenario.changes)))) if number % 5 == 1 else None


def try_until_killed(
    scenario: Scenario, point: Point, second: Point | None, folder: Path
) -> Outcome:
    """Try a point, and earlier ones if the process is done before; keep what went wrong."""
    for _ in range(TRIES):
        outcome = try_point(scenario, point, second, folder)
        if outcome.complaints:
            print(f"{scenario.name}: {point}, then {second}: {outcome.complaints}", flush=True)
            folder.rename(folder.with_name(f"wrong {scenario.name} {folder.name}"))
            break
        shutil.rmtree(folder)
        if outcome.killed:
            break
        point = point.earlier()
    return outcome


def table(outcomes: dict[str, list[Outcome]]) -> str:
    """Return the numbers of clean kill points by scenario and stage."""
    lines = [f"{'':16}" + "".join(f"{stage:>11}" for stage in STAGES) + f"{'too late':>11}"]
    for name, own in outcomes.items():
        counts = Counter(o.stage if o.killed else "too late" for o in own if not o.complaints)
        cells = [f"{counts[stage]:>11}" for stage in (*STAGES, "too late")]
        lines.append(f"{name:16}" + "".join(cells))
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    """Run as a command."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.kills", description=__doc__)
    parser.add_argument("--points", type=int, default=240)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep", type=Path, help="folder for what went wrong")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.keep or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        outcomes = walk(folder.resolve(), points=options.points, seed=options.seed)
    listed = [outcome for own in outcomes.values() for outcome in own]
    clean = sum(outcome.killed and not outcome.complaints for outcome in listed)
    print(table(outcomes))
    print(f"{clean} of {len(listed)} kill points: same bytes")
    return 0 if clean == len(listed) else 1


if __name__ == "__main__":
    sys.exit(main())
