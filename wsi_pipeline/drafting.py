"""Objects beside the network: maps are read as they arrive.

::

    network  -> writer  -> store
                             |  read: waits until the blocks under a box are written
                             v
                      first walk of the extraction, in the order in which blocks arrive

The first walk (:meth:`wsi_pipeline.instances.Extraction.begin`) is most of the work. When the last
block is written, only its windows are left, and what needs the whole slide.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager

import numpy as np
from numpy.typing import NDArray

from wsi_pipeline.errors import Interrupted
from wsi_pipeline.geometry import Box, PixelGrid
from wsi_pipeline.instances import Extraction
from wsi_pipeline.spec import ModelSpec
from wsi_pipeline.store import PredictionStore
from wsi_pipeline.tiling import Tile, TileGrid

__all__ = ["ArrivingMaps", "Draft"]


class ArrivingMaps:
    """The maps of a store that is being filled: reading waits for what is not there yet."""

    def __init__(self, store: PredictionStore, missing: TileGrid) -> None:
        """Watch a store.

        Args:
            store: where the blocks are written.
            missing: tiles whose blocks will come, in this order.
        """
        self._store = store
        self._tile_px = missing.tile_px
        columns, rows = missing.shape
        # When each block comes: its number, or -1 for those that are there or never wanted.
        self._turn = np.full((rows, columns), -1, np.int64)
        for number, tile in enumerate(missing.tiles):
            self._turn[tile.row, tile.column] = number
        self._pending = self._turn >= 0
        self._changed = threading.Condition()
        self.given_up = False
        """Whether nobody is to wait, or to work, for these maps any more."""
        self.waited_s = 0.0
        """Seconds for which readers have waited, all of them together."""

    @property
    def spec(self) -> ModelSpec:
        """The model that makes the maps."""
        return self._store.spec

    @property
    def grid(self) -> PixelGrid:
        """The working grid."""
        return self._store.grid

    @property
    def pixel_size(self) -> tuple[float, float]:
        """Micrometres per level-0 pixel, x and y."""
        return self._store.pixel_size

    def head_grid(self, name: str) -> PixelGrid:
        """Return the grid of a head's maps."""
        return self._store.head_grid(name)

    def arrival(self, box: Box) -> int:
        """Return the number of the last block under a box of the working grid: when it is there."""
        return int(self._turn[self._under(box)].max(initial=-1))

    def arrived(self, tile: Tile) -> None:
        """Note that the block of a tile is written."""
        with self._changed:
            self._pending[tile.row, tile.column] = False
            self._changed.notify_all()

    def give_up(self) -> None:
        """Note that no more blocks will come, or are wanted: who waits for one is interrupted."""
        with self._changed:
            self.given_up = True
            self._changed.notify_all()

    def read(self, key: str, box: Box) -> NDArray[np.uint8]:
        """Read a window of a map as :meth:`PredictionStore.read`, once its blocks are written.

        Raises:
            Interrupted: one of them will not come.
        """
        stride = self.spec.maps[key].stride
        inside = box.intersect(self.grid.box.coarsen(stride))
        under = self._under(inside.refine(stride))
        with self._changed:
            if self._pending[under].any():
                begun = time.perf_counter()
                self._changed.wait_for(lambda: self.given_up or not self._pending[under].any())
                self.waited_s += time.perf_counter() - begun
            if self._pending[under].any():
                raise Interrupted("the network ended before the maps were complete")
        return self._store.read(key, box)

    def _under(self, box: Box) -> tuple[slice, slice]:
        """Return where the blocks under a box are on the lattice; nothing for an empty box."""
        return box.coarsen(self._tile_px).slices if box.area else (slice(0), slice(0))


class Draft:
    """The objects of a slide, which may be begun while its maps still arrive."""

    def __init__(self, extraction: Extraction, maps: ArrivingMaps, *, workers: int) -> None:
        """Prepare.

        Args:
            extraction: of these maps, not begun.
            maps: what it reads.
            workers: its threads.
        """
        self.extraction = extraction
        self._maps = maps
        self._workers = workers
        self._begun: Future[float] | None = None

    @contextmanager
    def beside(self) -> Iterator[None]:
        """Extract beside what is done in the block; if that fails, the draft ends with it.

        A failure of the draft itself waits until :meth:`finish`: the maps are worth having.
        """
        pool = ThreadPoolExecutor(1, thread_name_prefix="draft")
        self._begun = pool.submit(self._begin)
        pool.shutdown(wait=False)  # the thread ends with its work
        try:
            yield
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """End what still runs, and give back what is held for rows that nobody will take."""
        self._maps.give_up()
        if self._begun is not None:
            self._begun.exception()
        self.extraction.close()

    def finish(self) -> float:
        """Wait until everything that was begun is done.

        Returns:
            The seconds of work that were done before this call; waiting is no work.

        Raises:
            WsiPipelineError: the draft has failed.
        """
        if self._begun is None:
            return 0.0
        asked = time.perf_counter()
        worked = self._begun.result()
        return max(0.0, worked - (time.perf_counter() - asked))

    def _begin(self) -> float:
        begun = time.perf_counter()
        self.extraction.begin(self._maps.arrival)
        return time.perf_counter() - begun - self._maps.waited_s / self._workers
