"""Where the tissue is: found on a thumbnail, or read from the user's own mask.

::

    thumbnail -> smooth -> balance to the glass -> saturation, less ink
       faintly stained -> less grain -> gaps closed, holes filled --+
       well stained    -> less specks ------------------------------+-> faint pieces that hold
                                                                       something well stained

Tissue takes up dye and glass does not, so saturation separates them whatever the
brightness of the lamp. Otsu's method alone would split *every* image in two; absolute
bounds on its threshold keep bare glass empty and an all-tissue image whole.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from scipy import ndimage
from skimage import filters

from wsi_pipeline.errors import MaskError
from wsi_pipeline.geometry import Box, PixelGrid

__all__ = ["TissueMask", "detect_tissue", "read_mask"]

# Constants are in physical units. "Measured": on the six H&E slides of the data kit at
# 8 um a pixel, smoothed and balanced, where glass stays under 0.035 (stained haze included)
# and 99 % of compact tissue is over 0.07.

SMOOTHING_UM = 5.0
"""Standard deviation of the blur: camera noise goes, the walls of fat cells stay."""
STAINED_BOUNDS = (0.07, 0.12)
"""Saturation of well stained tissue: Otsu's threshold, held in here (measured)."""
FAINT_SATURATION = 0.04
"""Saturation of faint tissue, such as the walls of fat cells (measured)."""
GLASS_MIN_LEVEL = 190
"""Glass passes light in all three channels: below this, a pixel is no glass."""
GRAIN_UM2 = 400.0
"""Faint grains up to 20 x 20 um go before gaps are closed, or closing would join them."""
SPECK_UM2 = 2_500.0
"""A well stained spot of less than 50 x 50 um is dust; it makes no piece tissue."""
GAP_UM = 48.0
"""Radius of the closing: about that of a fat cell, so that fat is a region, not a net."""
HOLE_UM2 = 250_000.0
"""Holes up to 500 x 500 um are lumina, vessels and fat: part of the tissue."""
OBJECT_UM2 = 20_000.0
"""Smaller pieces (140 x 140 um) are dust or debris (those of the data kit are smaller)."""
INK_UM2 = 30_000.0
"""Ink-coloured spots up to this area are pigment or blood: a marker draws wider lines."""
INK_MARGIN_UM = 24.0
"""Grown around ink, for the last of its rim."""
MASK_FORMATS = ("PNG", "TIFF", "BMP", "GIF", "JPEG", "PPM", "WEBP", "TGA")
"""Pictures without more to them; Pillow also reads some that are programs, such as EPS."""
MAX_MASK_PX = 4096
"""Long side above which a mask from a file is reduced: about 6-12 um a pixel of a large slide."""
_STRIP_PX = 1024
"""Lines of a mask that are looked at together."""
_EIGHT = np.ones((3, 3), np.bool_)
"""Neighbours of a pixel, those across its corners, too."""


@dataclass(frozen=True, kw_only=True, eq=False)
class TissueMask:
    """Which part of a slide holds tissue."""

    mask: NDArray[np.bool_]
    """``(H, W)``, true on tissue."""
    grid: PixelGrid
    """Where the mask lies on the slide."""
    source: Literal["detected", "file"]
    """Found by :func:`detect_tissue`, or given by the user."""

    def __post_init__(self) -> None:
        if self.mask.dtype != np.bool_ or self.mask.shape != self.grid.size[::-1]:
            msg = (
                f"a tissue mask is a bool array of its grid's size {self.grid.size}, "
                f"not {self.mask.dtype} of shape {self.mask.shape}"
            )
            raise ValueError(msg)

    def area_mm2(self, pixel_size: tuple[float, float]) -> float:
        """Return the area of tissue.

        Args:
            pixel_size: level-0 micrometres a pixel, ``(x, y)``.
        """
        return float(np.count_nonzero(self.mask)) * _pixel_um2(self.grid, pixel_size) / 1e6

    def touches(self, grid: PixelGrid, box: Box) -> bool:
        """Tell whether any tissue pixel meets a box of another grid, in constant time."""
        if not box.area:
            return False
        here = self.grid.cover(grid, box).intersect(self.grid.box)
        if not here.area:
            return False
        table = self._counts
        return bool(
            table[here.y1, here.x1]
            - table[here.y, here.x1]
            - table[here.y1, here.x]
            + table[here.y, here.x]
        )

    def extent(self, grid: PixelGrid, box: Box) -> Box:
        """Return a box that covers what tissue there is in a box of another grid.

        The smallest one along the mask's pixels, cut off at the box; empty without tissue.
        """
        here = self.grid.cover(grid, box).intersect(self.grid.box)
        rows, columns = self.mask[here.slices].nonzero()
        if not rows.size:
            return Box(x=box.x, y=box.y, width=0, height=0)
        edges = (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)
        tight = Box.from_edges(*map(int, edges)).shift(here.x, here.y)
        return grid.cover(self.grid, tight).intersect(box)

    def window(self, grid: PixelGrid, box: Box) -> NDArray[np.bool_]:
        """Return the mask as seen on a box of another grid.

        Args:
            grid: the grid to look from.
            box: a box of it; what lies beyond the mask is no tissue.

        Returns:
            ``(box.height, box.width)``: true where a pixel's centre lies on tissue. A box
            with any true pixel is one that :meth:`touches` tissue.
        """
        if not box.area or not self.mask.size:
            return np.zeros(box.size[::-1], np.bool_)
        steps = np.arange(max(box.size)) + 0.5
        level0 = grid.to_level0(np.stack([box.x + steps, box.y + steps], axis=-1))
        nearest = np.floor(self.grid.from_level0(level0)).astype(np.int64)
        columns, rows = nearest[: box.width, 0], nearest[: box.height, 1]
        width, height = self.grid.size
        known = np.outer((rows >= 0) & (rows < height), (columns >= 0) & (columns < width))
        seen = self.mask[np.ix_(rows.clip(0, height - 1), columns.clip(0, width - 1))]
        return np.asarray(known & seen, np.bool_)

    def including(self, boxes: Iterable[Box]) -> TissueMask:
        """Return the mask with whatever meets some boxes added.

        Args:
            boxes: in level-0 pixels.
        """
        mask = self.mask.copy()
        level0 = PixelGrid.level0((0, 0))
        for box in boxes:
            mask[self.grid.cover(level0, box).intersect(self.grid.box).slices] = True
        return TissueMask(mask=mask, grid=self.grid, source=self.source)

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the mask and its place on the slide: equal for equal masks."""
        where = f"{self.grid.origin} {self.grid.spacing} {self.grid.size} "
        return hashlib.sha256(where.encode() + np.packbits(self.mask).tobytes()).hexdigest()

    @cached_property
    def _counts(self) -> NDArray[np.int32]:
        """``(H + 1, W + 1)`` summed-area table: tissue pixels above and left of each corner."""
        height, width = self.mask.shape
        table = np.zeros((height + 1, width + 1), np.int32)
        np.cumsum(self.mask, axis=0, out=table[1:, 1:])
        np.cumsum(table[1:, 1:], axis=1, out=table[1:, 1:])
        return table


def detect_tissue(
    image: NDArray[np.uint8], grid: PixelGrid, mpp: tuple[float, float]
) -> TissueMask:
    """Find the tissue on a thumbnail.

    Marker strokes (blue, green, red, black), dust, grain and areas outside the scan are
    left out; lumina and fat inside the tissue are kept. A violet marker has the colour of
    haematoxylin and passes for tissue.

    Args:
        image: ``(H, W, 3)`` RGB of the slide, at about 8 micrometres a pixel.
        grid: where the thumbnail lies on the slide.
        mpp: level-0 micrometres a pixel, ``(x, y)``.
    """
    pixel_um2 = _pixel_um2(grid, mpp)
    pixel_um = pixel_um2**0.5
    # A very small image (a tile, not a slide) holds less tissue than the limit for dust.
    object_um2 = min(OBJECT_UM2, 0.1 * pixel_um2 * image.shape[0] * image.shape[1])

    smooth = filters.gaussian(
        image.astype(np.float32), SMOOTHING_UM / pixel_um, mode="nearest", channel_axis=-1
    )
    light = np.minimum(smooth / _glass_colour(smooth), 1.0)
    saturation = _saturation(light)
    dye = saturation * ~_ink(light, saturation, pixel_um)

    stained = _drop_small(
        dye > _stained_threshold(saturation), min(SPECK_UM2, object_um2) / pixel_um2
    )
    faint = _drop_small(dye > FAINT_SATURATION, GRAIN_UM2 / pixel_um2)
    region = _fill_holes(_close(faint, GAP_UM / pixel_um), HOLE_UM2 / pixel_um2)
    mask = _drop_small(_holding(region, stained), object_um2 / pixel_um2)
    return TissueMask(mask=mask, grid=grid, source="detected")


def read_mask(path: Path, slide_size: tuple[int, int]) -> TissueMask:
    """Read a tissue mask made elsewhere.

    The mask shows the whole slide at any resolution; whatever is not black (nor fully
    transparent) is tissue. A mask finer than :data:`MAX_MASK_PX` is reduced; a reduced
    pixel is tissue if any pixel under it is.

    Args:
        path: a PNG, or an image of another of the kinds in ``MASK_FORMATS``.
        slide_size: ``(width, height)`` of level 0.

    Raises:
        MaskError: the file is missing, no image, or not of the slide's shape.
    """
    try:
        # A file, not its name: Pillow would map it, and die if somebody made it shorter.
        with path.open("rb") as file, Image.open(file, formats=MASK_FORMATS) as image:
            mask = _opaque(image)
    except MemoryError:
        raise
    except Exception as error:  # damaged bytes lead Pillow into accidents of any kind
        reason = "there is no such file" if not path.exists() else str(error)
        msg = (
            f"the tissue mask {path} cannot be read: {reason}. "
            "Give a PNG of the whole slide, tissue brighter than 0, at most "
            f"{MAX_MASK_PX} pixels wide and high to be safe, or leave out the mask folder "
            "to have the tissue detected."
        )
        raise MaskError(msg) from error
    height, width = mask.shape
    if not _same_shape((width, height), slide_size):
        msg = (
            f"the tissue mask {path} does not fit its slide: the slide is "
            f"{slide_size[0]} x {slide_size[1]} (ratio {slide_size[0] / slide_size[1]:.3f}), "
            f"the mask {width} x {height} (ratio {width / height:.3f}). "
            "A mask must show the whole slide; check that it belongs to this slide and is "
            "neither cropped nor turned."
        )
        raise MaskError(msg)
    factor = -(-max(width, height) // MAX_MASK_PX)
    spacing = (slide_size[0] / width * factor, slide_size[1] / height * factor)
    mask = _reduce_any(mask, factor)
    grid = PixelGrid(origin=(0.0, 0.0), spacing=spacing, size=(mask.shape[1], mask.shape[0]))
    return TissueMask(mask=mask, grid=grid, source="file")


def _pixel_um2(grid: PixelGrid, mpp: tuple[float, float]) -> float:
    return grid.spacing[0] * mpp[0] * grid.spacing[1] * mpp[1]


def _glass_colour(image: NDArray[np.float32]) -> NDArray[np.float32]:
    """Estimate the colour of empty glass, ``(3,)``; white where no glass is in sight.

    Old mounting media are yellow and lamps differ: bare tinted glass would otherwise look
    stained. Glass is the most frequent brightness among pixels bright in all channels;
    out-of-scan pixels are pure white and say nothing about it.
    """
    least = image.min(axis=-1)
    bright = image[(least >= GLASS_MIN_LEVEL) & (least < 254)]
    white = np.full(3, 255, np.float32)
    if len(bright) < 0.01 * least.size:
        return white
    level = bright.mean(axis=-1)
    counts, edges = np.histogram(level, bins=np.arange(GLASS_MIN_LEVEL, 257, 2))
    peak = int(counts.argmax())
    chosen = bright[(level >= edges[peak]) & (level < edges[peak + 1])]
    return np.asarray(np.median(chosen, axis=0), np.float32)


def _saturation(light: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return HSV saturation, ``(H, W)``: 1 - min / max; 0 for black."""
    most, least = light.max(axis=-1), light.min(axis=-1)
    return np.asarray(np.where(most > 0, 1 - least / np.maximum(most, 1e-6), 0), np.float32)


def _stained_threshold(saturation: NDArray[np.float32]) -> float:
    """Return Otsu's threshold, held within :data:`STAINED_BOUNDS`."""
    low, high = STAINED_BOUNDS
    if saturation.min() == saturation.max():
        return low
    return float(np.clip(filters.threshold_otsu(saturation), low, high))


def _ink(
    light: NDArray[np.float32], saturation: NDArray[np.float32], pixel_um: float
) -> NDArray[np.bool_]:
    """Find marker strokes and black areas, ``(H, W)``.

    Judged by optical density, whose ratios between channels do not change with the
    thickness of a dye. Haematoxylin has (0.65, 0.70, 0.29) and eosin (0.07, 0.99, 0.11)
    for red, green, blue (Ruifrok and Johnston 2001): both absorb green most. Blue and green
    markers absorb red more than green; red ones absorb blue as much as green and hardly any
    red; black absorbs all alike. Blood is red too, but pale beside ink. A stroke is
    recognised where it is strong, and taken with the faint rim of its own hue.
    """
    density = -np.log10(np.clip(light, 0.04, 1.0))
    red, green, blue = np.moveaxis(density, -1, 0)
    least, most = density.min(axis=-1), density.max(axis=-1)
    coloured = saturation > FAINT_SATURATION
    cool = (red > 1.3 * green) & (saturation > 0.4)
    warm = (blue > 0.75 * green) & (red < 0.2 * green) & (saturation > 0.75)
    black = (least > 0.5) & (least > 0.65 * most)
    strokes = (
        (cool, coloured & (red > 1.1 * green)),
        (warm, coloured & (blue > 0.75 * green) & (red < 0.4 * green)),
        (black, black),
    )
    ink = np.zeros(saturation.shape, np.bool_)
    for core, rim in strokes:
        ink |= _holding(core | rim, _drop_small(core, INK_UM2 / pixel_um**2))
    return _grow(ink, INK_MARGIN_UM / pixel_um)


def _grow(mask: NDArray[np.bool_], radius_px: float) -> NDArray[np.bool_]:
    """Dilate by a disk."""
    if not mask.any():  # the distance to nothing is not defined
        return mask
    return np.asarray(ndimage.distance_transform_edt(~mask) <= radius_px, np.bool_)


def _close(mask: NDArray[np.bool_], radius_px: float) -> NDArray[np.bool_]:
    """Dilate and erode by a disk, as if the border's pixels went on beyond the image."""
    margin = math.ceil(radius_px) + 1
    wide = np.pad(mask, margin, mode="edge")
    closed = ~_grow(~_grow(wide, radius_px), radius_px)
    return closed[margin:-margin, margin:-margin]


def _drop_small(mask: NDArray[np.bool_], area_px: float) -> NDArray[np.bool_]:
    """Remove 8-connected pieces smaller than an area."""
    labels, _ = ndimage.label(mask, _EIGHT)
    keep = np.bincount(labels.ravel()) >= area_px
    keep[0] = False
    return np.asarray(keep[labels], np.bool_)


def _fill_holes(mask: NDArray[np.bool_], area_px: float) -> NDArray[np.bool_]:
    """Fill 4-connected holes up to an area; what reaches the border is no hole but glass."""
    labels, _ = ndimage.label(~mask)
    fill = np.bincount(labels.ravel()) <= area_px
    for edge in (labels[0], labels[-1], labels[:, 0], labels[:, -1]):
        fill[edge] = False
    fill[0] = True
    return np.asarray(fill[labels], np.bool_)


def _holding(mask: NDArray[np.bool_], seeds: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Keep the 8-connected pieces of a mask that hold at least one seed."""
    labels, _ = ndimage.label(mask, _EIGHT)
    keep = np.zeros(int(labels.max()) + 1, np.bool_)
    keep[labels[seeds]] = True
    keep[0] = False
    return np.asarray(keep[labels], np.bool_)


def _opaque(image: Image.Image) -> NDArray[np.bool_]:
    """Return where an image is neither black nor transparent, ``(H, W)``."""
    if image.mode not in {"1", "L", "I", "F"} and not image.mode.startswith("I;"):
        # Palettes and alpha are judged as shown, not by their stored numbers; in strips,
        # because as shown they are larger than as stored.
        opaque = np.zeros(image.size[::-1], np.bool_)
        for y in range(0, image.height, _STRIP_PX):
            strip = image.crop((0, y, image.width, min(y + _STRIP_PX, image.height)))
            pixels = np.asarray(strip.convert("RGBA"))
            opaque[y : y + _STRIP_PX] = (pixels[..., :3] > 0).any(axis=-1) & (pixels[..., 3] > 0)
        return opaque
    return np.asarray(np.asarray(image) > 0, np.bool_)


def _same_shape(mask_size: tuple[int, int], slide_size: tuple[int, int]) -> bool:
    """Tell whether one size is the other scaled, within 2 % or one pixel of the mask."""
    (width, height), (slide_width, slide_height) = mask_size, slide_size
    wanted_height = width * slide_height / slide_width
    wanted_width = height * slide_width / slide_height
    return abs(height - wanted_height) <= max(1.0, 0.02 * wanted_height) or abs(
        width - wanted_width
    ) <= max(1.0, 0.02 * wanted_width)


def _reduce_any(mask: NDArray[np.bool_], factor: int) -> NDArray[np.bool_]:
    if factor == 1:
        return mask
    height, width = mask.shape
    padded = np.pad(mask, ((0, -height % factor), (0, -width % factor)))
    blocks = padded.reshape(padded.shape[0] // factor, factor, padded.shape[1] // factor, factor)
    return np.asarray(blocks.any(axis=(1, 3)), np.bool_)
