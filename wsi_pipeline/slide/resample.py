"""Area averages, in whole numbers.

Everything here is integer arithmetic on absolute pixel positions. The value of a grid
pixel therefore depends on the slide and the grid alone, bit for bit, and never on the
window, the band or the thread that asked for it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic
from numpy.typing import NDArray

from wsi_pipeline.compiled import compiled

__all__ = [
    "AxisTaps",
    "area_mean",
    "axis_taps",
    "most_taps",
    "resample",
    "resample_part",
    "whiten_around",
    "ycc_to_rgb",
]

_UNITY = 2048
"""Weights of one axis add up to this: 11 bits, so that 11 + 11 + 8 bits fit an int32."""
_SHIFT = 22
"""Of those of both axes."""
_HALF = _UNITY * _UNITY // 2


@dataclass(frozen=True, kw_only=True, slots=True)
class AxisTaps:
    """Which source pixels make each target pixel along one axis, and with what weight."""

    first: NDArray[np.int32]
    """``(N,)`` first source pixel; -1 where the target pixel lies outside the source."""
    weights: NDArray[np.int32]
    """``(N, T)`` weights of the source pixels from ``first`` on; they add up to 2048. At least
    three, of which the last may be zero and lie outside the source."""

    @property
    def inside(self) -> tuple[int, int]:
        """Half-open range of the target pixels that do not lie outside the source."""
        inside = np.flatnonzero(self.first >= 0)
        return (int(inside[0]), int(inside[-1]) + 1) if inside.size else (0, 0)

    @property
    def ends(self) -> NDArray[np.int32]:
        """``(N,)`` one past the last source pixel of any weight."""
        reach = self.weights.shape[1] - np.argmax(self.weights[:, ::-1] > 0, axis=1)
        return (self.first + reach).astype(np.int32)

    def first_pixels(self, count: int) -> AxisTaps:
        """Return the taps of the first target pixels."""
        return AxisTaps(first=self.first[:count], weights=self.weights[:count])

    @property
    def span(self) -> tuple[int, int]:
        """Half-open range of the source pixels that have any weight; empty as (0, 0)."""
        start, stop = self.inside
        if start == stop:
            return 0, 0
        return int(self.first[start:stop].min()), int(self.ends[start:stop].max())


def most_taps(scale: float) -> int:
    """Return how many source pixels the taps of a target pixel name, some of no weight."""
    return max(3, math.ceil(scale) + 1)


def axis_taps(start: int, stop: int, *, scale: float, offset: float, size: int) -> AxisTaps:
    """Compute the taps of the target pixels ``start`` to ``stop`` along one axis.

    Target pixel k spans ``[k * scale + offset, (k + 1) * scale + offset)`` of the source.
    It is the mean over that span, clipped to the source; where a target pixel is smaller
    than a source pixel, the linear interpolation at its centre.

    Args:
        start: first target pixel.
        stop: one past the last.
        scale: source pixels that one target pixel spans.
        offset: source position of target position 0.
        size: length of the source.
    """
    k = np.arange(start, stop, dtype=np.float64)
    low, high = k * scale + offset, (k + 1) * scale + offset
    # a target pixel that only touches the source by a rounding error is not in it
    outside = (high <= 1e-6) | (low >= size - 1e-6)
    if scale < 1:
        centre = np.clip((low + high) / 2, 0.5, size - 0.5)
        low, high = centre - 0.5, centre + 0.5  # a box one source pixel wide interpolates
    low, high = np.clip(low, 0, size), np.clip(high, 0, size)
    first = np.minimum(np.floor(low + 1e-9).astype(np.int64), size - 1)
    pixel = first[:, None] + np.arange(most_taps(scale))
    share = np.minimum(high[:, None], pixel + 1) - np.maximum(low[:, None], pixel)
    share = np.where(pixel < size, np.maximum(share, 0), 0)
    total = np.where(outside, 1, share.sum(axis=1))[:, None]
    weights = np.rint(share / total * _UNITY).astype(np.int64)
    largest = np.argmax(weights, axis=1)
    weights[np.arange(len(k)), largest] += _UNITY - weights.sum(axis=1)
    weights[outside] = 0
    return AxisTaps(
        first=np.where(outside, -1, first).astype(np.int32), weights=weights.astype(np.int32)
    )


def resample(
    source: NDArray[np.uint8],
    corner: tuple[int, int],
    taps: tuple[AxisTaps, AxisTaps],
    target: NDArray[np.uint8],
) -> None:
    """Fill a target from a part of the source; white outside of it.

    Args:
        source: ``(h, w, 3)``, a part that holds all pixels the taps need.
        corner: ``(x, y)`` of that part in source pixels.
        taps: for x and y, of the columns and lines of the target.
        target: ``(H, W, 3)``, contiguous.
    """
    columns, lines = taps[0].inside, taps[1].inside
    whiten_around(target, columns, lines)
    resample_part(source, corner, taps, columns, lines, target)


def resample_part(
    source: NDArray[np.uint8],
    corner: tuple[int, int],
    taps: tuple[AxisTaps, AxisTaps],
    columns: tuple[int, int],
    lines: tuple[int, int],
    target: NDArray[np.uint8],
) -> None:
    """Fill a rectangle of a target, none of which lies outside the source.

    Args:
        source: ``(h, w, 3)``, a part that holds all pixels of any weight.
        corner: ``(x, y)`` of that part in source pixels.
        taps: for x and y, of the columns and lines of the target.
        columns: half-open range to fill.
        lines: half-open range to fill.
        target: ``(H, W, 3)``, contiguous; pixels beside the rectangle stay as they are.
    """
    if columns[0] >= columns[1] or lines[0] >= lines[1]:
        return
    x, y = slice(*columns), slice(*lines)
    _resample(
        _flat(source),
        corner,
        (taps[0].first[x], taps[0].weights[x]),
        (taps[1].first[y], taps[1].weights[y]),
        _flat(target),
        (columns[0], lines[0]),
    )


def whiten_around(
    target: NDArray[np.uint8], columns: tuple[int, int], lines: tuple[int, int]
) -> None:
    """Fill all of a target white but a rectangle, given by half-open ranges."""
    target[: lines[0]] = target[lines[1] :] = 255
    target[lines[0] : lines[1], : columns[0]] = 255
    target[lines[0] : lines[1], columns[1] :] = 255


def _flat(pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """View ``(h, w, 3)`` as ``(h, 3 w)``, which the compiler can vectorise."""
    return pixels.reshape(pixels.shape[0], pixels.shape[1] * 3)


def area_mean(pixels: NDArray[np.uint8], factor: int) -> NDArray[np.uint8]:
    """Average blocks of ``factor`` x ``factor`` pixels; cropped blocks over what they have.

    Args:
        pixels: ``(h, w, 3)``.
        factor: a power of two.

    Returns:
        ``(ceil(h / factor), ceil(w / factor), 3)``.
    """
    height, width, _ = pixels.shape
    means = np.empty((-(-height // factor), -(-width // factor), 3), np.uint8)
    _area_mean(np.ascontiguousarray(pixels), factor.bit_length() - 1, means)
    return means


def ycc_to_rgb(pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Convert full-range YCbCr of ITU-R BT.601, as JFIF defines it, to RGB.

    Args:
        pixels: ``(h, w, 3)`` Y, Cb, Cr.
    """
    rgb = np.empty_like(pixels)
    _ycc_to_rgb(np.ascontiguousarray(pixels), rgb)
    return rgb


@intrinsic  # type: ignore[misc]
def _blend_pixel(
    typing: Any, total: Any, at: Any, weights: Any, row: Any, line: Any, to: Any
) -> tuple[Any, Callable[..., Any]]:
    """Write four bytes of a line: red, green and blue of a pixel, and one that is of no use.

    In vectors of four, which compilers do not find by themselves in loops over three colours.

    Args:
        typing: of no use.
        total: int32, from ``at`` on three pixels and one number more.
        at: uint64.
        weights: int32, three from ``row`` on.
        row: uint64.
        line: uint8, four from ``to`` on.
        to: uint64.
    """

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        number, four = ir.IntType(32), ir.VectorType(ir.IntType(32), 4)
        unset, zero = ir.Constant(four, ir.Undefined), ir.Constant(number, 0)

        def place(array: int, step: int) -> Any:
            kind, value = signature.args[array], arguments[array]
            data = context.make_array(kind)(context, builder, value).data
            at = arguments[array + 1]
            return builder.gep(data, [builder.add(at, ir.Constant(at.type, step))])

        value = ir.Constant(four, [_HALF] * 4)
        for tap in range(3):
            source = builder.bitcast(place(0, 3 * tap), four.as_pointer())
            weight = builder.insert_element(unset, builder.load(place(2, tap)), zero)
            weight = builder.shuffle_vector(weight, unset, ir.Constant(four, [0] * 4))
            value = builder.add(value, builder.mul(builder.load(source, align=4), weight))
        value = builder.lshr(value, ir.Constant(four, [_SHIFT] * 4))
        # one store of a number: four bytes as a vector take several
        value = builder.trunc(value, ir.VectorType(ir.IntType(8), 4))
        goal = builder.bitcast(place(4, 0), number.as_pointer())
        builder.store(builder.bitcast(value, number), goal, align=1)
        return context.get_dummy_value()

    return types.void(total, at, weights, row, line, to), generate


def _sum_three_lines_loops(
    top: NDArray[np.uint8],
    middle: NDArray[np.uint8],
    bottom: NDArray[np.uint8],
    weights: NDArray[np.int32],
    total: NDArray[np.int32],
) -> None:
    first, second, third = weights[0], weights[1], weights[2]
    for i in range(top.size):
        total[i] = (
            first * np.int32(top[i]) + second * np.int32(middle[i]) + third * np.int32(bottom[i])
        )


def _sum_lines_loops(
    lines: NDArray[np.uint8], weights: NDArray[np.int32], total: NDArray[np.int32]
) -> None:
    total[:] = 0
    for t in range(weights.size):
        if weights[t]:
            line, weight = lines[t], weights[t]
            for i in range(line.size):
                total[i] += np.int32(weight) * np.int32(line[i])


def _blend_three_columns_loops(
    total: NDArray[np.int32],
    places: NDArray[np.int32],
    weights: NDArray[np.int32],
    line: NDArray[np.uint8],
) -> None:
    # Without signs, an index is no candidate for one from the end, which would cost a branch.
    three = np.uint64(3)
    last = places.size - 1
    for i in range(last):
        at, row = np.uint64(places[i]), np.uint64(i) * three
        _blend_pixel(total, at, weights, row, line, row)
    # what lies beside it is not ours to write
    for c in range(3):
        at = places[last] + c
        value = weights[3 * last] * total[at] + weights[3 * last + 1] * total[at + 3]
        value += weights[3 * last + 2] * total[at + 6]
        line[3 * last + c] = (value + _HALF) >> _SHIFT


def _blend_columns_loops(
    total: NDArray[np.int32],
    places: NDArray[np.int32],
    weights: NDArray[np.int32],
    line: NDArray[np.uint8],
) -> None:
    taps = weights.size // places.size
    for i in range(places.size):
        at = places[i]
        red = green = blue = np.int32(_HALF)
        for t in range(taps):
            weight = weights[i * taps + t]
            red += weight * total[at + t * 3]
            green += weight * total[at + t * 3 + 1]
            blue += weight * total[at + t * 3 + 2]
        line[i * 3] = red >> _SHIFT
        line[i * 3 + 1] = green >> _SHIFT
        line[i * 3 + 2] = blue >> _SHIFT


def _resample_loops(
    source: NDArray[np.uint8],
    corner: tuple[int, int],
    x: tuple[NDArray[np.int32], NDArray[np.int32]],
    y: tuple[NDArray[np.int32], NDArray[np.int32]],
    target: NDArray[np.uint8],
    start: tuple[int, int],
) -> None:
    (x_first, x_weights), (y_first, y_weights) = x, y
    count, taps = x_weights.shape
    begin = x_first[0] - corner[0]
    end = min(source.shape[1], 3 * (x_first[count - 1] - corner[0] + taps))
    columns = source[:, 3 * begin : end]
    last = source.shape[0] - 1
    # the last taps reach a little further, where their weight is zero
    total = np.zeros(columns.shape[1] + 3 * taps + 1, np.int32)
    places = (x_first - x_first[0]) * np.int32(3)
    weights = x_weights.reshape(count * taps)
    for j in range(y_first.size):
        at = y_first[j] - corner[1]
        left = 3 * start[0]
        line = target[start[1] + j, left : left + 3 * count]
        if taps == 3 and y_weights.shape[1] == 3:
            middle, bottom = columns[min(at + 1, last)], columns[min(at + 2, last)]
            _sum_three_lines(columns[at], middle, bottom, y_weights[j], total)
            _blend_three_columns(total, places, weights, line)
        else:
            _sum_lines(columns[at:], y_weights[j], total)
            _blend_columns(total, places, weights, line)


def _area_mean_loops(pixels: NDArray[np.uint8], shift: int, means: NDArray[np.uint8]) -> None:
    height, width, _ = pixels.shape
    total = np.empty(width * 3, np.int32)
    flat = pixels.reshape(height, width * 3)
    factor, full = 1 << shift, 1 << 2 * shift
    for j in range(means.shape[0]):
        rows = min(factor, height - j * factor)
        total[:] = 0
        for t in range(rows):
            line = flat[j * factor + t]
            for i in range(width * 3):
                total[i] += line[i]
        for i in range(means.shape[1]):
            columns = min(factor, width - i * factor)
            at = i * factor * 3
            for c in range(3):
                value = 0
                for t in range(columns):
                    value += total[at + t * 3 + c]
                if columns * rows == full:
                    means[j, i, c] = (value + full // 2) >> 2 * shift
                else:
                    means[j, i, c] = (value + rows * columns // 2) // (rows * columns)


def _ycc_to_rgb_loops(pixels: NDArray[np.uint8], rgb: NDArray[np.uint8]) -> None:
    # the 16-bit fixed-point constants of libjpeg's jdcolor.c
    height, width, _ = pixels.shape
    half = 1 << 15
    for j in range(height):
        for i in range(width):
            y = np.int32(pixels[j, i, 0])
            cb = np.int32(pixels[j, i, 1]) - 128
            cr = np.int32(pixels[j, i, 2]) - 128
            red = y + ((91881 * cr + half) >> 16)
            green = y + ((-22554 * cb - 46802 * cr + half) >> 16)
            blue = y + ((116130 * cb + half) >> 16)
            for c, value in enumerate((red, green, blue)):
                rgb[j, i, c] = 0 if value < 0 else 255 if value > 255 else value


_sum_three_lines = compiled(_sum_three_lines_loops)
_sum_lines = compiled(_sum_lines_loops)
_blend_three_columns = compiled(_blend_three_columns_loops)
_blend_columns = compiled(_blend_columns_loops)
_resample = compiled(_resample_loops)
_area_mean = compiled(_area_mean_loops)
_ycc_to_rgb = compiled(_ycc_to_rgb_loops)
