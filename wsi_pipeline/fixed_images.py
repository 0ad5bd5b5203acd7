"""Two images that are the same everywhere, at any pixel size: crypts, and glass with pen marks.

Golden tiles are of them, and 8-bit networks take the ranges of their maps from them.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache

import numpy as np
from numpy.typing import NDArray

from wsi_pipeline.geometry import Box
from wsi_pipeline.synth.world import World

__all__ = ["golden_tiles"]

_SEED = 1
_WORLD_UM = 2048.0
_TILES = {"tissue": ((720.0, 500.0), 384), "blank": ((-16.0, 1110.0), 192)}
"""Upper left corner in micrometres, side in pixels: crypts in lamina propria; glass and pen."""


@cache
def golden_tiles(mpp: float) -> Mapping[str, NDArray[np.uint8]]:
    """Draw the tiles at a pixel size: ``tissue`` (crypts) and ``blank`` (glass and pen).

    Args:
        mpp: micrometres a pixel; another one shows another part of the same world.

    Returns:
        (S, S, 3) RGB by name; not to be written to.
    """
    side_px = round(_WORLD_UM / mpp)
    world = World.make(seed=_SEED, mpp=mpp, size=(side_px, side_px))
    tiles = {}
    for name, ((x_um, y_um), side) in _TILES.items():
        box = Box(x=round(x_um / mpp), y=round(y_um / mpp), width=side, height=side)
        tiles[name] = world.draw(box, world.scene(box))
    return tiles
