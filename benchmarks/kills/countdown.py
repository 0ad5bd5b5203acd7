"""A process that ends at a chosen change to the file system, or after a time."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NoReturn

__all__ = ["STAGES", "Ended", "Point", "in_child"]

STAGES = ("begin", "open", "tissue", "predict", "polygonize", "seal", "write", "report", "end")
"""Seal and report are parts of the pipeline's stage "write" and of the end of a try."""
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
CHANGES = {"os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.link", "os.truncate"}
PATIENCE_S = 120


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
