"""Work and its limit, measured in turn; medians of what was measured."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

from wsi_pipeline.errors import Interrupted

__all__ = ["Clock", "Limit", "Measured", "Stage", "Stopwatch", "in_threads", "measure"]

Clock = Callable[[], float]
"""Returns seconds since some moment; ``time.perf_counter``, or a stand-in for it."""
Item = TypeVar("Item")


@dataclass(frozen=True, kw_only=True, slots=True)
class Limit:
    """The least time that a stage can take here."""

    name: str
    """What sets it."""
    seconds: float
    """How long that takes."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Stage:
    """A part of the pipeline that can be run alone."""

    name: str
    """One word."""
    work: Callable[[Clock], float]
    """Does the work once; returns the seconds that count."""
    limit: Callable[[Clock], Limit] | None = None
    """Measures the limit of the same work; None: the slowest stage before it in its round."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Measured:
    """A stage, measured in several rounds; all numbers are medians of the rounds."""

    name: str
    """Of the stage."""
    rounds: tuple[float, ...]
    """Seconds of the work in each round."""
    limits: tuple[Limit, ...]
    """The limit in each round."""

    @property
    def seconds(self) -> float:
        """How long the work takes."""
        return statistics.median(self.rounds)

    @property
    def limit(self) -> Limit:
        """The limit's usual name, and its time."""
        return Limit(
            name=statistics.mode(limit.name for limit in self.limits),
            seconds=statistics.median(limit.seconds for limit in self.limits),
        )

    @property
    def share(self) -> float:
        """Limit over work, 1 at the limit; compared within a round, where both saw one machine."""
        ratios = (
            limit.seconds / seconds if seconds else 0.0
            for limit, seconds in zip(self.limits, self.rounds, strict=True)
        )
        return statistics.median(ratios)


class Stopwatch:
    """Adds up the time spent inside its blocks."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self.seconds = 0.0

    @contextmanager
    def running(self) -> Iterator[None]:
        """Count the time of a block."""
        begun = self._clock()
        yield
        self.seconds += self._clock() - begun


def measure(
    stages: Sequence[Stage],
    repeat: int,
    *,
    clock: Clock,
    stop: Callable[[], bool] = lambda: False,
    say: Callable[[str], None] = lambda _: None,
) -> list[Measured]:
    """Run every stage and its limit in turn, and all of them again.

    Args:
        stages: in the order in which they are run.
        repeat: rounds.
        clock: what time it is.
        stop: asked before each work.
        say: told of each work when it is done.

    Raises:
        Interrupted: ``stop()`` was true.
    """
    rounds: list[list[float]] = [[] for _ in stages]
    limits: list[list[Limit]] = [[] for _ in stages]
    for number in range(1, repeat + 1):
        for stage, seconds, least in zip(stages, rounds, limits, strict=True):
            if stop():
                raise Interrupted("asked to stop; nothing was reported")
            slowest = max((done[-1] for done in rounds if len(done) == number), default=0.0)
            seconds.append(stage.work(clock))
            least.append(
                stage.limit(clock)
                if stage.limit is not None
                else Limit(name="its slowest stage alone", seconds=slowest)
            )
            say(
                f"round {number} of {repeat}: {stage.name} {seconds[-1]:.3f} s, "
                f"limit {least[-1].seconds:.3f} s"
            )
    return [
        Measured(name=stage.name, rounds=tuple(seconds), limits=tuple(least))
        for stage, seconds, least in zip(stages, rounds, limits, strict=True)
    ]


def in_threads(work: Callable[[Item], object], items: Sequence[Item], threads: int) -> None:
    """Do something with each item, several at once; the first error is raised."""
    with ThreadPoolExecutor(max(1, threads)) as pool:
        for future in [pool.submit(work, item) for item in items]:
            future.result()
