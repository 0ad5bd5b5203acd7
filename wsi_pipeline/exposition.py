"""What a run does, as a text file that Prometheus' node_exporter reads (``--metrics-file``).

One file a process. It is replaced whole every few seconds and at the end, so the collector never
sees half of it; the time in it tells a process that hangs, or is gone, from one at work. Format:
Prometheus text exposition 0.0.4.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import psutil

from wsi_pipeline.durable import durable_file, sweep
from wsi_pipeline.engines import Watcher
from wsi_pipeline.errors import WsiPipelineError
from wsi_pipeline.job import RunReport, SlideJob, versions
from wsi_pipeline.machine import peak_rss_mb

__all__ = ["ClosingWatcher", "MetricsWatcher"]

WRITE_EVERY_S = 5.0
"""How often the file is written anew."""
PREFIX = "wsi_pipeline_"

log = logging.getLogger(__name__)


class ClosingWatcher(Watcher, Protocol):
    """A watcher that has something to tidy up."""

    def close(self) -> None:
        """Tidy up."""


@dataclass(frozen=True, kw_only=True)
class _Family:
    """A metric with its values."""

    name: str
    kind: str
    help: str
    values: Mapping[tuple[tuple[str, str], ...], float]
    """By labels; a metric without values is left out."""


class MetricsWatcher:
    """Passes on what goes on to another watcher, and counts it into a file.

    Raises:
        OSError: the file cannot be written.
    """

    def __init__(
        self, inner: ClosingWatcher, path: Path, *, planned: int, labels: Mapping[str, str]
    ) -> None:
        """Write a first file, and begin to write it every few seconds.

        Args:
            inner: the watcher that is told everything, too.
            path: the file; the collector wants ``.prom``.
            planned: slides of this process.
            labels: on every value, such as the shard.
        """
        self._inner = inner
        self._path = path
        self._planned = planned
        self._labels = labels
        self._begun = time.time()
        self._running: set[str] = set()
        self._ended: dict[str, RunReport] = {}
        self._skipped: set[str] = set()
        self._lock = threading.Lock()
        self._closed = threading.Event()
        self._complained = False
        sweep(path)
        self._write()
        self._thread = threading.Thread(target=self._live, name="metrics", daemon=True)
        self._thread.start()

    def start(self, job: SlideJob) -> None:
        """Count a slide as running."""
        with self._lock:
            self._running.add(job.slide_id)
        self._inner.start(job)

    def advance(self, job: SlideJob, stage: str, done: int, total: int) -> None:
        """Pass it on."""
        self._inner.advance(job, stage, done, total)

    def finish(self, job: SlideJob, report: RunReport, *, skipped: bool) -> None:
        """Count how a slide ended, and what was found in it."""
        with self._lock:
            self._running.discard(job.slide_id)
            self._ended[job.slide_id] = report
            if skipped:
                self._skipped.add(job.slide_id)
        self._inner.finish(job, report, skipped=skipped)

    def close(self) -> None:
        """Write the file for the last time."""
        self._closed.set()
        self._thread.join()
        self._try_to_write()
        self._inner.close()

    def _live(self) -> None:
        while not self._closed.wait(WRITE_EVERY_S):
            self._try_to_write()

    def _try_to_write(self) -> None:
        try:
            self._write()
        except (OSError, WsiPipelineError) as error:
            if not self._complained:  # the slides matter more, and once is enough
                self._complained = True
                log.warning("the file of metrics could not be written: %s", error)

    def _write(self) -> None:
        with durable_file(self._path) as beside:
            beside.write_text(self._text(), encoding="utf-8")
            beside.chmod(0o644)  # the collector is another user

    def _text(self) -> str:
        with self._lock:
            families = [*self._slides(), *self._work(), *self._process()]
        return "".join(
            line + "\n" for family in families if family.values for line in self._lines(family)
        )

    def _slides(self) -> Iterator[_Family]:
        states = Counter(report.status for report in self._ended.values())
        waiting = self._planned - len(self._ended) - len(self._running)
        slides: dict[str, int] = {
            **{name: states[name] for name in ("done", "failed", "interrupted")},
            "running": len(self._running),
            "waiting": max(0, waiting),
        }
        yield _Family(
            name="slides",
            kind="gauge",
            help="Slides of this process by state.",
            values={(("state", name),): number for name, number in slides.items()},
        )
        yield _plain("slides_skipped", "gauge", "Slides that were settled before.", self._skipped)

    def _work(self) -> Iterator[_Family]:
        own = [r for name, r in self._ended.items() if name not in self._skipped]
        seconds: Counter[str] = Counter()
        objects: Counter[str] = Counter()
        for report in own:
            seconds.update({k: v for k, v in report.seconds.items() if k != "total"})
            objects.update(report.counts if report.done else {})
        yield _Family(
            name="stage_seconds_total",
            kind="counter",
            help="Seconds that stages of slides took; stages may overlap.",
            values={(("stage", name),): value for name, value in seconds.items()},
        )
        yield _Family(
            name="objects_total",
            kind="counter",
            help="Objects found in slides that were done, by kind.",
            values={(("kind", name),): value for name, value in objects.items()},
        )
        area = sum(report.tissue_mm2 for report in own if report.done)
        yield _plain("tissue_mm2_total", "counter", "Tissue of slides that were done.", area)
        busy = sum(report.device_busy_s or 0.0 for report in own)
        text = "Seconds in which the network ran on its device, of slides that ended."
        yield _plain("device_busy_seconds_total", "counter", text, busy)

    def _process(self) -> Iterator[_Family]:
        with suppress(psutil.Error, AttributeError):  # not told on every system
            read = psutil.Process().io_counters().read_chars
            yield _plain("read_bytes_total", "counter", "Bytes that this process has read.", read)
        peak = peak_rss_mb() * (1 << 20)
        yield _plain("peak_memory_bytes", "gauge", "The most memory this process has held.", peak)
        begun, now = self._begun, time.time()
        yield _plain("start_time_seconds", "gauge", "When this process began, Unix time.", begun)
        yield _plain("heartbeat_time_seconds", "gauge", "When this file was written.", now)
        ended = self._closed.is_set()
        yield _plain("ended", "gauge", "1 once this process has ended its slides.", ended)
        known = versions()
        build = (("version", known.get("wsi-pipeline", "")), ("python", known["python"]))
        yield _Family(
            name="build_info", kind="gauge", help="Versions, the value is 1.", values={build: 1}
        )

    def _lines(self, family: _Family) -> Iterator[str]:
        name = PREFIX + family.name
        yield f"# HELP {name} {family.help}"
        yield f"# TYPE {name} {family.kind}"
        for labels, value in family.values.items():
            pairs = [*self._labels.items(), *labels]
            text = ",".join(f'{key}="{_escaped(own)}"' for key, own in pairs)
            yield f"{name}{{{text}}} {float(value)!r}"


def _plain(name: str, kind: str, text: str, value: float | set[str]) -> _Family:
    number = len(value) if isinstance(value, set) else value
    return _Family(name=name, kind=kind, help=text, values={(): float(number)})


def _escaped(value: str) -> str:
    return value.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")
