"""The directories of a TIFF file, as bytes that can be changed one by one."""

from __future__ import annotations

import struct
from dataclasses import dataclass

__all__ = ["SIZES", "Entry", "Layout", "scan"]

SIZES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8, 13: 4,
         16: 8, 17: 8, 18: 8}  # fmt: skip
"""Bytes of a value by its TIFF type."""
_FORMATS = {1: "B", 2: "B", 3: "H", 4: "I", 6: "b", 7: "B", 8: "h", 9: "i", 13: "I", 16: "Q",
            17: "q", 18: "Q"}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One tag of a directory."""

    directory: int
    """Index of the directory."""
    at: int
    """Where the entry lies in the file."""
    tag: int
    kind: int
    """TIFF type of its values."""
    count: int
    """How many values it has."""
    data_at: int
    """Where its values lie: in the entry, or elsewhere in the file."""


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Where what lies in a TIFF file."""

    order: str
    """``<`` or ``>``."""
    is_big: bool
    """BigTIFF: offsets of 64 bits."""
    links: tuple[int, ...]
    """Where the offsets of directories lie: in the header, then at the end of each."""
    directories: tuple[int, ...]
    """Where the directories begin."""
    entries: tuple[Entry, ...]

    def find(self, tag: int, directory: int | None = None) -> list[Entry]:
        """Return the entries of a tag."""
        return [e for e in self.entries if e.tag == tag and directory in (None, e.directory)]

    def pack(self, code: str, *values: int) -> bytes:
        """Pack numbers in the file's byte order."""
        return struct.pack(self.order + code, *values)

    @property
    def offset_code(self) -> str:
        """Of an offset, and of the count of an entry."""
        return "Q" if self.is_big else "I"

    def point(self, data: bytearray, link: int, target: int) -> None:
        """Let the chain of directories go on elsewhere."""
        self._put(data, self.links[link], self.pack(self.offset_code, target & self._most))

    def retype(self, data: bytearray, entry: Entry, kind: int) -> None:
        """Change the type of a tag."""
        self._put(data, entry.at + 2, self.pack("H", kind))

    def retag(self, data: bytearray, entry: Entry, tag: int) -> None:
        """Change the number of a tag."""
        self._put(data, entry.at, self.pack("H", tag))

    def recount(self, data: bytearray, entry: Entry, count: int) -> None:
        """Change how many values a tag says to have."""
        self._put(data, entry.at + 4, self.pack(self.offset_code, count & self._most))

    def poke(self, data: bytearray, entry: Entry, value: int, index: int = 0) -> None:
        """Overwrite one value of a tag as far as its type holds it."""
        size = SIZES.get(entry.kind, 1)
        raw = (value & ((1 << 8 * size) - 1)).to_bytes(
            size, "little" if self.order == "<" else "big"
        )
        self._put(data, entry.data_at + index * size, raw)

    def replace(self, data: bytearray, entry: Entry, kind: int, values: bytes) -> None:
        """Give a tag other values, appended to the file where they do not fit the entry."""
        self.retype(data, entry, kind)
        self.recount(data, entry, len(values) // SIZES[kind])
        field, room = (entry.at + 12, 8) if self.is_big else (entry.at + 8, 4)
        if len(values) <= room:
            self._put(data, field, values.ljust(room, b"\0"))
        else:
            self._put(data, field, self.pack(self.offset_code, len(data)))
            data += values

    def set(self, data: bytearray, entry: Entry, *values: int) -> None:
        """Give a tag other whole numbers, of 32 bits, or 64 in a BigTIFF."""
        kind = 16 if self.is_big else 4
        packed = self.pack(_FORMATS[kind] * len(values), *(v & self._most for v in values))
        self.replace(data, entry, kind, packed)

    def values(self, data: bytes, entry: Entry) -> list[int]:
        """Return the whole numbers of a tag; nothing where it has none."""
        code = _FORMATS.get(entry.kind)
        size = SIZES.get(entry.kind, 1) * entry.count
        raw = data[entry.data_at : entry.data_at + size]
        if code is None or len(raw) < size:
            return []
        return list(struct.unpack(f"{self.order}{entry.count}{code}", raw))

    @property
    def _most(self) -> int:
        return (1 << (64 if self.is_big else 32)) - 1

    @staticmethod
    def _put(data: bytearray, at: int, raw: bytes) -> None:
        data[at : at + len(raw)] = raw


def scan(data: bytes) -> Layout:
    """Find the directories of a whole TIFF file.

    Raises:
        ValueError: the bytes are no TIFF.
    """
    order = {b"II": "<", b"MM": ">"}.get(bytes(data[:2]))
    if order is None:
        raise ValueError("no TIFF")
    is_big = struct.unpack_from(order + "H", data, 2)[0] == 43
    number, offset, size, link = ("Q", "Q", 20, 8) if is_big else ("H", "I", 12, 4)
    links, starts, entries = [link], [], []
    at = struct.unpack_from(order + offset, data, link)[0]
    while at:
        count = struct.unpack_from(order + number, data, at)[0]
        starts.append(at)
        first = at + struct.calcsize(order + number)
        for place in range(first, first + count * size, size):
            tag, kind, length = struct.unpack_from(order + "HH" + offset, data, place)
            field = place + (12 if is_big else 8)
            inside = SIZES.get(kind, 1) * length <= (8 if is_big else 4)
            data_at = field if inside else struct.unpack_from(order + offset, data, field)[0]
            entries.append(Entry(directory=len(starts) - 1, at=place, tag=tag, kind=kind,
                                 count=length, data_at=data_at))  # fmt: skip
        links.append(first + count * size)
        at = struct.unpack_from(order + offset, data, links[-1])[0]
    return Layout(
        order=order,
        is_big=is_big,
        links=tuple(links),
        directories=tuple(starts),
        entries=tuple(entries),
    )
