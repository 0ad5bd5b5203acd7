"""How a slide is stained: its glass, its dyes, and how much haematoxylin a nucleus has.

Fitted to a whole slide, not to a window: one without nuclei would call its fibres nuclei.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage
from skimage.filters import threshold_otsu

__all__ = ["Stain", "fit_stain"]

STAINS = ((0.65, 0.70, 0.29), (0.07, 0.99, 0.11))
"""Optical densities of haematoxylin and eosin in red, green and blue.

Ruifrok & Johnston, Analytical and Quantitative Cytology and Histology 23 (2001)."""
MIN_OD = 0.15
"""Of a stained pixel, in every channel (natural logarithm): Macenko et al., ISBI (2009)."""
TISSUE_OD = 0.3
"""Of tissue, over all channels; glass has less."""

Image = NDArray[np.float32]


@dataclass(frozen=True, kw_only=True, slots=True)
class Stain:
    """How a slide is stained."""

    white: NDArray[np.float32]
    """(3,) intensity of glass."""
    unmix: NDArray[np.float32]
    """(3,): optical density of a pixel times this is its haematoxylin, 1 at the threshold."""

    def density(self, rgb: NDArray[np.uint8]) -> Image:
        """Return optical densities (natural logarithm), 0 and up, of ``(H, W, 3)`` pixels."""
        light = np.log((self.white + 1) / (rgb.astype(np.float32) + 1))
        density: Image = np.maximum(light, 0).astype(np.float32)
        return density

    def nuclear(self, rgb: NDArray[np.uint8]) -> Image:
        """Return the haematoxylin of pixels, smoothed; 0 on blood and on green or blue ink.

        Red cells absorb blue and green, but hardly red light, ink just that; the bounds lie
        beyond the 5th and 95th percentiles of nuclei on five slides of different laboratories.
        """
        density = self.density(rgb)
        stain = ndimage.gaussian_filter(np.maximum(density @ self.unmix, 0), 1)
        red, green, blue = np.moveaxis(ndimage.gaussian_filter(density, (1, 1, 0)), -1, 0)
        blood = ((blue > 0.62 * green) & (red < 0.56 * green)) | (red < 0.46 * green)
        return np.where(blood | (red > 1.15 * green), 0, stain).astype(np.float32)


def fit_stain(tiles: Sequence[NDArray[np.uint8]]) -> Stain:
    """Fit the stain of a slide.

    The vectors are the mean of Macenko's, from the pixels, and Ruifrok's, which are the same
    for all: the former alone go astray on slides with much blood or pigment.

    Args:
        tiles: ``(H, W, 3)`` RGB of places all over the tissue, at 0.5 micrometres a pixel.

    Raises:
        ValueError: there is too little stained tissue to fit anything.
    """
    pixels = np.concatenate([tile[::2, ::2].reshape(-1, 3) for tile in tiles])
    white = np.percentile(pixels, 99.5, axis=0).astype(np.float32)
    plain = Stain(white=white, unmix=np.zeros(3, np.float32))
    density = plain.density(pixels)
    stained = density[(density > MIN_OD).all(axis=1)]
    if len(stained) < 1000:
        msg = f"{len(stained)} of {len(pixels)} pixels are stained: give tiles with more tissue"
        raise ValueError(msg)
    vectors = _unit((_unit(np.array(STAINS)) + _macenko(stained)) / 2)
    residual = _unit(np.cross(vectors[0], vectors[1]))
    unmix = np.linalg.inv(np.stack([*vectors, residual]))[:, 0]
    found = [
        ndimage.gaussian_filter(np.maximum(part @ unmix, 0), 1)[part.sum(axis=-1) > TISSUE_OD]
        for part in map(plain.density, tiles)
    ]
    values = np.concatenate(found)
    top = np.percentile(values, 99)
    threshold = float(threshold_otsu(np.clip(values / top, 0, 1.2))) * top
    return Stain(white=white, unmix=(unmix / threshold).astype(np.float32))


def _unit(vectors: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.asarray(vectors / np.linalg.norm(vectors, axis=-1, keepdims=True), np.float64)


def _macenko(density: Image) -> NDArray[np.float64]:
    """Return the ``(2, 3)`` unit vectors of haematoxylin and eosin that span the pixels."""
    plane = np.linalg.eigh(np.cov(density.T))[1][:, 1:]
    plane = plane * np.sign(plane.sum(axis=0))
    angle = np.arctan2(density @ plane[:, 0], density @ plane[:, 1])
    ends = np.percentile(angle, [1, 99])
    pair = _unit(np.abs(np.stack([np.sin(ends), np.cos(ends)], axis=1) @ plane.T))
    redder = pair[:, 0] / pair.sum(axis=1)
    return pair[np.argsort(-redder)]  # haematoxylin absorbs more of the red
