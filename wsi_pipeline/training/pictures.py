"""Two pictures of a training run: its curves, and what the network finds on some tiles.

::

    title                                      title, colours of the heads
    +--- loss ------+  +--- scores -------+    +-------+ +-------+ +-------+
    | total, heads  |  | validation       |    | image | | truth | | found |
    +---------------+  +------------------+    +-------+ +-------+ +-------+
    +- learning rate+                          caption

They look like the preview of a slide. Equal input gives equal bytes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from wsi_pipeline.lettering import PAPER, QUIET, TEXT, Rgb, shorten, write
from wsi_pipeline.preview import KIND_COLOURS, write_preview
from wsi_pipeline.training.plot import (
    LEGEND_LINE_PX,
    Curve,
    axes_of,
    curve_of,
    draw_legend,
    draw_plot,
    legend_lines,
    loss_axes,
    points_of,
)

__all__ = ["LogRow", "Panel", "draw_curves", "draw_examples"]

COLOURS: tuple[Rgb, ...] = (*KIND_COLOURS, (150, 70, 200), (0, 165, 165), (130, 95, 60))
"""Of heads and curves, by order."""

PAGE_PX = (1200, 760)
MARGIN_PX = 28
AXIS_PX = 62
"""Room for the numbers left of a plot."""
STRIP_PX = 84
"""Height of the learning rate's plot."""
TILE_PX = 320
"""Side of the square that a tile is scaled to fit, up or down."""
TILE_GAP_PX = 8
LINE_PX = 2
UNKNOWN_VEIL = 0.45
"""Share of grey laid over what nobody annotated."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LogRow:
    """What a training log says about one step; anything may be missing."""

    step: int
    """Training steps done."""
    loss: float | None = None
    """The total that was minimised."""
    losses: Mapping[str, float] = field(default_factory=dict)
    """By head."""
    learning_rate: float | None = None
    """Of this step."""
    scores: Mapping[str, float] = field(default_factory=dict)
    """On validation images, by the name to show, such as ``nuclei PQ``; mostly 0..1."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Panel:
    """One validation tile."""

    image: NDArray[np.uint8]
    """(H, W, 3) RGB."""
    truth: Mapping[str, NDArray[np.generic]]
    """By head: integers (H, W), ids with negative ones unknown, or floats (N, 4), boxes
    (left, top, right, bottom in pixels; NaN rows are left out)."""
    found: Mapping[str, NDArray[np.generic]]
    """The same, as predicted."""
    caption: str = ""
    """Written below: name, scores, true and predicted class."""


def draw_curves(rows: Sequence[LogRow], path: Path, *, title: str = "Training") -> None:
    """Draw a training log as PNG: losses, validation scores, learning rate.

    Losses are shown as they were, faint, and as a running mean. What no row has takes no
    room. Values that are not finite are left out.

    Args:
        rows: the log, in any order.
        path: the file to write.
        title: what to write on top.
    """
    rows = sorted(rows, key=lambda row: row.step)
    losses = _losses(rows)
    scores = _curves(rows, "scores", smooth=False)
    rates = points_of([(row.step, row.learning_rate) for row in rows])
    steps = (0.0, float(max([1, *(row.step for row in rows)])))
    columns = _columns(2 if losses and scores else 1)
    room = columns[0][1] - columns[0][0]
    names = [[(c.name, c.colour) for c in curves] for curves in (losses, scores)]
    top = 92 + LEGEND_LINE_PX * max(len(legend_lines(entries, room)) for entries in names)
    bottom = PAGE_PX[1] - 54
    above_rate = bottom - STRIP_PX - 58 if len(rates) else bottom

    page = Image.new("RGB", PAGE_PX, PAPER)
    pen = ImageDraw.Draw(page)
    write(pen, (MARGIN_PX, 18), title, 26)
    facts = f"{rows[-1].step:,} steps" if rows else "nothing logged"
    write(pen, (PAGE_PX[0] - MARGIN_PX, 26), facts, 16, QUIET, "ra")
    left, right = columns[0]
    if losses:
        draw_plot(page, "loss", losses, loss_axes((left, top, right, above_rate), steps, losses))
    if scores:
        box = (columns[-1][0], top, columns[-1][1], bottom if losses else above_rate)
        draw_plot(page, "validation score", scores, axes_of(box, steps, scores))
    if len(rates):
        curve = curve_of("", QUIET, rates, smooth=False)
        axes = axes_of((left, bottom - STRIP_PX, right, bottom), steps, [curve])
        draw_plot(page, "learning rate", [curve], axes, ticks=2)
    write_preview(path, np.asarray(page, np.uint8))


def draw_examples(panels: Sequence[Panel], path: Path, *, title: str = "Validation tiles") -> None:
    """Draw tiles as PNG: image, truth and prediction side by side, two tiles a row.

    Outlines lie just inside their objects. What nobody annotated is greyed.

    Args:
        panels: the tiles, of any size.
        path: the file to write.
        title: what to write on top.
    """
    heads = list(dict.fromkeys(head for p in panels for head in (*p.truth, *p.found)))
    colours = {head: COLOURS[n % len(COLOURS)] for n, head in enumerate(heads)}
    columns = min(2, max(1, len(panels)))
    group_px = 3 * TILE_PX + 2 * TILE_GAP_PX
    width = columns * (group_px + MARGIN_PX) + MARGIN_PX
    legend = legend_lines(list(colours.items()), width - 2 * MARGIN_PX)
    below = 80 + LEGEND_LINE_PX * len(legend)
    lines = [panels[n : n + columns] for n in range(0, len(panels), columns)]
    heights = [max(_tile_size(panel.image)[1] for panel in line) + 66 for line in lines]

    page = Image.new("RGB", (width, below + sum(heights)), PAPER)
    pen = ImageDraw.Draw(page)
    write(pen, (MARGIN_PX, 18), title, 26)
    draw_legend(pen, (MARGIN_PX, 62), legend)
    for line, height in zip(lines, heights, strict=True):
        for column, panel in enumerate(line):
            x = MARGIN_PX + column * (group_px + MARGIN_PX)
            _draw_panel(page, (x, below), panel, colours)
            caption = shorten(panel.caption, group_px, 17)
            write(pen, (x, below + 24 + _tile_size(panel.image)[1]), caption, 17)
        below += height
    write_preview(path, np.asarray(page, np.uint8))


def _draw_panel(
    page: Image.Image, corner: tuple[int, int], panel: Panel, colours: Mapping[str, Rgb]
) -> None:
    """Draw a tile's three pictures side by side."""
    pen = ImageDraw.Draw(page)
    x, y = corner
    for name, shapes in (("image", {}), ("truth", panel.truth), ("found", panel.found)):
        write(pen, (x, y), name, 15, QUIET)
        page.paste(_tile(panel.image, shapes, colours), (x, y + 20))
        x += TILE_PX + TILE_GAP_PX


def _tile_size(image: NDArray[np.uint8]) -> tuple[int, int]:
    """Return width and height of a tile's picture."""
    height, width = image.shape[:2]
    scale = TILE_PX / max(width, height)
    return max(1, round(width * scale)), max(1, round(height * scale))


def _tile(
    image: NDArray[np.uint8],
    shapes: Mapping[str, NDArray[np.generic]],
    colours: Mapping[str, Rgb],
) -> Image.Image:
    """Draw one picture of a tile, scaled; outlines are as thin on small tiles."""
    height, width = image.shape[:2]
    size = _tile_size(image)
    scale = TILE_PX / max(width, height)
    smoothing = Image.Resampling.BICUBIC if scale > 1 else Image.Resampling.BOX
    pixels = np.array(Image.fromarray(image).resize(size, smoothing))
    places = [
        np.minimum((np.arange(n) / scale).astype(np.intp), full - 1)
        for n, full in zip(size, (width, height), strict=True)
    ]
    for head, ids in shapes.items():
        if ids.dtype.kind in "iub":
            large = ids.astype(np.int64)[np.ix_(places[1], places[0])]
            veil = UNKNOWN_VEIL * (large < 0)[..., None]
            pixels = np.rint(pixels * (1 - veil) + 128 * veil).astype(np.uint8)
            pixels[_inner_edges(large)] = colours[head]
    tile = Image.fromarray(pixels)
    pen = ImageDraw.Draw(tile)
    for head, boxes in shapes.items():
        if boxes.dtype.kind == "f":
            for left, top, right, bottom in boxes[np.isfinite(boxes).all(axis=1)] * scale:
                corners = (left, top, max(left, right - 1), max(top, bottom - 1))
                pen.rectangle(corners, outline=colours[head], width=LINE_PX)
    return tile


def _inner_edges(ids: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Mark object pixels within ``LINE_PX`` of another id; the tile's edge is none."""
    edges = np.zeros(ids.shape, bool)
    for step in range(1, LINE_PX + 1):
        across = ids[:, step:] != ids[:, :-step]
        down = ids[step:] != ids[:-step]
        edges[:, step:] |= across
        edges[:, :-step] |= across
        edges[step:] |= down
        edges[:-step] |= down
    return edges & (ids > 0)


def _losses(rows: Sequence[LogRow]) -> list[Curve]:
    """Return the heads' losses, and the total where it is not that of the only head."""
    curves = _curves(rows, "losses", smooth=True)
    total = points_of([(row.step, row.loss) for row in rows])
    alone = len(curves) == 1 and np.array_equal(total, curves[0].points)
    if len(total) and not alone:
        curves.insert(0, curve_of("total", TEXT, total, smooth=True))
    return curves


def _curves(rows: Sequence[LogRow], kind: str, *, smooth: bool) -> list[Curve]:
    """Return a curve for each name in the rows' losses or scores.

    A score whose name begins with that of a head has the colour of its loss.
    """
    heads = list(dict.fromkeys(name for row in rows for name in row.losses))
    free = [*range(len(heads), len(COLOURS)), *range(len(COLOURS))]
    taken: set[int] = set()
    curves = []
    for name in dict.fromkeys(name for row in rows for name in getattr(row, kind)):
        points = points_of([(row.step, getattr(row, kind).get(name)) for row in rows])
        own = [n for n, head in enumerate(heads) if name == head or name.startswith(f"{head} ")]
        number = next((n for n in [*own, *free] if n not in taken), 0)
        taken.add(number)
        if len(points):
            curves.append(curve_of(name, COLOURS[number % len(COLOURS)], points, smooth=smooth))
    return curves


def _columns(count: int) -> list[tuple[int, int]]:
    """Return left and right of each plot in a row."""
    room = (PAGE_PX[0] - 2 * MARGIN_PX - count * AXIS_PX - (count - 1) * MARGIN_PX) // count
    lefts = [MARGIN_PX + AXIS_PX + n * (room + AXIS_PX + MARGIN_PX) for n in range(count)]
    return [(left, left + room) for left in lefts]
