"""Crops as another laboratory and another scanner would show them.

::

    log intensity --stain matrix--> intensity --light matrix--> sharper or softer --> + noise

Haematoxylin, eosin and what is left of the colour are told apart in optical density, where
stains add up (Beer-Lambert), scaled, and put together again with slightly other colours. All
of that is one affine map of the logarithms, and all that happens to light is one affine map
of the intensities. Suffixes name the axes: ``x_BCHW``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from wsi_pipeline.stain import STAINS

__all__ = ["Look", "light_map", "recolour", "stain_map"]

WHITE = 256.0
"""Intensity + 1 of what no stain dims: optical density is 0 there and finite at black."""
LUMA = (0.299, 0.587, 0.114)
"""Shares of red, green and blue in a grey of the same brightness (ITU-R BT.601)."""
MID_GREY = 127.5
"""The intensity that contrast leaves as it is."""
SHARPEN_PX = 1.0
"""Standard deviation of the blur whose difference to the image sharpening adds."""
BYTES_SD = math.sqrt(4 * (256**2 - 1) / 12)
"""Standard deviation of the sum of four random bytes."""

Affine = tuple[NDArray[np.float64], NDArray[np.float64]]
"""Colour maps: (B, 3, 3) and (B, 3)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Look:
    """What happens to each crop of a batch."""

    stain: Affine | None
    """Of log(1 + intensity); see :func:`stain_map`. None: left alone."""
    light: Affine | None
    """Of intensities 0..255; see :func:`light_map`. None: left alone."""
    focus_px: NDArray[np.float64]
    """(B,) standard deviation of the blur that takes detail away."""
    detail: NDArray[np.float64]
    """(B,) share of that detail that is kept: 0 blurs, 1 leaves alone, more sharpens."""
    max_focus_px: float
    """The largest ``focus_px`` that any batch can have: fixes the width of the kernel."""
    noise: NDArray[np.float64]
    """(B,) standard deviation of the noise, in intensities."""
    noise_key: NDArray[np.int64]
    """(B,) below 2^32: decides a crop's noise."""


def recolour(x_BCHW: Tensor, look: Look) -> Tensor:
    """Give every crop its look.

    Args:
        x_BCHW: (B, 3, H, W) float32, RGB, 0..255.
        look: one entry a crop.

    Returns:
        The same shape, 0..255, not rounded. Each crop depends on its own entry alone.
    """
    if look.stain is not None:
        x_BCHW = _mixed(torch.log1p(x_BCHW), look.stain).expm1_()
    if look.light is not None:
        x_BCHW = _mixed(x_BCHW, look.light)
    for chosen, step in ((look.detail != 1, _refocused), (look.noise > 0, _noisy)):
        which = np.flatnonzero(chosen)
        if which.size:
            rows_N = torch.from_numpy(which).to(x_BCHW.device, non_blocking=True)
            x_BCHW = x_BCHW.index_copy(0, rows_N, step(x_BCHW[rows_N], look, which))
    return x_BCHW.clamp(0, 255)


def stain_map(
    gain: NDArray[np.float64], offset: NDArray[np.float64], jitter: NDArray[np.float64]
) -> Affine:
    """Return the map of log(1 + intensity) that changes stains.

    With V the colours of haematoxylin, eosin and their cross product as rows (Ruifrok &
    Johnston 2001) and V' the same with other colours, optical densities o = c V become
    (gain c + offset) V'.

    Args:
        gain: (B, 3) factors of haematoxylin, eosin and the rest.
        offset: (B, 3) amounts of each added everywhere, in optical density.
        jitter: (B, 2, 3) added to the unit colours of haematoxylin and eosin.
    """
    colours = np.array(STAINS) / np.linalg.norm(STAINS, axis=1, keepdims=True)
    unmix = np.linalg.inv(_basis(colours))
    mix = _basis(colours + jitter)
    matrix = unmix @ (gain[:, :, None] * mix)
    added = (offset[:, None, :] @ mix)[:, 0]
    # log(1 + intensity) = log(WHITE) - density turns one affine map into another.
    white = math.log(WHITE)
    return np.swapaxes(matrix, 1, 2), white - white * matrix.sum(axis=1) - added


def light_map(
    contrast: NDArray[np.float64], brightness: NDArray[np.float64], grey: NDArray[np.float64]
) -> Affine:
    """Return the map of intensities for contrast, brightness and loss of colour.

    Args:
        contrast: (B,) factor of the distance to mid grey.
        brightness: (B,) added, as a share of 255.
        grey: (B,) share of the colour that is lost, 0..1.
    """
    share = grey[:, None, None]
    colour = (1 - share) * np.eye(3) + share * np.array(LUMA)
    constant = MID_GREY * (1 - contrast) + 255 * brightness
    return contrast[:, None, None] * colour, np.repeat(constant[:, None], 3, axis=1)


def _basis(colours: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return unit rows (..., 3, 3): two colours and what is at right angles to both."""
    rest = np.cross(colours[..., 0, :], colours[..., 1, :])
    rows = np.concatenate([colours, rest[..., None, :]], axis=-2)
    return np.asarray(rows / np.linalg.norm(rows, axis=-1, keepdims=True))


def _mixed(x_BCHW: Tensor, affine: Affine) -> Tensor:
    """Apply a colour map.

    Plane by plane: what a matrix product does may depend on the size of the batch.
    """
    matrix, constant = (
        torch.from_numpy(part.astype(np.float32)).to(x_BCHW.device, non_blocking=True)
        for part in affine
    )
    y_BCHW = torch.empty_like(x_BCHW)
    for out in range(3):
        plane = torch.mul(x_BCHW[:, 0], matrix[:, out, 0, None, None], out=y_BCHW[:, out])
        for source in (1, 2):
            plane.addcmul_(x_BCHW[:, source], matrix[:, out, source, None, None])
        plane.add_(constant[:, out, None, None])
    return y_BCHW


def _refocused(x_NCHW: Tensor, look: Look, which: NDArray[np.intp]) -> Tensor:
    """Blur, and give back a share of what the blur took away; 1 and more sharpens."""
    reach = math.ceil(3 * look.max_focus_px)
    steps = np.arange(-reach, reach + 1) / np.maximum(look.focus_px[which], 1e-3)[:, None]
    taps = np.exp(-(steps**2) / 2)
    taps /= taps.sum(axis=1, keepdims=True)
    detail = look.detail[which].astype(np.float32)[:, None, None, None]
    taps_NT, detail_N111 = (
        torch.from_numpy(part.astype(np.float32)).to(x_NCHW.device, non_blocking=True)
        for part in (taps, detail)
    )
    soft_NCHW = x_NCHW
    for axis, margin in ((3, (reach, reach, 0, 0)), (2, (0, 0, reach, reach))):
        wide_NCHW = functional.pad(soft_NCHW, margin, mode="replicate")
        size = x_NCHW.shape[axis]
        soft_NCHW = torch.zeros_like(x_NCHW)
        for tap in range(2 * reach + 1):
            soft_NCHW.addcmul_(wide_NCHW.narrow(axis, tap, size), taps_NT[:, tap, None, None, None])
    return torch.lerp(soft_NCHW, x_NCHW, detail_N111)


def _noisy(x_NCHW: Tensor, look: Look, which: NDArray[np.intp]) -> Tensor:
    """Add noise that is nearly normal, drawn on the device from the crops' keys.

    Each value is the sum of the four bytes of a hash of its place: no generator to seed for
    every crop, and the same numbers everywhere.
    """
    keys_N1, sd_N1 = (
        torch.from_numpy(part[which, None]).to(x_NCHW.device, non_blocking=True)
        for part in (look.noise_key, look.noise.astype(np.float32))
    )
    places = torch.arange(x_NCHW[0].numel(), device=x_NCHW.device) * 0x1E3779B1
    bits_NK = _hashed((places + keys_N1) & 0xFFFFFFFF)
    pairs_NK = (bits_NK & 0x00FF00FF) + ((bits_NK >> 8) & 0x00FF00FF)
    sum_NK = (pairs_NK & 0xFFFF) + (pairs_NK >> 16)
    noise_NK = (sum_NK - 510).float() * (sd_N1 / BYTES_SD)
    return x_NCHW + noise_NK.view_as(x_NCHW)


def _hashed(x: Tensor) -> Tensor:
    """Scatter integers below 2^32; both factors are below 2^31, so int64 holds the products.

    Shifts and factors: Wellons, "Hash function prospector" (public domain).
    """
    x = ((x ^ (x >> 16)) * 0x21F0AAAD) & 0xFFFFFFFF
    x = ((x ^ (x >> 15)) * 0x735A2D97) & 0xFFFFFFFF
    return x ^ (x >> 15)
