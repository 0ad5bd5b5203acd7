"""A BigTIFF written tile by tile, laid out as Aperio scanners lay out an SVS.

Tile data are appended as they come, of any level in any order; the directories follow at
the end. Only the tiles' offsets are held in memory.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, field
from typing import BinaryIO

__all__ = ["BigTiff", "Page"]

_SHORT, _LONG, _LONG8, _ASCII = 3, 4, 16, 2
_FORMATS = {_SHORT: "H", _LONG: "I", _LONG8: "Q"}


@dataclass(kw_only=True)
class Page:
    """One image of the file while it is being written."""

    size: tuple[int, int]
    """``(width, height)`` in pixels."""
    tile_px: int | None
    """Side of a tile; None for an image in one strip."""
    compression: int
    """TIFF tag 259: 7 JPEG, 33005 JPEG 2000 with RGB components."""
    description: str
    """Image description."""
    offsets: list[int] = field(init=False)
    """Where each tile lies in the file; 0 where none was written."""
    lengths: list[int] = field(init=False)
    """Bytes of each tile."""

    def __post_init__(self) -> None:
        count = self.tiles[0] * self.tiles[1]
        self.offsets = [0] * count
        self.lengths = [0] * count

    @property
    def tiles(self) -> tuple[int, int]:
        """Columns and rows of tiles."""
        if self.tile_px is None:
            return 1, 1
        return -(-self.size[0] // self.tile_px), -(-self.size[1] // self.tile_px)

    def tags(self) -> list[tuple[int, int, list[int] | bytes]]:
        """Return the directory's ``(tag, type, values)`` in ascending order."""
        text = self.description.encode("ascii") + b"\0"
        tags: list[tuple[int, int, list[int] | bytes]] = [
            (254, _LONG, [0]),
            (256, _LONG, [self.size[0]]),
            (257, _LONG, [self.size[1]]),
            (258, _SHORT, [8, 8, 8]),
            (259, _SHORT, [self.compression]),
            # Photometric RGB: the JPEG streams hold R, G, B, not Y, Cb, Cr.
            (262, _SHORT, [2]),
            (270, _ASCII, text),
            (277, _SHORT, [3]),
            (284, _SHORT, [1]),
        ]
        if self.tile_px is None:
            tags += [
                (273, _LONG8, self.offsets),
                (278, _LONG, [self.size[1]]),
                (279, _LONG8, self.lengths),
            ]
        else:
            tags += [
                (322, _LONG, [self.tile_px]),
                (323, _LONG, [self.tile_px]),
                (324, _LONG8, self.offsets),
                (325, _LONG8, self.lengths),
            ]
        return sorted(tags, key=lambda tag: tag[0])


class BigTiff:
    """An open file to which tiles are appended."""

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream
        # Byte order, version 43, 8-byte offsets; the first directory's place comes later.
        stream.write(struct.pack("<2sHHHQ", b"II", 43, 8, 0, 0))
        self._end = 16

    def append(self, page: Page, index: int, data: bytes) -> None:
        """Write the data of one tile (or of the only strip) of a page."""
        page.offsets[index], page.lengths[index] = self._put(data), len(data)

    def finish(self, pages: list[Page]) -> None:
        """Write the directories, in order, and link them."""
        link = 8
        for page in pages:
            entries = [self._entry(*tag) for tag in page.tags()]
            self._put(b"\0" * (-self._end % 8))
            place = self._put(struct.pack("<Q", len(entries)) + b"".join(entries) + b"\0" * 8)
            self._stream.seek(link)
            self._stream.write(struct.pack("<Q", place))
            self._stream.seek(0, 2)
            link = self._end - 8

    def _entry(self, tag: int, kind: int, values: list[int] | bytes) -> bytes:
        if isinstance(values, bytes):
            packed = values
        else:
            packed = struct.pack(f"<{len(values)}{_FORMATS[kind]}", *values)
        if len(packed) > 8:
            self._put(b"\0" * (-self._end % 8))
            packed = struct.pack("<Q", self._put(packed))
        return struct.pack("<HHQ", tag, kind, len(values)) + packed.ljust(8, b"\0")

    def _put(self, data: bytes) -> int:
        place = self._end
        self._stream.write(data)
        self._end += len(data)
        return place
