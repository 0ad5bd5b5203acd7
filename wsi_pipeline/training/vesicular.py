"""Nuclei with open chromatin: pale inside, with a rim and nucleoli, made of dense ones.

::

    ids ----> depth below the outline --> how far inside the rim -----+
    pixels -> mean colour around, nuclei left out                     v
    bytes --> which nuclei, how pale, how thick a rim, texture --> diluted --> nucleoli

Vesicular nuclei are what a network misses most where few of its examples are: nuclei of
tumours and of regenerating crypts, whose inside is as bright as what is around them. The
objects and their outlines stay as they are. Colours are mixed in optical density, where
less chromatin is less of its stain. Lengths are micrometres at the model's mpp. Suffixes name
the axes: ``x_BCHW``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

__all__ = ["NOISE_BYTES", "SHARE", "Vesicles", "open_chromatin"]

WHITE = 256.0
"""Intensity + 1 of what no stain dims, as in ``recolour.py``."""
SHARE = 0.2, 0.9
"""Least and largest share of a crop's nuclei that change."""
PALENESS = 0.35, 0.9
"""How far the inside goes to the colour around the nucleus, least and most; uniform."""
CLEARNESS = 0.75, 1.0
"""Optical density of that colour within the nucleus, as a share of that around: where there is
neither chromatin nor cytoplasm, more light passes."""
RIM_UM = 0.5, 1.0
"""Least and largest thickness of the rim that stays."""
EDGE_UM = 0.5
"""Width of the transition from the rim to the inside."""
RIM_GAIN = 0.15
"""Share by which optical density grows in the rim: chromatin lies along the membrane."""
TEXTURE = 0.75
"""Paleness varies by up to this share of itself."""
TEXTURE_UM = 1.0
"""Distance of the places between which texture is interpolated."""
MOST_NUCLEOLI = 3
"""In a nucleus; none to so many are asked for, and come where it is wide enough."""
NUCLEOLUS_UM = 0.5, 1.1
"""Least and largest radius of a nucleolus."""
NUCLEOLUS_EDGE_UM = 0.75
"""Width of its edge."""
NUCLEOLUS_DEPTH_UM = 1.5
"""Least distance of its middle to the nucleus' outline."""
NUCLEOLUS_GAIN = 0.3
"""Share by which optical density grows there, over that of the nucleus it was."""
NUCLEOLUS_CELL_UM = 4.0
"""Side of the squares of which each has one place for a nucleolus."""
AROUND_UM = 4.0
"""Side of the squares that colours are averaged in, before they are smoothed by nearly a
Gaussian whose standard deviation is two of them."""
FAR_WEIGHT = 0.02
"""Weight of the whole crop's colour beside that around, for nuclei far inside others."""

_NUCLEI, _PLACES, _GRAINS = 256, (16, 16), (32, 32)
"""How many draws there are before they repeat: of nuclei, nucleoli, texture."""
NOISE_BYTES = 4 * _NUCLEI + 4 * math.prod(_PLACES) + math.prod(_GRAINS)
"""Random bytes that a crop needs."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Vesicles:
    """What is drawn for each crop of a batch."""

    share: NDArray[np.float64]
    """(B,) share of the nuclei that change; 0: the crop is left alone."""
    noise: NDArray[np.uint8]
    """(B, NOISE_BYTES): decides which nuclei, and how."""


def open_chromatin(
    x_BCHW: Tensor, ids_NHW: Tensor, rows_N: Tensor, vesicles: Vesicles, *, mpp: float
) -> Tensor:
    """Make some nuclei of some crops vesicular.

    Args:
        x_BCHW: (B, 3, H, W) float32, RGB, 0..255.
        ids_NHW: nuclei of the crops that are labelled, (N, H, W) int32: 0 background, -1
            unknown.
        rows_N: (N,) int64, which crops those are.
        vesicles: one entry a crop.
        mpp: micrometres per pixel.

    Returns:
        The same shape; only pixels within nuclei differ. Each crop depends on its own entry
        alone, and what happens to a nucleus on the lowest byte of its id.
    """
    device = x_BCHW.device
    share_N = torch.from_numpy(vesicles.share.astype(np.float32)).to(device, non_blocking=True)
    noise_NK = torch.from_numpy(vesicles.noise).to(device, non_blocking=True)
    share_N, noise_NK = share_N[rows_N], noise_NK[rows_N]
    if device.type == "cpu":  # elsewhere the number of those that change had to be waited for
        some = share_N.nonzero()[:, 0]
        ids_NHW, rows_N = ids_NHW[some], rows_N[some]
        share_N, noise_NK = share_N[some], noise_NK[some]
    if not len(rows_N):
        return x_BCHW
    opened_NCHW = _opened(x_BCHW[rows_N], ids_NHW, share_N, noise_NK, mpp)
    return x_BCHW.index_copy(0, rows_N, opened_NCHW)


def _opened(
    x_NCHW: Tensor, ids_NHW: Tensor, share_N: Tensor, noise_NK: Tensor, mpp: float
) -> Tensor:
    sizes = [4 * _NUCLEI, 4 * math.prod(_PLACES), math.prod(_GRAINS)]
    nuclei, places, grains = torch.split(noise_NK, sizes, dim=1)
    around_NCHW, known_N = _density_around(x_NCHW, ids_NHW, max(1, round(AROUND_UM / mpp)))
    draws_NHW = _draws_of(ids_NHW, nuclei)
    chosen_NHW = _part(draws_NHW, 0) < (share_N * known_N)[:, None, None]
    chosen_NHW &= ids_NHW > 0
    depth_NHW = _depth(ids_NHW, math.ceil(max(RIM_UM[1] + EDGE_UM, NUCLEOLUS_DEPTH_UM) / mpp))
    rim_NHW = _between(RIM_UM, _part(draws_NHW, 2)) / mpp
    inside_NHW = ((depth_NHW - rim_NHW) * (mpp / EDGE_UM)).clamp_(0, 1)
    spots_NHW = _nucleoli(ids_NHW, depth_NHW, draws_NHW, places, mpp).mul_(inside_NHW)
    pale_NHW = _between(PALENESS, _part(draws_NHW, 1))
    pale_NHW.mul_(_texture(grains, ids_NHW.shape[1:], mpp)).clamp_(0, 1)
    pale_NHW.mul_(inside_NHW).mul_(1 - spots_NHW)
    clear_NHW = _between(CLEARNESS, _lower_bits(draws_NHW))
    gain_NHW = RIM_GAIN * (1 - inside_NHW) + NUCLEOLUS_GAIN * spots_NHW + 1
    density_NCHW = torch.lerp(
        _density(x_NCHW), around_NCHW * clear_NHW[:, None], pale_NHW[:, None]
    ).mul_(gain_NHW[:, None])
    y_NCHW = density_NCHW.neg_().exp_().mul_(WHITE).sub_(1).clamp_(min=0)
    return torch.where(chosen_NHW[:, None], y_NCHW, x_NCHW)


def _density(x: Tensor) -> Tensor:
    return torch.log1p(x).neg_().add_(math.log(WHITE))


def _draws_of(ids_NHW: Tensor, noise_NK: Tensor) -> Tensor:
    """Return four bytes for each pixel, the same ones all over a nucleus, as an int32."""
    words_NK = noise_NK.contiguous().view(torch.int32)
    of_NK = (ids_NHW & (_NUCLEI - 1)).flatten(1).long()
    return words_NK.gather(1, of_NK).view(ids_NHW.shape)


def _part(words: Tensor, byte: int) -> Tensor:
    """Return one of four bytes as a number from 0 to below 1."""
    return ((words >> 8 * byte) & 255).float().div_(256)


def _nucleoli_wanted(words: Tensor) -> Tensor:
    """Return 0..MOST_NUCLEOLI, from the highest bits of the last byte."""
    return (_part(words, 3) * (MOST_NUCLEOLI + 1)).long()


def _lower_bits(words: Tensor) -> Tensor:
    """Return a number from 0 to below 1 that does not depend on how many nucleoli are wanted."""
    return (_part(words, 3) * (MOST_NUCLEOLI + 1)).frac_()


def _between(limits: tuple[float, float], share: Tensor) -> Tensor:
    return share * (limits[1] - limits[0]) + limits[0]


def _depth(ids_NHW: Tensor, reach_px: int) -> Tensor:
    """Return the distance of each pixel's middle to the nucleus' outline, 0 outside.

    Erosions by a cross and a square in turn, which are nearly round together, are counted and
    the counts smoothed. Distances above ``reach_px`` are not told apart. The crop's edge is no
    outline, the border to unknown pixels is.
    """
    inside_NHW = ids_NHW > 0
    depth_NHW = inside_NHW.float()
    left_NHW = inside_NHW.clone()
    for axis in (1, 2):
        _meet(left_NHW, _ahead(ids_NHW, axis) == _behind(ids_NHW, axis), axis)
    # From here on pixels of two nuclei are no longer neighbours.
    for step in range(reach_px + 1):
        depth_NHW += left_NHW
        before_NHW = left_NHW.clone()
        for axis in (1, 2):
            seen_NHW = before_NHW if step % 2 else left_NHW.clone()
            _erode(left_NHW, seen_NHW, axis)
    for axis in (1, 2):
        _soften(depth_NHW, axis)
    return depth_NHW.sub_(0.5).clamp_(min=0)


def _ahead(x_NHW: Tensor, axis: int) -> Tensor:
    return x_NHW.narrow(axis, 1, x_NHW.shape[axis] - 1)


def _behind(x_NHW: Tensor, axis: int) -> Tensor:
    return x_NHW.narrow(axis, 0, x_NHW.shape[axis] - 1)


def _meet(left_NHW: Tensor, same: Tensor, axis: int) -> None:
    """Take away, in place, both of two neighbours that are not the same."""
    _ahead(left_NHW, axis).logical_and_(same)
    _behind(left_NHW, axis).logical_and_(same)


def _erode(left_NHW: Tensor, seen_NHW: Tensor, axis: int) -> None:
    """Take away, in place, what has a neighbour along an axis that is not in ``seen``."""
    _ahead(left_NHW, axis).logical_and_(_behind(seen_NHW, axis))
    _behind(left_NHW, axis).logical_and_(_ahead(seen_NHW, axis))


def _soften(x_NHW: Tensor, axis: int) -> None:
    """Average in place with both neighbours, one quarter each; at the crop's edge with itself."""
    step = (_ahead(x_NHW, axis) - _behind(x_NHW, axis)).div_(4)
    _behind(x_NHW, axis).add_(step)
    _ahead(x_NHW, axis).sub_(step)


def _density_around(x_NCHW: Tensor, ids_NHW: Tensor, cell_px: int) -> tuple[Tensor, Tensor]:
    """Return the optical density of the mean colour near that is no nucleus, (N, 3, H, W).

    Pixels beside a nucleus are half of it and do not count, nor do unknown ones. Also says
    for each crop whether there is such a pixel, (N,) bool.
    """
    free_NHW = ids_NHW == 0
    seen_NHW = free_NHW.clone()
    for axis in (1, 2):
        _erode(free_NHW, seen_NHW, axis)
    planes_N4HW = torch.cat([x_NCHW * free_NHW[:, None], free_NHW[:, None].float()], 1)
    sums_N4hw = functional.avg_pool2d(
        planes_N4HW, cell_px, ceil_mode=True, divisor_override=cell_px**2
    )
    whole_N411 = sums_N4hw.mean((2, 3), keepdim=True)
    whole_N411 = whole_N411 / whole_N411[:, 3:].clamp(min=1e-6)
    for _ in range(2):  # two boxes of 5 make nearly a Gaussian of 2 cells
        sums_N4hw = functional.avg_pool2d(sums_N4hw, 5, 1, 2)
    sums_N4hw = sums_N4hw + FAR_WEIGHT * whole_N411
    colour_N3hw = sums_N4hw[:, :3] / sums_N4hw[:, 3:].clamp(min=1e-6)
    density_NCHW = functional.interpolate(
        _density(colour_N3hw), scale_factor=cell_px, mode="bilinear", align_corners=False
    )
    height, width = ids_NHW.shape[1:]
    return density_NCHW[..., :height, :width], whole_N411[:, 3, 0, 0] > 0.5


def _texture(noise_NK: Tensor, size: tuple[int, ...], mpp: float) -> Tensor:
    """Return factors about 1 that vary slowly, (N, H, W)."""
    pitch_px = max(1, round(TEXTURE_UM / mpp))
    grains_Nhw = noise_NK.view(-1, *_GRAINS)
    for axis, length in enumerate(size, start=1):
        grains_Nhw = _repeated(grains_Nhw, axis, -(-length // pitch_px))
    grains_N1hw = (grains_Nhw[:, None].float() - 127.5).mul_(TEXTURE / 127.5).add_(1)
    wide_N1HW = functional.interpolate(
        grains_N1hw, scale_factor=pitch_px, mode="bilinear", align_corners=False
    )
    return wide_N1HW[:, 0, : size[0], : size[1]]


def _nucleoli(
    ids_NHW: Tensor, depth_NHW: Tensor, draws_NHW: Tensor, noise_NK: Tensor, mpp: float
) -> Tensor:
    """Return what share of a pixel belongs to a nucleolus, (N, H, W).

    Every square of a grid has a place for one. It holds where it lies deep in a nucleus, and
    there the nucleus' own draw says how many do.
    """
    count, height, width = ids_NHW.shape
    cell_px = max(3, round(NUCLEOLUS_CELL_UM / mpp))
    rows, columns = -(-height // cell_px), -(-width // cell_px)
    words_Nhw = noise_NK.contiguous().view(torch.int32).view(-1, *_PLACES)
    words_Nhw = _repeated(_repeated(words_Nhw, 1, rows), 2, columns)
    radius_Nhw = (_between(NUCLEOLUS_UM, _part(words_Nhw, 2)) / mpp).clamp_(max=cell_px / 2)
    x_Nhw, y_Nhw = (
        radius_Nhw - 0.5 + _part(words_Nhw, byte) * (cell_px - 2 * radius_Nhw) for byte in (0, 1)
    )
    first_row = torch.arange(rows, device=ids_NHW.device)[:, None] * cell_px
    first_column = torch.arange(columns, device=ids_NHW.device) * cell_px
    row_Nhw = (y_Nhw.round().long() + first_row).clamp_(max=height - 1)
    column_Nhw = (x_Nhw.round().long() + first_column).clamp_(max=width - 1)
    at_NK = (row_Nhw * width + column_Nhw).flatten(1)
    own_NK, depth_NK, draws_NK = (
        values.flatten(1).gather(1, at_NK) for values in (ids_NHW, depth_NHW, draws_NHW)
    )
    deep_NK = depth_NK >= NUCLEOLUS_DEPTH_UM / mpp
    order_NK = (words_Nhw >> 24).flatten(1) & 255
    rank_NK = _rank_in_group(torch.where(deep_NK, own_NK, 0), order_NK)
    kept_Nhw = (deep_NK & (rank_NK < _nucleoli_wanted(draws_NK))).view_as(radius_Nhw)
    edge_px = NUCLEOLUS_EDGE_UM / mpp
    reach_Nhw = torch.where(kept_Nhw, radius_Nhw + edge_px / 2, 0.0)
    steps = torch.arange(cell_px, device=ids_NHW.device)
    across = (steps - x_Nhw[..., None])[:, :, None]  # N, row, 1, column, pixel
    down = (steps - y_Nhw[..., None]).transpose(2, 3)[..., None]  # N, row, pixel, column, 1
    distance = torch.hypot(across, down)
    spots = (reach_Nhw[:, :, None, :, None] - distance).div_(edge_px).clamp_(0, 1)
    return spots.reshape(count, rows * cell_px, columns * cell_px)[:, :height, :width]


def _rank_in_group(group_NK: Tensor, order_NK: Tensor) -> Tensor:
    """Return how many of its group come before each, by ``order`` (0..255) and then place."""
    keys_NK, index_NK = ((group_NK.long() << 8) + order_NK).sort(dim=1, stable=True)
    place_NK = torch.arange(keys_NK.shape[1], device=keys_NK.device).expand_as(keys_NK)
    sorted_NK = keys_NK >> 8
    starts_NK = torch.zeros_like(place_NK)
    new_NK = sorted_NK[:, 1:] != sorted_NK[:, :-1]
    starts_NK[:, 1:] = torch.where(new_NK, place_NK[:, 1:], 0)
    rank_NK = place_NK - starts_NK.cummax(dim=1).values
    return torch.empty_like(rank_NK).scatter_(1, index_NK, rank_NK)


def _repeated(x: Tensor, axis: int, length: int) -> Tensor:
    """Make an axis as long as wanted, from its beginning again and again."""
    return x.index_select(axis, torch.arange(length, device=x.device) % x.shape[axis])
