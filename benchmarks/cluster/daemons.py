"""Slurm's programs: where they are, and children of this process that run them."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path

__all__ = ["PROGRAMS", "Daemons", "kill_jobs", "missing_programs", "search_path"]

PROGRAMS = "munged", "slurmctld", "slurmd", "sbatch", "scontrol", "squeue"
_SBIN = "/usr/sbin", "/sbin", "/usr/local/sbin"


def missing_programs() -> list[str]:
    """Return which of the programs a cluster needs are not installed here."""
    return [name for name in PROGRAMS if _find(name) is None]


def search_path() -> str:
    """Return ``PATH`` with the folders of daemons, which are not in everyone's."""
    return os.pathsep.join((os.environ.get("PATH", ""), *_SBIN))


class Daemons:
    """Children of this process that run until they are ended.

    Args:
        folder: where each one's log goes.
        environment: variables that they get besides this process's.
    """

    def __init__(self, folder: Path, environment: Mapping[str, str]) -> None:
        self._folder = folder
        self._environment = environment
        self._children: dict[str, subprocess.Popen[bytes]] = {}

    def start(self, name: str, *arguments: str) -> None:
        """Start one; :func:`missing_programs` does not name it."""
        program = _find(name)
        assert program is not None
        with (self._folder / f"{name}.log").open("ab") as log:
            self._children[name] = subprocess.Popen(
                [program, *arguments],
                env={**os.environ, **self._environment},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,  # Ctrl-C is for us, and we end them in order
            )

    def wait(self, name: str, up: Callable[[], bool], timeout_s: float = 60.0) -> None:
        """Wait until one is up.

        Raises:
            RuntimeError: it has ended, or does not come up in time.
        """
        end = time.monotonic() + timeout_s
        while not up():
            if not self.alive(name) or time.monotonic() > end:
                log = (self._folder / f"{name}.log").read_text(errors="replace")
                raise RuntimeError(f"{name} does not come up:\n{log[-2000:]}")
            time.sleep(0.05)

    def alive(self, name: str) -> bool:
        """Whether one was started and runs."""
        child = self._children.get(name)
        return child is not None and child.poll() is None

    def end(self, name: str, by: signal.Signals) -> None:
        """Send one a signal and wait until it is gone; without patience, by SIGKILL."""
        child = self._children.pop(name, None)
        if child is None:
            return
        child.send_signal(by)
        try:
            child.wait(10)
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()


def kill_jobs(conf: Path) -> None:
    """Kill every process below the slurmd of a configuration: their environment names its file."""
    for number in _processes_of_jobs(conf):
        with suppress(ProcessLookupError):
            os.kill(number, signal.SIGKILL)


def _processes_of_jobs(conf: Path) -> list[int]:
    mark = f"SLURM_CONF={conf}".encode()
    found = []
    for folder in Path("/proc").iterdir():
        if not folder.name.isdecimal() or int(folder.name) == os.getpid():
            continue
        try:
            variables = (folder / "environ").read_bytes().split(b"\0")
            stepd = (folder / "comm").read_text().startswith("slurmstepd")
        except OSError:
            continue  # it has ended, or is none of ours
        in_job = any(variable.startswith(b"SLURM_JOB_ID=") for variable in variables)
        if mark in variables and (in_job or stepd):
            found.append(int(folder.name))
    return found


def _find(name: str) -> str | None:
    return shutil.which(name, path=search_path())
