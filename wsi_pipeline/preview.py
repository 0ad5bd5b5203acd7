"""One picture of a finished slide: enough to see at a glance whether to trust it.

::

    title, size, tissue area
    +---------------------------+  +-----------+
    |                           |  | legend    |   counts, and counts per mm2
    |   thumbnail with tissue   |  +-----------+
    |   and object outlines     |  | density   |   small objects per mm2 of tissue
    |                           |  | map       |
    |  |--- scale bar ---|      |  +-----------+
    +---------------------------+  0 ==colours== max

What the objects are called comes with the data; nothing here knows about nuclei.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFilter

from wsi_pipeline.durable import durable_file
from wsi_pipeline.geometry import PixelGrid
from wsi_pipeline.lettering import PAPER, QUIET, TEXT, Rgb, font, shorten, write
from wsi_pipeline.tissue import TissueMask

__all__ = ["draw_preview", "write_preview"]


PICTURE_PX = (1600, 1200)
"""The thumbnail is scaled to fit in here, up or down."""
PANEL_PX = 460
"""Width of the column beside it."""
GUTTER_PX = 28
HEADER_PX = 92
MIN_HEIGHT_PX = 700
"""The column needs this much whatever the shape of the slide."""
OVERSAMPLE = 2
"""Lines are drawn this much larger, then reduced: Pillow does not smooth them itself."""

EMPTY: Rgb = (240, 241, 243)
TISSUE: Rgb = (20, 20, 24)
KIND_COLOURS: tuple[Rgb, ...] = ((0, 190, 80), (0, 130, 255), (245, 190, 0), (220, 60, 0))
"""Outlines, by order of kind: apart from each other and from pink and purple."""

DENSITY_BIN_UM = 50.0
"""Smallest side of a bin of the density map: a few nuclei."""
DENSITY_BINS = 160
"""Most bins along the longer side."""
MIN_BIN_TISSUE = 0.1
"""A bin with a smaller share of tissue is left blank: a density there would be noise."""

VIRIDIS = (
    (68, 1, 84),
    (71, 44, 122),
    (59, 81, 139),
    (44, 113, 142),
    (33, 144, 141),
    (39, 173, 129),
    (92, 200, 99),
    (170, 220, 50),
    (253, 231, 37),
)
"""Equidistant colours of matplotlib's viridis (van der Walt and Smith, CC0)."""


def draw_preview(
    thumbnail: NDArray[np.uint8],
    grid: PixelGrid,
    *,
    tissue: TissueMask,
    polygons: Mapping[str, Sequence[NDArray[np.float64]]],
    points: NDArray[np.float64],
    pixel_size: tuple[float, float],
    title: str,
    counts: Mapping[str, int],
) -> NDArray[np.uint8]:
    """Draw a slide with what was found on it.

    Args:
        thumbnail: ``(H, W, 3)`` RGB of the whole slide, any resolution.
        grid: where the thumbnail lies on the slide.
        tissue: outlined, and the denominator of all densities.
        polygons: for each kind of large object its rings, ``(N, 2)`` level-0 points.
        points: ``(N, 2)`` level-0 centroids of the small objects, shown as a density.
        pixel_size: level-0 micrometres a pixel, ``(x, y)``.
        title: what to write on top, such as the slide's name.
        counts: objects of each kind; a kind without polygons is taken for that of the points.

    Returns:
        ``(H, W, 3)`` picture, at most about 2150 x 1370 pixels.
    """
    picture = _draw_slide(thumbnail, grid, tissue, polygons, pixel_size)
    height = HEADER_PX + max(picture.height, MIN_HEIGHT_PX) + GUTTER_PX
    width = picture.width + PANEL_PX + 3 * GUTTER_PX
    page = Image.new("RGB", (width, height), PAPER)
    page.paste(picture, (GUTTER_PX, HEADER_PX))
    pen = ImageDraw.Draw(page)

    area_mm2 = tissue.area_mm2(pixel_size)
    extent_um = [n * s * mpp for n, s, mpp in zip(grid.size, grid.spacing, pixel_size, strict=True)]
    facts = (
        f"{_length(extent_um[0])} x {_length(extent_um[1])}  ·  "
        f"{pixel_size[0]:.4g} um per pixel  ·  tissue {_number(area_mm2)} sq mm"
    )
    write(pen, (GUTTER_PX, 20), shorten(title, width - 2 * GUTTER_PX, 30), 30)
    write(pen, (GUTTER_PX, 58), facts, 19, QUIET)

    left = GUTTER_PX * 2 + picture.width
    below = _draw_legend(pen, (left, HEADER_PX), tuple(polygons), counts, area_mm2)
    small = " and ".join(kind for kind in counts if kind not in polygons) or "object"
    density = _density(points, grid, tissue, pixel_size)
    _draw_density(page, (left, below), density, f"{small} density", extent_um[0] / extent_um[1])
    return np.asarray(page, np.uint8)


def write_preview(path: Path, image: NDArray[np.uint8]) -> None:
    """Write a picture as PNG, complete or not at all; equal pictures give equal bytes."""
    with durable_file(path) as beside:
        Image.fromarray(image).save(beside, format="PNG", compress_level=2)


def _draw_slide(
    thumbnail: NDArray[np.uint8],
    grid: PixelGrid,
    tissue: TissueMask,
    polygons: Mapping[str, Sequence[NDArray[np.float64]]],
    pixel_size: tuple[float, float],
) -> Image.Image:
    """Draw the thumbnail with outlines and scale bar."""
    scale = min(limit / side for limit, side in zip(PICTURE_PX, grid.size, strict=True))
    size = (max(1, round(grid.size[0] * scale)), max(1, round(grid.size[1] * scale)))
    large = (size[0] * OVERSAMPLE, size[1] * OVERSAMPLE)
    fine = PixelGrid(
        origin=grid.origin,
        spacing=(
            grid.spacing[0] * grid.size[0] / large[0],
            grid.spacing[1] * grid.size[1] / large[1],
        ),
        size=large,
    )
    smoothing = Image.Resampling.BOX if scale < 1 else Image.Resampling.BICUBIC
    picture = Image.fromarray(thumbnail).resize(size, smoothing)
    # Which colour lies on top, 0 where none does: each is smoothed and laid on by itself.
    lines = Image.new("L", large)
    lines.paste(1, mask=_outline(tissue, fine))
    pen = ImageDraw.Draw(lines)
    for number, rings in enumerate(polygons.values()):
        for ring in rings:
            corners = _thinned(fine.from_level0(ring)).ravel().tolist()
            if len(corners) >= 4:
                layer = 2 + number % len(KIND_COLOURS)
                pen.line(corners + corners[:2], fill=layer, width=5, joint="curve")
    for layer, colour in enumerate((TISSUE, *KIND_COLOURS[: len(polygons)]), start=1):
        cover = lines.point([255 * (value == layer) for value in range(256)])
        picture.paste(colour, mask=cover.reduce(OVERSAMPLE))
    _draw_scale_bar(picture, fine.spacing[0] * OVERSAMPLE * pixel_size[0])
    ImageDraw.Draw(picture).rectangle((0, 0, size[0] - 1, size[1] - 1), outline=(200, 202, 208))
    return picture


def _thinned(ring: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return points of a ring, ``(N, 2)`` pixels: one of those that lie within four pixels."""
    along = np.hypot(*np.diff(ring, axis=0).T).cumsum()
    first = np.diff(along // 4, prepend=-1.0) > 0
    return ring[:1] if not along.size else ring[np.append(True, first)]


def _outline(tissue: TissueMask, grid: PixelGrid) -> Image.Image:
    """Return the tissue's inner border on another grid, as a 1-bit mask.

    Where tissue meets the border of the picture no line is drawn: it goes on there.
    """
    (left, top), (right, bottom) = (
        (tissue.grid.from_level0(grid.to_level0(np.array(corner, np.float64)))).tolist()
        for corner in ((0, 0), grid.size)
    )
    width, height = tissue.grid.size
    # Its last pixels reach over what rounding leaves; beyond lies no tissue.
    outside = max(0, math.ceil(max(-left, -top, right - width, bottom - height) - 1)) + 1
    mask = np.pad(np.pad(tissue.mask, 1, mode="edge"), outside - 1)
    # The steps of a coarse mask would look like detail: round them off.
    smooth = Image.fromarray(mask.astype(np.uint8) * 255).filter(ImageFilter.GaussianBlur(0.6))
    there = smooth.resize(
        grid.size,
        Image.Resampling.BICUBIC,
        (left + outside, top + outside, right + outside, bottom + outside),
    )
    solid = np.asarray(there) > 127
    reach = 2 * OVERSAMPLE
    wide = np.pad(solid, reach, mode="edge")
    inner = (
        wide[: -2 * reach, reach:-reach]
        & wide[2 * reach :, reach:-reach]
        & wide[reach:-reach, : -2 * reach]
        & wide[reach:-reach, 2 * reach :]
    )
    return Image.fromarray(solid & ~inner)


def _draw_scale_bar(picture: Image.Image, um_per_px: float) -> None:
    """Draw a bar of a round length near the bottom left corner."""
    length_um = _round_down(0.22 * picture.width * um_per_px)
    bar_px = round(length_um / um_per_px)
    text = _length(length_um)
    pen = ImageDraw.Draw(picture)
    text_px = round(pen.textlength(text, font=font(20)))
    x0, y1 = 16, picture.height - 16
    x1, y0 = x0 + max(bar_px, text_px) + 24, y1 - 50
    pen.rounded_rectangle((x0, y0, x1, y1), radius=6, fill=PAPER, outline=(200, 202, 208))
    middle = (x0 + x1) // 2
    write(pen, (middle, y0 + 6), text, 20, TEXT, "ma")
    pen.rectangle(
        (middle - bar_px // 2, y1 - 15, middle - bar_px // 2 + bar_px, y1 - 10), fill=TEXT
    )


def _draw_legend(
    pen: ImageDraw.ImageDraw,
    corner: tuple[int, int],
    outlined: tuple[str, ...],
    counts: Mapping[str, int],
    area_mm2: float,
) -> int:
    """Write colours, counts and densities; return where the next thing may begin."""
    x, y = corner
    columns = (x + 44, x + 300, x + PANEL_PX)
    write(pen, (columns[1], y), "count", 17, QUIET, "ra")
    write(pen, (columns[2], y), "per sq mm tissue", 17, QUIET, "ra")
    y += 32
    pen.line((x, y + 12, x + 30, y + 12), fill=TISSUE, width=4)
    write(pen, (columns[0], y), "tissue outline", 20)
    kinds = [*outlined, *(kind for kind in counts if kind not in outlined)]
    for kind in kinds:
        y += 32
        if kind in outlined:
            colour = KIND_COLOURS[outlined.index(kind) % len(KIND_COLOURS)]
            pen.line((x, y + 12, x + 30, y + 12), fill=colour, width=4)
        else:
            for step, colour in enumerate(VIRIDIS[::2]):
                pen.rectangle((x + 6 * step, y + 6, x + 6 * step + 6, y + 17), fill=colour)
        write(pen, (columns[0], y), shorten(kind, 170, 20), 20)
        write(pen, (columns[1], y), f"{counts.get(kind, 0):,}", 20, TEXT, "ra")
        rate = _number(counts.get(kind, 0) / area_mm2) if area_mm2 > 0 else "-"
        write(pen, (columns[2], y), rate, 20, TEXT, "ra")
    return y + 52


def _density(
    points: NDArray[np.float64],
    grid: PixelGrid,
    tissue: TissueMask,
    pixel_size: tuple[float, float],
) -> NDArray[np.float64]:
    """Count points in nearly square bins and divide by the tissue in them, both smoothed alike.

    Returns:
        ``(H, W)`` objects per mm2 of tissue, NaN where there is next to none.
    """
    extent_um = [n * s * mpp for n, s, mpp in zip(grid.size, grid.spacing, pixel_size, strict=True)]
    side_um = max(DENSITY_BIN_UM, max(extent_um) / DENSITY_BINS)
    if max(extent_um) < 8 * DENSITY_BIN_UM:
        side_um = max(extent_um) / 8  # a mere tile: still a map, if a coarse one
    columns, rows = (math.ceil(extent / side_um) for extent in extent_um)
    bins = PixelGrid(
        origin=grid.origin,
        spacing=(
            extent_um[0] / columns / pixel_size[0],
            extent_um[1] / rows / pixel_size[1],
        ),
        size=(columns, rows),
    )
    bin_mm2 = math.prod(bins.spacing) * math.prod(pixel_size) / 1e6
    pixel_mm2 = math.prod(tissue.grid.spacing) * math.prod(pixel_size) / 1e6
    across, down = (_overlap(tissue.grid, bins, axis) for axis in (0, 1))
    pixels = down @ tissue.mask.astype(np.float32) @ across.T
    tissue_mm2 = _smooth(pixels.astype(np.float64) * pixel_mm2)
    enough = tissue_mm2 > MIN_BIN_TISSUE * bin_mm2
    values = np.full(tissue_mm2.shape, np.nan)
    values[enough] = _smooth(_count(points, bins))[enough] / tissue_mm2[enough]
    return values


def _overlap(grid: PixelGrid, bins: PixelGrid, axis: int) -> NDArray[np.float32]:
    """Return which share of each column (axis 0) or row (1) of a grid lies in which bin.

    Returns:
        ``(bins, columns or rows)``; a column sums to 1 unless it reaches beyond the bins.
    """
    spacing = grid.spacing[axis] / bins.spacing[axis]
    start = (grid.origin[axis] - bins.origin[axis]) / bins.spacing[axis]
    left = start + spacing * np.arange(grid.size[axis])
    bin_left = np.arange(bins.size[axis])[:, None]
    shared = np.minimum(left + spacing, bin_left + 1) - np.maximum(left, bin_left)
    return np.asarray(np.maximum(shared, 0) / spacing, np.float32)


def _count(points: NDArray[np.float64], bins: PixelGrid) -> NDArray[np.float64]:
    """Count level-0 points in the pixels of a grid, ``(H, W)``; those outside are left out."""
    width, height = bins.size
    x, y = np.floor(bins.from_level0(points.reshape(-1, 2))).astype(np.int64).T
    inside = (x >= 0) & (x < width) & (y >= 0) & (y < height)
    flat = np.bincount(y[inside] * width + x[inside], minlength=width * height)
    return flat.reshape(height, width).astype(np.float64)


def _smooth(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Blur by (1, 2, 1) / 4 along both axes, with nothing beyond the border."""
    padded = np.pad(values, 1)
    tall = (padded[:-2] + 2 * padded[1:-1] + padded[2:]) / 4
    return np.asarray((tall[:, :-2] + 2 * tall[:, 1:-1] + tall[:, 2:]) / 4)


def _draw_density(
    page: Image.Image,
    corner: tuple[int, int],
    density: NDArray[np.float64],
    title: str,
    aspect: float,
) -> None:
    """Draw the density map and its colour bar into the rest of the column."""
    x, y = corner
    pen = ImageDraw.Draw(page)
    write(pen, (x, y), shorten(title, PANEL_PX, 22), 22)
    y += 36
    room = (PANEL_PX, page.height - GUTTER_PX - 80 - y)
    width = max(1, min(room[0], round(room[1] * aspect)))
    height = max(1, min(room[1], round(width / aspect)))
    known = density[np.isfinite(density)]
    top = _round_up(float(np.quantile(known, 0.995))) if known.size else 1.0
    shares = density / top
    colours = np.where(np.isnan(shares)[..., None], EMPTY, _viridis(np.nan_to_num(shares)))
    picture = Image.fromarray(colours.astype(np.uint8))
    page.paste(picture.resize((width, height), Image.Resampling.NEAREST), (x, y))
    pen.rectangle((x, y, x + width - 1, y + height - 1), outline=(200, 202, 208))
    y += height + 18
    ramp = _viridis(np.linspace(0, 1, PANEL_PX)[None, :].repeat(16, axis=0))
    page.paste(Image.fromarray(ramp.astype(np.uint8)), (x, y))
    write(pen, (x, y + 22), "0", 17)
    write(pen, (x + PANEL_PX // 2, y + 22), _number(top / 2), 17, TEXT, "ma")
    write(pen, (x + PANEL_PX, y + 22), f"{_number(top)} per sq mm", 17, TEXT, "ra")


def _viridis(shares: NDArray[np.float64]) -> NDArray[np.float64]:
    """Map 0..1 to colours, ``(..., 3)``; values beyond are held at the ends."""
    places = np.linspace(0, 1, len(VIRIDIS))
    channels = np.array(VIRIDIS, np.float64).T
    return np.stack([np.interp(shares, places, channel) for channel in channels], axis=-1).round()


def _length(um: float) -> str:
    return f"{um / 1000:.3g} mm" if um >= 1000 else f"{um:.3g} um"


def _number(value: float) -> str:
    """Write a number with about three digits and thousands apart."""
    if value >= 100 or value == 0:
        return f"{value:,.0f}"
    return f"{value:.3g}"


def _round_down(value: float) -> float:
    """Return the largest of 1, 2, 5 times a power of ten that is not above a value."""
    power = 10.0 ** math.floor(math.log10(value))
    return max(step * power for step in (1, 2, 5) if step * power <= value * (1 + 1e-9))


def _round_up(value: float) -> float:
    """Return the smallest of 1, 2, 3, 5 times a power of ten not below a value; 1 for 0."""
    if value <= 0:
        return 1.0
    power = 10.0 ** math.floor(math.log10(value))
    return min(step * power for step in (1, 2, 3, 5, 10) if step * power >= value * (1 - 1e-9))
