"""What a TIFF file says of itself, checked before any library believes it.

A TIFF is a chain of directories of tags, and most readers follow and allocate whatever the tags
say: some end the process where memory does not suffice, some follow a chain for ever. Here the
chain is walked once, a few reads a directory, and absurd claims are refused. Whether the
pixels are of a kind that can be read is for the readers to say.
"""

from __future__ import annotations

import math
import os
import re
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, cast

import numpy as np

from wsi_pipeline.slide.outages import watched
from wsi_pipeline.slide.reader import NotTakenError

__all__ = ["MAX_SIDE_PX", "check_directories"]

MAX_DIRECTORIES = 512
"""Slides have about ten, and stacks of focal planes a hundred."""
MAX_PLANES = 100_000
"""Of an OME-TIFF, as its XML says; for each of them, readers make an entry."""
MAX_SIDE_PX = 6_000_000
"""300 mm, wider than any glass, at 0.05 um a pixel."""
MAX_TILE_BYTES = 64 << 20
"""Decoded, several at once: 4,096 x 4,096 RGBA pixels. Usual are 256 to 1,024 a side."""
MAX_STRIP_BYTES = 256 << 20
"""Decoded, one at a time."""

_WIDTH, _LENGTH, _BITS, _SAMPLES, _ROWS, _PLANAR = 256, 257, 258, 277, 278, 284
_DESCRIPTION, _TILE_WIDTH, _TILE_LENGTH, _TILES = 270, 322, 323, 324
_INNER, _NDPI = 330, 65420
_TEXT = (1, 2, 7)
_SIZES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8, 13: 4,
          16: 8, 17: 8, 18: 8}  # fmt: skip
"""Bytes of a value by its type."""
_WHOLE = {1: "B", 3: "H", 4: "I", 13: "I", 16: "Q", 18: "Q"}
"""Types of numbers that are no text, no fraction, and not negative."""
_PLACES = frozenset({273, 279, _TILES, 325, 347})
"""Tags whose values must lie in the file: where the pixels are, and what decodes them."""
_BYTES = frozenset({279, 325})
"""Bytes of each tile or strip, which some readers allocate before they read."""
_ONCE = frozenset({_WIDTH, _LENGTH, _TILE_WIDTH, _TILE_LENGTH, _TILES, _BITS, _SAMPLES, _ROWS})
"""Tags of which readers would differ in which they believe."""


def check_directories(path: str) -> None:
    """Refuse a TIFF file whose directories make no sense; pass over any other file.

    Args:
        path: a local path or an fsspec URL. Whether it can be opened is for the readers to say.

    Raises:
        NotTakenError: the chain leaves the file or runs in a circle, or a directory states a
            size, tiles or places that cannot be.
        OSError: the file cannot be read.
    """
    if "://" not in path:
        with Path(path).open("rb") as file:
            _check_file(file)
        return
    import fsspec

    try:
        # small blocks: directories are few bytes here and there
        opened = fsspec.open(path, "rb", block_size=1 << 16).open()
    except (OSError, ValueError, ImportError, TypeError):
        return
    with opened as file:
        _check_file(cast(BinaryIO, watched(file)))


def _check_file(file: BinaryIO) -> None:
    tiff = _Tiff.begin(file)
    if tiff is None or (tiff.link == "I" and tiff.size > 0xFFFF_FFFF):
        return  # offsets of 32 bits do not reach all of it: NDPI, which has ways of its own
    seen: set[int] = set()
    links = [tiff.first_link]
    while links:
        at = tiff.follow(links.pop())
        while at:
            if at in seen:
                raise _damaged(f"directory {len(seen)} is one of those before it")
            seen.add(at)
            if len(seen) > MAX_DIRECTORIES:
                reason = f"more than {MAX_DIRECTORIES:,} directories: a stack, not a slide"
                raise NotTakenError(reason, damaged=False)
            entries, link = tiff.directory(at)
            if len(seen) == 1:
                _check_planes(tiff.text(entries, _DESCRIPTION))
            _check_image(tiff, entries)
            links += tiff.inner_links(entries)
            at = tiff.follow(link)
    if not seen:
        raise _damaged("it has no directory")


@dataclass(frozen=True, kw_only=True, slots=True)
class _Entry:
    """One tag of a directory."""

    kind: int
    """TIFF type."""
    count: int
    """Of values."""
    values_at: int
    """In the file; in the entry itself where they fit."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Tiff:
    """An open file, and how it writes its numbers."""

    file: BinaryIO
    size: int
    order: str
    link: str
    """Of offsets, and of counts of values."""
    number: str
    """Of the count of entries."""
    first_link: int
    """Where the offset of the first directory lies."""

    @classmethod
    def begin(cls, file: BinaryIO) -> _Tiff | None:
        """Read the head of a file; None where it is no TIFF."""
        size = file.seek(0, os.SEEK_END)
        file.seek(0)
        head = file.read(8)
        order = {b"II": "<", b"MM": ">"}.get(head[:2])
        if order is None or len(head) < 8:
            return None
        version, width, zero = struct.unpack(order + "HHH", head[2:])
        if version == 42:
            return cls(file=file, size=size, order=order, link="I", number="H", first_link=4)
        if (version, width, zero) == (43, 8, 0):
            return cls(file=file, size=size, order=order, link="Q", number="Q", first_link=8)
        return None

    def read(self, code: str, at: int) -> tuple[int, ...]:
        """Read numbers.

        Raises:
            NotTakenError: they do not lie in the file.
        """
        length = struct.calcsize(self.order + code)
        if at + length > self.size:
            raise _damaged(f"truncated: {self.size} bytes, and its directories reach to {at}")
        self.file.seek(at)
        return struct.unpack(self.order + code, self.file.read(length))

    def follow(self, link: int) -> int:
        """Read where a directory lies; 0 where there is none."""
        return self.read(self.link, link)[0]

    def directory(self, at: int) -> tuple[dict[int, _Entry], int]:
        """Read a directory; return its tags, and where the offset of the next one lies."""
        (count,) = self.read(self.number, at)
        first, length = at + struct.calcsize("=" + self.number), 4 + 2 * self.width
        end = first + count * length
        if end > self.size:
            raise _damaged(f"truncated: {self.size} bytes, and a directory at {at} ends at {end}")
        entries: dict[int, _Entry] = {}
        for place in range(first, end, length):
            tag, kind, values = self.read("HH" + self.link, place)
            if tag in entries and tag in _ONCE:
                raise _damaged(f"the directory at {at} has tag {tag} twice")
            values_at = place + length - self.width
            if _SIZES.get(kind, 1) * values > self.width:
                (values_at,) = self.read(self.link, values_at)
            entries[tag] = _Entry(kind=kind, count=values, values_at=values_at)
        return entries, end

    def inner_links(self, entries: dict[int, _Entry]) -> list[int]:
        """Return where the offsets of directories within a directory lie."""
        entry = entries.get(_INNER)
        if entry is None:
            return []
        step = _SIZES.get(entry.kind, 0)
        if step != self.width or entry.count > MAX_DIRECTORIES:
            raise _damaged(f"{entry.count} inner directories, by numbers of type {entry.kind}")
        return list(range(entry.values_at, entry.values_at + entry.count * step, step))

    def value(self, entries: dict[int, _Entry], tag: int, default: int) -> int:
        """Return the first number of a tag; the default where it has none."""
        entry = entries.get(tag)
        code = _WHOLE.get(entry.kind) if entry is not None else None
        if entry is None or code is None or not entry.count:
            return default
        return self.read(code, entry.values_at)[0]

    def largest(self, entry: _Entry) -> int:
        """Return the largest number of a tag whose values lie in the file; 0 where it has none."""
        code = _WHOLE.get(entry.kind)
        if code is None or not entry.count:
            return 0
        self.file.seek(entry.values_at)
        raw = self.file.read(entry.count * _SIZES[entry.kind])
        return int(np.frombuffer(raw, self.order + code).max())

    def text(self, entries: dict[int, _Entry], tag: int) -> bytes:
        """Return the text of a tag, as far as it lies in the file; nothing where it has none."""
        entry = entries.get(tag)
        if entry is None or entry.kind not in _TEXT:
            return b""
        self.file.seek(min(entry.values_at, self.size))
        return self.file.read(min(entry.count, self.size))

    @property
    def width(self) -> int:
        """Bytes of an offset."""
        return struct.calcsize("=" + self.link)


def _check_image(tiff: _Tiff, entries: dict[int, _Entry]) -> None:
    for tag in _PLACES & entries.keys():
        entry = entries[tag]
        if entry.values_at + entry.count * _SIZES.get(entry.kind, 1) > tiff.size:
            reason = f"truncated: {tiff.size} bytes, and tag {tag} has {entry.count} values"
            raise _damaged(f"{reason} at {entry.values_at}")
        if tag in _BYTES and (largest := tiff.largest(entry)) > tiff.size:
            raise _damaged(f"truncated: {tiff.size} bytes, and a part of its pixels has {largest}")
    width, length = (tiff.value(entries, tag, 0) for tag in (_WIDTH, _LENGTH))
    if not (0 < width <= MAX_SIDE_PX and 0 < length <= MAX_SIDE_PX):
        raise _damaged(f"it says to have {width:,} x {length:,} pixels")
    if _TILES in entries:
        wide, high = (tiff.value(entries, tag, 0) for tag in (_TILE_WIDTH, _TILE_LENGTH))
        name, most = "tiles", MAX_TILE_BYTES
    else:
        wide, high = width, min(length, tiff.value(entries, _ROWS, length))
        name, most = "strips", MAX_STRIP_BYTES
    said = f"{name} of {wide:,} x {high:,} pixels"
    if not wide or not high:
        raise _damaged(f"it says to have {said}")
    samples = tiff.value(entries, _SAMPLES, 1)
    depth = wide * high * samples * -(-tiff.value(entries, _BITS, 1) // 8)
    if depth > most and _NDPI not in entries:
        raise NotTakenError(f"{said}, too large to be decoded whole", damaged=False)
    needed = -(-width // wide) * -(-length // high)
    needed *= samples if tiff.value(entries, _PLANAR, 1) == 2 else 1
    if _TILES in entries and entries[_TILES].count < needed:
        raise _damaged(f"{entries[_TILES].count:,} tile offsets for {needed:,} tiles")


def _check_planes(description: bytes) -> None:
    """Refuse an OME-TIFF that says to have more planes than anything has."""
    if b"<OME" not in description:
        return
    for pixels in description.split(b"<Pixels")[1:]:
        sizes = re.findall(rb"\bSize[CTZ]\s*=\s*[\"']\s*(\d+)", pixels.partition(b">")[0])
        if any(len(size) > 6 for size in sizes) or math.prod(map(int, sizes)) > MAX_PLANES:
            raise _damaged(f"its OME-XML says to have {b' x '.join(sizes).decode()} planes")


def _damaged(reason: str) -> NotTakenError:
    return NotTakenError(reason, damaged=True)
