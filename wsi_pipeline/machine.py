"""What this process may use of its machine."""

from __future__ import annotations

import os
import resource
import sys

import psutil

__all__ = ["available_cpus", "peak_rss_mb", "total_memory"]


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
