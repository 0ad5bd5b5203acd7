"""From tiles to maps: the store of a slide, filled block by block.

The network hands its blocks to a few writers and goes on; only when several blocks wait for
them does it wait, too.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Executor
from typing import Any, Protocol

from wsi_pipeline.committing import Writers
from wsi_pipeline.errors import Interrupted, StoreError
from wsi_pipeline.geometry import PixelGrid
from wsi_pipeline.job import SlideJob, versions
from wsi_pipeline.slide import Slide
from wsi_pipeline.spec import ModelSpec
from wsi_pipeline.store import PredictionBlock, PredictionStore, WrittenBlock
from wsi_pipeline.tiling import PANEL_PX, Tile, TileGrid, fit_step
from wsi_pipeline.tissue import TissueMask

__all__ = [
    "Feed",
    "Predictor",
    "fill_store",
    "lay_tiles",
    "open_store",
    "sealed_store",
    "writers_beside",
]

WRITERS = 4
"""Threads that compress and write blocks beside a network on another device."""


def writers_beside(device: str) -> int:
    """Return how many threads write blocks while the network runs on a device."""
    return 1 if device == "cpu" else WRITERS


class Feed(Protocol):
    """Windows of a slide that are read ahead of the network, by threads of their own."""

    @property
    def failed(self) -> bool:
        """Whether that has ended with an error, which is told to whoever asks for windows."""
        ...

    def close(self) -> None:
        """End the threads; may be called twice."""
        ...


class Predictor(Protocol):
    """Whatever turns the tiles of a slide into blocks of maps."""

    spec: ModelSpec
    device: str
    precision: str
    tile_px: int
    halo_px: int
    is_fitting: bool
    """Whether it takes windows of any size, one by one, rather than all of one size."""
    canvas_bytes: int
    extractors: int

    def begin(self, slide: Slide, tiles: TileGrid) -> Feed | None:
        """Begin to read the windows of tiles; None where that begins with :meth:`predict`."""
        ...

    def predict(
        self,
        slide: Slide,
        tiles: TileGrid,
        *,
        stop: Callable[[], bool],
        warn: Callable[[str, str], None],
        feed: Any,  # noqa: ANN401 - of its own kind
    ) -> Iterator[PredictionBlock]:
        """Yield one block a tile, in order; a block keeps its arrays. End when asked to stop.

        ``warn`` is told the code and the message of what the user should know; ``feed`` is what
        :meth:`begin` has returned for the same tiles, or None.
        """
        ...


def lay_tiles(slide: Slide, tissue: TissueMask, predictor: Predictor) -> TileGrid:
    """Lay a predictor's tiles over the tissue of a slide, fitted to it where they may be."""
    grid = slide.working_grid(predictor.spec.mpp)
    strides = [head.stride for head in predictor.spec.heads]
    return TileGrid.cover(
        grid,
        tile_px=predictor.tile_px,
        halo_px=predictor.halo_px,
        panel_px=_panel_px(slide, grid, predictor),
        wanted=lambda box: tissue.touches(grid, box),
        extent=(lambda box: tissue.extent(grid, box)) if predictor.is_fitting else None,
        step_px=math.lcm(fit_step(predictor.tile_px), *strides),
    )


def _panel_px(slide: Slide, grid: PixelGrid, predictor: Predictor) -> int:
    """Return the width of columns of tiles whose canvases fit into the predictor's bytes."""
    margin, panel = 2 * predictor.halo_px, PANEL_PX
    side = predictor.tile_px + margin
    while panel > predictor.tile_px:
        if slide.band_bytes(grid, (panel + margin, side)) <= predictor.canvas_bytes:
            break
        panel -= predictor.tile_px
    return panel


def open_store(
    job: SlideJob, slide: Slide, tissue: TissueMask, tiles: TileGrid, predictor: Predictor
) -> PredictionStore:
    """Return the store of a job: the sealed one, the unfinished one, or a new one."""
    made = _made(job, tissue, predictor)
    try:
        store = PredictionStore.open(job.maps_path)
        if store.meta["made"] == made:
            return store
    except (StoreError, KeyError):  # none, or of an earlier version of this package
        pass
    return PredictionStore.create(
        job.maps_path,
        spec=predictor.spec,
        tiles=tiles,
        pixel_size=(slide.pixel_size.x, slide.pixel_size.y),
        made=made,
    )


def sealed_store(job: SlideJob, tissue: TissueMask) -> PredictionStore:
    """Return the complete maps of a job, whatever device, precision and tiles they were made with.

    Raises:
        StoreError: there are none.
    """
    try:
        store = PredictionStore.open(job.maps_path)
    except StoreError as error:
        msg = f"{error} Make it with --only maps, or run without --only."
        raise StoreError(msg) from error
    wanted = {"job": job.job_id, "tissue": tissue.digest}
    found = {name: store.meta.get("made", {}).get(name) for name in wanted}
    if found != wanted:
        msg = (
            f"{job.maps_path} holds maps of another slide, pixel size, mask or model than asked "
            "for now; make them again with --only maps, or run without --only"
        )
        raise StoreError(msg)
    return store


def fill_store(
    store: PredictionStore,
    missing: TileGrid,
    *,
    slide: Slide,
    tissue: TissueMask,
    predictor: Predictor,
    stop: Callable[[], bool],
    wrote: Callable[[Tile], None],
    feed: Feed | None = None,
    allowed: Callable[[], None] = lambda: None,
    warn: Callable[[str, str], None],
) -> Generator[Tile, None, None]:
    """Predict the missing tiles and write their blocks.

    Args:
        store: unfinished.
        missing: tiles whose blocks are not written.
        slide: where the pixels come from.
        tissue: beyond it, maps are blank.
        predictor: the network.
        stop: asked by the predictor before each batch.
        allowed: called before a block is written and before blocks are marked; raises if this
            process must not write any more.
        wrote: told of every block that can be read, from the thread that wrote it. The block
            may not be on the disk yet: who reads it has nothing to show before all are.
        feed: what the predictor has begun to read of these tiles.
        warn: told by the predictor what the user should know.

    Yields:
        Each tile that is predicted; its block may still be on its way to the disk. When the
        iteration ends, well or not, each block is committed, or the error is raised.

    Raises:
        Interrupted: ``stop`` said so.
        WsiPipelineError: the slide or the disk is not usable.
    """

    def write(block: PredictionBlock) -> WrittenBlock:
        allowed()
        tile = block.tile
        lost_px = slide.unreadable_share(store.grid, tile.predicted) * tile.predicted.area
        clipped = _clip(block, store.grid, tissue, predictor.spec)
        written = store.put(clipped, readable=1 - lost_px / tile.write.area)
        wrote(tile)
        return written

    def commit(written: list[WrittenBlock], threads: Executor) -> None:
        allowed()
        store.commit(written, threads)

    predicted, total = 0, len(missing.tiles)
    with Writers(write, commit, threads=writers_beside(predictor.device)) as writers:
        for block in predictor.predict(slide, missing, stop=stop, warn=warn, feed=feed):
            writers.hand(block)
            predicted += 1
            yield block.tile
    if stop():
        raise Interrupted(f"stopped after {predicted} of {total} blocks")
    if predicted < total:
        raise RuntimeError(f"the predictor ended after {predicted} of {total} blocks")


def _made(job: SlideJob, tissue: TissueMask, predictor: Predictor) -> dict[str, Any]:
    """Name everything that decides the bytes of the maps."""
    known = versions()
    return {
        "job": job.job_id,
        "device": predictor.device.partition(":")[0],
        "precision": predictor.precision,
        "tile_px": predictor.tile_px,
        "fitted": predictor.is_fitting,
        "tissue": tissue.digest,
        "versions": {name: known[name] for name in ("wsi-pipeline", "torch") if name in known},
    }


def _clip(
    block: PredictionBlock, grid: PixelGrid, tissue: TissueMask, spec: ModelSpec
) -> PredictionBlock:
    """Blank what lies beyond the tissue, so that results do not depend on the tile size."""
    keep = {
        head.stride: tissue.window(grid.coarsen(head.stride), block.tile.write.coarsen(head.stride))
        for head in spec.heads
    }
    maps = spec.maps
    arrays = {key: pixels * keep[maps[key].stride] for key, pixels in block.arrays.items()}
    return PredictionBlock(tile=block.tile, arrays=arrays)
