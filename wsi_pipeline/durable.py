"""Files that are complete or absent: write beside, sync, rename.

A name that is visible is finished. Unfinished work lies beside it under a name that
starts with a dot and ends in ``.partial``, and a later run may sweep it away.
"""

from __future__ import annotations

import errno
import os
import re
import shutil
import socket
import uuid
from collections.abc import Collection, Iterator, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path

import psutil

from wsi_pipeline.errors import DiskFullError

__all__ = [
    "FULL",
    "disk_errors",
    "durable_file",
    "filesystem_time",
    "partial_path",
    "publish_directory",
    "remove_tree",
    "sweep",
    "sweep_shared",
    "sync",
    "sync_all",
    "sync_threads",
    "sync_tree",
    "unfinished_path",
]

FULL = frozenset({errno.ENOSPC, errno.EDQUOT})
"""Numbers of the errors "no space left" and "quota exceeded"."""
ABANDONED_S = 3600.0
"""No process writes a small file for so long."""
_SYNCS = 16
"""Files that wait for the disk together."""


def partial_path(path: Path) -> Path:
    """Return the name under which unfinished work for ``path`` lies."""
    return path.with_name(f".{path.name}.partial")


@contextmanager
def durable_file(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside ``path``; on success sync it and rename it.

    An exception inside the block removes the temporary file, leaves whatever lay
    under the final name, and goes on; "no space left" becomes :class:`DiskFullError`.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = unfinished_path(path)
    try:
        with disk_errors(path):
            yield beside
            sync(beside)
            os.replace(beside, path)
            sync(path.parent)
    finally:
        beside.unlink(missing_ok=True)


def sweep(path: Path) -> None:
    """Remove what earlier processes, on whatever host, left unfinished beside a name.

    For whoever is alone at it. Work that is gone on with (:func:`partial_path`) stays.
    """
    if not path.parent.is_dir():
        return
    name = re.escape(path.name)
    unfinished = re.compile(rf"\.{name}~[^~]+\.partial")
    removed = re.compile(rf"\.{name}(\.partial)?\.trash\.partial")
    for beside in path.parent.iterdir():
        if unfinished.fullmatch(beside.name):
            beside.unlink(missing_ok=True)
        elif removed.fullmatch(beside.name):
            shutil.rmtree(beside)


def sweep_shared(path: Path) -> None:
    """Remove what ended processes left beside a name that many processes write, such as run.json.

    Those of this host that run no more, and whatever nobody has touched for an hour.
    """
    if not path.parent.is_dir():
        return
    unfinished = re.compile(rf"\.{re.escape(path.name)}~([^~]+)\.(\d+)\.\w{{8}}\.partial")
    for beside in path.parent.iterdir():
        match = unfinished.fullmatch(beside.name)
        if match is None:
            continue
        with suppress(FileNotFoundError):  # it was just finished
            here = match[1] == socket.gethostname()
            old = filesystem_time(path.parent) - beside.stat().st_mtime > ABANDONED_S
            if old or (here and not psutil.pid_exists(int(match[2]))):
                beside.unlink()


def filesystem_time(folder: Path) -> float:
    """Return what time it is by the clock that stamps files in a folder.

    Raises:
        OSError: nothing can be written there.
    """
    probe = unfinished_path(folder / "clock")
    try:
        probe.touch(exist_ok=False)
        return probe.stat().st_mtime
    finally:
        probe.unlink(missing_ok=True)


def publish_directory(beside: Path, path: Path, *, synced: Collection[Path] = ()) -> None:
    """Sync a finished directory tree and give it its final name, replacing an older one.

    Args:
        beside: the tree.
        path: its final name.
        synced: folders in it that are on the disk already, with all that is in them.
    """
    with disk_errors(path):
        sync_tree(beside, synced)
        remove_tree(path)
        os.replace(beside, path)
        sync(path.parent)


def sync_tree(root: Path, synced: Collection[Path] = ()) -> None:
    """Flush every file and folder below ``root`` to the disk, but for those that are there."""
    tree = []
    for name, below, files in os.walk(root):
        folder = Path(name)
        below[:] = [each for each in below if folder / each not in synced]
        tree.append((folder, files))
    sync_all([folder / name for folder, files in tree for name in files])
    sync_all([folder for folder, _ in tree])


def sync_all(paths: Sequence[Path], threads: Executor | None = None) -> None:
    """Flush files, or the names in folders, to the disk, all at once.

    One commit of the file system's journal then serves many: one after the other, each waits
    for its own, which takes ten times as long where other programs write, too.

    Args:
        paths: of files and folders.
        threads: from :func:`sync_threads`, for whoever syncs again and again; None: new ones.
    """
    if len(paths) == 1:
        sync(paths[0])
    elif paths:
        with sync_threads() if threads is None else nullcontext(threads) as pool:
            for _ in pool.map(sync, paths):
                pass


def sync_threads() -> ThreadPoolExecutor:
    """Return threads that wait for the disk together; they start as they are needed."""
    return ThreadPoolExecutor(_SYNCS, thread_name_prefix="sync")


def remove_tree(path: Path) -> None:
    """Remove a folder if it is there, and what a killed removal of it left.

    It loses its name first: a folder that is half gone must not look like a whole one.
    """
    trash = path.with_name(f".{path.name.lstrip('.')}.trash.partial")
    if trash.exists():
        shutil.rmtree(trash)
    if path.exists():
        os.replace(path, trash)
        shutil.rmtree(trash)


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turn "no space left" and "quota exceeded" into :class:`DiskFullError`."""
    try:
        yield
    except OSError as error:
        if error.errno in FULL:
            msg = (
                f"no space is left to write {path.name} in {path.parent}. "
                "Free some space and run the same command again: finished work is kept."
            )
            raise DiskFullError(msg) from error
        raise


def unfinished_path(path: Path) -> Path:
    """Return a name for unfinished work that tells whose it is."""
    # Unique among threads and containers, too, which may share the numbers of processes.
    own = f"{socket.gethostname()}.{os.getpid()}.{uuid.uuid4().hex[:8]}"
    return path.with_name(f".{path.name}~{own}.partial")


def sync(path: Path) -> None:
    """Flush a file, or the names in a folder, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
