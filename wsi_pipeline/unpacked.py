"""The bytes of a file that a stranger made, unpacked, a few at a time and up to a limit."""

from __future__ import annotations

import zlib
from typing import IO

__all__ = ["RefusedError", "Unpacked"]

_FOREIGN = (
    (b"BZh", "bzip2"), (b"\xfd7zXZ", "xz"), (b"]\x00", "lzma"), (b"\x04\x22\x4d\x18", "lz4"),
    (b"PK\x03\x04", "zip"),
)  # fmt: skip
_STEP_BYTES = 1 << 16
_LONGEST_LINE = 256


class RefusedError(Exception):
    """A file wants something that is not done here; the text says what."""


class Unpacked:
    """Reads a file, packed by zlib or gzip or not at all.

    A count is never trusted before that many bytes are there.
    """

    def __init__(self, file: IO[bytes], limit_bytes: int) -> None:
        """Look at the first bytes.

        Raises:
            RefusedError: it is packed in another way.
        """
        self._file = file
        self._left = limit_bytes
        head = file.read(6)
        file.seek(0)
        foreign = next((name for magic, name in _FOREIGN if head.startswith(magic)), None)
        if foreign:
            raise RefusedError(f"it is packed by {foreign}; unpack it, or dump it without")
        # 0x78 begins a stream of zlib; it is a lower-case x, with which no pickle begins.
        packed = head[:1] == b"\x78" or head[:2] == b"\x1f\x8b"
        self._unpack = zlib.decompressobj(wbits=47) if packed else None
        self._held, self._at = b"", 0

    def byte(self) -> int:
        """Return the next byte."""
        if self._at == len(self._held):
            self._held, self._at = self._more(), 0
        self._at += 1
        return self._held[self._at - 1]

    def read(self, count: int) -> bytes:
        """Return exactly so many bytes.

        Raises:
            EOFError: there are fewer.
            RefusedError: the limit is passed.
        """
        end = self._at + count
        if end <= len(self._held):
            out = self._held[self._at : end]
            self._at = end
            return out
        parts = [self._held[self._at :]]
        missing = count - len(parts[0])
        while missing:
            self._held = self._more()
            self._at = min(missing, len(self._held))
            parts.append(self._held[: self._at])
            missing -= self._at
        return b"".join(parts)

    def line(self) -> str:
        """Return a short line of ASCII text, without its end."""
        out = bytearray()
        while (byte := self.byte()) != 0x0A:
            out.append(byte)
            if len(out) > _LONGEST_LINE:
                raise ValueError(f"a name of more than {_LONGEST_LINE} bytes")
        return out.decode("ascii")

    def _more(self) -> bytes:
        data = self._file.read(_STEP_BYTES) if self._unpack is None else self._inflate()
        if not data:
            raise EOFError("it ends too early")
        self._left -= len(data)
        if self._left < 0:
            raise RefusedError("it is larger than what is read here")
        return data

    def _inflate(self) -> bytes:
        assert self._unpack is not None
        while not self._unpack.eof:
            raw = self._unpack.unconsumed_tail or self._file.read(_STEP_BYTES)
            data = self._unpack.decompress(raw, _STEP_BYTES)
            if data or not raw:
                return data
        return b""
