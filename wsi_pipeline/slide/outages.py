"""An outage of the disk or the network told from damage of the slide.

Damage is there for good: the tile becomes a hole. An outage passes: the slide fails, and another
run reads it whole. Libraries give both the same error, so what fails is tried again after pauses;
and before the first hole the files are read from end to end, which damage does not disturb.
"""

from __future__ import annotations

import os
import re
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from wsi_pipeline.errors import SlideError
from wsi_pipeline.slide.reader import TileError

if TYPE_CHECKING:
    from tifffile import TiffFile

__all__ = ["PAUSES_S", "Outages", "outage", "try_again", "watch_reads", "watched"]

PAUSES_S = (0.1, 0.5, 2.0)
"""Before the third try, the fourth, and so on; the second comes at once."""
_SHORT_PAUSES_S = (0.02,)
"""Once a slide is known to be damaged: there may be thousands of such tiles."""
_CHUNK = 4 << 20
_BLOCK, _SAMPLES = 1 << 12, 16
_OUTAGE = re.compile(r"\bI/O error|input/output error|stale file|timed out", re.IGNORECASE)
"""What OpenSlide says where the system has refused a read, rather than the file has ended."""

Result = TypeVar("Result")


def try_again(
    read: Callable[[], Result],
    passing: type[Exception],
    pauses_s: Sequence[float] | None = None,
) -> Result:
    """Try a read that has failed again, at once and after pauses; let the last error through.

    Args:
        read: the read, by a fresh handle where an error spoils one.
        passing: what it raises for an outage.
        pauses_s: seconds before further tries; None: :data:`PAUSES_S`.
    """
    for pause_s in PAUSES_S if pauses_s is None else pauses_s:
        try:
            return read()
        except passing:
            time.sleep(pause_s)
    return read()


def outage(said: str) -> SlideError:
    """Return the error of a slide that could not be read for reasons outside it."""
    return SlideError(
        f"the slide's bytes cannot be read, perhaps for a while ({said}). To proceed: check the "
        "disk or the network, and try again by the same command."
    )


class Outages:
    """Tells outages of one slide from damage where a library does not; for several threads.

    Args:
        path: the slide's file.
    """

    def __init__(self, path: str) -> None:
        self._path = Path(path)
        self._lock = threading.Lock()
        self._is_damaged = False
        """Whether a tile is, for sure."""

    def persist(self, read: Callable[[], Result], passing: type[Exception]) -> Result:
        """Try a read that has failed again.

        Args:
            read: the read, by a fresh handle.
            passing: what it raises for damage and outages alike.

        Raises:
            TileError: it fails for damage.
            SlideError: it fails for an outage, which lasts longer than the pauses.
        """
        try:
            return try_again(read, passing, _SHORT_PAUSES_S if self._is_damaged else None)
        except passing as error:
            if _OUTAGE.search(str(error)):
                raise outage(str(error)) from error
            self._require_readable()
            raise TileError(str(error)) from error

    def _require_readable(self) -> None:
        """Read the slide's files, from end to end the first time.

        Raises:
            SlideError: they cannot be read.
        """
        try:
            with self._lock:
                for path in _files_of(self._path):
                    _read_through(path, everywhere=not self._is_damaged)
                self._is_damaged = True
        except OSError as error:
            raise outage(str(error)) from error


class _WatchedReads:
    """A file whose failed reads are OSErrors, whatever its file system calls them."""

    def __init__(self, file: Any) -> None:  # noqa: ANN401 - fsspec's files have no common class
        self._file = file

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401 - as above
        return getattr(self._file, name)

    def read(self, *size: int) -> bytes:
        try:
            data: bytes = self._file.read(*size)
        except (OSError, MemoryError):
            raise
        except Exception as error:  # aiohttp's, botocore's: a class of its own for each protocol
            raise OSError(f"{type(error).__name__}: {error}") from error
        return data


def watched(file: Any) -> Any:  # noqa: ANN401 - as above
    """Return a file whose failed reads raise OSError, so that they are not taken for damage."""
    return _WatchedReads(file)


def watch_reads(tif: TiffFile) -> None:
    """Have the failed reads of an open TIFF raise OSError."""
    handle: Any = tif.filehandle
    handle._fh = watched(handle._fh)  # it has no door for it


def _files_of(path: Path) -> Iterator[Path]:
    """Yield a slide's file, and those in the folder beside it of some formats, such as MIRAX."""
    yield path
    beside = path.with_suffix("")
    if beside != path and beside.is_dir():
        yield from sorted(own for own in beside.iterdir() if own.is_file())


def _read_through(path: Path, *, everywhere: bool) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        size = os.fstat(fd).st_size
        if everywhere:
            for offset in range(0, size, _CHUNK):
                os.pread(fd, _CHUNK, offset)
            return
        for number in range(_SAMPLES):
            os.pread(fd, _BLOCK, max(0, size - _BLOCK) * number // (_SAMPLES - 1))
    finally:
        os.close(fd)
