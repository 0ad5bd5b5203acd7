"""Windows turned, scaled and cut to crops: pixels, ids, boxes, all by one affine a sample.

::

    crop = middle of the crop + matrix (window - middle of the window) + shift

Places are exact. What a crop's pixel reads is computed in 64-bit floats and rounded once to
1/65536 pixel; from there on it is integers, the same on every device. So an affine that maps
pixels onto pixels (the identity, quarter turns, flips) copies them bit by bit.

Beyond the window labels are unknown, and pixels are mirrored: a drawn edge of glass or
colour would be a thing to learn. Suffixes name the axes: ``x_BHW``.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from wsi_pipeline.spec import ModelSpec
from wsi_pipeline.training.annotation import IGNORE_CLASS, IGNORE_ID
from wsi_pipeline.training.batch import Batch

__all__ = ["warp"]

FRACTION_BITS = 16
"""Of a place in pixels; the rest of an int32 leaves room for windows of 32,767 pixels."""
ONE = 1 << FRACTION_BITS


def warp(
    batch: Batch,
    spec: ModelSpec,
    *,
    matrix: NDArray[np.float64],
    shift_px: NDArray[np.float64],
    crop_px: int,
) -> Batch:
    """Cut a crop out of every window.

    Pixels are bilinear between the window's pixel centres, labels those of the nearest
    centre. Shrinking does not blur beforehand: meant for scales of 0.5 and more.

    Args:
        batch: windows, (B, S, S, 3) uint8.
        spec: tells the kind of each head.
        matrix: (B, 2, 2), from the window's (x, y) to the crop's, both from the middle.
        shift_px: (B, 2), added to the crop's (x, y).
        crop_px: the crops' side C; S - C must be even, so that their pixels can coincide.

    Returns:
        Crops: (B, 3, C, C) contiguous float32, and the labels. Boxes become those of the
        turned ellipses they hold, in pixels of the crop.

    Raises:
        ValueError: windows that are not square, or sizes that differ by an odd number.
    """
    count, height, width, _ = batch.pixels.shape
    if height != width or (width - crop_px) % 2:
        msg = f"windows of {width} x {height} px cannot be cut to {crop_px} px about their middle"
        raise ValueError(msg)
    x_BHW, y_BHW = _places(matrix, shift_px, width, crop_px, batch.pixels.device)
    pixels_BCHW = _interpolated(batch.pixels, x_BHW, y_BHW)

    column_BHW = (x_BHW + ONE // 2) >> FRACTION_BITS
    row_BHW = (y_BHW + ONE // 2) >> FRACTION_BITS
    outside_BHW = (column_BHW < 0) | (column_BHW >= width) | (row_BHW < 0) | (row_BHW >= width)
    index_BHW = (row_BHW.clamp_(0, width - 1) * width + column_BHW.clamp_(0, width - 1)).long()

    def nearest(values_NHW: Tensor, rows_N: Tensor, beyond: int) -> Tensor:
        every = len(rows_N) == count
        places_NHW = index_BHW if every else index_BHW[rows_N]
        lost_NHW = outside_BHW if every else outside_BHW[rows_N]
        found_NK = values_NHW.flatten(1).gather(1, places_NHW.flatten(1))
        return found_NK.view(places_NHW.shape).masked_fill_(lost_NHW, beyond)

    labels, unknown = {}, {}
    for name, label in batch.labels.items():
        kind, rows_N = spec.head(name).kind, batch.rows[name]
        if kind == "instance":
            labels[name] = nearest(label, rows_N, IGNORE_ID)
        elif kind == "class":
            labels[name] = nearest(label, rows_N, IGNORE_CLASS)
        elif kind == "detect":
            labels[name] = _boxes(label, rows_N, matrix, shift_px, (width, crop_px))
            unknown[name] = nearest(batch.unknown[name], rows_N, True)
        else:
            labels[name] = label
    return Batch(pixels=pixels_BCHW, rows=batch.rows, labels=labels, unknown=unknown)


def _places(
    matrix: NDArray[np.float64],
    shift_px: NDArray[np.float64],
    window_px: int,
    crop_px: int,
    device: torch.device,
) -> tuple[Tensor, Tensor]:
    """Return where in its window each pixel of a crop reads, (B, C, C) in 1/65536 pixel.

    An affine is a part that depends on the column plus one that depends on the row: each is
    rounded to fixed point in a short table, and what is as long as the crop is one addition.
    """
    inverse = np.linalg.inv(matrix)
    middle = np.arange(crop_px) - (crop_px - 1) / 2
    from_middle = middle[None, None, :] - shift_px[:, :, None]
    # By crop axis, window axis: what a crop's column, then its row, adds to (x, y).
    steps = np.swapaxes(inverse, 1, 2)[..., None] * from_middle[:, :, None, :]
    steps[:, 1] += (window_px - 1) / 2
    table = torch.from_numpy(np.rint(steps * ONE).astype(np.int32)).to(device, non_blocking=True)
    across, down = table[:, 0, :, None, :], table[:, 1, :, :, None]
    return across[:, 0] + down[:, 0], across[:, 1] + down[:, 1]


def _interpolated(window_BHWC: Tensor, x_BHW: Tensor, y_BHW: Tensor) -> Tensor:
    """Interpolate between the four pixels around each place; (B, 3, C, C) float32."""
    count, side = window_BHWC.shape[:2]
    # Four bytes a pixel: a word is fetched at once, and far faster than three bytes.
    words = window_BHWC.new_empty((count, side, side, 4))
    for channel in range(3):
        words[..., channel] = window_BHWC[..., channel]
    flat = words.view(torch.int32).view(-1)
    left, top = x_BHW >> FRACTION_BITS, y_BHW >> FRACTION_BITS
    columns = _mirrored(left, side), _mirrored(left + 1, side)
    first = torch.arange(count, device=flat.device, dtype=torch.int32)[:, None, None] * side
    rows = [(_mirrored(row, side) + first) * side for row in (top, top + 1)]
    around = [
        flat.index_select(0, (row + column).view(-1)).view(x_BHW.shape)
        for row in rows
        for column in columns
    ]
    right_share = (x_BHW & (ONE - 1)).float() / ONE
    lower_share = (y_BHW & (ONE - 1)).float() / ONE
    crop_BCHW = torch.empty((count, 3, *x_BHW.shape[1:]), device=flat.device)
    for channel in range(3):
        corners = [(word >> 8 * channel).bitwise_and_(255).float() for word in around]
        upper = corners[0].lerp_(corners[1], right_share)
        lower = corners[2].lerp_(corners[3], right_share)
        torch.lerp(upper, lower, lower_share, out=crop_BCHW[:, channel])
    return crop_BCHW


def _mirrored(index: Tensor, size: int) -> Tensor:
    """Fold an index back into 0..size - 1 at the window's edges, each edge pixel twice."""
    folded = torch.maximum(index, -1 - index)
    return torch.minimum(folded, 2 * size - 1 - folded).clamp_(0, size - 1)


def _boxes(
    boxes_NM4: Tensor,
    rows_N: Tensor,
    matrix: NDArray[np.float64],
    shift_px: NDArray[np.float64],
    sides_px: tuple[int, int],
) -> Tensor:
    """Move boxes; NaN stays NaN.

    A cell fills its box as an ellipse does, and an ellipse turned by 45 degrees needs no
    larger box, where the turned box itself would need one twice as large.
    """
    device = boxes_NM4.device
    turn = torch.from_numpy(matrix.astype(np.float32)).to(device, non_blocking=True)[rows_N]
    shift = torch.from_numpy(shift_px.astype(np.float32)).to(device, non_blocking=True)[rows_N]
    window, crop = (side / 2 for side in sides_px)
    centre_NM2 = (boxes_NM4[..., :2] + boxes_NM4[..., 2:]) / 2 - window
    half_NM2 = (boxes_NM4[..., 2:] - boxes_NM4[..., :2]) / 2
    moved_NM2 = (centre_NM2[:, :, None, :] * turn[:, None]).sum(-1) + shift[:, None] + crop
    reach_NM2 = (half_NM2[:, :, None, :] * turn[:, None]).square().sum(-1).sqrt()
    return torch.cat([moved_NM2 - reach_NM2, moved_NM2 + reach_NM2], -1)
