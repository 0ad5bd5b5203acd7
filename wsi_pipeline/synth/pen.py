"""A mark with a felt pen along the edge of the tissue."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from wsi_pipeline.compiled import compiled
from wsi_pipeline.geometry import Box
from wsi_pipeline.synth.noise import noise, sample_texture, uniform

__all__ = ["Pen"]

_INKS = ((0.95, 0.55, 0.12), (0.85, 0.30, 0.62), (0.80, 0.78, 0.74))
"""Optical density of blue, green and black ink."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Pen:
    """One stroke down the left side of the slide, where the first piece of tissue begins."""

    seed: int
    """Of the world."""
    top_um: float
    """Where the stroke begins."""
    bottom_um: float
    """Where it ends."""
    width_um: float
    """Width of the stroke."""
    ink: tuple[float, float, float]
    """Optical density in red, green and blue."""

    @classmethod
    def make(cls, *, seed: int, extent_um: tuple[float, float]) -> Pen:
        """Place a stroke on a slide of this size, small enough to leave most of it clear."""
        width, height = round(extent_um[0]), round(extent_um[1])
        return cls(
            seed=seed,
            top_um=0.58 * height,
            bottom_um=0.88 * height,
            width_um=min(320.0, 0.035 * width + 10.0),
            ink=_INKS[int(uniform(seed, 51) * len(_INKS))],
        )

    def touches(self, box: Box, mpp: float) -> bool:
        """Tell whether a box of level-0 pixels may show ink."""
        reach = self.width_um
        return (
            box.x * mpp < 20.0 + 2.5 * reach
            and box.y1 * mpp > self.top_um - reach
            and box.y * mpp < self.bottom_um + reach
        )

    def covers(self, x_um: NDArray[np.float64], y_um: NDArray[np.float64]) -> NDArray[np.bool_]:
        """Tell for each point whether it lies under the ink."""
        found = np.zeros(len(x_um), np.bool_)
        _cover(self.seed, self.top_um, self.bottom_um, self.width_um, x_um, y_um, found)
        return found

    def draw(self, box: Box, mpp: float, texture: NDArray[np.float32]) -> NDArray[np.float32]:
        """Return the ink in a box ``(H, W)``, or an empty array where there is none."""
        if not self.touches(box, mpp):
            return np.empty((0, 0), np.float32)
        ink = np.zeros((box.height, box.width), np.float32)
        stroke = (self.top_um, self.bottom_um, self.width_um)
        _paint(self.seed, *stroke, texture, box.x, box.y, mpp, ink)
        return ink


@compiled
def _depth(seed: int, top: float, bottom: float, width: float, x: float, y: float) -> float:
    """Return how far a point lies inside the stroke; negative outside."""
    half = 0.5 * width
    middle = 20.0 + 1.1 * half + 0.35 * half * noise(seed + 51, y / (4.0 * width), 0.5)
    half *= 0.9 + 0.12 * noise(seed + 52, y / (0.5 * width), 3.5)
    along = max(max(top - y, y - bottom), 0.0)
    return half - math.hypot(x - middle, along)


@compiled
def _cover(
    seed: int,
    top: float,
    bottom: float,
    width: float,
    x: NDArray[np.float64],
    y: NDArray[np.float64],
    found: NDArray[np.bool_],
) -> None:
    for k in range(x.shape[0]):
        found[k] = _depth(seed, top, bottom, width, x[k], y[k]) > 0.0


@compiled
def _paint(
    seed: int,
    top: float,
    bottom: float,
    width: float,
    texture: NDArray[np.float32],
    x0: int,
    y0: int,
    mpp: float,
    ink: NDArray[np.float32],
) -> None:
    for r in range(ink.shape[0]):
        y = (y0 + r + 0.5) * mpp
        for c in range(ink.shape[1]):
            x = (x0 + c + 0.5) * mpp
            depth = _depth(seed, top, bottom, width, x, y)
            if depth <= -8.0:
                continue
            streak = sample_texture(texture, 0.5 * x, 0.03 * y)
            depth += 2.5 * streak
            if depth <= 0.0:
                continue
            # Ink dries darker at the rim of a stroke.
            rim = 0.35 * math.exp(-depth / 6.0)
            ink[r, c] = min(depth / 3.0, 1.0) * (0.72 + rim + 0.07 * streak)
