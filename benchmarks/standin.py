"""Stand-ins for the network and for who watches, for what is about everything around them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from wsi_pipeline.slide import Slide
from wsi_pipeline.spec import AnchorRules, HeadSpec, ModelSpec, RunRules
from wsi_pipeline.store import PredictionBlock
from wsi_pipeline.tiling import Tile, TileGrid

SPEC = ModelSpec(
    name="stand-in",
    architecture="none",
    mpp=0.5,
    halo_px=32,
    options={},
    heads=(
        HeadSpec(
            name="cells", kind="instance", object_kind="cell", rules=AnchorRules(), parent="dark"
        ),
        HeadSpec(name="dark", kind="instance", object_kind="dark", rules=RunRules(), stride=2),
        HeadSpec(name="area", kind="patch", classes=("pale", "deep"), stride=16),
    ),
)


class StandIn:
    """Calls dark pixels cells, dark neighbourhoods areas, and the two classes by turns."""

    spec = SPEC
    precision = "fp32"
    halo_px = 32
    is_fitting = False
    canvas_bytes = 1 << 28
    extractors = 2

    def __init__(self, *, tile_px: int = 256, device: str = "cpu") -> None:
        self.tile_px = tile_px
        self.device = device

    def begin(self, slide: Slide, tiles: TileGrid) -> None:
        """Read nothing ahead."""

    def predict(
        self,
        slide: Slide,
        tiles: TileGrid,
        *,
        stop: Callable[[], bool],
        warn: Callable[[str, str], None],
        feed: None,
    ) -> Iterator[PredictionBlock]:
        """Yield the blocks; see :class:`wsi_pipeline.filling.Predictor`."""
        for tile in tiles.tiles:
            if stop():
                return
            dark = 255 - slide.read(tiles.grid, tile.write).mean(axis=2)
            yield PredictionBlock(tile=tile, arrays=_arrays(tile, dark))


def _arrays(tile: Tile, dark: NDArray[Any]) -> dict[str, NDArray[np.uint8]]:
    inner = np.where(dark > 130, 255, 0).astype(np.uint8)
    coarse, patch = tile.write.coarsen(2), tile.write.coarsen(16)
    padded = np.pad(dark, ((0, dark.shape[0] % 2), (0, dark.shape[1] % 2)), mode="edge")
    half = padded.reshape(coarse.height, 2, coarse.width, 2).mean((1, 3))
    wide = np.where(half > 75, 255, 0).astype(np.uint8)
    stripes = (np.arange(patch.x, patch.x1) // 8 % 2).astype(np.uint8)
    deep = np.tile(stripes, (patch.height, 1))
    return {
        "cells/prob": np.stack([inner, np.zeros_like(inner)]),
        "dark/prob": np.stack([wide, np.zeros_like(wide)]),
        "area/prob": np.stack([255 * (1 - deep), 255 * deep]),
        "area/class": deep,
    }
