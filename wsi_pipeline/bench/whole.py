"""The pipeline as it runs, and how busy it keeps the device."""

from __future__ import annotations

import statistics
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from types import TracebackType

import torch

from wsi_pipeline.bench.subject import Subject, run_job
from wsi_pipeline.bench.timing import Clock, Stage
from wsi_pipeline.durable import remove_tree
from wsi_pipeline.machine import available_cpus

__all__ = ["BusyMeter", "Whole"]

SAMPLE_S = 0.002


@dataclass(kw_only=True)
class Whole:
    """Runs the whole pipeline, again and again, and keeps what was seen."""

    subject: Subject
    stop: Callable[[], bool] = lambda: False
    busy: list[float] = field(default_factory=list)
    """Share of each run's time in which the device worked."""
    seconds: list[dict[str, float]] = field(default_factory=list)
    """By stage, as the report of each run has them."""

    def stage(self) -> Stage:
        """Return it as what is measured after its stages: they are its limit."""
        return Stage(name="whole", work=self.work)

    def work(self, clock: Clock) -> float:
        """Run the slide into an empty folder."""
        out = self.subject.folder / "again"
        remove_tree(out)
        job = replace(self.subject.job, out=out)
        meter = BusyMeter(self.subject.predictor.device, clock=clock)
        with meter:
            report = run_job(
                job, self.subject.predictor, workers=self.subject.workers, stop=self.stop
            )
        if meter.share is not None:
            self.busy.append(meter.share)
        self.seconds.append({k: v for k, v in report.seconds.items() if k != "total"})
        remove_tree(out)
        return meter.seconds

    @property
    def device_busy(self) -> float | None:
        """Median share of the time in which the device worked; None where nothing tells."""
        return statistics.median(self.busy) if self.busy else None

    @property
    def stage_seconds(self) -> dict[str, float]:
        """Median seconds by stage, as reports have them."""
        names = self.seconds[0] if self.seconds else {}
        return {
            name: statistics.median(seconds[name] for seconds in self.seconds) for name in names
        }


class BusyMeter:
    """Measures a block: its seconds, and the share of them in which the device worked.

    For a CPU that is the share of its processors' time that this process used; for a CUDA
    device the share of moments at which its queue held unfinished work.
    """

    def __init__(
        self,
        device: str,
        *,
        clock: Clock,
        cpu_clock: Clock = time.process_time,
        cpus: int | None = None,
    ) -> None:
        self.seconds = 0.0
        self.share: float | None = None
        self._device = device
        self._clock, self._cpu_clock = clock, cpu_clock
        self._cpus = cpus or available_cpus()
        self._sampler: _Sampler | None = None
        if device.startswith("cuda"):
            self._sampler = _Sampler(torch.cuda.default_stream(device).query)

    def __enter__(self) -> BusyMeter:
        if self._sampler is not None:
            self._sampler.start()
        self._begun = self._clock(), self._cpu_clock()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.seconds = self._clock() - self._begun[0]
        used = self._cpu_clock() - self._begun[1]
        if self._sampler is not None:
            self.share = self._sampler.stop()
        elif self._device == "cpu" and self.seconds > 0:
            self.share = min(1.0, used / (self.seconds * self._cpus))


class _Sampler(threading.Thread):
    """Asks every few milliseconds whether a queue is empty."""

    def __init__(self, is_empty: Callable[[], bool]) -> None:
        super().__init__(name="busy", daemon=True)
        self._is_empty = is_empty
        self._ended = threading.Event()
        self._busy, self._count = 0, 0

    def run(self) -> None:
        while not self._ended.wait(SAMPLE_S):
            self._busy += not self._is_empty()
            self._count += 1

    def stop(self) -> float | None:
        """Return the share of the moments at which it was not; None without any."""
        self._ended.set()
        self.join()
        return self._busy / self._count if self._count else None
