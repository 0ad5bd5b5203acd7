"""Who is at work on a slide: a file that one process owns and keeps alive.

::

    logs/<slide_id>.lease     {"host": ..., "pid": ..., "stage": "predict", "done": 7, "total": 40}

The file is created exclusively, which every file system does atomically (NFS, too), and written
anew every few seconds while the process lives. So a process on another machine can tell work
from wreckage, and ``wsi status`` how far a slide is. Ages are differences of times that the
file system itself noted, never of two machines' clocks.

A process that was stopped for so long that another took its slide over finds its file gone
(:attr:`Lease.lost`), and must not publish anything any more.
"""

from __future__ import annotations

import fcntl
import json
import os
import socket
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psutil

from wsi_pipeline.checked import fits, parse_json
from wsi_pipeline.durable import filesystem_time, unfinished_path
from wsi_pipeline.errors import SlideBusyError
from wsi_pipeline.machine import pause

__all__ = [
    "DEAD_AFTER_S",
    "HEARTBEAT_S",
    "Holder",
    "Lease",
    "alone",
    "read_holder",
    "remove_if_dead",
    "slurm_job",
]

HEARTBEAT_S = 10.0
"""How often a lease is written anew."""
DEAD_AFTER_S = 120.0
"""Without a sign of life for so long, a process that cannot be asked counts as dead."""
_FACTS: dict[str, Any] = {
    "host": str,
    "machine": str,
    "pid": int,
    "born": str,
    "job": str | None,
    "restart": int,
    "since": str,
    "for_s": float,
    "stage": str,
    "done": int,
    "total": int,
    "released": bool,
}
"""What a lease may say."""
_BYTES = 1024
"""Size of the file: always the same, so that a write needs no space and is never seen in part."""


@dataclass(frozen=True, kw_only=True)
class Holder:
    """The process that holds a lease, as its file tells."""

    facts: Mapping[str, Any]
    """``host``, ``machine``, ``pid``, ``born``, ``job``, ``restart``, ``since``, ``for_s``,
    ``stage``, ``done``, ``total``."""
    beat: float
    """When it was last alive, in seconds of the file system's clock."""

    @property
    def name(self) -> str:
        """The process in words."""
        job = self.facts.get("job")
        return f"process {self.facts.get('pid')} on {self.facts.get('host')}" + (
            f" (Slurm job {job})" if job else ""
        )

    @property
    def has_ended(self) -> bool:
        """Whether it is known to be gone: asked of this machine, or told by Slurm."""
        facts = self.facts
        if facts.get("released"):
            return True
        if facts.get("machine") == _machine():
            born = _born(facts.get("pid", -1))
            return born is None or facts.get("born", born) != born
        job, restart = slurm_job()
        # Slurm starts a task again only when the start before it has ended.
        same = job is not None and facts.get("job") == job
        return same and bool(facts.get("restart", 0) < restart)


class Lease:
    """A slide that this process works on, until :meth:`release` or its end."""

    def __init__(self, path: Path, descriptor: int, facts: dict[str, Any]) -> None:
        """Use :meth:`take`."""
        self._path = path
        self._descriptor = descriptor
        self._inode = os.fstat(descriptor).st_ino
        self._facts = facts
        self._begun = time.monotonic()
        self._ended = threading.Event()
        self._writing = threading.Lock()
        self._lost = False
        self._thread = threading.Thread(target=self._live, name="lease", daemon=True)
        self._thread.start()

    @classmethod
    def take(cls, path: Path) -> Lease:
        """Take a lease that is free, or whose holder is dead.

        Args:
            path: the lease's file; its folder is made, but not the one around it.

        Raises:
            SlideBusyError: another process is at work.
            OSError: the folder cannot be written.
        """
        path.parent.mkdir(exist_ok=True)
        facts = _own_facts()
        while True:
            try:
                descriptor = _created(path, facts)
            except FileExistsError:
                remove_if_dead(path)
                continue
            return cls(path, descriptor, facts)

    @property
    def lost(self) -> bool:
        """Whether another process has taken the slide over, or the folder is gone."""
        with self._writing:
            if not self._lost and not self._ended.is_set():
                self._lost = not self._is_ours()
            return self._lost

    def note(self, stage: str, done: int, total: int) -> None:
        """Say how far the work is; others see it with the next sign of life."""
        self._facts |= {"stage": stage, "done": done, "total": total}

    def release(self) -> None:
        """Let others at the slide; may be called twice."""
        if self._ended.is_set():
            return
        self._ended.set()
        self._thread.join()
        with self._writing:
            if self._is_ours():
                self._path.unlink(missing_ok=True)
            else:  # its folder is elsewhere, perhaps, and may come back with it
                self._facts["released"] = True
                with suppress(OSError):
                    self._write()
            os.close(self._descriptor)

    def _live(self) -> None:
        while not self._ended.wait(HEARTBEAT_S):
            with self._writing, suppress(OSError):  # a server that is away may come back
                self._write()

    def _write(self) -> None:
        _write(self._descriptor, self._facts, time.monotonic() - self._begun)

    def _is_ours(self) -> bool:
        # No other file has this number while ours is open.
        return _is_at(self._path, self._inode)


def _created(path: Path, facts: Mapping[str, Any]) -> int:
    """Make a lease that says whose it is from its first moment on; return its descriptor.

    A process that is killed while it takes a lease leaves none, rather than an empty one, which
    would be nobody's until it counts as dead.

    Raises:
        FileExistsError: there is one.
        OSError: the folder cannot be written.
    """
    beside = unfinished_path(path)
    try:
        descriptor = _new(beside, facts)
        try:
            os.link(beside, path)
        except OSError as error:
            # A file server may be asked again for what it has done, and say that it is there.
            if not _is_at(path, os.fstat(descriptor).st_ino):
                os.close(descriptor)
                if isinstance(error, FileExistsError):
                    raise
                return _new(path, facts)  # a file system without links, or somebody swept up
        return descriptor
    finally:
        beside.unlink(missing_ok=True)


def _new(path: Path, facts: Mapping[str, Any]) -> int:
    descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o644)
    try:
        _write(descriptor, facts, 0)
    except BaseException:  # a full disk
        path.unlink(missing_ok=True)
        os.close(descriptor)
        raise
    return descriptor


def _write(descriptor: int, facts: Mapping[str, Any], for_s: float) -> None:
    # How long, rather than since when: who watches need not trust this machine's clock.
    text = json.dumps({**facts, "for_s": round(for_s, 1)})
    os.pwrite(descriptor, text.encode().ljust(_BYTES - 1)[: _BYTES - 1] + b"\n", 0)


@contextmanager
def alone(path: Path) -> Iterator[None]:
    """Do something short that only one process at a time may do; wait for the others.

    Args:
        path: of the lease.

    Raises:
        SlideBusyError: another process does not come to an end.
    """
    patience = time.monotonic() + 1.5 * DEAD_AFTER_S
    while True:
        try:
            lease = Lease.take(path)
            break
        except SlideBusyError:
            if time.monotonic() > patience:
                raise
            pause(0.05)
    try:
        yield
    finally:
        lease.release()


def read_holder(path: Path) -> Holder | None:
    """Return who holds a lease; None where nobody does."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError:
        return None
    try:
        return _holder(descriptor)
    except OSError:  # no file at all
        return None
    finally:
        os.close(descriptor)


def remove_if_dead(path: Path) -> None:
    """Take the lease of a dead process away; of several who try at once, one does.

    Raises:
        SlideBusyError: its process lives.
        OSError: it is no file, and cannot be removed.
    """
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_NOFOLLOW)
    except FileNotFoundError:
        return  # released meanwhile
    except OSError:
        if not path.is_symlink():
            raise
        path.unlink(missing_ok=True)  # no process of ours has made it
        return
    try:
        with suppress(OSError):  # no locks here: a process that is robbed sees that it lost
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        holder = _holder(descriptor)
        age = max(filesystem_time(path.parent) - holder.beat, _unchanged_s(path, holder))
        if not holder.has_ended and age < DEAD_AFTER_S:
            msg = (
                f"another process is at work: {holder.name}, last alive {age:.0f} s ago. "
                f"Wait for it, or use another --out; a process that is not heard of for "
                f"{DEAD_AFTER_S:.0f} s counts as dead."
            )
            raise SlideBusyError(msg)
        if _is_at(path, os.fstat(descriptor).st_ino):  # and nobody else's new one
            path.unlink(missing_ok=True)
    finally:
        os.close(descriptor)


def _holder(descriptor: int) -> Holder:
    try:
        said = parse_json(os.pread(descriptor, _BYTES, 0).decode())
    except ValueError:  # created, and not yet written
        said = {}
    said = said if isinstance(said, dict) else {}
    facts = {k: said[k] for k, kind in _FACTS.items() if k in said and fits(said[k], kind)}
    return Holder(facts=facts, beat=os.fstat(descriptor).st_mtime)


_beats: dict[Path, tuple[float, float]] = {}
"""The last beat of each lease that this process has asked for, and when it was seen first."""


def _unchanged_s(path: Path, holder: Holder) -> float:
    """Return for how long, by our own clock, a lease has given no sign of life.

    The time of a file may lie in the future: of a restored copy, or where a clock was put back.
    """
    now = time.monotonic()
    beat, since = _beats.get(path, (None, now))
    if beat != holder.beat:
        since = now
        _beats[path] = holder.beat, now
    return now - since


def _is_at(path: Path, inode: int) -> bool:
    try:
        return path.stat().st_ino == inode
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError:  # a file server that does not answer has not given the slide away
        return True


def _own_facts() -> dict[str, Any]:
    job, restart = slurm_job()
    return {
        "host": socket.gethostname(),
        "machine": _machine(),
        "pid": os.getpid(),
        "born": _born(os.getpid()),
        "job": job,
        "restart": restart,
        "since": datetime.now(UTC).isoformat(timespec="seconds"),
        "stage": "open",
        "done": 0,
        "total": 0,
    }


def _born(pid: int) -> str | None:
    """Return when a process of this machine began; None if there is no such process."""
    try:
        # Linux counts from its start: when the clock is put right, seconds since 1970 change.
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        pass
    try:
        return f"{psutil.Process(pid).create_time():.0f}"
    except (psutil.Error, ValueError, OverflowError):
        return None


def slurm_job() -> tuple[str | None, int]:
    """Return the number of this Slurm job and how often it was started again."""
    try:
        restart = int(os.environ.get("SLURM_RESTART_COUNT", "0"))
    except ValueError:
        restart = 0
    return os.environ.get("SLURM_JOB_ID"), restart


def _machine() -> str:
    """Name the place where process numbers mean the same as here.

    Containers may bear their host's name and number their processes anew.
    """
    parts = [socket.gethostname()]
    with suppress(OSError):  # no Linux
        parts.append(Path("/proc/sys/kernel/random/boot_id").read_text().strip())
    with suppress(OSError):
        parts.append(os.readlink("/proc/self/ns/pid"))  # noqa: PTH115 - no path at all
    return " ".join(parts)
