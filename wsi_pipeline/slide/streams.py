"""What a compressed tile says of itself, checked before a decoder allocates it.

Decoders of pictures trust the size in the picture's own head: a tile of a kilobyte may claim
4,000 million pixels. What the file's directory says of the tile is known by then to be small.
"""

from __future__ import annotations

import struct

__all__ = ["JPEG", "JPEG2000", "PLAIN", "check_stream", "picture_size"]

JPEG = frozenset({6, 7, 33007, 34892})
"""TIFF numbers of JPEG."""
JPEG2000 = frozenset({33003, 33004, 33005, 34712})
PLAIN = frozenset({1, 5, 8, 32773, 32946, 34926, 50000})
"""None, LZW, deflate twice, PackBits, Zstandard twice: told how much to write, they stop there."""
_WEBP = frozenset({34927, 50001})
_PNG = 34933
_MAX_SCANS = 64
"""Of a JPEG stream; progressive ones have about ten, and each is decoded over the whole tile."""
_SIZE_MARKERS = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
"""JPEG's start of a frame, in its kinds."""
_SCAN = 0xDA
_J2K_START = b"\xff\x4f\xff\x51"


def check_stream(compression: int, data: bytes, most_px: int) -> None:
    """Refuse a tile that would be decoded to more pixels than its place has.

    Args:
        compression: its number in TIFF.
        data: the tile as it is stored.
        most_px: pixels that its place has.

    Raises:
        ValueError: it says to be larger, or its size cannot be known beforehand.
    """
    if compression in PLAIN:
        return
    width, height = picture_size(compression, data)
    if width * height > most_px:
        msg = f"a picture of {width:,} x {height:,} pixels in place of {most_px:,}"
        raise ValueError(msg)


def picture_size(compression: int, data: bytes) -> tuple[int, int]:
    """Return width and height as a compressed picture states them.

    Args:
        compression: its number in TIFF.
        data: the whole picture.

    Raises:
        ValueError: no such picture, or of a kind whose head is not known here.
    """
    try:
        if compression in JPEG:
            return _jpeg_size(data)
        if compression in JPEG2000:
            return _jpeg2000_size(data)
        if compression in _WEBP:
            return _webp_size(data)
        if compression == _PNG and data[12:16] == b"IHDR":
            width, height = struct.unpack_from(">II", data, 16)
            return width, height
    except struct.error as error:
        raise ValueError("a picture that ends in its head") from error
    msg = f"no picture of compression {compression}, or of one whose size is not known beforehand"
    raise ValueError(msg)


def _jpeg_size(data: bytes) -> tuple[int, int]:
    at, frame = 2, (0, 0, 0, 0)
    while data[at : at + 1] == b"\xff":
        marker = data[at + 1] if at + 1 < len(data) else 0
        if marker in _SIZE_MARKERS:
            frame = (marker, *struct.unpack_from(">HHB", data, at + 5))
        if marker == _SCAN:
            break
        # fill bytes and markers that stand alone; what else there is has a length
        alone = marker == 0xFF or 0xD0 <= marker <= 0xD9
        at += 1 if marker == 0xFF else 2
        if not alone:
            at += max(2, struct.unpack_from(">H", data, at)[0])
    kind, height, width, components = frame
    if not kind:
        raise ValueError("a JPEG stream without a frame")
    # where the first scan holds all components, and all of each, it is the only one
    is_single = kind in (0xC0, 0xC1) and data[at + 4 : at + 5] == bytes([components])
    if not is_single and data.count(b"\xff\xda") > _MAX_SCANS:
        msg = f"a JPEG stream of more than {_MAX_SCANS} scans"
        raise ValueError(msg)
    return width, height


def _jpeg2000_size(data: bytes) -> tuple[int, int]:
    if data[:4] != _J2K_START:
        data = _codestream(data)
    # behind the marker: length, capabilities, far and near corner of the picture
    x1, y1, x0, y0 = struct.unpack_from(">4I", data, 8)
    return x1 - x0, y1 - y0


def _codestream(data: bytes) -> bytes:
    """Return what the boxes of a JP2 file are around."""
    at = 0
    while at + 8 <= len(data):
        length, name = struct.unpack_from(">I4s", data, at)
        if name == b"jp2c" and data[at + 8 : at + 12] == _J2K_START:
            return data[at + 8 :]
        if length < 8:
            break
        at += length
    raise ValueError("no JPEG 2000 stream")


def _webp_size(data: bytes) -> tuple[int, int]:
    kind = data[12:16]
    if kind == b"VP8X":
        numbers = struct.unpack_from("<I6B", data, 20)[1:]
        low = numbers[0] | numbers[1] << 8 | numbers[2] << 16
        high = numbers[3] | numbers[4] << 8 | numbers[5] << 16
        return low + 1, high + 1
    if kind == b"VP8L":
        (bits,) = struct.unpack_from("<I", data, 21)
        return (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
    if kind == b"VP8 ":
        width, height = struct.unpack_from("<HH", data, 26)
        return width & 0x3FFF, height & 0x3FFF
    raise ValueError("no WebP picture")
