"""Runs cases, some one after another in a forked process that may hold and take only so much.

The process that forks has imported everything and has one thread. A fork of it costs more than
most cases, so it serves several, until one of them does not end clean; those behind it get another
process. What a case does comes back through a pipe; a process that ends without a word was killed.
"""

from __future__ import annotations

import json
import math
import os
import resource
import select
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from wsi_pipeline.errors import WsiPipelineError
from wsi_pipeline.machine import release_memory
from wsi_pipeline.slide import outages

__all__ = ["CLEAN", "Case", "Limits", "Outcome", "run_cases"]

CLEAN = ("fine", "refused")
"""How a clean case ends: with a result, or with one of our errors."""


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What one case may use."""

    memory_mib: int = 1024
    """Writable memory beyond what the process holds when the case begins."""
    cpu_s: int = 20
    """Processor time, of all threads."""
    wall_s: float = 60.0
    """Time until the process is killed."""
    file_mib: int = 64
    """The largest file it may write."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """One hostile input, to be made and used in a process with limits."""

    target: str
    """Name of the target."""
    number: int
    """With the seed of the campaign, what the case is drawn from."""
    make: Callable[[Path], str]
    """Writes the input into a folder; returns what was done to it in a few words."""
    use: Callable[[Path], None]
    """Does with the input what the pipeline would."""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """How one case ended."""

    target: str
    number: int
    how: str
    """``fine``, ``refused``, ``accident``, ``killed``, ``hang`` or ``harness``."""
    code: str = ""
    """Of our error."""
    detail: str = ""
    """The message, or the traceback."""
    done: str = ""
    """What was done to the input."""
    seconds: float = 0.0
    memory_mib: float = 0.0
    """Resident memory at its highest, beyond that at the beginning."""

    @property
    def is_clean(self) -> bool:
        """Whether the case ended as every case should."""
        return self.how in CLEAN


def run_cases(
    cases: Sequence[Case],
    *,
    limits: Limits,
    jobs: int,
    together: int = 1,
    scratch: Path | None = None,
) -> Iterator[Outcome]:
    """Run cases; yield how each ended, in the order in which they end.

    Args:
        cases: to be run.
        limits: of each.
        jobs: processes at a time.
        together: the most cases that a process runs one after another.
        scratch: where the inputs are written.
    """
    with tempfile.TemporaryDirectory(prefix="wsi-fuzz-", dir=scratch) as root:
        waiting = [cases[at : at + together] for at in range(0, len(cases), together)]
        waiting.reverse()
        running: dict[int, _Group] = {}
        try:
            while waiting or running:
                while waiting and len(running) < jobs:
                    group = _start(waiting.pop(), Path(root), limits)
                    running[group.pipe] = group
                for group in _wait(running, limits):
                    yield from group.listen()
                    if group.is_over or group.is_late(limits):
                        del running[group.pipe]
                        yield from group.end()
                        if group.left:
                            waiting.append(group.left)
        finally:
            for group in running.values():
                list(group.end())


def _start(cases: Sequence[Case], root: Path, limits: Limits) -> _Group:
    folder = Path(tempfile.mkdtemp(dir=root))
    reading, writing = os.pipe()
    os.set_blocking(reading, False)
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid == 0:
        os.close(reading)
        try:
            _work(cases, folder, limits, writing)
        finally:
            os._exit(0)
    os.close(writing)
    return _Group(left=list(cases), pid=pid, pipe=reading, folder=folder, begun=time.monotonic())


def _wait(running: dict[int, _Group], limits: Limits) -> list[_Group]:
    """Wait until a process has something to say or its time is over; return those."""
    left = min(group.begun + limits.wall_s - time.monotonic() for group in running.values())
    ready, _, _ = select.select(list(running), [], [], max(0.0, left))
    return [g for g in list(running.values()) if g.pipe in ready or g.is_late(limits)]


@dataclass(kw_only=True)
class _Group:
    """A process and its cases: what the parent knows of them."""

    left: list[Case]
    """The first one is at work."""
    pid: int
    pipe: int
    folder: Path
    begun: float
    """When the first one began."""
    facts: dict[str, Any] = field(default_factory=dict)
    """What is said of it so far."""
    is_over: bool = False
    """Whether the process has ended."""
    _said: bytes = b""
    """The beginning of a line."""
    _has_ended_one: bool = False

    def is_late(self, limits: Limits) -> bool:
        """Whether the case at work has had its time."""
        return time.monotonic() - self.begun > limits.wall_s

    def listen(self) -> Iterator[Outcome]:
        """Hear what the process says; yield the outcomes of cases that have ended."""
        try:
            part = os.read(self.pipe, 1 << 16)
        except BlockingIOError:
            return
        self.is_over = not part
        *lines, self._said = (self._said + part).split(b"\n")
        for line in lines:
            self.facts |= json.loads(line)
            if "how" in self.facts:
                yield self._outcome()

    def end(self) -> Iterator[Outcome]:
        """Wait for the process, which is killed if it still runs; yield what it died of."""
        if not self.is_over:
            os.kill(self.pid, signal.SIGKILL)
        _, status = os.waitpid(self.pid, 0)
        os.close(self.pipe)
        shutil.rmtree(self.folder, ignore_errors=True)
        if not self.facts and self._has_ended_one:
            return  # it has left after a case that was not clean, or all are done
        seconds = time.monotonic() - self.begun
        code = os.waitstatus_to_exitcode(status)
        name = signal.Signals(-code).name if code < 0 else "exit"
        # The kernel's own limit of processor time is a time-out, too.
        hung = not self.is_over or name == "SIGXCPU"
        self.facts["how"] = "hang" if hung else "killed"
        self.facts["detail"] = f"{name} after {seconds:.1f} s"
        yield self._outcome()

    def _outcome(self) -> Outcome:
        case, now = self.left.pop(0), time.monotonic()
        outcome = Outcome(
            target=case.target, number=case.number, seconds=now - self.begun, **self.facts
        )
        self.facts, self.begun, self._has_ended_one = {}, now, True
        return outcome


def _work(cases: Sequence[Case], folder: Path, limits: Limits, pipe: int) -> None:
    """Run the cases of a process, until one does not end clean."""
    _silence()
    outages.PAUSES_S = ()  # for a disk that fails, which is none of the cases here
    for number, case in enumerate(cases):
        place = folder / str(number)
        place.mkdir()
        if _run(case, place, limits, pipe) not in CLEAN:
            return
        shutil.rmtree(place, ignore_errors=True)
        release_memory()


def _run(case: Case, folder: Path, limits: Limits, pipe: int) -> str:
    """Make and use the input; tell the parent what was done, then how it ended."""
    _unconfine()
    try:
        done = case.make(folder)
    except BaseException:
        _tell(pipe, how="harness", detail=traceback.format_exc())
        return "harness"
    _tell(pipe, done=done)
    begin_mib = _peak_mib()
    _confine(limits)
    how, code, detail = "fine", "", ""
    try:
        case.use(folder)
    except WsiPipelineError as error:
        how, code, detail = "refused", error.code, str(error)
    except BaseException:
        how, detail = "accident", traceback.format_exc()
    more_mib = round(_peak_mib() - begin_mib, 1)
    _tell(pipe, how=how, code=code, detail=detail[-4000:], memory_mib=more_mib)
    return how


def _tell(pipe: int, **facts: object) -> None:
    os.write(pipe, json.dumps(facts).encode() + b"\n")


def _silence() -> None:
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.dup2(nowhere, 2)


def _confine(limits: Limits) -> None:
    # RLIMIT_DATA counts writable memory when it is asked for, touched or not; RLIMIT_AS would
    # also count the libraries and what a thread's heap reserves.
    page = resource.getpagesize()
    held = int(Path("/proc/self/statm").read_text().split()[5]) * page
    _limit(resource.RLIMIT_DATA, held + (limits.memory_mib << 20))
    _limit(resource.RLIMIT_CPU, math.ceil(time.process_time()) + limits.cpu_s)
    _limit(resource.RLIMIT_FSIZE, limits.file_mib << 20)
    _limit(resource.RLIMIT_CORE, 0)


def _unconfine() -> None:
    """Make an input without the limits of the case before it, and begin its peak anew."""
    for kind in (resource.RLIMIT_DATA, resource.RLIMIT_CPU, resource.RLIMIT_FSIZE):
        _limit(kind, sys.maxsize)
    Path("/proc/self/clear_refs").write_text("5")


def _limit(kind: int, most: int) -> None:
    _, hard = resource.getrlimit(kind)
    most = most if hard == resource.RLIM_INFINITY else min(most, hard)
    resource.setrlimit(kind, (most, hard))


def _peak_mib() -> float:
    """Return the most resident memory since the input was begun."""
    (line,) = (s for s in Path("/proc/self/status").read_text().split("\n") if "VmHWM" in s)
    return int(line.split()[1]) / 1024
