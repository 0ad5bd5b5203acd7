"""The general path: regions read by openslide, and by tiffslide where that cannot.

Openslide knows the formats of many scanners; tiffslide is pure Python, takes any
fsspec URL, and decodes what imagecodecs can. Both are shown as a lattice of blocks, so
that the rest of this room need not know the difference.
"""

from __future__ import annotations

import math
import re
import threading
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import numpy as np
import openslide
from numpy.typing import NDArray

from wsi_pipeline.errors import SlideError
from wsi_pipeline.slide.outages import Outages, outage, try_again, watch_reads
from wsi_pipeline.slide.quiet import quiet
from wsi_pipeline.slide.reader import NotTakenError, RasterLevel, TileError
from wsi_pipeline.slide.resample import area_mean
from wsi_pipeline.slide.streams import check_stream

if TYPE_CHECKING:
    from tifffile import TiffPage
    from tiffslide import TiffSlide  # slow to import, and seldom needed

__all__ = ["OpenSlideReader", "TiffSlideReader"]

_BLOCK_PX = 512
"""Blocks are at least this large, so that a source tile is seldom cut."""
_MAX_BLOCK_PX = 2048
_CACHE_BYTES = 64 << 20
_ASSOCIATED = re.compile(r"openslide\.associated\.(.+)\.width")


class OpenSlideReader:
    """Reads regions through openslide."""

    kind = "openslide"

    def __init__(self, path: str, handle: openslide.OpenSlide) -> None:
        self._path = path
        self._handle = handle
        self._lock = threading.Lock()
        self._outages = Outages(path)
        handle.set_cache(openslide.OpenSlideCache(_CACHE_BYTES))
        self.properties: Mapping[str, str] = MappingProxyType(dict(handle.properties))
        self.vendor = self.properties.get("openslide.vendor", "unknown")
        self.associated = _associated(self.properties)
        # asked for now: a handle that an error has spoilt does not tell any more
        self._downsamples = tuple(handle.level_downsamples)
        self.levels = tuple(
            RasterLevel(size=size, tile_size=_block(self.properties, index))
            for index, size in enumerate(handle.level_dimensions)
        )

    @classmethod
    def open(cls, path: str) -> OpenSlideReader:
        """Open a local file.

        Raises:
            NotTakenError: openslide does not take the file.
        """
        try:
            return cls(path, openslide.OpenSlide(path))
        except openslide.OpenSlideUnsupportedFormatError as error:
            raise NotTakenError("not a format it knows", damaged=False) from error
        except openslide.OpenSlideError as error:
            raise NotTakenError(str(error), damaged=True) from error

    def tile(self, level: int, column: int, row: int, reduction: int) -> NDArray[np.uint8] | None:
        """Read one block; see :class:`~wsi_pipeline.slide.reader.TileReader`."""
        box = self.levels[level].tile_box(column, row)
        handle, downsample = self._handle, self._downsamples[level]
        place = (round(box.x * downsample), round(box.y * downsample))

        def read_anew() -> NDArray[np.uint8]:
            nonlocal handle
            handle = self._renew(handle)
            return np.asarray(handle.read_region(place, level, box.size))

        try:
            rgba = np.asarray(handle.read_region(place, level, box.size))
        except openslide.OpenSlideError:
            # one error, perhaps of another thread, spoils a handle for good
            rgba = self._outages.persist(read_anew, openslide.OpenSlideError)
        return area_mean(_on_white(rgba), reduction)

    def close(self) -> None:
        """Release the file."""
        self._handle.close()

    def _renew(self, spoilt: openslide.OpenSlide) -> openslide.OpenSlide:
        with self._lock:
            if self._handle is spoilt:
                # not closed here: another thread may still be inside it
                self._handle = openslide.OpenSlide(self._path)
                self._handle.set_cache(openslide.OpenSlideCache(_CACHE_BYTES))
            return self._handle


class TiffSlideReader:
    """Reads regions through tiffslide, one at a time: its file handle has one position."""

    kind = "tiffslide"

    def __init__(self, handle: TiffSlide) -> None:
        self._handle = handle
        self._lock = threading.Lock()
        watch_reads(handle.ts_tifffile)
        self.properties: Mapping[str, str] = MappingProxyType(
            {key: str(value) for key, value in handle.properties.items() if value is not None}
        )
        self.vendor = self.properties.get("tiffslide.vendor", "generic-tiff")
        self.associated: Mapping[str, tuple[int, int]] = MappingProxyType({})
        """Not known: tiffslide would have to read them."""
        self.levels = tuple(
            RasterLevel(size=(int(width), int(height)), tile_size=(_BLOCK_PX, _BLOCK_PX))
            for width, height in handle.level_dimensions
        )

    @classmethod
    def open(cls, path: str) -> TiffSlideReader:
        """Open a local file or an fsspec URL.

        Raises:
            NotTakenError: tiffslide does not take the file.
        """
        import tiffslide  # see above

        try:
            with quiet():
                handle = tiffslide.TiffSlide(path)
                for series in handle.ts_tifffile.series:
                    for level in series.levels:
                        _guard(level.keyframe)
                return cls(handle)
        except FileNotFoundError as error:
            raise NotTakenError(f"no such file ({error})", damaged=True) from error
        except (tiffslide.TiffFileError, OSError) as error:
            raise NotTakenError(str(error), damaged=True) from error
        except (ValueError, TypeError, KeyError, ImportError, NotImplementedError) as error:
            raise NotTakenError(str(error), damaged=False) from error
        except MemoryError:
            raise
        except Exception as error:  # damaged bytes lead a parser into accidents of any kind
            raise NotTakenError(repr(error), damaged=True) from error

    def tile(self, level: int, column: int, row: int, reduction: int) -> NDArray[np.uint8] | None:
        """Read one block; see :class:`~wsi_pipeline.slide.reader.TileReader`."""
        box = self.levels[level].tile_box(column, row)
        downsample = self._handle.level_downsamples[level]
        place = (round(box.x * downsample), round(box.y * downsample))

        def read() -> NDArray[Any]:
            with self._lock, quiet():  # not while it waits for the network to come back
                found: NDArray[Any] = self._handle.read_region(
                    place, level, box.size, as_array=True
                )
                return found

        try:
            pixels = _patiently(read)
        except (MemoryError, SlideError):
            raise
        except Exception as error:  # as above
            raise TileError(str(error) or repr(error)) from error
        if np.dtype(pixels.dtype) != np.uint8 or pixels.shape[:2] != (box.height, box.width):
            msg = f"holds {pixels.dtype} values in the shape {pixels.shape}, not 8-bit colours"
            raise TileError(msg)
        if pixels.ndim != 3 or pixels.shape[2] not in (3, 4):
            msg = f"has the shape {pixels.shape}, which is not RGB"
            raise TileError(msg)
        return area_mean(_on_white(np.asarray(pixels, np.uint8)), reduction)

    def close(self) -> None:
        """Release the file."""
        self._handle.close()


def _patiently(read: Callable[[], NDArray[Any]]) -> NDArray[Any]:
    """Read what an outage may keep from being read.

    Raises:
        SlideError: it lasts.
    """
    try:
        try:
            return read()
        except OSError:
            return try_again(read, OSError)
    except OSError as error:
        raise outage(str(error) or repr(error)) from error


def _associated(properties: Mapping[str, str]) -> Mapping[str, tuple[int, int]]:
    found = (_ASSOCIATED.fullmatch(key) for key in properties)
    names = [match[1] for match in found if match]
    sides = {
        name: tuple(
            int(properties.get(f"openslide.associated.{name}.{side}", 0))
            for side in ("width", "height")
        )
        for name in names
    }
    return MappingProxyType({name: (width, height) for name, (width, height) in sides.items()})


def _guard(page: TiffPage) -> None:
    """Check the tiles of an image before tifffile decodes them."""
    decode = page.decode
    most_px = math.prod(page.chunks)  # colours included, however they are laid out

    def checked(data: bytes | None, *place: Any, **how: Any) -> Any:  # noqa: ANN401
        if data is not None:
            head = how.get("jpegheader") or b""
            check_stream(int(page.compression), head + data, most_px)
        return decode(data, *place, **how)

    page.decode = checked


def _block(properties: Mapping[str, str], level: int) -> tuple[int, int]:
    """Choose the block of a level: some whole native tiles, where these are of a usual size."""

    def side(axis: str) -> int:
        native = int(properties.get(f"openslide.level[{level}].tile-{axis}", 0))
        if native < 16 or native % 16 or native > _MAX_BLOCK_PX:
            return _BLOCK_PX
        return -(-_BLOCK_PX // native) * native

    return side("width"), side("height")


def _on_white(pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Lay ``(h, w, 3 or 4)`` pixels on white: what a scanner did not scan is glass."""
    if pixels.shape[2] == 3:
        return pixels
    alpha = pixels[..., 3:].astype(np.uint16)
    if alpha.min() == 255:
        return pixels[..., :3]
    blended = (pixels[..., :3] * alpha + 255 * (255 - alpha) + 127) // 255
    return blended.astype(np.uint8)
