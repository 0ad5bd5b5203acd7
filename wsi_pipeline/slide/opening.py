"""Which reader takes a file, and what to say when none does."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import openslide

from wsi_pipeline.errors import SlideError, UnsupportedFormatError
from wsi_pipeline.slide.directory import check_directories
from wsi_pipeline.slide.outages import outage
from wsi_pipeline.slide.reader import NotTakenError, TileError, TileReader
from wsi_pipeline.slide.regions import OpenSlideReader, TiffSlideReader
from wsi_pipeline.slide.tiff import TiffReader

__all__ = ["open_reader"]

_FAST_VENDORS = (None, "aperio", "generic-tiff")
"""Other vendors' TIFF files place their tiles in ways of their own."""
_PROBES = 16
"""Tiles tried before a level counts as undecodable."""
_SIGNATURES = (
    (0, b"\x89PNG", "a PNG picture"),
    (0, b"\xff\xd8\xff", "a JPEG picture"),
    (0, b"GIF8", "a GIF picture"),
    (0, b"BM", "a BMP picture"),
    (0, b"RIFF", "a WebP picture or another RIFF file"),
    (0, b"%PDF", "a PDF document"),
    (0, b"PK\x03\x04", "a ZIP archive"),
    (0, b"\x1f\x8b", "a gzip archive"),
    (0, b"\x89HDF", "an HDF5 file"),
    (0, b"PAR1", "a Parquet file"),
    (0, b"ZISRAWFILE", "a Zeiss CZI file"),
    (0, b"\x00\x00\x00\x0cjP  ", "a JPEG 2000 picture"),
    (128, b"DICM", "a DICOM file"),
)
"""Offset, bytes and name of formats that may be whole and are still no slide we read."""


def open_reader(path: str) -> TileReader:
    """Open a slide with the first reader that takes it and can decode it.

    Args:
        path: a local path or an fsspec URL.

    Raises:
        SlideError: the file is missing or damaged.
        UnsupportedFormatError: the file is whole, and of a kind that no reader takes.
    """
    _require_file(path)
    try:
        check_directories(path)
    except NotTakenError as refusal:
        raise _failure(path, [("Tiff", refusal)]) from refusal
    except OSError as problem:
        raise outage(str(problem)) from problem
    refusals: list[tuple[str, NotTakenError]] = []
    for opener in _openers(path):
        name = opener.__qualname__.partition("Reader")[0]
        try:
            reader = opener(path)
        except NotTakenError as refusal:
            refusals.append((name, refusal))
            if refusal.damaged and opener == TiffReader.open:
                break  # others read truncated files without a word
            continue
        try:
            error = _undecodable(reader)
        except SlideError:
            reader.close()
            raise
        if error is None:
            return reader
        reader.close()
        # the fast path knows beforehand what it can decode; the others do not
        refusals.append((name, NotTakenError(error, damaged=reader.kind == "tiff")))
    raise _failure(path, refusals)


def _require_file(path: str) -> None:
    if "://" in path:
        return
    if not Path(path).is_file():
        found = "is a folder" if Path(path).is_dir() else "does not exist"
        msg = f"{path} {found}. To proceed: give the path of a slide file."
        raise SlideError(msg)
    try:
        with open(path, "rb"):
            pass
    except OSError as error:
        msg = f"{path} cannot be opened: {error.strerror}. To proceed: check who may read it."
        raise SlideError(msg) from error


def _openers(path: str) -> Sequence[Callable[[str], TileReader]]:
    if "://" in path:
        return [TiffSlideReader.open]
    vendor = openslide.OpenSlide.detect_format(path)
    if vendor in _FAST_VENDORS:
        return [TiffReader.open, OpenSlideReader.open, TiffSlideReader.open]
    return [OpenSlideReader.open, TiffSlideReader.open]


def _undecodable(reader: TileReader) -> str | None:
    """Tell which level holds nothing that can be decoded, and why; None if all do.

    An undecodable overview would make a slide look empty, so it counts as much as
    level 0.
    """
    for index in range(len(reader.levels)):
        error = _probe(reader, index)
        if error is not None:
            return f"it opens, but nothing of level {index} can be decoded: {error}"
    return None


def _probe(reader: TileReader, index: int) -> TileError | None:
    """Decode tiles spread over a level until one succeeds; return the last error if none."""
    columns, rows = reader.levels[index].lattice
    count = columns * rows
    places = np.unique(np.linspace(0, count - 1, min(count, _PROBES)).astype(int))
    failure = None
    # from the middle outwards: borders are the first to be empty
    for place in sorted(places.tolist(), key=lambda place: abs(place - count / 2)):
        try:
            if reader.tile(index, place % columns, place // columns, 1) is not None:
                return None
        except TileError as error:
            failure = error
    return failure


def _failure(path: str, refusals: list[tuple[str, NotTakenError]]) -> SlideError:
    said = "; ".join(f"{name}: {refusal}" for name, refusal in refusals)
    is_damaged = refusals[0][1].damaged
    if "://" in path:
        msg = (
            f"{path} cannot be read as a slide. Tried {said}. To proceed: check the URL, or "
            "copy the file to this machine, where more formats are read."
        )
        return SlideError(msg) if is_damaged else UnsupportedFormatError(msg)
    foreign = _foreign(path)
    if foreign or not is_damaged:
        msg = (
            f"{path} {'is ' + foreign if foreign else 'seems whole'}, but no reader here takes "
            f"it. Tried {said}. To proceed: convert it to a tiled pyramidal TIFF (JPEG, RGB, "
            "8 bits) that states its pixel size."
        )
        return UnsupportedFormatError(msg)
    msg = (
        f"{path} cannot be read: it is damaged or incomplete, or no slide at all. Tried {said}. "
        "To proceed: copy it again from the scanner or the archive and compare checksums."
    )
    return SlideError(msg)


def _foreign(path: str) -> str | None:
    with open(path, "rb") as file:
        head = file.read(256)
    return next(
        (name for at, magic, name in _SIGNATURES if head[at : at + len(magic)] == magic), None
    )
