"""Runs cases, each in a forked process that may hold and take only so much.

The process that forks has imported everything and has one thread, so a case costs a fork and
itself. What a case does comes back through a pipe; a process that ends without a word was killed.
"""

from __future__ import annotations

import json
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

from wsi_pipeline.errors import WsiPipelineError

__all__ = ["CLEAN", "Case", "Limits", "Outcome", "run_cases"]

CLEAN = ("fine", "refused")
"""How a clean case ends: with a result, or with one of our errors."""


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What one case may use."""

    memory_mib: int = 1024
    """Writable memory beyond what the process holds when it is forked."""
    cpu_s: int = 20
    """Processor time, of all threads."""
    wall_s: float = 60.0
    """Time until the process is killed."""
    file_mib: int = 64
    """The largest file it may write."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """One hostile input, to be made and used in a process of its own."""

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
    """Resident memory at its highest, beyond that of the fork."""

    @property
    def is_clean(self) -> bool:
        """Whether the case ended as every case should."""
        return self.how in CLEAN


@dataclass(kw_only=True)
class _Running:
    case: Case
    pid: int
    pipe: int
    folder: Path
    begun: float
    said: bytearray = field(default_factory=bytearray)


def run_cases(
    cases: Sequence[Case], *, limits: Limits, jobs: int, scratch: Path | None = None
) -> Iterator[Outcome]:
    """Run cases, some at a time; yield how each ended, in the order in which they end."""
    with tempfile.TemporaryDirectory(prefix="wsi-fuzz-", dir=scratch) as root:
        waiting = list(reversed(cases))
        running: dict[int, _Running] = {}
        try:
            while waiting or running:
                while waiting and len(running) < jobs:
                    one = _start(waiting.pop(), Path(root), limits)
                    running[one.pipe] = one
                yield from _collect(running, limits)
        finally:
            for one in running.values():
                os.kill(one.pid, signal.SIGKILL)
                _end(one)


def _start(case: Case, root: Path, limits: Limits) -> _Running:
    folder = Path(tempfile.mkdtemp(dir=root))
    reading, writing = os.pipe()
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid == 0:
        os.close(reading)
        try:
            _child(case, folder, limits, writing)
        finally:
            os._exit(0)
    os.close(writing)
    return _Running(case=case, pid=pid, pipe=reading, folder=folder, begun=time.monotonic())


def _collect(running: dict[int, _Running], limits: Limits) -> Iterator[Outcome]:
    """Wait until a case has something to say or its time is over."""
    now = time.monotonic()
    left = min(one.begun + limits.wall_s - now for one in running.values())
    ready, _, _ = select.select(list(running), [], [], max(0.0, left))
    for pipe in ready:
        one = running[pipe]
        part = os.read(pipe, 1 << 16)
        one.said += part
        if not part:
            del running[pipe]
            yield _outcome(one, _end(one))
    for pipe, one in list(running.items()):
        if time.monotonic() - one.begun > limits.wall_s:
            os.kill(one.pid, signal.SIGKILL)
            del running[pipe]
            _end(one)
            yield _outcome(one, None)


def _end(one: _Running) -> int:
    _, status = os.waitpid(one.pid, 0)
    os.close(one.pipe)
    shutil.rmtree(one.folder, ignore_errors=True)
    return os.waitstatus_to_exitcode(status)


def _outcome(one: _Running, status: int | None) -> Outcome:
    seconds = time.monotonic() - one.begun
    lines = [json.loads(line) for line in bytes(one.said).splitlines() if line.endswith(b"}")]
    facts = {key: value for line in lines for key, value in line.items()}
    if status is None:
        facts["how"], facts["detail"] = "hang", f"still at it after {seconds:.0f} s"
    elif status < 0:
        name = signal.Signals(-status).name
        # The kernel's own limit of processor time is a time-out, too.
        facts["how"] = "hang" if name in ("SIGXCPU",) else "killed"
        facts["detail"] = f"{name} after {seconds:.1f} s"
    facts.setdefault("how", "killed")
    return Outcome(target=one.case.target, number=one.case.number, seconds=seconds, **facts)


def _child(case: Case, folder: Path, limits: Limits, pipe: int) -> None:
    """Make and use the input; tell the parent what was done, then how it ended."""
    _silence()
    try:
        done = case.make(folder)
    except BaseException:
        _tell(pipe, how="harness", detail=traceback.format_exc())
        return
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
    _limit(resource.RLIMIT_CPU, limits.cpu_s)
    _limit(resource.RLIMIT_FSIZE, limits.file_mib << 20)
    _limit(resource.RLIMIT_CORE, 0)


def _limit(kind: int, most: int) -> None:
    _, hard = resource.getrlimit(kind)
    most = most if hard == resource.RLIM_INFINITY else min(most, hard)
    resource.setrlimit(kind, (most, hard))


def _peak_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
