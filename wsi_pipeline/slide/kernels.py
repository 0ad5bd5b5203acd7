"""Loops over pixels, compiled.

What they are called with is checked where they are called from: an index that is out of bounds
reads or writes something else.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import config, types
from numba.extending import intrinsic
from numpy.typing import NDArray

from wsi_pipeline.compiled import compiled

__all__ = ["UNITY", "area_mean", "keep_edges", "paint", "resample", "scatter", "ycc_to_rgb"]

UNITY = 2048
"""Weights of one axis add up to this: 11 bits, so that 11 + 11 + 8 bits fit an int32."""
_SHIFT = 22
"""Bits of those of both axes."""
_HALF = UNITY * UNITY // 2
_IS_COMPILED = not getattr(config, "DISABLE_JIT", 0)
"""Instructions of the processor can only be written into compiled loops."""
Code = Any
"""Types, values and instructions of the compiler, which has no types for them."""


def _blending(
    typing: Code,
    upper: Code,
    lower: Code,
    at: Code,
    weights: Code,
    row: Code,
    above: Code,
    below: Code,
    to: Code,
) -> Code:
    """Write a pixel of two lines: red, green, blue, and a fourth byte that is of no use.

    In vectors of four, which compilers do not find by themselves in loops over three colours;
    two lines at once, because they have the weights in common.

    Args:
        typing: not used.
        upper: int32 sums of lines, from ``at`` on three pixels and one number more.
        lower: the same, of the other line.
        at: uint64.
        weights: int32, three from ``row`` on.
        row: uint64.
        above: uint8, where the pixel of ``upper`` goes: four bytes from ``to`` on.
        below: the same, of the other line.
        to: uint64.
    """

    def generate(context: Code, builder: Code, signature: Code, arguments: Code) -> Code:
        number, four = ir.IntType(32), ir.VectorType(ir.IntType(32), 4)
        unset, zero = ir.Constant(four, ir.Undefined), ir.Constant(number, 0)
        _, _, first, _, weight_at, _, _, goal = arguments

        def place(array: int, index: Code, step: int, kind: Code) -> Code:
            made = context.make_array(signature.args[array])(context, builder, arguments[array])
            index = builder.add(index, ir.Constant(index.type, step))
            return builder.bitcast(builder.gep(made.data, [index]), kind.as_pointer())

        values = [ir.Constant(four, [_HALF] * 4)] * 2
        for tap in range(3):
            weight = builder.load(place(3, weight_at, tap, number))
            weight = builder.insert_element(unset, weight, zero)
            weight = builder.shuffle_vector(weight, unset, ir.Constant(four, [0] * 4))
            for line in range(2):
                source = builder.load(place(line, first, 3 * tap, four), align=4)
                values[line] = builder.add(values[line], builder.mul(source, weight))
        for line, value in enumerate(values):
            value = builder.lshr(value, ir.Constant(four, [_SHIFT] * 4))
            value = builder.trunc(value, ir.VectorType(ir.IntType(8), 4))
            # stored as one number: a vector of four bytes takes longer
            value = builder.bitcast(value, number)
            builder.store(value, place(5 + line, goal, 0, number), align=1)
        return context.get_dummy_value()

    return types.void(upper, lower, at, weights, row, above, below, to), generate


_blend_pixels: Code = intrinsic(_blending)


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
    upper: NDArray[np.int32],
    lower: NDArray[np.int32],
    places: NDArray[np.int32],
    weights: NDArray[np.int32],
    above: NDArray[np.uint8],
    below: NDArray[np.uint8],
) -> None:
    # Without signs, an index is no candidate for one from the end, which would cost a branch.
    three = np.uint64(3)
    last = places.size - 1
    for i in range(last):
        at, row = np.uint64(places[i]), np.uint64(i) * three
        _blend_pixels(upper, lower, at, weights, row, above, below, row)
    # what lies behind the last pixel is not ours to write
    for total, line in ((upper, above), (lower, below)):
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
    # pictures are (h, 3 w) here, which the compiler can vectorise
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
    left, right = 3 * start[0], 3 * (start[0] + count)
    if _IS_COMPILED and taps == 3 and y_weights.shape[1] == 3:
        other = np.zeros_like(total)
        for j in range(0, y_first.size, 2):
            k = min(j + 1, y_first.size - 1)
            for line, sums in ((j, total), (k, other)):
                at = y_first[line] - corner[1]
                middle, bottom = columns[min(at + 1, last)], columns[min(at + 2, last)]
                _sum_three_lines(columns[at], middle, bottom, y_weights[line], sums)
            above, below = target[start[1] + j, left:right], target[start[1] + k, left:right]
            _blend_three_columns(total, other, places, weights, above, below)
        return
    for j in range(y_first.size):
        _sum_lines(columns[y_first[j] - corner[1] :], y_weights[j], total)
        _blend_columns(total, places, weights, target[start[1] + j, left:right])


def _keep_edges_loops(
    pixels: NDArray[np.uint8],
    place: tuple[int, int],
    tile_size: tuple[int, int],
    margin: int,
    below: NDArray[np.uint8],
    beside: NDArray[np.uint8],
) -> None:
    (x0, y0), (width, height) = place, tile_size
    x1, y1 = x0 + pixels.shape[1] // 3, y0 + pixels.shape[0]
    for edge in range(max(0, (y0 - margin) // height), below.shape[0]):
        first = (edge + 1) * height - margin
        if first >= y1:
            break
        for y in range(max(y0, first), min(y1, first + 2 * margin)):
            below[edge, y - first, 3 * x0 : 3 * x1] = pixels[y - y0]
    for edge in range(max(0, (x0 - margin) // width), beside.shape[1] // (6 * margin)):
        first = (edge + 1) * width - margin
        if first >= x1:
            break
        start, stop = 3 * (max(x0, first) - x0), 3 * (min(x1, first + 2 * margin) - x0)
        to = 3 * (2 * margin * edge + max(x0, first) - first) - start
        for y in range(y1 - y0):
            for i in range(start, stop):
                beside[y0 + y, to + i] = pixels[y, i]


def _paint_loops(
    pixels: NDArray[np.uint8],
    corner: tuple[int, int],
    x: tuple[NDArray[np.int32], NDArray[np.int32]],
    y: tuple[NDArray[np.int32], NDArray[np.int32]],
    target: NDArray[np.uint8],
    start: tuple[int, int],
    place: tuple[int, int],
    tile_size: tuple[int, int],
    margin: int,
    below: NDArray[np.uint8],
    beside: NDArray[np.uint8],
) -> None:
    if x[0].size and y[0].size:
        resample(pixels, corner, x, y, target, start)
    keep_edges(pixels, place, tile_size, margin, below, beside)


def _scatter_loops(
    filled: NDArray[np.uint8], columns: NDArray[np.int32], target: NDArray[np.uint8], top: int
) -> None:
    for j in range(filled.shape[0]):
        for i in range(columns.size):
            at = 3 * columns[i]
            for c in range(3):
                target[top + j, at + c] = filled[j, 3 * i + c]


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
resample = compiled(_resample_loops)
keep_edges = compiled(_keep_edges_loops)
paint = compiled(_paint_loops)
scatter = compiled(_scatter_loops)
area_mean = compiled(_area_mean_loops)
ycc_to_rgb = compiled(_ycc_to_rgb_loops)
