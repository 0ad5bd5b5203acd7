"""Area averages, in whole numbers.

Everything here is integer arithmetic on absolute pixel positions. The value of a grid
pixel therefore depends on the slide and the grid alone, bit for bit, and never on the
window, the band or the thread that asked for it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from wsi_pipeline.compiled import compiled

__all__ = ["AxisTaps", "area_mean", "axis_taps", "resample", "ycc_to_rgb"]

_UNITY = 2048
"""Weights of one axis add up to this: 11 bits, so that 11 + 11 + 8 bits fit an int32."""
_SHIFT = 22
"""Of those of both axes."""


@dataclass(frozen=True, kw_only=True, slots=True)
class AxisTaps:
    """Which source pixels make each target pixel along one axis, and with what weight."""

    first: NDArray[np.int32]
    """``(N,)`` first source pixel; -1 where the target pixel lies outside the source."""
    weights: NDArray[np.int32]
    """``(N, T)`` weights of the source pixels from ``first`` on; they add up to 2048."""

    @property
    def span(self) -> tuple[int, int]:
        """Half-open range of the source pixels that have any weight; empty as (0, 0)."""
        inside = self.first >= 0
        if not inside.any():
            return 0, 0
        reach = self.weights.shape[1] - np.argmax(self.weights[:, ::-1] > 0, axis=1)
        return int(self.first[inside].min()), int((self.first + reach)[inside].max())


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
    pixel = first[:, None] + np.arange(math.ceil(max(scale, 1.0)) + 1)
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
    left: int,
) -> None:
    """Fill some columns of a target from a part of the source; white outside of it.

    Args:
        source: ``(h, w, 3)``, contiguous, a part that holds all pixels the taps need.
        corner: ``(x, y)`` of that part in source pixels.
        taps: for x and y, of the columns and lines to fill.
        target: ``(H, W, 3)``, contiguous, all lines of which are filled.
        left: first column to fill.
    """
    x, y = taps
    start, stop = x.span
    columns = max(0, start - corner[0]), max(0, stop - corner[0])
    _resample(
        _flat(source),
        columns,
        np.where(x.first < 0, -1, x.first - start),
        x.weights,
        np.where(y.first < 0, -1, y.first - corner[1]),
        y.weights,
        _flat(target),
        left,
    )


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


def _add_line_loops(line: NDArray[np.uint8], weight: int, total: NDArray[np.int32]) -> None:
    for i in range(line.size):
        total[i] += np.int32(weight) * np.int32(line[i])


def _sum_three_lines_loops(
    lines: NDArray[np.uint8], weights: NDArray[np.int32], total: NDArray[np.int32]
) -> None:
    top, middle, bottom = lines[0], lines[1], lines[2]
    first, second, third = weights[0], weights[1], weights[2]
    for i in range(top.size):
        total[i] = (
            first * np.int32(top[i]) + second * np.int32(middle[i]) + third * np.int32(bottom[i])
        )


def _blend_columns_loops(
    total: NDArray[np.int32],
    first: NDArray[np.int32],
    weights: NDArray[np.int32],
    line: NDArray[np.uint8],
) -> None:
    half = np.int32(_UNITY * _UNITY // 2)
    for i in range(first.size):
        if first[i] < 0:
            line[i * 3 : i * 3 + 3] = 255
            continue
        at = first[i] * 3
        red = green = blue = half
        for t in range(weights.shape[1]):
            weight = weights[i, t]
            red += weight * total[at + t * 3]
            green += weight * total[at + t * 3 + 1]
            blue += weight * total[at + t * 3 + 2]
        line[i * 3] = red >> _SHIFT
        line[i * 3 + 1] = green >> _SHIFT
        line[i * 3 + 2] = blue >> _SHIFT


def _blend_three_columns_loops(
    total: NDArray[np.int32],
    first: NDArray[np.int32],
    weights: NDArray[np.int32],
    line: NDArray[np.uint8],
) -> None:
    # Without signs, an index is no candidate for one from the end, which would cost a branch.
    channels = np.uint64(0), np.uint64(1), np.uint64(2)
    half, three, six = np.int32(_UNITY * _UNITY // 2), np.uint64(3), np.uint64(6)
    for i in range(first.size):
        to = np.uint64(i) * three
        if first[i] < 0:
            for c in channels:
                line[to + c] = 255
            continue
        at = np.uint64(first[i]) * three
        left, middle, right = weights[i, 0], weights[i, 1], weights[i, 2]
        for c in channels:
            value = left * total[at + c] + middle * total[at + three + c]
            line[to + c] = (value + right * total[at + six + c] + half) >> _SHIFT


def _resample_loops(
    source: NDArray[np.uint8],
    columns: tuple[int, int],
    x_first: NDArray[np.int32],
    x_weights: NDArray[np.int32],
    y_first: NDArray[np.int32],
    y_weights: NDArray[np.int32],
    target: NDArray[np.uint8],
    left: int,
) -> None:
    width = (columns[1] - columns[0]) * 3
    # the last taps reach a little further, where their weight is zero
    total = np.zeros(width + 3 * x_weights.shape[1], np.int32)
    for j in range(target.shape[0]):
        line = target[j, left * 3 : (left + x_first.size) * 3]
        if y_first[j] < 0:
            line[:] = 255
            continue
        lines = source[y_first[j] :, columns[0] * 3 : columns[1] * 3]
        if y_weights.shape[1] == 3 and lines.shape[0] >= 3:
            _sum_three_lines(lines, y_weights[j], total)
        else:
            total[:] = 0
            for t in range(y_weights.shape[1]):
                if y_weights[j, t]:
                    _add_line(lines[t], y_weights[j, t], total)
        if x_weights.shape[1] == 3:
            _blend_three_columns(total, x_first, x_weights, line)
        else:
            _blend_columns(total, x_first, x_weights, line)


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


_add_line = compiled(_add_line_loops)
_sum_three_lines = compiled(_sum_three_lines_loops)
_blend_columns = compiled(_blend_columns_loops)
_blend_three_columns = compiled(_blend_three_columns_loops)
_resample = compiled(_resample_loops)
_area_mean = compiled(_area_mean_loops)
_ycc_to_rgb = compiled(_ycc_to_rgb_loops)
