"""The whole job on a hostile slide, with a stand-in for the network."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from benchmarks.fuzz.models import HEADS
from wsi_pipeline.engines import Silent, run_slides
from wsi_pipeline.job import SlideJob
from wsi_pipeline.slide import Slide
from wsi_pipeline.spec import ModelSpec
from wsi_pipeline.store import PredictionBlock
from wsi_pipeline.tiling import TileGrid

__all__ = ["use_job"]


class _Dark:
    """Calls dark pixels objects of every kind."""

    spec = ModelSpec(name="dark", architecture="none", mpp=0.5, halo_px=16, heads=HEADS, options={})
    name = "dark"
    digest = "0" * 64
    device = "cpu"
    precision = "fp32"
    tile_px = 64
    halo_px = 16
    is_fitting = False
    canvas_bytes = 1 << 26
    extractors = 1

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
        boxes = [tile.read for tile in tiles.tiles]
        windows = slide.read_windows(tiles.grid, boxes, threads=1)
        for tile, window in zip(tiles.tiles, windows, strict=True):
            grey = window[16:, 16:].mean(axis=2)[: tile.write.height, : tile.write.width]
            arrays = {}
            for key, head in self.spec.maps.items():
                seen = np.where(grey[:: head.stride, :: head.stride] < 110, 255, 0).astype(np.uint8)
                count = len(head.prob_channels)
                arrays[key] = np.stack([seen] * count) if key.endswith("/prob") else seen // 255
            for head in self.spec.instance_heads:
                arrays[f"{head.name}/prob"][1] = 0  # no contour
            yield PredictionBlock(tile=tile, arrays=arrays)


def use_job(folder: Path) -> None:
    """Run the slide in a folder; its report must be done, or say why not with a code."""
    path = next(folder.glob("a.*"))
    job = SlideJob(path=str(path), slide_id="a", out=folder / "out", model_name="dark",
                   model_digest=_Dark.digest, mpp=0.5)  # fmt: skip
    (report,) = run_slides([job], _Dark(), watcher=Silent(), stop=lambda: False)
    code = (report.error or {}).get("code")
    if report.status not in ("done", "failed") or code in ("internal", "out_of_memory"):
        raise AssertionError(f"{report.status}, {report.reason}")
    if not job.report_path.is_file() or (report.done and not job.objects_path.is_file()):
        raise AssertionError("a result is missing")
