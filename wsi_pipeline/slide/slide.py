"""An open slide: pixels of any box, on any grid, from any format."""

from __future__ import annotations

import logging
import math
import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import numpy as np
from numpy.typing import NDArray

from wsi_pipeline.errors import ImplausiblePixelSizeError, SlideError
from wsi_pipeline.geometry import Box, PixelGrid
from wsi_pipeline.slide.bands import decode_once, read_bands
from wsi_pipeline.slide.directory import MAX_SIDE_PX
from wsi_pipeline.slide.opening import open_reader
from wsi_pipeline.slide.painting import painting_bytes
from wsi_pipeline.slide.pixel_size import (
    PixelSize,
    find_pixel_size,
    objective_power,
    scan_date,
)
from wsi_pipeline.slide.planes import Plane, fitting_grid, sampling_for
from wsi_pipeline.slide.reader import TileError, TileReader

__all__ = ["PyramidLevel", "Slide"]

logger = logging.getLogger(__name__)

_STRIP_PX = 512
"""Height of the strips in which a large box is read."""
_STRIP_BYTES = 256 << 20
"""At most for the canvases of a strip; it is cut where tiles make them larger."""
_THUMBNAIL_PX = 1 << 25
"""75 x 25 mm of glass, scanned all over, at 8 um a pixel are 29 million pixels."""
_LARGEST_UM = 300_000.0
"""Of a side: the glass of the largest sections, whole brains, is 254 mm wide."""
_THUMBNAIL_THREADS = 4


@dataclass(frozen=True, kw_only=True, slots=True)
class PyramidLevel:
    """One of the resolutions that a file holds."""

    index: int
    """0 is the finest."""
    size: tuple[int, int]
    """``(width, height)`` in pixels of this level."""
    downsample: tuple[float, float]
    """Level-0 pixels that one pixel of this level spans, in x and y."""


class Slide:
    """An open whole-slide image.

    Reading is safe from several threads. A tile that cannot be decoded is read as white
    and listed in :attr:`holes`.
    """

    def __init__(self, path: str, reader: TileReader, pixel_size: PixelSize) -> None:
        """Take over an open reader; use :meth:`open`."""
        self.path = path
        self.pixel_size = pixel_size
        self._reader = reader
        self._downsamples = [
            (reader.levels[0].size[0] / level.size[0], reader.levels[0].size[1] / level.size[1])
            for level in reader.levels
        ]
        self._holes: dict[tuple[int, Box], None] = {}
        self._lock = threading.Lock()

    @classmethod
    def open(cls, path: str | Path, *, mpp: float | None = None) -> Slide:
        """Open a slide.

        Args:
            path: a local file, or a URL that fsspec knows.
            mpp: micrometres per level-0 pixel; overrides what the file says.

        Raises:
            SlideError: the file is missing or damaged.
            UnsupportedFormatError: no reader takes this kind of file.
            MissingPixelSizeError: neither the file nor the caller gives a pixel size.
            ImplausiblePixelSizeError: the pixel size cannot be true.
        """
        text = os.fspath(path)
        reader = open_reader(text)
        try:
            found = find_pixel_size(reader.properties, name=_name(text), argument=mpp)
            _check_extent(_name(text), reader.levels[0].size, found)
        except SlideError:
            reader.close()
            raise
        return cls(text, reader, found)

    def __enter__(self) -> Slide:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Release the file."""
        self._reader.close()

    @property
    def name(self) -> str:
        """The file's name without its folders."""
        return _name(self.path)

    @property
    def size(self) -> tuple[int, int]:
        """``(width, height)`` of level 0."""
        return self._reader.levels[0].size

    @property
    def levels(self) -> tuple[PyramidLevel, ...]:
        """What the file holds, finest first."""
        return tuple(
            PyramidLevel(index=index, size=level.size, downsample=downsample)
            for index, (level, downsample) in enumerate(
                zip(self._reader.levels, self._downsamples, strict=True)
            )
        )

    @property
    def reader(self) -> str:
        """``tiff`` (the fast path), ``openslide`` or ``tiffslide``."""
        return self._reader.kind

    @property
    def vendor(self) -> str:
        """The scanner's format, by openslide's name for it."""
        return self._reader.vendor

    @property
    def objective_power(self) -> float | None:
        """Magnification of the objective, where the file names one."""
        return objective_power(self._reader.properties)

    @property
    def scan_date(self) -> str | None:
        """When it was scanned, in the scanner's words, where the file says."""
        return scan_date(self._reader.properties)

    @property
    def associated(self) -> Mapping[str, tuple[int, int]]:
        """``(width, height)`` of pictures beside the slide by name, such as label and macro.

        They may show names of patients: nothing here reads them.
        """
        return self._reader.associated

    @property
    def holes(self) -> tuple[Box, ...]:
        """Disjoint level-0 boxes that could not be decoded so far and were read as white."""
        with self._lock:
            boxes = {box for _, box in self._holes}
        apart: list[Box] = []
        # the largest first: what it covers need not be cut into pieces
        for box in sorted(boxes, key=lambda box: (-box.area, box.y, box.x)):
            apart.extend(_outside(box, apart))
        return tuple(sorted(apart, key=lambda box: (box.y, box.x)))

    def unreadable_share(self, grid: PixelGrid, box: Box) -> float:
        """Return the share of a box that could not be decoded so far and was read as white.

        Args:
            grid: the grid that was read; only holes of the level it is read from count.
            box: in pixels of that grid; what lies outside the slide counts as read.
        """
        level = sampling_for(grid, self._reader.levels, self._downsamples).plane.level
        level0 = PixelGrid.level0(self.size).cover(grid, box)
        with self._lock:
            # tiles of one level do not overlap, so their areas add up
            lost = sum(hole.intersect(level0).area for at, hole in self._holes if at == level)
        return min(1.0, lost / level0.area) if level0.area else 0.0

    def working_grid(self, mpp: float) -> PixelGrid:
        """Return the whole slide at about the wanted pixel size.

        The nearest power-of-two reduction of a level is used as it is where it lies within
        3 %: its own spacing is then the grid's. Otherwise the pixel size is exact.

        Args:
            mpp: wanted micrometres a pixel.
        """
        target = mpp / self.pixel_size.x, mpp / self.pixel_size.y
        levels = [(level.size, level.downsample) for level in self.levels]
        return fitting_grid(levels, target)

    def read(self, grid: PixelGrid, box: Box) -> NDArray[np.uint8]:
        """Read one box.

        Args:
            grid: any grid on this slide.
            box: in pixels of that grid; may reach outside the slide.

        Returns:
            ``(H, W, 3)`` RGB, area-averaged; white outside the slide.
        """
        return self._read(grid, box, threads=1)

    def read_windows(
        self,
        grid: PixelGrid,
        boxes: Sequence[Box],
        *,
        threads: int,
        stop: Callable[[], bool] = lambda: False,
    ) -> Iterator[NDArray[np.uint8]]:
        """Read many overlapping boxes, each tile of the file decoded once a panel.

        The next row of boxes is decoded while the caller works on the present one. Memory
        is two rows of boxes, as wide as their panel, whatever the size of the slide.

        Args:
            grid: any grid on this slide.
            boxes: panel by panel, row by row, left to right, as a tile grid has them.
            threads: how many tiles are decoded at once.
            stop: asked often; once it is true, the iteration ends early.

        Yields:
            ``(H, W, 3)`` RGB of each box in order, equal to :meth:`read` bit for bit;
            a read-only view that is valid until the next one is asked for.
        """
        sampling = sampling_for(grid, self._reader.levels, self._downsamples)
        return read_bands(sampling, boxes, fetch=self._fetch, threads=threads, stop=stop)

    def decode(self, grid: PixelGrid, boxes: Sequence[Box], *, threads: int) -> int:
        """Decode each tile of the file that some boxes need once, and drop the pixels.

        The least that :meth:`read_windows` can cost; for measuring it.

        Args:
            grid: any grid on this slide.
            boxes: as of :meth:`read_windows`, in any order.
            threads: how many tiles are decoded at once.

        Returns:
            The number of tiles.
        """
        sampling = sampling_for(grid, self._reader.levels, self._downsamples)
        return len(decode_once(sampling, boxes, fetch=self._fetch, threads=threads))

    def band_bytes(self, grid: PixelGrid, size: tuple[int, int]) -> int:
        """Return the bytes that :meth:`read_windows` holds for a row of windows.

        Args:
            grid: of the windows.
            size: width and height that they span together, in its pixels.
        """
        sampling = sampling_for(grid, self._reader.levels, self._downsamples)
        return painting_bytes(sampling, Box(x=0, y=0, width=size[0], height=size[1]))

    def thumbnail(self, mpp: float) -> tuple[NDArray[np.uint8], PixelGrid]:
        """Read the whole slide at a coarse pixel size, cheaply.

        Args:
            mpp: wanted micrometres a pixel; see :meth:`working_grid`. It is coarser where the
                whole slide would have more than 32 million of them.

        Returns:
            ``(H, W, 3)`` RGB, area-averaged, and the grid it lies on.
        """
        area_um2 = math.prod(self.size) * self.pixel_size.x * self.pixel_size.y
        grid = self.working_grid(max(mpp, math.sqrt(area_um2 / _THUMBNAIL_PX)))
        return self._read(grid, grid.box, threads=_THUMBNAIL_THREADS), grid

    def _read(self, grid: PixelGrid, box: Box, *, threads: int) -> NDArray[np.uint8]:
        pixels = np.empty((box.height, box.width, 3), np.uint8)
        wide, high = self._strip_size(grid, box)
        strips = [
            Box.from_edges(x, y, min(x + wide, box.x1), min(y + high, box.y1))
            for x in range(box.x, box.x1, wide)
            for y in range(box.y, box.y1, high)
        ]
        windows = self.read_windows(grid, strips, threads=threads)
        for strip, window in zip(strips, windows, strict=True):
            pixels[strip.relative_to(box).slices] = window
        return pixels

    def _strip_size(self, grid: PixelGrid, box: Box) -> tuple[int, int]:
        """Return width and height of the parts in which a box is read."""
        wide, high = max(1, box.width), _STRIP_PX
        while self.band_bytes(grid, (wide, high)) > _STRIP_BYTES and max(wide, high) > 1:
            # low strips first: parts side by side decode the tiles between them twice
            if high > _STRIP_PX // 8 or wide == 1:
                high //= 2
            else:
                wide = -(-wide // 2)
        return wide, high

    def _fetch(self, plane: Plane, column: int, row: int) -> NDArray[np.uint8] | None:
        try:
            return self._reader.tile(plane.level, column, row, plane.reduction)
        except TileError as error:
            self._report_hole(plane, column, row, error)
            return None

    def _report_hole(self, plane: Plane, column: int, row: int, error: TileError) -> None:
        tile = self._reader.levels[plane.level].tile_box(column, row)
        x, y = self._downsamples[plane.level]
        hole = Box.from_edges(
            round(tile.x * x), round(tile.y * y), round(tile.x1 * x), round(tile.y1 * y)
        )
        with self._lock:
            is_first, is_new = not self._holes, (plane.level, hole) not in self._holes
            self._holes[plane.level, hole] = None
        if is_new:
            # One warning a slide: a damaged one may have thousands of such tiles.
            logger.log(
                logging.WARNING if is_first else logging.INFO,
                "%s: level %d, tile (%d, %d) cannot be decoded and is read as white: %s",
                self.name, plane.level, column, row, error,
            )  # fmt: skip


def _check_extent(name: str, size: tuple[int, int], pixel: PixelSize) -> None:
    """Refuse a slide that would be larger than any glass: whatever is made of it would be, too.

    Raises:
        SlideError: it has more pixels than any scanner makes of the largest glass.
        ImplausiblePixelSizeError: they are too large for there to be so many.
    """
    width, height = size[0] * pixel.x, size[1] * pixel.y
    said = f"{name} says to have {size[0]:,} x {size[1]:,} pixels"
    if max(size) > MAX_SIDE_PX:
        msg = f"{said}, which no scanner makes. To proceed: copy it again from the scanner."
        raise SlideError(msg)
    if max(width, height) > _LARGEST_UM:
        msg = (
            f"{said} of {pixel.x:g} x {pixel.y:g} micrometres according to {pixel.source}, which "
            f"is {width / 1e3:,.0f} x {height / 1e3:,.0f} mm of glass. To proceed: give the true "
            "micrometres per level-0 pixel with --mpp, or in an mpp column of the slide list."
        )
        raise ImplausiblePixelSizeError(msg)


def _name(path: str) -> str:
    return path.replace("\\", "/").rstrip("/").rpartition("/")[2]


def _outside(box: Box, others: Sequence[Box]) -> list[Box]:
    """Cut what the others cover off a box; return the rest in pieces."""
    pieces = [box]
    for other in others:
        pieces = [part for piece in pieces for part in _minus(piece, other)]
    return pieces


def _minus(box: Box, other: Box) -> list[Box]:
    common = box.intersect(other)
    if not common.area:
        return [box]
    parts = (
        Box.from_edges(box.x, box.y, box.x1, common.y),
        Box.from_edges(box.x, common.y, common.x, common.y1),
        Box.from_edges(common.x1, common.y, box.x1, common.y1),
        Box.from_edges(box.x, common.y1, box.x1, box.y1),
    )
    return [part for part in parts if part.area]
