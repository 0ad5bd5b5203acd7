"""What this process may use of its machine."""

from __future__ import annotations

import ctypes
import os
import resource
import sys
from contextlib import suppress
from pathlib import Path

import psutil

__all__ = ["available_cpus", "memory_limit", "peak_rss_mb", "release_memory", "total_memory"]


def available_cpus() -> int:
    """Return the processors this process may run on; a cluster job has fewer than the node."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def peak_rss_mb() -> float:
    """Return the most memory this process has held since its start, in MiB."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (1 << 20) if sys.platform == "darwin" else peak / 1024


def total_memory() -> int:
    """Return the machine's memory in bytes."""
    return int(psutil.virtual_memory().total)


def memory_limit(proc: Path = Path("/proc"), control: Path = Path("/sys/fs/cgroup")) -> int:
    """Return the bytes this process may hold: the machine's, or less for a job or a container.

    Args:
        proc: where the system describes processes.
        control: where it describes control groups, of version 1 or 2.
    """
    limits = [total_memory()]
    lines: list[str] = []
    with suppress(OSError):  # not Linux
        lines = (proc / "self/cgroup").read_text().splitlines()
    for line in lines:
        _, controllers, group = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        top = control / "memory" if controllers else control
        name = "memory.limit_in_bytes" if controllers else "memory.max"
        own = Path(group.lstrip("/"))
        for folder in (own, *own.parents):  # a group has no more than those around it
            with suppress(OSError, ValueError):  # not there, or "max"
                limits.append(int((top / folder / name).read_text()))
    return min(limits)


def release_memory() -> None:
    """Give memory that was freed back to the system, where the C library hoards it (glibc)."""
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
