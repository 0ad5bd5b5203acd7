"""Batches of a slide's windows, filled ahead of the network by a background thread."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from wsi_pipeline.geometry import Box, PixelGrid
from wsi_pipeline.tiling import Tile, TileGrid

__all__ = ["WAITING_BATCHES", "Batch", "Feeder", "WindowReader"]

WAITING_BATCHES = 2
"""How many batches lie ready for the network."""


class WindowReader(Protocol):
    """What prediction needs of a slide."""

    def read_windows(
        self,
        grid: PixelGrid,
        boxes: Sequence[Box],
        *,
        threads: int,
        stop: Callable[[], bool] = ...,
    ) -> Iterator[NDArray[np.uint8]]:
        """Yield the pixels of each box in order, each valid until the next is asked for."""
        ...


@dataclass(kw_only=True, slots=True)
class Batch:
    """Tiles that the network sees together, and their pixels."""

    tiles: tuple[Tile, ...]
    """At most as many as there are rows of pixels."""
    pixels: Tensor
    """``(B, H, W, 3)`` uint8 on the host; what there is beyond the tiles is filling."""


class Feeder:
    """Batches of a slide's windows, prepared by a background thread from :meth:`start` on.

    A context manager: leaving it stops the thread and waits for it.
    """

    def __init__(
        self,
        slide: WindowReader,
        tiles: TileGrid,
        batch_size: int,
        threads: int,
        *,
        ahead: int = WAITING_BATCHES,
        pin: bool,
    ) -> None:
        """Take what is to be read.

        Args:
            slide: where the pixels come from.
            tiles: whose windows have one size, or any where batches are of one.
            batch_size: windows a batch.
            threads: that decode.
            ahead: batches that wait at most.
            pin: whether pixels lie in pinned memory, for a GPU to fetch.
        """
        self._slide = slide
        self._tiles = tiles
        self._batch_size = batch_size
        self._threads = threads
        self._pin = pin
        self._cancelled = threading.Event()
        self._queue: queue.Queue[Batch | None] = queue.Queue(ahead)
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="batches")
        self._filling: Future[None] | None = None

    def __enter__(self) -> Iterator[Batch]:
        self.start()
        return self._batches()

    def __exit__(self, *_: object) -> None:
        self.close()

    def start(self) -> Feeder:
        """Begin to read, unless it has begun."""
        if self._filling is None:
            self._filling = self._pool.submit(self._fill)
        return self

    @property
    def failed(self) -> bool:
        """Whether reading has ended with an error, which whoever takes the batches is told."""
        filling = self._filling
        return filling is not None and filling.done() and filling.exception() is not None

    def close(self) -> None:
        """Stop the thread and wait for it; may be called twice."""
        self._cancelled.set()
        self._pool.shutdown(wait=True)

    def _batches(self) -> Iterator[Batch]:
        while (batch := self._queue.get()) is not None:
            yield batch
        assert self._filling is not None  # started, as there was an end
        self._filling.result()

    def _fill(self) -> None:
        try:
            for batch in self._read():
                self._put(batch)
                if self._cancelled.is_set():
                    return
        finally:
            self._put(None)

    def _put(self, batch: Batch | None) -> None:
        while not self._cancelled.is_set():
            with suppress(queue.Full):
                self._queue.put(batch, timeout=0.1)
                return

    def _read(self) -> Iterator[Batch]:
        tiles = self._tiles.tiles
        windows = self._slide.read_windows(
            self._tiles.grid,
            [tile.read for tile in tiles],
            threads=self._threads,
            stop=self._cancelled.is_set,
        )
        for start in range(0, len(tiles), self._batch_size):
            part = tiles[start : start + self._batch_size]
            width, height = part[0].read.size
            pixels = torch.empty(
                (self._batch_size, height, width, 3), dtype=torch.uint8, pin_memory=self._pin
            )
            pixels[len(part) :] = 0
            into = pixels.numpy()
            for index in range(len(part)):
                window = next(windows, None)
                if window is None:  # stopped
                    if self._cancelled.is_set():
                        return
                    raise RuntimeError(
                        f"the slide ended after {start + index} of {len(tiles)} tiles"
                    )
                into[index] = window
            yield Batch(tiles=part, pixels=pixels)
