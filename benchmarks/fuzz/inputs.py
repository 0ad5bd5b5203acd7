"""Hostile masks and lists of slides."""

from __future__ import annotations

import io
import struct
import zlib
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image

from benchmarks.fuzz.mutate import Rng, break_bytes, pick
from benchmarks.fuzz.slides import deflate_bomb

__all__ = ["MASKED_SIZE", "break_list", "break_mask", "masks"]

MASKED_SIZE = (1500, 1300)
"""Of the slide that the masks are for."""


# --- masks


@cache
def masks() -> tuple[bytes, ...]:
    """Return good masks, in all forms that pictures have."""
    mask = np.zeros((130, 150), np.uint8)
    mask[30:90, 20:110] = 255
    grey = Image.fromarray(mask)
    pictures = [grey, grey.convert("1"), grey.convert("P"), grey.convert("RGBA"),
                grey.convert("LA"), Image.fromarray(mask.astype(np.uint16) * 257)]  # fmt: skip
    forms = [(picture, "PNG") for picture in pictures]
    forms += [(grey, name) for name in ("TIFF", "BMP", "JPEG", "GIF", "WEBP", "PPM", "TGA", "ICNS")]
    files = []
    for picture, form in forms:
        buffer = io.BytesIO()
        picture.save(buffer, form)
        files.append(buffer.getvalue())
    return tuple(files)


def break_mask(folder: Path, rng: Rng) -> str:
    """Write a hostile ``mask.png``."""
    path = folder / "mask.png"
    roll = rng.random()
    if roll < 0.25:
        width, height = (int(pick(rng, (0, 1, 150, 4097, 13_000, 30_000, 65_535, 2**31 - 1)))
                         for _ in "wh")  # fmt: skip
        bits, colour = pick(rng, ((1, 0), (8, 0), (16, 0), (8, 2), (16, 2), (8, 3), (8, 6), (3, 9)))
        content = pick(rng, (deflate_bomb(1024), zlib.compress(bytes(1000)), b"", b"\x78\x9c"))
        path.write_bytes(png(width, height, bits, colour, content))
        return f"PNG of {width} x {height}, {bits} bits, colour {colour}, {len(content)} bytes"
    if roll < 0.3:
        path.write_bytes(png(150, 130, 8, 0, zlib.compress(bytes(151 * 130)), text=64))
        return "PNG with a bomb of text"
    number = int(rng.integers(len(masks())))
    data, done = break_bytes(masks()[number], rng, masks())
    if roll < 0.6:
        data = _with_checksums(data)
    path.write_bytes(data)
    return f"mask {number}: {done}"


def png(width: int, height: int, bits: int, colour: int, data: bytes, text: int = 0) -> bytes:
    """Return a PNG whose checksums are right, whatever its header says.

    Args:
        width: as the header says.
        height: as the header says.
        bits: a sample.
        colour: PNG colour type.
        data: compressed pixels.
        text: MiB of compressed text.
    """
    head = struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0)
    chunks = [(b"IHDR", head), (b"IDAT", data), (b"IEND", b"")]
    if text:
        chunks.insert(1, (b"zTXt", b"Comment\0\0" + deflate_bomb(text)))
    return b"\x89PNG\r\n\x1a\n" + b"".join(_chunk(*chunk) for chunk in chunks)


def _chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def _with_checksums(data: bytes) -> bytes:
    """Make the checksums of a damaged PNG right again, as far as its chunks can be followed."""
    out, at = bytearray(data), 8
    while data[:4] == b"\x89PNG" and at + 12 <= len(data):
        end = at + 8 + int.from_bytes(data[at : at + 4], "big")
        if end + 4 > len(data):
            break
        out[end : end + 4] = struct.pack(">I", zlib.crc32(data[at + 4 : end]))
        at = end + 4
    return bytes(out)


# --- lists

_CSV = b"path,slide_id,mpp,mask\na.svs,one,0.25,\nb.svs,two,,m.png\nc/d.tif,three,0.5,\n"
_TXT = b"a.svs\n# a comment\nb.svs\n\nc/d.tif\n"
_CELLS = ("", "nan", "inf", "-1", "0", "1e999", "../../x", "/etc/passwd", "\x00", '"',
          "a" * 200_000, "s3://x/y.svs", "file:///etc/passwd",
          ".hidden", "..", ".", "*", "[", "\u202e", "0,25",
          "CON", "a/b", "~", "${HOME}", "\ufeff", "1_0", "१")  # fmt: skip


def break_list(folder: Path, rng: Rng) -> str:
    """Write a hostile ``list.csv`` or ``list.txt``."""
    is_csv = rng.random() < 0.7
    path, data = (folder / "list.csv", _CSV) if is_csv else (folder / "list.txt", _TXT)
    roll = rng.random()
    if roll < 0.4:
        data, done = break_bytes(data, rng, (_TXT, _CSV))
    elif roll < 0.45:
        data, done = data + b'"' + b"x," * 100_000, "a quote that never ends"
    elif roll < 0.5:
        data, done = data.decode().encode(pick(rng, ("utf-16", "utf-32", "utf-8-sig"))), "recoded"
    elif roll < 0.53:
        data, done = data + b"".join(b"x%d.svs\n" % n for n in range(3000)), "3,000 lines"
    else:
        lines = [line.split(",") for line in data.decode().splitlines()]
        done = ""
        for _ in range(1 + int(rng.integers(3))):
            line, cell = pick(rng, lines), pick(rng, _CELLS)
            line[int(rng.integers(len(line)))] = cell
            done += f" {cell[:20]!r}"
        data = "\n".join(",".join(line) for line in lines).encode("utf-8", "surrogatepass")
    path.write_bytes(data)
    return f"{path.name}: {done}"
