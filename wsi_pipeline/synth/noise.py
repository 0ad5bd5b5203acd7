"""Randomness that depends on place alone: hashes, smooth noise, a tileable texture.

Everything in the synthetic world is a pure function of (seed, place), so that any part
of a slide can be drawn on its own, in any order, by any thread.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from wsi_pipeline.compiled import compiled

__all__ = ["TEXTURE_SIZE", "make_texture", "mix", "noise", "sample_texture", "uniform"]

TEXTURE_SIZE = 512
"""Side of the square texture, a power of two so that wrapping is a mask."""

_SCALE = 2.0**-53


@compiled
def mix(a: int, b: int, c: int) -> int:
    """Hash three integers to 64 well-mixed bits (the finaliser of SplitMix64, Steele 2014)."""
    h = a * 0x27D4EB2F165667C5 + b * 0x165667B19E3779F9 + c * 0x2545F4914F6CDD1D
    h ^= (h >> 30) & 0x3FFFFFFFF
    h *= 0x3F58476D1CE4E5B9
    h ^= (h >> 27) & 0x1FFFFFFFFF
    h *= 0x14D049BB133111EB
    return h ^ ((h >> 31) & 0x1FFFFFFFF)


@compiled
def uniform(h: int, k: int) -> float:
    """Return the k-th number in [0, 1) of the stream that belongs to a hash."""
    return ((mix(h, k, 77) >> 11) & 0x1FFFFFFFFFFFFF) * _SCALE


@compiled
def noise(seed: int, x: float, y: float) -> float:
    """Return smooth value noise in [-1, 1] with a feature size of one unit."""
    i = math.floor(x)
    j = math.floor(y)
    u = x - i
    v = y - j
    u = u * u * u * (u * (u * 6.0 - 15.0) + 10.0)
    v = v * v * v * (v * (v * 6.0 - 15.0) + 10.0)
    top = uniform(mix(seed, i, j), 0) * (1.0 - u) + uniform(mix(seed, i + 1, j), 0) * u
    low = uniform(mix(seed, i, j + 1), 0) * (1.0 - u) + uniform(mix(seed, i + 1, j + 1), 0) * u
    return 2.0 * (top * (1.0 - v) + low * v) - 1.0


@compiled
def sample_texture(texture: NDArray[np.float32], x: float, y: float) -> float:
    """Read the texture at a point in texels, linearly between texels, wrapped around."""
    i = math.floor(x)
    j = math.floor(y)
    u = x - i
    v = y - j
    i0 = i & (TEXTURE_SIZE - 1)
    j0 = j & (TEXTURE_SIZE - 1)
    i1 = (i + 1) & (TEXTURE_SIZE - 1)
    j1 = (j + 1) & (TEXTURE_SIZE - 1)
    top = texture[j0, i0] * (1.0 - u) + texture[j0, i1] * u
    low = texture[j1, i0] * (1.0 - u) + texture[j1, i1] * u
    return float(top * (1.0 - v) + low * v)


def make_texture(seed: int) -> NDArray[np.float32]:
    """Make tileable cloudy noise with features of 3 to 30 texels, mean 0 and deviation 1."""
    white = np.random.default_rng(seed).standard_normal((TEXTURE_SIZE, TEXTURE_SIZE))
    fy = np.fft.fftfreq(TEXTURE_SIZE)[:, None]
    fx = np.fft.rfftfreq(TEXTURE_SIZE)[None, :]
    f = np.hypot(fx, fy)
    gain = 1.0 / (f + 1.0 / 30.0) * np.exp(-((f * 3.0) ** 2))
    gain[0, 0] = 0.0
    cloud = np.fft.irfft2(np.fft.rfft2(white) * gain, s=white.shape)
    return np.ascontiguousarray(cloud / cloud.std(), np.float32)
