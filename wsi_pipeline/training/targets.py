"""What the losses compare logits with, made from a crop's labels on its device.

::

    ids ---- interior_and_contour --> 0 background, 1 inner, 2 contour, -1 unknown
     +------ between_weights -------> 1, and more where objects nearly touch
    class ids -- class_targets -----> the same, -1 unknown
                                      at_scale: any of these, for a coarser output

An object is what bears one id, connected or not. Targets are made after augmentation: an
interior is eroded by as many pixels whatever the crop was scaled by. Suffixes name the axes:
``ids_NHW``.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from wsi_pipeline.training.annotation import IGNORE_CLASS

__all__ = ["UNKNOWN", "at_scale", "between_weights", "class_targets", "interior_and_contour"]

Pick = Callable[..., Tensor]
"""``torch.maximum`` or ``torch.minimum``."""

UNKNOWN = -1
"""A target pixel that no loss may look at."""
NOTHING = torch.iinfo(torch.int32).max
"""Above every id."""
REACH = 3.0
"""Where d1 + d2 exceeds this many sigma, the weight is 1: it would be at most 1.1 % of the
gain more, and the search stays short."""
NOWHERE = 1 << 30
"""Farther off than any pixel of a batch."""
FAR_PX = 1 << 10
"""A distance that counts as none. With its square, keys of up to 1024 rows are int32."""
MAX_SIGMA_PX = 150.0
"""So that the search has no more rows."""


def interior_and_contour(ids_NHW: Tensor, element_px: int, *, contour: bool = True) -> Tensor:
    """Turn objects into the classes of an instance head.

    Inner is the erosion of each object by an ellipse, contour its dilation without the
    erosion. The crop's edge erodes nothing: what lies beyond it does not count. Unknown
    pixels stay unknown, and so does a pixel for which the unknown ones in its element
    decide: an object that borders on them may go on there, or end.

    Args:
        ids_NHW: (N, H, W) int32, 0 background, -1 unknown.
        element_px: diameter of the ellipse, odd. Cerberus: 3 for nuclei and lumina (a
            cross), 11 for glands.
        contour: whether contour is a class; else it is background (the paper's "Cerberus",
            where with contour it is "Cerberus+").

    Returns:
        (N, H, W) int64: 0 background, 1 inner, 2 contour, -1 unknown.

    Raises:
        ValueError: an even diameter, whose ellipse would have no middle.
    """
    spans = _ellipse(element_px)
    unknown = ids_NHW < 0
    highest = _filtered(ids_NHW, spans, torch.maximum)
    lowest = _filtered(ids_NHW.masked_fill(unknown, NOTHING), spans, torch.minimum)
    near_unknown = _filtered(unknown.to(torch.uint8), spans, torch.maximum) > 0
    alone = (highest == ids_NHW) & (lowest == ids_NHW)
    inside = ids_NHW > 0
    doubtful = near_unknown & (alone if contour else alone & inside)
    classes = torch.where(inside & alone, 1, 0)
    if contour:
        classes = torch.where(~alone & (highest > 0), 2, classes)
    return classes.masked_fill_(doubtful | unknown, UNKNOWN)


def between_weights(
    ids_NHW: Tensor, *, sigma_px: float, gain: float = 10.0, inner: Tensor | None = None
) -> Tensor:
    """Weight pixels between neighbouring objects, so that narrow gaps are learned.

    ``1 + gain exp(-((d1 + d2) / sigma)^2 / 2)`` with d1 and d2 the distances from a pixel's
    centre to that of the nearest pixel of the nearest and of the second nearest object, 0
    inside (Ronneberger et al., "U-Net", MICCAI 2015, equation 2). Exactly 1 where fewer than
    two objects have d1 + d2 within 3 sigma.

    Args:
        ids_NHW: (N, H, W) int32, 0 background, -1 unknown (no object).
        sigma_px: Cerberus takes the diameter of the contour's element.
        gain: Largest weight less 1.
        inner: (N, H, W) bool, where the weight is 1 whatever is near: the target's inner.

    Returns:
        (N, H, W) float32, 1 and more.

    Raises:
        ValueError: a sigma that is not above 0, or above 150 px.
    """
    if not 0 < sigma_px <= MAX_SIGMA_PX:
        raise ValueError(f"sigma must be above 0 and at most {MAX_SIGMA_PX:g} px, not {sigma_px}")
    first_NHW, second_NHW = _two_nearest(ids_NHW, math.floor(REACH * sigma_px))
    limit_px = REACH * sigma_px
    total_px = first_NHW.float().sqrt_() + second_NHW.float().sqrt_()
    even = total_px > limit_px
    if inner is not None:
        even |= inner
    extra = total_px.clamp_(max=limit_px).div_(sigma_px).square_().div_(-2).exp_().mul_(gain)
    return extra.masked_fill_(even, 0).add_(1)


def class_targets(ids: Tensor) -> Tensor:
    """Turn class ids, uint8 with 255 unknown, into int64 with -1 unknown; any shape."""
    return ids.long().masked_fill_(ids == IGNORE_CLASS, UNKNOWN)


def at_scale(labels_NHW: Tensor, scale: int) -> Tensor:
    """Take the label at the centre of each cell of an output ``scale`` times coarser.

    The centre of an even cell is a corner of four pixels; the one below and to the right
    speaks for it.

    Args:
        labels_NHW: (N, H, W) targets or weights.
        scale: pixels a cell spans; H and W are multiples of it.

    Returns:
        (N, H / scale, W / scale) of the same type.

    Raises:
        ValueError: H or W is no multiple.
    """
    if any(side % scale for side in labels_NHW.shape[1:]):
        raise ValueError(f"labels {tuple(labels_NHW.shape)} do not divide into cells of {scale} px")
    return labels_NHW[:, scale // 2 :: scale, scale // 2 :: scale]


def _ellipse(diameter: int) -> list[int]:
    """Return how far an ellipse reaches left and right of its middle, for rows 0, 1, ...

    The same pixels as OpenCV's elliptical element.
    """
    if diameter < 1 or diameter % 2 == 0:
        raise ValueError(f"an element's diameter must be odd, not {diameter}")
    radius = diameter // 2
    return [round(math.sqrt(radius**2 - row**2)) for row in range(radius + 1)]


def _filtered(x_NHW: Tensor, spans: list[int], pick: Pick) -> Tensor:
    """Take the largest or smallest value within a symmetric element, as far as it exists.

    From the outermost row of the element inwards, so that each row's run widens the last.
    """
    run_NHW, span = x_NHW, 0
    found_NHW = x_NHW.clone()
    for row in reversed(range(len(spans))):
        run_NHW, span = _widened(run_NHW, (span, spans[row]), 2, pick), spans[row]
        _pick_shifted(found_NHW, run_NHW, row, 1, pick)
    return found_NHW


def _widened(x_NHW: Tensor, spans: tuple[int, int], axis: int, pick: Pick) -> Tensor:
    """Let values that speak for ``spans[0]`` pixels either way speak for ``spans[1]``."""
    span, wanted = spans
    while span < wanted:
        step = min(wanted - span, 2 * span + 1)
        wide_NHW = x_NHW.clone()
        _pick_shifted(wide_NHW, x_NHW, step, axis, pick)
        x_NHW, span = wide_NHW, span + step
    return x_NHW


def _pick_shifted(into: Tensor, x_NHW: Tensor, step: int, axis: int, pick: Pick) -> None:
    """Pick, in place, between each pixel and those ``step`` before and after it."""
    rest = max(0, x_NHW.shape[axis] - step)
    skip = x_NHW.shape[axis] - rest
    for start, source in ((skip, 0), (0, skip)):
        part = into.narrow(axis, start, rest)
        pick(part, x_NHW.narrow(axis, source, rest), out=part)


def _two_nearest(ids_NHW: Tensor, reach: int) -> tuple[Tensor, Tensor]:
    """Return squared distances to the two nearest objects, int32, large where there is none.

    Exact where they are no farther than ``reach`` along either axis. First the two nearest
    in each row, then the best of the rows around: an object that is third in its own row is
    at best third in the plane.
    """
    height = ids_NHW.shape[1]
    near, near_id, next_near = (
        functional.pad(part, (0, 0, reach, reach), value=FAR_PX**2)
        for part in _two_in_row(ids_NHW, reach)
    )
    # The row is part of what is minimised, to know afterwards whose distance it is.
    rows = 2 * reach + 1
    keys = near * rows
    best_NHW = torch.full_like(ids_NHW, NOTHING)
    found = torch.empty_like(best_NHW)
    for row in range(rows):
        torch.add(keys[:, row : row + height], (row - reach) ** 2 * rows + row, out=found)
        torch.minimum(best_NHW, found, out=best_NHW)
    first_NHW = best_NHW.div(rows, rounding_mode="floor")
    row_NHW = best_NHW - first_NHW * rows + torch.arange(height, device=ids_NHW.device)[:, None]
    owner_NHW = near_id.gather(1, row_NHW)

    second_NHW = torch.full_like(ids_NHW, NOTHING)
    for row in range(rows):
        part = slice(row, row + height)
        # The row's second where its first is the owner, else its first. That is the larger
        # of the two once the second is pushed below 0: many times faster than a selection.
        torch.bitwise_xor(near_id[:, part], owner_NHW, out=found)
        found.clamp_(max=1).mul_(-(FAR_PX**2) - 1).add_(next_near[:, part])
        torch.maximum(found, near[:, part], out=found)
        torch.minimum(second_NHW, found.add_((row - reach) ** 2), out=second_NHW)
    return first_NHW, second_NHW


def _two_in_row(ids_NHW: Tensor, reach: int) -> tuple[Tensor, Tensor, Tensor]:
    """Find the two nearest objects in each pixel's own row, by where their pixels are.

    Returns:
        Squared distance to the nearest, its id, squared distance to the second nearest;
        (N, H, W) int32.
    """
    place_NHW = torch.arange(ids_NHW.numel(), device=ids_NHW.device, dtype=torch.int32)
    place_NHW = place_NHW.view_as(ids_NHW)
    left, left_id, more_left = _two_beside(ids_NHW, place_NHW, reach, 1)
    right, right_id, more_right = _two_beside(ids_NHW, place_NHW, reach, -1)
    is_left = place_NHW - left <= right - place_NHW
    same = left_id == right_id
    left_px = place_NHW - torch.where(same | is_left, more_left, left)
    right_px = torch.where(same | ~is_left, more_right, right) - place_NHW
    near_px = torch.minimum(place_NHW - left, right - place_NHW)
    near, next_near = (
        distance.clamp_(max=FAR_PX).square_()
        for distance in (near_px, torch.minimum(left_px, right_px))
    )
    return near, torch.where(is_left, left_id, right_id), next_near


def _two_beside(
    ids_NHW: Tensor, place_NHW: Tensor, reach: int, side: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Find the nearest pixel of an object at or beside each pixel, and that of another one.

    Args:
        ids_NHW: object ids.
        place_NHW: number of each pixel in the batch, int32.
        reach: how far along the row to look, at least.
        side: 1 looks to the left, -1 to the right.

    Returns:
        The nearest one's place, its id, the other one's place; a place far off is none.
    """
    none = -side * NOWHERE
    pick = torch.maximum if side > 0 else torch.minimum
    objects = ids_NHW > 0
    nearest = _swept(place_NHW.where(objects, none), reach, side, pick)
    found = nearest.clamp(0, ids_NHW.numel() - 1).view(-1)
    owner = ids_NHW.reshape(-1).index_select(0, found).view_as(ids_NHW)
    # Where objects change, the last pixel of the one before is the nearest of another id.
    step = (1, -1) if side > 0 else (-1, 1)
    before = functional.pad(nearest, step, value=none)
    changed = objects & (before != none) & (functional.pad(owner, step) != ids_NHW)
    return nearest, owner, _swept(before.where(changed, none), reach, side, pick)


def _swept(x_NHW: Tensor, reach: int, side: int, pick: Pick) -> Tensor:
    """Pick among each pixel and ``reach`` or more before it (side 1) or after it (-1)."""
    span, width = 1, x_NHW.shape[2]
    while span <= min(reach, width - 1):
        wide_NHW = x_NHW.clone()
        source, into = (0, span) if side > 0 else (span, 0)
        part = wide_NHW.narrow(2, into, width - span)
        pick(part, x_NHW.narrow(2, source, width - span), out=part)
        x_NHW, span = wide_NHW, 2 * span
    return x_NHW
