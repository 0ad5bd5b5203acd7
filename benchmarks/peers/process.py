"""What a run costs, measured from outside and alike for every tool: time, processors, memory."""

from __future__ import annotations

import json
import os
import subprocess
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil

SAMPLE_S = 0.5
MIB = 1 << 20
TAIL = 2000
"""Characters of a failed run's errors that are shown."""


class RunFailedError(Exception):
    """A tool did not finish; the message has the end of what it said."""


def run_measured(command: Sequence[str], result: Path, *, root: Path) -> dict[str, Any]:
    """Run a tool and return what it reports, and what the machine saw of it.

    Args:
        command: a tool of this package, in its environment.
        result: the file that it is told to write.
        root: folder that holds this package.

    Raises:
        RunFailedError: it ended without a result.
    """
    # Idle OpenMP threads that spin would take the processors from the loaders.
    environment = {"PYTHONPATH": str(root), "OMP_WAIT_POLICY": "PASSIVE"}
    result.unlink(missing_ok=True)
    log_path = result.with_suffix(".log")
    begun = time.perf_counter()
    with log_path.open("w") as log:
        child = subprocess.Popen(
            command, cwd=root, env=os.environ | environment, stdout=log, stderr=subprocess.STDOUT
        )
        with _Memory(child.pid) as memory:
            _, status, usage = os.wait4(child.pid, 0)
    child.returncode = os.waitstatus_to_exitcode(status)
    seconds = time.perf_counter() - begun
    if child.returncode or not result.is_file():
        said = log_path.read_text(errors="replace")[-TAIL:]
        raise RunFailedError(f"{' '.join(map(str, command))} ended with {child.returncode}: {said}")
    return {
        **json.loads(result.read_text()),
        "process_wall_s": round(seconds, 2),
        "process_cpu_s": round(usage.ru_utime + usage.ru_stime, 2),
        "peak_rss_mb": round(usage.ru_maxrss / 1024),
        "peak_anonymous_mb": round(memory.peak / MIB),
    }


class _Memory:
    """The most anonymous memory that a process and its children held at one time, sampled.

    The pages of mapped files, which the system may drop, do not count; those that a child still
    shares with its parent count in both. Reading this costs nothing, unlike the split of shared
    pages, for which the kernel walks the page tables while the process has to wait.
    """

    def __init__(self, pid: int) -> None:
        self.peak = 0
        self._root = psutil.Process(pid)
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)

    def __enter__(self) -> _Memory:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()

    def _sample(self) -> None:
        while not self._done.wait(SAMPLE_S):
            with suppress(psutil.Error):
                pids = [self._root.pid, *(p.pid for p in self._root.children(recursive=True))]
                self.peak = max(self.peak, sum(map(_anonymous, pids)))


def _anonymous(pid: int) -> int:
    """Bytes of a process that are no file's; 0 where it has gone or is not Linux."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon")), 0)
