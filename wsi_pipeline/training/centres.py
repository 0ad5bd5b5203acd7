"""What a detect head learns: a peak of heat at each object's centre, and the box's size there.

::

    boxes, px of the crop           heat target            size targets
    +-----------+                   . .1 .3 .1 .           width and height, as shares of
    |     x     |        ->         .1 .6 1 .6 .1          max_size_um, at the centre's
    +-----------+                   . .1 .3 .1 .           pixel alone

The method is CenterNet (Zhou et al., "Objects as Points", 2019): a Gaussian as wide as the box
tells how little a wrong centre matters, the heat's loss is a focal loss that is lenient there,
and sizes are compared (L1) at the centres alone. What is found at last is decoded from the maps
by the pipeline itself (``wsi_pipeline.instances``).

It differs in three ways. The maps have the input's resolution, so there is no offset within a
pixel. Sizes are shares behind a sigmoid, since maps are stored that way. And terms are
normalised a sample, as all losses here, so that a sample's loss does not depend on its
neighbours in the batch.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from wsi_pipeline.errors import RecipeError
from wsi_pipeline.spec import HeadSpec, PeakRules

__all__ = ["CentreTargets", "centre_loss", "centre_targets"]

_OVERLAP = 0.3
"""A box moved to where its Gaussian ends still overlaps with the object's by this IoU. Comes to
0.32 of a square's side; the widths of CenterNet's published code come to 0.27."""
_FOCUS = 2
"""Power of the error by which easy pixels count less: CenterNet's alpha."""
_LENIENCE = 4
"""Power of (1 - target) by which pixels near a centre count less: CenterNet's beta."""
_SIZE_WEIGHT = 3.0
"""Of the size term. CenterNet takes 0.1 an output pixel of 4 input pixels; the default range of
64 um at 0.5 um a pixel is 32 of these."""
_CHUNK_VALUES = 1 << 24
"""Values of Gaussians held at a time: 64 MiB."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CentreTargets:
    """What the maps of N samples should say."""

    heat: Tensor
    """(N, H, W) float32: the largest of the objects' Gaussians; 1 at a centre's pixel alone."""
    known: Tensor
    """(N, H, W) bool: where the heat is compared."""
    pixel: Tensor
    """(N, M) int64 flat index of each centre's pixel; 0 where there is no object."""
    counted: Tensor
    """(N, M) bool: whether there is an object, with its centre on a known pixel."""
    share: Tensor
    """(N, 2, M) float32: width and height as shares of ``max_size_um``, at most 1."""


def centre_loss(
    logits_N3HW: Tensor, boxes_NM4: Tensor, unknown_NSS: Tensor, head: HeadSpec, *, mpp: float
) -> dict[str, Tensor]:
    """Compare a detect head's logits with boxes.

    Args:
        logits_N3HW: heat, width, height, before the sigmoid; H divides S.
        boxes_NM4: left, top, right, bottom in pixels of the crop; NaN where there is none.
            Boxes whose centre lies outside the crop do not count.
        unknown_NSS: bool, True where nobody annotated: no loss there, nor for objects whose
            centre lies there.
        head: a detect head.
        mpp: micrometres a pixel of the crop.

    Returns:
        Two terms, each (N,), a sample's sum over its number of counted objects (over 1 where
        it has none): ``heat``, summed over pixels, and ``size``, summed over objects, width
        and height. A network's loss is their sum over the samples.

    Raises:
        RecipeError: the head is no detect head.
    """
    if not isinstance(head.rules, PeakRules):
        raise RecipeError(f"head {head.name!r} is of kind {head.kind!r}: boxes are for 'detect'")
    scale = unknown_NSS.shape[-1] // logits_N3HW.shape[-1]
    unknown_NHW = unknown_NSS
    if scale > 1:
        unknown_NHW = functional.max_pool2d(unknown_NSS.float(), scale) > 0
    targets = centre_targets(boxes_NM4 / scale, unknown_NHW, head.rules, mpp=mpp * scale)
    objects_N = targets.counted.sum(1).clamp(min=1)
    logits_N3HW = logits_N3HW.float()
    heat_N = _heat_loss(logits_N3HW[:, 0], targets.heat, targets.known)
    size_N = _size_loss(logits_N3HW[:, 1:], targets)
    return {"heat": heat_N / objects_N, "size": _SIZE_WEIGHT * size_N / objects_N}


@torch.no_grad()
def centre_targets(
    boxes_NM4: Tensor, unknown_NHW: Tensor, rules: PeakRules, *, mpp: float
) -> CentreTargets:
    """Turn boxes into what the maps should say.

    Args:
        boxes_NM4: left, top, right, bottom in pixels of the maps; NaN where there is none.
        unknown_NHW: bool, True where nobody annotated; of the maps' size.
        rules: the head's.
        mpp: micrometres a pixel of the maps.
    """
    height, width = unknown_NHW.shape[1:]
    boxes_NM4 = boxes_NM4.float()
    pixel_NM2 = ((boxes_NM4[..., :2] + boxes_NM4[..., 2:]) / 2).floor()
    side_NM2 = boxes_NM4[..., 2:] - boxes_NM4[..., :2]
    x_NM, y_NM = pixel_NM2.unbind(-1)
    # NaN is nowhere inside.
    inside_NM = (x_NM >= 0) & (y_NM >= 0) & (x_NM < width) & (y_NM < height)
    x_NM, y_NM = (torch.where(inside_NM, at_NM, 0) for at_NM in (x_NM, y_NM))
    side_NM2 = torch.where(inside_NM[..., None], side_NM2, 1)

    flat_NM = (y_NM * width + x_NM).long()
    known_NM = ~unknown_NHW.flatten(1).gather(1, flat_NM)
    return CentreTargets(
        heat=_splat(x_NM, y_NM, _spread_px(side_NM2), inside_NM, (height, width)),
        known=~unknown_NHW,
        pixel=flat_NM,
        counted=inside_NM & known_NM,
        share=(side_NM2 * (mpp / rules.max_size_um)).clamp(0, 1).movedim(-1, 1),
    )


def _spread_px(side_NM2: Tensor) -> Tensor:
    """Return the standard deviation of each box's Gaussian.

    A box moved by r along x and y overlaps with itself by (w - r)(h - r) of w * h; for an IoU
    of t that is 2t / (1 + t) of it, a quadratic in r. As in CenterNet, the pixels from -r to r
    are six standard deviations.
    """
    w_NM, h_NM = side_NM2.unbind(-1)
    lost = (1 - _OVERLAP) / (1 + _OVERLAP)
    root_NM = ((w_NM + h_NM).square() - 4 * lost * w_NM * h_NM).sqrt()
    reach_NM = (w_NM + h_NM - root_NM) / 2
    return (2 * reach_NM + 1) / 6


def _splat(
    x_NM: Tensor, y_NM: Tensor, spread_NM: Tensor, inside_NM: Tensor, size: tuple[int, int]
) -> Tensor:
    """Return (N, H, W): the largest of the Gaussians around the given pixels, 0 without any."""
    height, width = size
    heat_NHW = x_NM.new_zeros((len(x_NM), height, width))
    over_x_NMW = _bell(x_NM, spread_NM, width)
    over_y_NMH = _bell(y_NM, spread_NM, height) * inside_NM[..., None]
    chunk = max(1, _CHUNK_VALUES // max(1, heat_NHW.numel()))
    for some_x, some_y in zip(
        torch.split(over_x_NMW, chunk, 1), torch.split(over_y_NMH, chunk, 1), strict=True
    ):
        if some_x.shape[1]:
            both_NKHW = some_y[..., :, None] * some_x[..., None, :]
            heat_NHW = torch.maximum(heat_NHW, both_NKHW.amax(1))
    return heat_NHW


def _bell(middle_NM: Tensor, spread_NM: Tensor, size: int) -> Tensor:
    """Return (N, M, size): a Gaussian of height 1 over the pixels of an axis."""
    away = torch.arange(size, device=middle_NM.device) - middle_NM[..., None]
    return (-0.5 * (away / spread_NM[..., None]).square()).exp()


def _heat_loss(logits_NHW: Tensor, heat_NHW: Tensor, known_NHW: Tensor) -> Tensor:
    """Return (N,) sums of CenterNet's penalty-reduced focal loss (its equation 1)."""
    hot_NHW = logits_NHW.sigmoid()
    at_centre_NHW = -(1 - hot_NHW).pow(_FOCUS) * functional.logsigmoid(logits_NHW)
    elsewhere_NHW = (
        -(1 - heat_NHW).pow(_LENIENCE) * hot_NHW.pow(_FOCUS) * functional.logsigmoid(-logits_NHW)
    )
    loss_NHW = torch.where(heat_NHW == 1, at_centre_NHW, elsewhere_NHW)
    return (loss_NHW * known_NHW).sum((1, 2))


def _size_loss(logits_N2HW: Tensor, targets: CentreTargets) -> Tensor:
    """Return (N,) sums of the absolute errors of the shares at the counted centres."""
    index_N2M = targets.pixel[:, None].expand(-1, 2, -1)
    found_N2M = logits_N2HW.flatten(2).gather(2, index_N2M).sigmoid()
    error_N2M = (found_N2M - targets.share).abs() * targets.counted[:, None]
    return error_N2M.sum((1, 2))
