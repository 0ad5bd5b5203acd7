"""From dye amounts to the colours of a scanner: the law of Beer and Lambert."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from wsi_pipeline.compiled import compiled
from wsi_pipeline.synth.fields import EOSIN, HAEMATOXYLIN, HUE, field

__all__ = ["GRAIN_SIZE", "colour", "make_grain", "make_light"]

GRAIN_SIZE = 256
"""Period of the sensor noise: one tile, so that tiles of bare glass are all the same."""

_LIGHT = (245.0, 244.0, 246.0)
"""Grey levels of bare glass."""
_STEPS = 1024
"""Steps of the table of light per unit of optical density."""


def make_light() -> NDArray[np.float32]:
    """Tabulate the transmitted light ``(3, K)`` by channel and optical density 0-4."""
    density = np.arange(4 * _STEPS, dtype=np.float64) / _STEPS
    return (np.array(_LIGHT)[:, None] * 10.0**-density).astype(np.float32)


def make_grain(seed: int) -> NDArray[np.float32]:
    """Make the sensor noise ``(256, 256, 3)``, in grey levels."""
    random = np.random.default_rng(seed + 1)
    shared = random.standard_normal((GRAIN_SIZE, GRAIN_SIZE, 1))
    own = random.standard_normal((GRAIN_SIZE, GRAIN_SIZE, 3))
    return (1.1 * shared + 1.0 * own).astype(np.float32)


@compiled
def colour(
    dyes: NDArray[np.float32],
    nodes: NDArray[np.float32],
    node: tuple[int, int],
    pen: NDArray[np.float32],
    ink: NDArray[np.float32],
    grain: NDArray[np.float32],
    light: NDArray[np.float32],
    corner: tuple[int, int],
    mpp: float,
    image: NDArray[np.uint8],
) -> None:
    """Turn dye amounts into RGB.

    The dye vectors follow Ruifrok and Johnston (Anal Quant Cytol Histol 2001), eosin
    turned towards what slide scanners show; their hue and strength drift over the slide.

    Args:
        dyes: ``(2, H, W)`` amounts, optical density of a unit vector.
        nodes: Of the fields.
        node: Lattice index of the first of them.
        pen: ``(H, W)`` pen ink, or ``(0, 0)`` where there is none.
        ink: ``(3,)`` optical density of the pen.
        grain: Of :func:`make_grain`.
        light: Of :func:`make_light`.
        corner: Pixel position of the image on the slide.
        mpp: Micrometres per pixel.
        image: ``(H, W, 3)`` to fill.
    """
    last = light.shape[1] - 1
    for r in range(image.shape[0]):
        y = (corner[1] + r + 0.5) * mpp
        gr = (corner[1] + r) & (GRAIN_SIZE - 1)
        for c in range(image.shape[1]):
            gc = (corner[0] + c) & (GRAIN_SIZE - 1)
            h, e, hue = float(dyes[0, r, c]), float(dyes[1, r, c]), 0.0
            if h + e > 0.0:
                x = (corner[0] + c + 0.5) * mpp
                h *= field(nodes, node[0], node[1], x, y, HAEMATOXYLIN)
                e *= field(nodes, node[0], node[1], x, y, EOSIN)
                hue = field(nodes, node[0], node[1], x, y, HUE)
            mark = float(pen[r, c]) if pen.shape[0] > 0 else 0.0
            for k in range(3):
                if k == 0:
                    od = (0.640 + 0.03 * hue) * h + (0.13 + 0.03 * hue) * e
                elif k == 1:
                    od = 0.704 * h + 0.88 * e
                else:
                    od = (0.31 - 0.03 * hue) * h + (0.42 - 0.08 * hue) * e
                od += mark * ink[k]
                level = light[k, min(int(od * _STEPS + 0.5), last)] + grain[gr, gc, k]
                image[r, c, k] = int(min(max(level + 0.5, 0.0), 255.0))
