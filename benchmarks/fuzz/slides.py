"""Hostile slides: small good ones of every kind, changed where it hurts.

A change of the directories is made on the bytes of a whole file, so everything around it stays
as a scanner would have written it.
"""

from __future__ import annotations

import struct
import tempfile
import zlib
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path

import imagecodecs
import numpy as np

from benchmarks.fuzz.mutate import NUMBERS, Rng, break_bytes, pick
from benchmarks.fuzz.tiffs import SIZES, Entry, Layout, scan
from tests import slide_fixtures
from wsi_pipeline.synth import write_slide

__all__ = ["break_slide", "broken_seeds", "seeds"]

_WIDTH, _LENGTH, _COMPRESSION, _PHOTOMETRIC, _DESCRIPTION = 256, 257, 259, 262, 270
_TILE_WIDTH, _TILE_LENGTH, _OFFSETS, _COUNTS, _TABLES = 322, 323, 324, 325, 347
_SAMPLES = 277
_SIZE_TAGS = (_WIDTH, _LENGTH, _TILE_WIDTH, _TILE_LENGTH, 278, 282, 283, 32997, 32998)
_CHOICES: Mapping[int, tuple[int, ...]] = {
    254: (0, 1, 2, 4, 9, 255),
    258: (0, 1, 4, 8, 12, 16, 32, 64, 65535),
    _COMPRESSION: (0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 262, 32766, 32773, 32809, 32946, 33003, 33005,
                   34661, 34676, 34677, 34712, 34887, 34892, 34925, 34926, 34927, 50000, 50001,
                   50002, 52546, 65000),
    _PHOTOMETRIC: (0, 1, 2, 3, 4, 5, 6, 8, 9, 10, 32803, 34892, 65535),
    266: (0, 1, 2, 7),
    274: (0, 1, 2, 3, 4, 5, 6, 7, 8, 9),
    _SAMPLES: (0, 1, 2, 3, 4, 5, 255, 65535),
    284: (0, 1, 2, 3),
    296: (0, 1, 2, 3, 4),
    317: (0, 1, 2, 3, 34892, 34893, 34894, 34895),
    338: (0, 1, 2, 3),
    339: (0, 1, 2, 3, 4, 5, 6),
    530: (0, 1, 2, 4, 8, 255),
}  # fmt: skip
"""Tags that name a choice, and what they may be set to, possible or not."""
_DESCRIPTIONS = (
    b"Aperio Image Library v11|AppMag = 40|MPP = nan\0",
    b"Aperio Image Library v11|AppMag = 1e400|MPP = -0.25\0",
    b"Aperio Image Library v11|MPP = 0.0000001\0",
    b"Aperio|MPP=0.25|MPP=0.5|=||===|\0",
    b"Aperio Image Library v11\n" + b"|MPP = 0.25" * 2000 + b"\0",
    b"Aperio Image Library v11|MPP = 0.25\xff\xfe\x80|\xf0\x28\x8c\x28 = 1\0",
    b'<?xml version="1.0"?><scn xmlns="http://www.leica-microsystems.com/scn/2010/10/01">'
    b'<collection sizeX="1000000000" sizeY="1"><image><pixels sizeX="1" sizeY="1"><dimension '
    b'r="0" ifd="0" sizeX="1000000000" sizeY="64"/></pixels></image></collection></scn>\0',
    b'<?xml version="1.0"?><DataObject ObjectType="DPUfsImport"><Attribute Name='
    b'"DICOM_PIXEL_SPACING">"0" "1e-400"</Attribute></DataObject>\0',
    b'{"shape": [1000000000, 1000000000, 3]}\0',
    b"ImageJ=1.11a\nimages=1000000000\nslices=1000000000\n\0",
    b'<?xml version="1.0"?><OME xmlns="http://www.openmicroscopy.org/Schemas/OME/2016-06"><Image>'
    b'<Pixels DimensionOrder="XYCZT" SizeC="3" SizeT="1000000000" SizeX="64" SizeY="64" SizeZ='
    b'"99999" Type="uint8" PhysicalSizeX="0"><TiffData/></Pixels></Image></OME>\0',
    b"SCANIMAGE\0", b"\0", b"",
)  # fmt: skip
_FOREIGN = (271, 272, 305, 330, 34377, 34665, 37724, 50215, 50838, 51023, 65420, 65421, 65427, 700,
            33628, 33629, 34118, 34361, 34362, 34682, 42112, 50839)  # fmt: skip
"""Tags of other makers, that readers look at before anything else."""

Change = Callable[[bytearray, Layout, Rng], str]


@cache
def seeds() -> tuple[bytes, ...]:
    """Return small good slides: every kind, BigTIFF, without tiles, of another maker's style."""
    files = []
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a.svs"
        picture = slide_fixtures.picture(150, 130)
        for kind in slide_fixtures.KINDS:
            slide_fixtures.write_slide(path, picture, kind)
            files.append(path.read_bytes())
        slide_fixtures.write_slide(path, picture, "jpeg-ycc420", bigtiff=True)
        files.append(path.read_bytes())
        slide_fixtures.write_slide(path, picture, "deflate", description="", downsamples=(1, 2))
        files.append(path.read_bytes())
        write_slide(path, width=512, height=512, mpp=0.5, seed=1, truth=False)
        files.append(path.read_bytes())
        files.append(_in_strips(picture))
    return tuple(files)


def broken_seeds(folder: Path) -> tuple[bytes, ...]:
    """Return the small damaged slides of a data kit; none where there is none."""
    small = (path for path in sorted(folder.glob("*")) if path.stat().st_size < 1 << 20)
    return tuple(path.read_bytes() for path in small)


def _in_strips(picture: np.ndarray) -> bytes:
    import io

    import tifffile

    buffer = io.BytesIO()
    tifffile.imwrite(buffer, picture, photometric="rgb", compression="zlib", metadata=None,
                     resolution=(40_000, 40_000), resolutionunit="CENTIMETER")  # fmt: skip
    return buffer.getvalue()


def break_slide(rng: Rng, extra: tuple[bytes, ...] = ()) -> tuple[bytes, str]:
    """Draw a hostile slide.

    Args:
        rng: what decides.
        extra: further files to begin with.

    Returns:
        The bytes of the file, and what was done to it.
    """
    files = (*seeds(), *extra)
    number = int(rng.integers(len(files)))
    data = bytearray(files[number])
    try:
        layout = scan(data)
    except (ValueError, struct.error):
        layout = None
    if layout is None or rng.random() < 0.25:
        changed, done = break_bytes(bytes(data), rng, files)
        return changed, f"seed {number}: {done}"
    changes = pick(rng, (1, 1, 1, 2, 3))
    done = ", ".join(pick(rng, _CHANGES)(data, layout, rng) for _ in range(changes))
    return bytes(data), f"seed {number}: {done}"


def _entry(layout: Layout, rng: Rng, *tags: int) -> Entry | None:
    found = [e for e in layout.entries if not tags or e.tag in tags]
    return pick(rng, found) if found else None


def _any_value(data: bytearray, layout: Layout, rng: Rng) -> str:
    entry = _entry(layout, rng)
    value = pick(rng, NUMBERS)
    layout.poke(data, entry, value, int(rng.integers(max(1, min(entry.count, 64)))))
    return f"tag {entry.tag} of {entry.directory} is {value}"


def _size(data: bytearray, layout: Layout, rng: Rng) -> str:
    entry = _entry(layout, rng, *_SIZE_TAGS)
    value = pick(rng, (*NUMBERS, -1))
    layout.set(data, entry, value)
    return f"size tag {entry.tag} of {entry.directory} is {value}"


def _choice(data: bytearray, layout: Layout, rng: Rng) -> str:
    entry = _entry(layout, rng, *_CHOICES)
    value = pick(rng, _CHOICES[entry.tag])
    layout.set(data, entry, *[value] * max(1, entry.count))
    return f"tag {entry.tag} of {entry.directory} is {value}"


def _count(data: bytearray, layout: Layout, rng: Rng) -> str:
    entry, count = _entry(layout, rng), pick(rng, NUMBERS)
    layout.recount(data, entry, count)
    return f"tag {entry.tag} of {entry.directory} has {count} values"


def _type(data: bytearray, layout: Layout, rng: Rng) -> str:
    entry, kind = _entry(layout, rng), pick(rng, (0, *SIZES, 19, 99, 65535))
    layout.retype(data, entry, kind)
    return f"tag {entry.tag} of {entry.directory} has type {kind}"


def _swap(data: bytearray, layout: Layout, rng: Rng) -> str:
    one, other = _entry(layout, rng), _entry(layout, rng)
    layout.retag(data, one, other.tag)
    layout.retag(data, other, one.tag)
    return f"tags {one.tag} and {other.tag} swapped"


def _foreign(data: bytearray, layout: Layout, rng: Rng) -> str:
    entry, tag = _entry(layout, rng), pick(rng, _FOREIGN)
    layout.retag(data, entry, tag)
    if rng.random() < 0.6:
        values = [pick(rng, (*layout.directories, *NUMBERS)) for _ in range(pick(rng, (1, 2, 9)))]
        layout.set(data, entry, *values)
    return f"tag {entry.tag} of {entry.directory} became {tag}"


def _link(data: bytearray, layout: Layout, rng: Rng) -> str:
    link = int(rng.integers(len(layout.links)))
    target = pick(rng, (*layout.directories, *layout.directories, 0, 1, 8, len(data) - 2, len(data),
                        len(data) + 1000, 2**32 - 1, 2**63, layout.entries[0].data_at))  # fmt: skip
    layout.point(data, link, target)
    return f"directory {link} is at {target}"


def _long_chain(data: bytearray, layout: Layout, rng: Rng) -> str:
    """Append a long chain of copies of the first directory."""
    count = pick(rng, (100, 500, 5000))
    at = len(data)
    layout.point(data, len(layout.links) - 1, at)
    directory = bytes(data[layout.directories[0] : layout.links[1]])
    step = len(directory) + struct.calcsize("=" + layout.offset_code)
    data += b"".join(
        directory + layout.pack(layout.offset_code, at + (n + 1) * step if n + 1 < count else 0)
        for n in range(count)
    )
    return f"{count} more directories"


def _places(data: bytearray, layout: Layout, rng: Rng) -> str:
    entry = _entry(layout, rng, _OFFSETS, _COUNTS, 273, 279)
    value = pick(rng, (*NUMBERS, len(data), len(data) - 1, len(data) + 1, 8))
    if entry.count and rng.random() < 0.5:
        layout.poke(data, entry, value, int(rng.integers(entry.count)))
        return f"one value of {entry.tag} of {entry.directory} is {value}"
    layout.set(data, entry, *[value] * pick(rng, (1, max(1, entry.count), 1000)))
    return f"all of {entry.tag} of {entry.directory} are {value}"


def _description(data: bytearray, layout: Layout, rng: Rng) -> str:
    entry = _entry(layout, rng, _DESCRIPTION) or _entry(layout, rng, 305) or _entry(layout, rng)
    text = pick(rng, _DESCRIPTIONS)
    layout.retag(data, entry, _DESCRIPTION)
    layout.replace(data, entry, 2, text)
    return f"description {text[:24]!r}"


def _tables(data: bytearray, layout: Layout, rng: Rng) -> str:
    entry = _entry(layout, rng, _TABLES) or _entry(layout, rng)
    layout.retag(data, entry, _TABLES)
    raw = pick(
        rng,
        (
            b"\xff\xd8\xff\xd9",
            b"\xff\xd8",
            b"",
            rng.bytes(600),
            b"\xff\xd8" + _sof(65_500, 65_500) + b"\xff\xd9",
            rng.bytes(200_000),
        ),
    )
    layout.replace(data, entry, 7, raw)
    return f"JPEG tables of {len(raw)} bytes"


def _giant_tile(data: bytearray, layout: Layout, rng: Rng) -> str:
    """Make a level one tile of an absurd size, which contradicts nothing."""
    entry = _entry(layout, rng, _TILE_WIDTH)
    if entry is None:
        return _size(data, layout, rng)
    level = entry.directory
    width = pick(rng, (16_384, 65_488, 1_000_000_000, 2**31 - 16))
    length = pick(rng, (16, 64, 65_488, 1_000_000_000))
    for tag, value in ((_TILE_WIDTH, width), (_TILE_LENGTH, length), (_WIDTH, width),
                       (_LENGTH, length)):  # fmt: skip
        for found in layout.find(tag, level):
            layout.set(data, found, value)
    for tag in (_OFFSETS, _COUNTS):
        for found in layout.find(tag, level):
            layout.set(data, found, *layout.values(data, found)[:1] or [8])
    return f"level {level} is one tile of {width} x {length}"


def _payload(data: bytearray, layout: Layout, rng: Rng) -> str:
    """Let tiles of a level hold a bomb."""
    entry = _entry(layout, rng, _OFFSETS, 273)
    compression = layout.find(_COMPRESSION, entry.directory)
    known = layout.values(bytes(data), compression[0])[:1] if compression else []
    bombs = _BOMBS[known[0]] if known and known[0] in _BOMBS else tuple(_ALL_BOMBS)
    if rng.random() < 0.15:
        bombs = tuple(_ALL_BOMBS)
    name = pick(rng, bombs)
    bomb = _bomb(name)
    at = len(data)
    data += bomb
    share = pick(rng, (1.0, 0.3))
    for index in range(entry.count):
        if rng.random() < share:
            layout.poke(data, entry, at, index)
            for counts in layout.find(entry.tag + 1 if entry.tag == _OFFSETS else 279,
                                      entry.directory):  # fmt: skip
                layout.poke(data, counts, len(bomb), index)
    return f"{name} in {entry.directory}"


_BOMBS = {
    1: ("short",),
    5: ("lzw bomb", "short"),
    7: ("jpeg 65500", "jpeg one pixel", "jpeg scans", "jpeg cut", "jpeg 12 bit", "jpeg cmyk"),
    8: ("deflate bomb", "short"),
    33003: ("j2k 2e9", "j2k 60000", "j2k tiny", "j2k components", "j2k cut"),
    33005: ("j2k 2e9", "j2k 60000", "j2k tiny", "j2k components", "j2k cut"),
}
_ALL_BOMBS = sorted({name for names in _BOMBS.values() for name in names})


@cache
def _bomb(name: str) -> bytes:
    kind, _, detail = name.partition(" ")
    if kind == "deflate":
        return deflate_bomb(2048)
    if kind == "lzw":
        return bytes(imagecodecs.lzw_encode(bytes(64 << 20)))
    if kind == "jpeg":
        return _jpeg(detail)
    if kind == "j2k":
        return _j2k(detail)
    return b"\x00"


def deflate_bomb(mib: int) -> bytes:
    """Return a whole zlib stream of zeros."""
    packer = zlib.compressobj(9)
    head = packer.compress(b"") + packer.flush(zlib.Z_FULL_FLUSH)
    block = packer.compress(bytes(1 << 20)) + packer.flush(zlib.Z_FULL_FLUSH)
    end = packer.flush()[:-4]
    # Adler-32 of n zeros: the low half stays 1 and is added to the high half n times.
    return head + block * mib + end + struct.pack(">HH", (mib << 20) % 65_521, 1)


def _sof(width: int, height: int, bits: int = 8, components: int = 3) -> bytes:
    parts = b"".join(bytes([n + 1, 0x22 if n == 0 else 0x11, 0]) for n in range(components))
    body = struct.pack(">BHHB", bits, height, width, components) + parts
    return b"\xff\xc0" + struct.pack(">H", len(body) + 2) + body


def _jpeg(detail: str) -> bytes:
    tile = slide_fixtures.picture(64, 64)
    if detail == "one pixel":
        return bytes(imagecodecs.jpeg8_encode(tile[:1, :1]))
    if detail == "cmyk":
        four = np.concatenate([tile, tile[..., :1]], axis=2)
        return bytes(imagecodecs.jpeg8_encode(four, colorspace="CMYK", outcolorspace="CMYK"))
    good = bytes(imagecodecs.jpeg8_encode(tile, level=90))
    if detail == "cut":
        return good[: len(good) // 2]
    at = good.index(b"\xff\xc0")
    size = 2 + int.from_bytes(good[at + 2 : at + 4], "big")
    if detail == "12 bit":
        return good[:at] + _sof(64, 64, bits=12) + good[at + size :]
    head = bytearray(good)
    struct.pack_into(">HH", head, at + 5, 65_500, 65_500)
    if detail == "scans":  # thousands of empty scans of a huge progressive picture
        head[at + 1] = 0xC2
        scan_at = head.index(b"\xff\xda")
        scan = bytes(head[scan_at : scan_at + 14]) + b"\x00" * 8
        return bytes(head[:scan_at]) + scan * 5000 + b"\xff\xd9"
    return bytes(head)


def _j2k(detail: str) -> bytes:
    tile = slide_fixtures.picture(64, 64)
    data = bytearray(imagecodecs.jpeg2k_encode(tile, level=0, codecformat="j2k", reversible=True))
    if detail == "cut":
        return bytes(data[: len(data) // 2])
    at = data.index(b"\xff\x51") + 6  # behind the marker, its length and its capabilities
    if detail == "components":
        struct.pack_into(">H", data, at + 32, 16_384)
        return bytes(data)
    side = {"2e9": 2_000_000_000, "60000": 60_000, "tiny": 1}[detail]
    struct.pack_into(">II", data, at, side, side)
    if detail == "60000":
        struct.pack_into(">II", data, at + 16, side, side)
    return bytes(data)


_CHANGES: tuple[Change, ...] = (
    _any_value, _any_value, _size, _size, _choice, _choice, _count, _type, _swap, _foreign, _link,
    _long_chain, _places, _places, _description, _tables, _giant_tile, _giant_tile, _payload,
    _payload,
)  # fmt: skip


def prepare() -> None:
    """Make the good slides and the bombs, so that no case has to."""
    seeds()
    for name in _ALL_BOMBS:
        _bomb(name)
