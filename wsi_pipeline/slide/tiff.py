"""The fast path: tiled TIFF and Aperio SVS, one decoder call a tile.

The directory is parsed once; after that a tile is one ``pread`` and one decoder call,
both without the interpreter's lock. JPEG tiles are decoded at 1/2, 1/4 or 1/8 by the
inverse DCT itself, which agrees with area averaging to half a grey level and never
computes the pixels that averaging would throw away. JPEG 2000 is decoded in full: the
low band of its wavelet is shifted by a quarter of a pixel and is no area average.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fractions import Fraction
from types import MappingProxyType

import imagecodecs
import numpy as np
import simplejpeg
import tifffile
from numpy.typing import NDArray

from wsi_pipeline.errors import SlideError
from wsi_pipeline.slide.quiet import quiet
from wsi_pipeline.slide.reader import NotTakenError, RasterLevel, TileError
from wsi_pipeline.slide.resample import area_mean, ycc_to_rgb
from wsi_pipeline.slide.streams import picture_size

__all__ = ["TiffReader"]

_JPEG = 7
_APERIO_JPEG2000_YCC = 33003
_JPEG2000 = (_APERIO_JPEG2000_YCC, 33005, 34712)
_LOSSLESS = (1, 5, 8, 32946)
"""None, LZW, and the two numbers of deflate."""
_RGB, _YCC = 2, 6
_SOI = b"\xff\xd8"

Decoder = Callable[[bytes, int], NDArray[np.uint8]]
"""Compressed bytes and a scale (1, 2, 4, 8) to ``(h / scale, w / scale, 3)`` RGB."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Level:
    """One level: where its tiles lie in the file and how to decode them."""

    raster: RasterLevel
    offsets: NDArray[np.int64]
    counts: NDArray[np.int64]
    decode: Decoder
    max_scale: int
    """The decoder itself can reduce by powers of two up to this."""


class TiffReader:
    """Reads the tiles of a TIFF file as they are stored."""

    kind = "tiff"

    def __init__(
        self,
        fd: int,
        vendor: str,
        properties: Mapping[str, str],
        levels: tuple[_Level, ...],
        associated: Mapping[str, tuple[int, int]],
    ) -> None:
        self._fd = fd
        self._levels = levels
        self.associated = associated
        self.vendor = vendor
        self.properties = properties
        self.levels = tuple(level.raster for level in levels)

    @classmethod
    def open(cls, path: str) -> TiffReader:
        """Parse the directory of a local file.

        Raises:
            NotTakenError: not a TIFF, damaged, or of a kind the fast path does not know.
        """
        try:
            with quiet(), tifffile.TiffFile(path) as tif:
                series = tif.series[0]
                if series.axes != "YXS":
                    reason = f"its first image has axes {series.axes}, not one RGB picture"
                    raise NotTakenError(reason, damaged=False)
                levels = tuple(_parse_level(level.keyframe) for level in series.levels)
                size = tif.filehandle.size
                vendor = "aperio" if tif.is_svs else "generic-tiff"
                properties = _properties(tif.pages.first)
                associated = {
                    other.name.lower(): (other.keyframe.imagewidth, other.keyframe.imagelength)
                    for other in tif.series[1:]
                }
        except (NotTakenError, MemoryError):
            raise
        except Exception as error:  # damaged bytes lead a parser into accidents of any kind
            raise NotTakenError(f"no whole TIFF directory ({error})", damaged=True) from error
        end = max(int((level.offsets + level.counts).max()) for level in levels)
        if end > size:
            reason = f"truncated: {size} bytes, but its tiles reach to byte {end}"
            raise NotTakenError(reason, damaged=True)
        return cls(os.open(path, os.O_RDONLY), vendor, properties, levels, associated)

    def tile(self, level: int, column: int, row: int, reduction: int) -> NDArray[np.uint8] | None:
        """Decode one tile; see :class:`~wsi_pipeline.slide.reader.TileReader`."""
        this = self._levels[level]
        index = row * this.raster.lattice[0] + column
        offset, count = int(this.offsets[index]), int(this.counts[index])
        if not offset or not count:
            return None  # sparse files leave out empty tiles
        try:
            data = os.pread(self._fd, count, offset)
        except OSError as error:
            # The disk or the network, not the slide: no hole, another try may succeed.
            msg = f"{count} bytes at {offset} cannot be read ({error}); try again"
            raise SlideError(msg) from error
        if len(data) < count:
            msg = f"{len(data)} of {count} bytes"
            raise TileError(msg)
        box = this.raster.tile_box(column, row)
        # what fills up an edge tile is not slide: it must not reach an average
        scale = min(reduction, this.max_scale) if box.size == this.raster.tile_size else 1
        try:
            pixels = this.decode(data, scale)
        except MemoryError:
            raise
        except Exception as error:  # as above
            if "memory" in str(error).lower():  # libjpeg's and zlib's: the tile is good
                raise MemoryError(str(error)) from error
            raise TileError(str(error)) from error
        width, height = this.raster.tile_size
        if pixels.dtype != np.uint8 or pixels.shape != (height // scale, width // scale, 3):
            msg = f"decodes to {pixels.shape} {pixels.dtype}"
            raise TileError(msg)
        pixels = pixels[: box.height, : box.width]
        return area_mean(pixels, reduction // scale) if reduction > scale else pixels

    def close(self) -> None:
        """Release the file; a second call does nothing."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def _parse_level(page: tifffile.TiffPage) -> _Level:
    compression, photometric = int(page.compression), int(page.photometric)
    expected = (_RGB, _YCC) if compression == _JPEG else (_RGB,)
    if compression == _APERIO_JPEG2000_YCC:
        expected = (_RGB, _YCC)  # scanners write either; the codestream is YCbCr
    known = (_JPEG, *_JPEG2000, *_LOSSLESS)
    checks = {
        "not tiled": page.is_tiled,
        f"compression {compression}": compression in known,
        f"photometric {photometric}": photometric in expected,
        f"{page.samplesperpixel} samples of {page.bitspersample} bits": (
            page.samplesperpixel == 3 and page.bitspersample == 8 and page.dtype == np.uint8
        ),
        "separate colour planes": page.planarconfig == 1,
        f"fill order {page.fillorder}": page.fillorder == 1,
        "a volume": page.imagedepth == 1,
    }
    odd = [what for what, is_usual in checks.items() if not is_usual]
    if odd:
        raise NotTakenError(", ".join(odd), damaged=False)
    raster = RasterLevel(
        size=(page.imagewidth, page.imagelength), tile_size=(page.tilewidth, page.tilelength)
    )
    columns, rows = raster.lattice
    if not len(page.dataoffsets) == len(page.databytecounts) == columns * rows:
        reason = f"{len(page.dataoffsets)} tile offsets for {columns * rows} tiles"
        raise NotTakenError(reason, damaged=True)
    decode, max_scale = _decoder(page, compression, photometric)
    return _Level(
        raster=raster,
        offsets=np.array(page.dataoffsets, np.int64),
        counts=np.array(page.databytecounts, np.int64),
        decode=decode,
        max_scale=max_scale,
    )


def _decoder(page: tifffile.TiffPage, compression: int, photometric: int) -> tuple[Decoder, int]:
    if compression == _JPEG:
        return _jpeg(page.jpegtables, photometric, page.tilewidth, page.tilelength), 8
    if compression in _JPEG2000:
        is_ycc = compression == _APERIO_JPEG2000_YCC
        return _jpeg2000(page.tilewidth, page.tilelength, is_ycc=is_ycc), 1
    return _lossless(page), 1


def _jpeg(tables: bytes | None, photometric: int, width: int, height: int) -> Decoder:
    # The tiles of many scanners carry no colour marker, and decoders then take RGB for
    # YCbCr. An Adobe APP14 segment (libjpeg: transform 0 = RGB, 1 = YCbCr) makes the tile
    # say what the TIFF tag says; the tables hold DQT and DHT between SOI and EOI.
    transform = bytes([0 if photometric == _RGB else 1])
    adobe = b"\xff\xee\x00\x0eAdobe\x00\x64\x00\x00\x00\x00" + transform
    prefix = _SOI + adobe + (tables[2:-2] if tables else b"")

    def decode(data: bytes, scale: int) -> NDArray[np.uint8]:
        stream = prefix + data[_end_of_app_segments(data) :]
        _require_size(_JPEG, stream, width, height)
        smallest = {"min_width": width // scale, "min_height": height // scale}
        try:
            pixels = simplejpeg.decode_jpeg(stream, min_factor=scale, **smallest)
        except ValueError as error:
            if "extraneous bytes" not in str(error):
                raise
            # padding between segments, complained about by libjpeg, harms nothing
            pixels = simplejpeg.decode_jpeg(stream, min_factor=scale, strict=False, **smallest)
        return np.asarray(pixels)

    return decode


def _end_of_app_segments(data: bytes) -> int:
    """Return where the colour-neutral part of a JPEG stream begins.

    A JFIF segment would overrule the Adobe one; libtiff ignores both.
    """
    if data[:2] != _SOI:
        msg = "no JPEG stream"
        raise ValueError(msg)
    at = 2
    while data[at : at + 1] == b"\xff" and 0xE0 <= data[at + 1] <= 0xEF:
        at += 2 + int.from_bytes(data[at + 2 : at + 4], "big")
    return at


def _jpeg2000(width: int, height: int, *, is_ycc: bool) -> Decoder:
    def decode(data: bytes, scale: int) -> NDArray[np.uint8]:
        _require_size(_APERIO_JPEG2000_YCC, data, width, height)
        pixels: NDArray[np.uint8] = np.asarray(imagecodecs.jpeg2k_decode(data, numthreads=1))
        return ycc_to_rgb(pixels) if is_ycc else pixels

    return decode


def _require_size(compression: int, data: bytes, width: int, height: int) -> None:
    """Refuse a picture of another size than its tile: decoders allocate what it says."""
    found = picture_size(compression, data)
    if found != (width, height):
        msg = f"a picture of {found[0]} x {found[1]} pixels"
        raise ValueError(msg)


def _lossless(page: tifffile.TiffPage) -> Decoder:
    unpack = page.decode  # made here, while the file is open

    def decode(data: bytes, scale: int) -> NDArray[np.uint8]:
        pixels, _, _ = unpack(data, 0, _fullsize=True)
        plane: NDArray[np.uint8] = np.asarray(pixels)[0]
        return plane

    return decode


def _properties(page: tifffile.TiffPage) -> Mapping[str, str]:
    """Collect what the first directory says, under openslide's names."""
    found: dict[str, str] = {}
    description = page.description
    if description.startswith("Aperio"):
        for field in description.split("|")[1:]:
            key, _, value = field.partition("=")
            found[f"aperio.{key.strip()}"] = value.strip()
    for tag in ("XResolution", "YResolution"):
        value = page.tags.valueof(tag)
        if value is not None and value[1]:
            found[f"tiff.{tag}"] = str(float(Fraction(*value)))
    # the TIFF standard: 2, inch, where the tag is left out
    unit = {1: "none", 2: "inch", 3: "centimeter"}.get(page.tags.valueof("ResolutionUnit", 2))
    return MappingProxyType(found | {"tiff.ResolutionUnit": unit or "none"})
