"""What goes wrong on a cluster, at random moments."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import threading
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path

import numpy as np
import psutil

from benchmarks.cluster import Cluster
from benchmarks.cohort.places import ReadErrors, SmallDisk

__all__ = ["Faults"]

WEIGHTS = {
    "SIGKILL of a worker": 10,
    "SIGTERM of a worker": 4,
    "slides folder gone for a while": 2,
    "a slide is another file for a while": 4,
    "read errors of slides for a while": 3,
    "disk full for a while": 3,
    "results folder gone for a while": 2,
    "a second run of the same list in the same folder": 1,
    "power cut of the node": 1,
    "restart of the controller": 1,
}
"""How often each happens, relative to the others."""


class Faults(threading.Thread):
    """Injects one fault after another until :meth:`end`.

    Args:
        cluster: where the jobs run.
        slides: the folder of the slides.
        results: the disk of the results.
        reading: what makes slides unreadable; skipped where that is not available.
        command: a second run, as somebody might start it by mistake.
        every_s: seconds from the end of a fault to the next, on average.
        rng: decides what happens when.
    """

    def __init__(
        self,
        *,
        cluster: Cluster,
        slides: Path,
        results: SmallDisk,
        reading: ReadErrors,
        command: list[str],
        every_s: float,
        rng: np.random.Generator,
    ) -> None:
        super().__init__(name="faults", daemon=True)
        self._cluster = cluster
        self._slides = slides
        self._results = results
        self._reading = reading
        self._command = command
        self._every_s = every_s
        self._rng = rng
        self._ended = threading.Event()
        self.counts: Counter[str] = Counter()
        """How often each fault was injected."""
        self.problem: Exception | None = None
        """Why no more faults came, if that was not asked for."""

    def run(self) -> None:
        """Wait, injure, and again."""
        actions = {
            "SIGKILL of a worker": lambda: self._signal(signal.SIGKILL),
            "SIGTERM of a worker": lambda: self._signal(signal.SIGTERM),
            "slides folder gone for a while": self._hide_slides,
            "a slide is another file for a while": self._change_slide,
            "read errors of slides for a while": self._fail_reads,
            "disk full for a while": self._fill,
            "results folder gone for a while": self._take_away,
            "a second run of the same list in the same folder": self._second_run,
            "power cut of the node": self._power_cut,
            "restart of the controller": self._restart_controller,
        }
        names = list(WEIGHTS)
        shares = np.array([WEIGHTS[name] for name in names], float)
        try:
            while not self._ended.wait(self._rng.exponential(self._every_s)):
                name = names[self._rng.choice(len(names), p=shares / shares.sum())]
                if actions[name]() is not False:
                    self.counts[name] += 1
        except Exception as error:  # told by whoever started this thread
            self.problem = error

    def end(self) -> None:
        """Inject no more; what was taken away is back when this returns."""
        self._ended.set()
        self.join()
        if self.problem is not None:
            raise self.problem

    def workers(self) -> list[psutil.Process]:
        """Return the processes of wsi-run that jobs have started."""
        found = []
        for process in psutil.process_iter(["cmdline", "environ"]):
            words, environment = process.info["cmdline"] or [], process.info["environ"] or {}
            # Others may run jobs of their own on this machine.
            if environment.get("SLURM_CONF") != str(self._cluster.conf):
                continue
            runs = len(words) > 1 and words[1].endswith("wsi-run") and "python" in words[0]
            if runs and "SLURM_ARRAY_JOB_ID" in environment:
                found.append(process)
        return found

    def _signal(self, number: int) -> bool:
        workers = self.workers()
        if not workers:
            return False
        with suppress(psutil.Error):
            workers[self._rng.integers(len(workers))].send_signal(number)
        return True

    def _pause(self, most_s: float) -> None:
        time.sleep(self._rng.uniform(0.2, most_s))

    def _hide_slides(self) -> None:
        away = self._slides.with_name(self._slides.name + ".away")
        self._slides.rename(away)
        try:
            self._pause(3)
        finally:
            away.rename(self._slides)

    def _change_slide(self) -> None:
        """Somebody copies another file over a slide, sees the mistake, and puts it back."""
        paths = sorted(self._slides.glob("*.svs"))
        path = paths[self._rng.integers(len(paths))]
        kept = path.with_suffix(".kept")
        shutil.copy2(path, kept)
        try:
            with path.open("r+b") as file:
                file.truncate(path.stat().st_size // 2)
            self._pause(2)
        finally:
            os.replace(kept, path)

    def _fail_reads(self) -> bool:
        if not (self._reading.available and self.workers()):
            return False
        self._reading.begin()
        try:
            self._pause(3)
        finally:
            self._reading.end()
        return True

    def _fill(self) -> None:
        try:
            self._results.fill()
            self._pause(4)
        finally:
            self._results.relieve()

    def _take_away(self) -> None:
        self._results.take_away()
        try:
            self._pause(3)
        finally:
            self._results.bring_back()

    def _second_run(self) -> None:
        with subprocess.Popen(
            self._command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        ) as second:
            try:
                second.wait(self._rng.uniform(5, 25))
            except subprocess.TimeoutExpired:
                second.terminate()

    def _power_cut(self) -> None:
        self._cluster.kill_node()
        self._pause(2)
        self._cluster.start_node()

    def _restart_controller(self) -> None:
        self._cluster.kill_controller(signal.SIGTERM)
        self._pause(2)
        self._cluster.start_controller()
        # The node tells what runs on it; else a job that ended meanwhile seems to go on for long.
        self._cluster.command("scontrol", "reconfigure", check=False)
