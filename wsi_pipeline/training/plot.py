"""Line plots and words, drawn with Pillow alone.

One plot is a box on a page with axes, numbers, curves and a legend above it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from wsi_pipeline.lettering import PAPER, QUIET, Rgb, font, shorten, write

__all__ = [
    "LEGEND_LINE_PX",
    "Axes",
    "Curve",
    "axes_of",
    "curve_of",
    "draw_legend",
    "draw_plot",
    "legend_lines",
    "loss_axes",
    "points_of",
]

RULE: Rgb = (226, 228, 232)
FRAME: Rgb = (200, 202, 208)
LEGEND_LINE_PX = 24
LEGEND_MARK_PX = 26
LEGEND_GAP_PX = 18
OVERSAMPLE = 2
"""Lines are drawn this much larger, then reduced: Pillow does not smooth them itself."""

SMOOTH_SHARE = 0.02
"""Half the width of the running mean, as a share of the points."""
FEW_POINTS = 25
"""So few are shown one by one, as dots, and not smoothed."""
LOG_RATIO = 30.0
"""A loss whose smoothed curves span more than this is drawn on a logarithmic axis."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Curve:
    """One line of a plot."""

    name: str
    """For the legend."""
    colour: Rgb
    """Of the line."""
    points: NDArray[np.float64]
    """(N, 2): step and value, by step."""
    smoothed: NDArray[np.float64]
    """(N, 2); the same as ``points`` where every point counts."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Axes:
    """Where a plot lies and what its corners mean."""

    box: tuple[int, int, int, int]
    """Left, top, right, bottom in pixels of the page."""
    steps: tuple[float, float]
    """Values at the left and right."""
    values: tuple[float, float]
    """Values at the bottom and top."""
    is_log: bool = False
    """Whether the vertical axis is logarithmic."""

    def place(self, points: NDArray[np.float64]) -> NDArray[np.float64]:
        """Turn (N, 2) steps and values into pixels; values beyond are held at the edge."""
        left, top, right, bottom = self.box
        low, high = (math.log(v) if self.is_log else v for v in self.values)
        values = np.clip(points[:, 1], *self.values)
        up = ((np.log(values) if self.is_log else values) - low) / (high - low)
        along = (points[:, 0] - self.steps[0]) / (self.steps[1] - self.steps[0])
        return np.stack([left + along * (right - left), bottom - up * (bottom - top)], axis=1)


def points_of(pairs: Sequence[tuple[int, float | None]]) -> NDArray[np.float64]:
    """Return (N, 2) steps and values, without those that are missing or not finite."""
    known = [(step, value) for step, value in pairs if value is not None and math.isfinite(value)]
    return np.array(known, np.float64).reshape(-1, 2)


def curve_of(name: str, colour: Rgb, points: NDArray[np.float64], *, smooth: bool) -> Curve:
    """Return a curve and, where asked, its running mean over 4 % of its points."""
    if not smooth or len(points) <= FEW_POINTS:
        return Curve(name=name, colour=colour, points=points, smoothed=points)
    reach = max(1, round(SMOOTH_SHARE * len(points)))
    sums = np.concatenate([[0.0], np.cumsum(points[:, 1])])
    index = np.arange(len(points))
    start, stop = np.maximum(index - reach, 0), np.minimum(index + reach + 1, len(points))
    means = (sums[stop] - sums[start]) / (stop - start)
    smoothed = np.stack([points[:, 0], means], axis=1)
    return Curve(name=name, colour=colour, points=points, smoothed=smoothed)


def axes_of(
    box: tuple[int, int, int, int], steps: tuple[float, float], curves: Sequence[Curve]
) -> Axes:
    """Return linear axes from 0 (or below) to a little above the curves."""
    values = np.concatenate([curve.points[:, 1] for curve in curves])
    low, high = min(0.0, float(values.min())), float(values.max())
    return Axes(box=box, steps=steps, values=(low, high + 0.05 * (high - low) or low + 1.0))


def loss_axes(
    box: tuple[int, int, int, int], steps: tuple[float, float], curves: Sequence[Curve]
) -> Axes:
    """Return axes for the smoothed losses: a few wild steps must not flatten the rest."""
    smoothed = np.concatenate([curve.smoothed[:, 1] for curve in curves])
    low, high = float(smoothed.min()), float(smoothed.max())
    if low > 0 and high / low > LOG_RATIO:
        return Axes(box=box, steps=steps, values=(low / 1.2, high * 1.2), is_log=True)
    low = min(0.0, low)
    return Axes(box=box, steps=steps, values=(low, low + (1.08 * (high - low) or 1.0)))


def draw_plot(
    page: Image.Image, name: str, curves: Sequence[Curve], axes: Axes, *, ticks: int = 6
) -> None:
    """Draw one plot: rules and numbers, faint raw curves below clear smoothed ones, legend."""
    left, top, right, bottom = axes.box
    pen = ImageDraw.Draw(page)
    for value in _ticks(axes, ticks):
        y = round(float(axes.place(np.array([[0.0, value]]))[0, 1]))
        pen.line((left, y, right, y), fill=RULE)
        write(pen, (left - 8, y), _number(value), 15, QUIET, "rm")
    for step in _nice_steps(*axes.steps, 5):
        x = round(float(axes.place(np.array([[step, axes.values[1]]]))[0, 0]))
        pen.line((x, bottom, x, bottom + 5), fill=FRAME)
        write(pen, (x, bottom + 9), _number(step), 15, QUIET, "ma")
    size = ((right - left + 1) * OVERSAMPLE, (bottom - top + 1) * OVERSAMPLE)
    canvas = page.crop((left, top, right + 1, bottom + 1)).resize(size, Image.Resampling.NEAREST)
    brush = ImageDraw.Draw(canvas)
    for raw in (True, False):
        for curve in curves:
            if raw and curve.points is not curve.smoothed:
                faint = tuple(
                    round(0.25 * c + 0.75 * p) for c, p in zip(curve.colour, PAPER, strict=True)
                )
                _line(brush, axes, curve.points, faint, 1)
            elif not raw:
                _line(brush, axes, curve.smoothed, curve.colour, 2)
    page.paste(canvas.reduce(OVERSAMPLE), (left, top))
    pen.rectangle((left, top, right, bottom), outline=FRAME)
    entries = [(curve.name, curve.colour) for curve in curves if curve.name]
    lines = legend_lines(entries, right - left)
    above = top - 4 - LEGEND_LINE_PX * (len(lines) + 1)
    write(pen, (left, above), name + (", logarithmic" if axes.is_log else ""), 17)
    draw_legend(pen, (left, above + LEGEND_LINE_PX), lines)


def _line(
    brush: ImageDraw.ImageDraw,
    axes: Axes,
    points: NDArray[np.float64],
    colour: tuple[int, ...],
    width: int,
) -> None:
    """Draw a curve on the enlarged canvas of a plot; a single point is a dot."""
    corner = np.array(axes.box[:2])
    places = (axes.place(points) - corner) * OVERSAMPLE
    if len(places) > 1:
        brush.line(places.ravel().tolist(), fill=colour, width=width * OVERSAMPLE, joint="curve")
    if len(places) <= FEW_POINTS:
        for x, y in places.tolist():
            reach = (width + 1) * OVERSAMPLE
            brush.ellipse((x - reach, y - reach, x + reach, y + reach), fill=colour)


def _ticks(axes: Axes, count: int) -> list[float]:
    low, high = axes.values
    if not axes.is_log:
        return _nice_steps(low, high, count)
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    marks = [step * 10.0**power for power in powers for step in (1, 2, 5)]
    return [mark for mark in marks if low <= mark <= high]


def _nice_steps(low: float, high: float, count: int) -> list[float]:
    """Return multiples of 1, 2 or 5 times a power of ten, about ``count`` of them."""
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(s * power for s in (1, 2, 5, 10) if s * power >= rough * (1 - 1e-9))
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [n * step for n in range(first, last + 1)]


def legend_lines(entries: Sequence[tuple[str, Rgb]], room_px: int) -> list[list[tuple[str, Rgb]]]:
    """Break a legend's names and colours into lines that fit."""
    lines: list[list[tuple[str, Rgb]]] = []
    used = room_px
    for name, colour in entries:
        text = shorten(name, room_px - LEGEND_MARK_PX, 16)
        needed = LEGEND_MARK_PX + round(font(16).getlength(text)) + LEGEND_GAP_PX
        if used + needed > room_px + LEGEND_GAP_PX:
            lines.append([])
            used = 0
        lines[-1].append((text, colour))
        used += needed
    return lines


def draw_legend(
    pen: ImageDraw.ImageDraw, corner: tuple[int, int], lines: Sequence[Sequence[tuple[str, Rgb]]]
) -> None:
    """Write the lines of a legend, each name after a dash of its colour."""
    for number, line in enumerate(lines):
        x, y = corner[0], corner[1] + number * LEGEND_LINE_PX
        for text, colour in line:
            pen.line((x, y + 10, x + 20, y + 10), fill=colour, width=4)
            write(pen, (x + LEGEND_MARK_PX, y), text, 16)
            x += LEGEND_MARK_PX + round(pen.textlength(text, font(16))) + LEGEND_GAP_PX


def _number(value: float) -> str:
    if value == 0 or 0.001 <= abs(value) < 10_000:
        return f"{value:.3g}" if abs(value) < 1000 else f"{value:,.0f}"
    return f"{value:,.0f}" if 10_000 <= abs(value) < 1e7 else f"{value:.1e}"
