"""What this process may use of its machine."""

from __future__ import annotations

import ctypes
import os
import resource
import sys
import threading
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

import psutil

__all__ = [
    "SAID_OF_NO_MEMORY",
    "available_cpus",
    "keep_freed_memory",
    "memory_limit",
    "pause",
    "peak_rss_mb",
    "release_memory",
    "total_memory",
    "use_few_heaps",
]

SAID_OF_NO_MEMORY = (
    "allocate memory",
    "not enough memory",
    "could not create a memory object",
    "out of memory",
)
"""What torch, oneDNN and CUDA say in plain errors when memory is lacking."""
_TRIM_THRESHOLD, _MMAP_MAX, _ARENA_MAX = -1, -4, -8
"""Of ``mallopt`` in glibc's malloc.h."""


def available_cpus() -> int:
    """Return the processors this process may run on; a cluster job has fewer than the node."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def peak_rss_mb() -> float:
    """Return the most memory this process has held since its start, in MiB."""
    with suppress(OSError, StopIteration):
        # Linux counts for ``getrusage`` what the parent held when it started this process.
        lines = Path("/proc/self/status").read_text(encoding="ascii", errors="replace").splitlines()
        return int(next(line for line in lines if line.startswith("VmHWM:")).split()[1]) / 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (1 << 20) if sys.platform == "darwin" else peak / 1024


def total_memory() -> int:
    """Return the machine's memory in bytes."""
    return int(psutil.virtual_memory().total)


def keep_freed_memory() -> bool:
    """Let this process keep the memory it has freed, for what it allocates next.

    glibc returns blocks of more than 32 MiB to the system, and asks for fresh ones, page by page
    and zeroed, at the next allocation. A network on a CPU does so for every map: a convolution of
    large maps then takes twice as long. For the processes of commands; a library must not
    decide this for the program it is in.

    Returns:
        Whether it does; False without glibc.
    """
    kept = _set_malloc({_MMAP_MAX: 0, _TRIM_THRESHOLD: (1 << 31) - 1})
    return kept and use_few_heaps()  # what one thread has freed, others take


def use_few_heaps() -> bool:
    """Let threads share heaps, one for four processors; to be said before there are many threads.

    glibc gives threads heaps of their own, whose free ends it keeps even when it is asked for
    them, and which other threads cannot use: threads that come and go with each slide left 300 MiB
    behind. A heap is one lock, so it is not one for all of a large machine. For the processes of
    commands, as above.

    Returns:
        Whether they do; False without glibc.
    """
    return _set_malloc({_ARENA_MAX: max(1, available_cpus() // 4)})


def _set_malloc(options: Mapping[int, int]) -> bool:
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):  # another C library
        return False
    done = [mallopt(name, value) for name, value in options.items()]  # each is tried
    return all(done)


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


def pause(seconds: float) -> None:
    """Wait, by a clock that nobody sets.

    ``time.sleep`` asks the system for a moment, which fails where clocks are set or pretended.
    """
    threading.Event().wait(seconds)


def resident_bytes() -> int:
    """Return the memory that this process holds now."""
    return int(psutil.Process().memory_info().rss)


def release_memory() -> None:
    """Give memory that was freed back to the system, where the C library hoards it (glibc)."""
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
