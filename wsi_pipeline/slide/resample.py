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

from wsi_pipeline.slide import kernels

__all__ = [
    "AxisTaps",
    "area_mean",
    "axis_taps",
    "flat",
    "most_taps",
    "resample",
    "resample_columns",
    "resample_part",
    "whiten_around",
    "ycc_to_rgb",
]


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
        ends: NDArray[np.int32] = (self.first + reach).astype(np.int32)
        return ends

    def only(self, start: int, stop: int) -> AxisTaps:
        """Return the taps of a half-open range of the target pixels."""
        return AxisTaps(first=self.first[start:stop], weights=self.weights[start:stop])

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
    weights = np.rint(share / total * kernels.UNITY).astype(np.int64)
    largest = np.argmax(weights, axis=1)
    weights[np.arange(len(k)), largest] += kernels.UNITY - weights.sum(axis=1)
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
    kernels.resample(
        flat(source),
        corner,
        (taps[0].first[x], taps[0].weights[x]),
        (taps[1].first[y], taps[1].weights[y]),
        flat(target),
        (columns[0], lines[0]),
    )


def resample_columns(
    source: NDArray[np.uint8],
    corner: tuple[int, int],
    taps: tuple[AxisTaps, AxisTaps],
    lines: tuple[int, int],
    target: NDArray[np.uint8],
    columns: NDArray[np.int32],
) -> None:
    """Fill some columns of a target that are not side by side.

    Args:
        source: ``(h, w, 3)``, as of :func:`resample_part`.
        corner: ``(x, y)`` of it in source pixels.
        taps: for x, of the columns to fill alone; for y, of all lines of the target.
        lines: half-open range to fill.
        target: ``(H, W, 3)``, contiguous; other pixels stay as they are.
        columns: ``(N,)`` where they are in the target.
    """
    y = taps[1].only(*lines)
    filled = np.empty((len(y.first), len(columns), 3), np.uint8)
    everything = (0, len(columns)), (0, len(y.first))
    resample_part(source, corner, (taps[0], y), *everything, filled)
    kernels.scatter(flat(filled), columns, flat(target), lines[0])


def whiten_around(
    target: NDArray[np.uint8], columns: tuple[int, int], lines: tuple[int, int]
) -> None:
    """Fill all of a target white but a rectangle, given by half-open ranges."""
    target[: lines[0]] = target[lines[1] :] = 255
    target[lines[0] : lines[1], : columns[0]] = 255
    target[lines[0] : lines[1], columns[1] :] = 255


def flat(pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
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
    kernels.area_mean(np.ascontiguousarray(pixels), factor.bit_length() - 1, means)
    return means


def ycc_to_rgb(pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Convert full-range YCbCr of ITU-R BT.601, as JFIF defines it, to RGB.

    Args:
        pixels: ``(h, w, 3)`` Y, Cb, Cr.
    """
    rgb = np.empty_like(pixels)
    kernels.ycc_to_rgb(np.ascontiguousarray(pixels), rgb)
    return rgb
