"""How fast the slides of a run are done, how busy the devices are, and how long it will take.

Hosts' clocks may differ, so no two of them are compared: a slide ended when its report was
written, by the file system's clock, and had begun as long before as its own stopwatch says.
A copy of a results folder must keep the times of its files (``cp -p``, ``rsync -t``).
"""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from wsi_pipeline.cohort import Cohort, SlideState
from wsi_pipeline.job import RunReport

__all__ = ["Pace", "duration", "measure_pace", "slide_bytes"]

LATELY_S = 3600.0
"""What counts as lately."""
Interval = tuple[float, float]
Worker = tuple[str, int]
"""A process: host and number."""


@dataclass(frozen=True, kw_only=True)
class Pace:
    """How fast a run goes; None is what nothing is known of yet."""

    slides_per_h: float | None = None
    """Slides done an hour in which any slide was in work; pauses of the whole run do not count."""
    mm2_per_h: float | None = None
    """Tissue, the same way."""
    slides_per_h_lately: float | None = None
    """Slides that ended in the last hour, or since the run began if that is less."""
    mm2_per_h_lately: float | None = None
    """Tissue, the same way."""
    device_busy: float | None = None
    """Share of the time, 0 to 1, in which the devices computed: seconds in which the network ran
    (of a CUDA device by its own clock) in the seconds in which its process had a slide in work,
    over the slides that ended. Reading, extracting and writing beside it show as idle."""
    workers: int = 0
    """Processes that are at work now."""
    left_s: float | None = None
    """Estimate of the seconds until all slides are done, if the workers go on as before."""
    left_by: str = ""
    """What the estimate goes by: ``bytes`` of the slides' files, or ``slides``."""


def measure_pace(cohort: Cohort, sizes: Mapping[str, float] | None = None) -> Pace:
    """Measure how fast a run goes.

    The time left is the work left, in bytes of slides or in slides, times the seconds that a
    process has spent on one so far, divided by the number of processes now at work; at least
    what the largest slide left takes. The begun part of slides at work is taken off: the share
    of the stage ``predict`` that is behind them. There is no estimate before a slide is done or
    while nobody works. Failed slides do not count, and tries that were killed cost nothing here.

    Args:
        cohort: the run.
        sizes: bytes of the slides' files by id, see :func:`slide_bytes`; None: not known.
    """
    done = [own for own in cohort.states if own.state == "done" and _interval(own)]
    workers = {_worker(own) for own in cohort.states if own.state == "running"}
    left_s = _left_s(cohort, done, sizes, len(workers)) if workers and done else None
    lately = [own for own in done if _end(own) > cohort.now - LATELY_S]
    first = min((span[0] for span in map(_interval, done) if span), default=cohort.now)
    window_h = min(LATELY_S, max(1.0, cohort.now - first)) / 3600
    hours = _covered(span for span in map(_interval, done) if span) / 3600
    return Pace(
        slides_per_h=len(done) / hours if hours else None,
        mm2_per_h=_area(done) / hours if hours else None,
        slides_per_h_lately=len(lately) / window_h if done else None,
        mm2_per_h_lately=_area(lately) / window_h if done else None,
        device_busy=_busy_share(cohort),
        workers=len(workers),
        left_s=left_s,
        left_by="" if left_s is None else "slides" if sizes is None else "bytes",
    )


def slide_bytes(cohort: Cohort) -> dict[str, float] | None:
    """Return the sizes of all slides' files; None if one cannot be seen from here.

    Only asks the file system; nothing is opened.
    """

    def size(own: SlideState) -> int:
        return os.stat(own.path).st_size  # noqa: PTH116 - a plain system call

    try:
        with ThreadPoolExecutor(16) as pool:
            found = list(pool.map(size, cohort.states))
    except (OSError, ValueError):  # such as a name with a zero in it
        return None
    names = [own.slide_id for own in cohort.states]
    return {name: float(number) for name, number in zip(names, found, strict=True)}


def duration(seconds: float) -> str:
    """Return a time span in words, such as ``3 min 20 s``."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


def _left_s(
    cohort: Cohort, done: list[SlideState], sizes: Mapping[str, float] | None, workers: int
) -> float | None:
    def units(own: SlideState) -> float:
        return 1.0 if sizes is None else sizes[own.slide_id]

    reports = [own.report for own in done if own.report]
    whole = sum(report.seconds["total"] for report in reports)
    predict = sum(report.seconds.get("predict", 0.0) for report in reports)
    left = [
        units(own) * (1 - _behind(own, min(1.0, predict / whole)))
        for own in cohort.states
        if own.state in ("running", "interrupted", "missing")
    ]
    finished = sum(map(units, done))
    if not finished:
        return None
    cost_s = sum(_covered(spans) for spans in _by_worker(done).values()) / finished
    return max(sum(left) / workers, max(left)) * cost_s


def _behind(own: SlideState, predict_share: float) -> float:
    """Return how much of a slide is done, by the stage it is in."""
    stage = own.holder.facts.get("stage") if own.holder and own.state == "running" else None
    if stage == "predict":
        return predict_share * (own.fraction or 0.0)
    return predict_share if stage in ("polygonize", "write") else 0.0


def _busy_share(cohort: Cohort) -> float | None:
    measured = [
        own for own in cohort.states if _interval(own) and _report(own).device_busy_s is not None
    ]
    covered = sum(_covered(spans) for spans in _by_worker(measured).values())
    busy = sum(_report(own).device_busy_s or 0.0 for own in measured)
    return min(1.0, busy / covered) if covered else None


def _by_worker(states: Iterable[SlideState]) -> dict[Worker, list[Interval]]:
    spans: dict[Worker, list[Interval]] = defaultdict(list)
    for own in states:
        span, report = _interval(own), _report(own)
        if span:
            spans[(report.host, report.pid)].append(span)
    return spans


def _covered(spans: Iterable[Interval]) -> float:
    """Return the length of what intervals cover together: overlaps count once."""
    total, until = 0.0, float("-inf")
    for begin, end in sorted(spans):
        total += max(0.0, end - max(begin, until))
        until = max(until, end)
    return total


def _interval(own: SlideState) -> Interval | None:
    """Return when a slide was in work; None of one that has no report or took no time."""
    if own.report is None or own.reported is None:
        return None
    seconds = own.report.seconds.get("total", 0.0)
    return (own.reported - seconds, own.reported) if seconds > 0 else None


def _end(own: SlideState) -> float:
    return own.reported or 0.0


def _area(states: Iterable[SlideState]) -> float:
    return sum(_report(own).tissue_mm2 for own in states)


def _report(own: SlideState) -> RunReport:
    assert own.report is not None  # asked only of slides that have one
    return own.report


def _worker(own: SlideState) -> Worker:
    facts = own.holder.facts if own.holder else {}
    return str(facts.get("machine") or facts.get("host")), int(facts.get("pid") or 0)
