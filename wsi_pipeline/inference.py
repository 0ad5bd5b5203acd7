"""Tiles -> batches -> device -> blocks of uint8 maps.

::

    reader threads        a background thread         here
    slide.read_windows -> copy into (pinned) batches -> to device, network, softmax, crop the
                          at most two waiting           halo, shrink, quantise -> uint8 blocks

Batches always have their full size (the last is filled up), and a CPU computes their tiles
one by one: a tile's bytes cannot depend on the tiles it shares a batch with.
"""

from __future__ import annotations

import logging
import queue
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from wsi_pipeline.blocks import INPUT_MULTIPLE, cropped, enlarged, fold_batch_norms
from wsi_pipeline.bundle import ModelBundle
from wsi_pipeline.device import (
    DTYPES,
    auto_batch,
    auto_workers,
    choose_device,
    choose_precision,
)
from wsi_pipeline.errors import JobError, ModelBundleError, OutOfMemoryError
from wsi_pipeline.geometry import Box, PixelGrid
from wsi_pipeline.spec import HeadSpec, ModelSpec
from wsi_pipeline.store import PredictionBlock
from wsi_pipeline.tiling import Tile, TileGrid

__all__ = ["TorchPredictor", "WindowReader"]

log = logging.getLogger(__name__)

_WAITING_BATCHES = 2


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
class _Batch:
    tiles: tuple[Tile, ...]
    pixels: Tensor  # (B, H, W, 3) uint8 on the host; rows beyond the tiles are filling


class TorchPredictor:
    """A network on a device, ready to predict slides."""

    def __init__(
        self,
        spec: ModelSpec,
        network: nn.Module,
        *,
        device: str,
        precision: str,
        tile_px: int,
        halo_px: int,
        batch_size: int,
        workers: int,
    ) -> None:
        """Take a network that is ready.

        Args:
            spec: what the network promises.
            network: in evaluation mode; its normalisations are folded into its convolutions,
                and it is moved to the device and the precision.
            device: ``cpu``, ``cuda``, ``cuda:N``, ``mps``.
            precision: ``fp32``, ``bf16``, ``fp16``.
            tile_px: side of a write box, a multiple of 16 and of the heads' strides.
            halo_px: margin around it that the network sees, a multiple of the same.
            batch_size: tiles a pass.
            workers: threads that read.
        """
        self.spec = spec
        self.device = device
        self.precision = precision
        self.tile_px = tile_px
        self.halo_px = halo_px
        self.batch_size = batch_size
        self.workers = workers
        # Tiles the device takes at once; out-of-memory halves it. A CPU gains nothing by more
        # than one, and its kernels round differently by the number.
        self._limit = 1 if device == "cpu" else batch_size
        # What lies further out only the encoder has to see.
        decoder_halo_px = getattr(network, "decoder_halo_px", halo_px)
        self._margin_px = max(0, halo_px - decoder_halo_px) // INPUT_MULTIPLE * INPUT_MULTIPLE
        fold_batch_norms(network)
        network = network.to(device=device, dtype=DTYPES[precision])
        self._network: nn.Module = network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    @classmethod
    def load(
        cls,
        bundle: ModelBundle,
        *,
        device: str = "auto",
        precision: str = "auto",
        tile_size: int | str = "auto",
        batch_size: int | str = "auto",
        workers: int | str = "auto",
    ) -> TorchPredictor:
        """Load a bundle's network; ``auto`` chooses what suits the machine.

        Args:
            bundle: the model.
            device: ``auto`` (cuda, else mps, else cpu), ``cpu``, ``cuda``, ``cuda:N``, ``mps``.
            precision: ``auto``, ``fp32``, ``bf16``, ``fp16``. Auto: bf16 on CUDA, and on CPUs
                that have bf16 instructions, for networks of convolutions; else fp32.
            tile_size: side of a write box in pixels, multiple of 16. Auto: 2048 on CUDA,
                else 1024.
            batch_size: tiles a pass. Auto: by the memory of a CUDA device, else 1.
            workers: threads that decode the slide.

        Raises:
            JobError: an impossible choice.
            ModelBundleError: weights that do not fit.
        """
        device = choose_device(device)
        precision = choose_precision(precision, device, architecture=bundle.spec.architecture)
        cuda = device.startswith("cuda")
        tile_px = _positive("tile size", tile_size, auto=2048 if cuda else 1024)
        strides = [head.stride for head in bundle.spec.heads]
        if tile_px % 16 or any(tile_px % stride for stride in strides):
            msg = f"tile size {tile_px} must be a multiple of 16 and of the strides {strides}"
            raise JobError(msg)
        read_px = tile_px + 2 * bundle.spec.halo_px
        predictor = cls(
            bundle.spec,
            bundle.load_network(),
            device=device,
            precision=precision,
            tile_px=tile_px,
            halo_px=bundle.spec.halo_px,
            batch_size=_positive("batch size", batch_size, auto=auto_batch(device, read_px)),
            workers=_positive("workers", workers, auto=auto_workers(device)),
        )
        log.info(
            "%s on %s, %s, tiles of %d px, batches of %d, %d readers",
            bundle.name, device, precision, tile_px, predictor.batch_size, predictor.workers,
        )  # fmt: skip
        return predictor

    def predict(
        self, slide: WindowReader, tiles: TileGrid, *, stop: Callable[[], bool] = lambda: False
    ) -> Iterator[PredictionBlock]:
        """Predict tiles in their order.

        Args:
            slide: where the pixels come from.
            tiles: of this predictor's tile size and halo.
            stop: asked before each batch; True ends the iteration early.

        Yields:
            One block a tile. Closing the iterator ends its threads.

        Raises:
            OutOfMemoryError: not even a single tile fits.
            SlideError: the slide cannot be read.
        """
        if (tiles.tile_px, tiles.halo_px) != (self.tile_px, self.halo_px):
            msg = f"tiles of {tiles.tile_px}+{tiles.halo_px} px, not {self.tile_px}+{self.halo_px}"
            raise ValueError(msg)
        # On a GPU the next batch is queued before the last one's maps are waited for.
        depth = 1 if self.device.startswith("cuda") else 0
        running: deque[tuple[_Batch, dict[str, Tensor], torch.cuda.Event | None]] = deque()
        with _Feeder(slide, tiles, self.batch_size, self.workers, pin=depth > 0) as batches:
            for batch in batches:
                if stop():
                    return
                running.append((batch, *self._launch(batch)))
                if len(running) > depth:
                    yield from self._collect(*running.popleft())
            while running and not stop():
                yield from self._collect(*running.popleft())

    def _launch(self, batch: _Batch) -> tuple[dict[str, Tensor], torch.cuda.Event | None]:
        """Start the work for a batch; the maps are complete when the event has passed."""
        while True:
            try:
                parts = [self._compute(part) for part in torch.split(batch.pixels, self._limit)]
                break
            except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
                if not _is_out_of_memory(error):
                    raise
                if self._limit == 1:
                    msg = (
                        f"{self.device} has too little memory for one tile of {self.tile_px} px; "
                        "choose a smaller --tile-size"
                    )
                    raise OutOfMemoryError(msg) from error
            # Outside the handler, where the traceback no longer holds the tensors.
            self._limit //= 2
            log.warning(
                "out of memory on %s: %d tiles at once from now on", self.device, self._limit
            )
            if self.device.startswith("cuda"):
                torch.cuda.empty_cache()
        maps = {key: torch.cat([part[key] for part in parts]) for key in parts[0]}
        if not self.device.startswith("cuda"):
            return {key: map_.cpu() for key, map_ in maps.items()}, None
        host = {
            key: torch.empty(map_.shape, dtype=map_.dtype, pin_memory=True).copy_(
                map_, non_blocking=True
            )
            for key, map_ in maps.items()
        }
        done = torch.cuda.Event()  # type: ignore[no-untyped-call]
        done.record(torch.cuda.current_stream(self.device))
        return host, done

    @torch.inference_mode()
    def _compute(self, pixels_BHWC: Tensor) -> dict[str, Tensor]:
        """Run the network on uint8 windows and return the uint8 maps of their write boxes."""
        pixels = pixels_BHWC.to(self.device, non_blocking=True)
        # BHWC seen as BCHW is the channels_last format, without a copy.
        x_BCHW = pixels.permute(0, 3, 1, 2).to(DTYPES[self.precision])
        with torch.backends.cudnn.flags(
            enabled=True, benchmark=False, deterministic=True, allow_tf32=False
        ):
            how = {"margin": self._margin_px} if self._margin_px else {}
            logits = self._network(x_BCHW, **how)
        maps: dict[str, Tensor] = {}
        for head in self.spec.heads:
            maps |= self._maps(head, logits[head.name])
        return maps

    def _maps(self, head: HeadSpec, logits_BCHW: Tensor) -> dict[str, Tensor]:
        around = self.halo_px - self._margin_px  # pixels of context that are still there
        scale = (self.tile_px + 2 * around) // logits_BCHW.shape[-1]
        if scale > head.stride and scale % head.stride == 0:
            # Interpolation needs one logit beyond the box.
            beyond = min(around, scale)
            (logits_BCHW,) = cropped([logits_BCHW], around - beyond, [scale])
            logits_BCHW = enlarged(logits_BCHW, scale // head.stride)
            around, scale = beyond, head.stride
        if head.stride % scale or around % scale:
            msg = f"head {head.name!r}: stride {head.stride} on logits of scale {scale}"
            raise ModelBundleError(msg)
        (kept_BCHW,) = cropped([logits_BCHW], around, [scale])
        kept_BCHW = kept_BCHW.to(torch.float32, memory_format=torch.channels_last)
        # A detect head's channels do not exclude each other.
        prob_BCHW = kept_BCHW.sigmoid() if head.kind == "detect" else kept_BCHW.softmax(1)
        if head.stride > scale:
            prob_BCHW = functional.avg_pool2d(prob_BCHW, head.stride // scale)
        maps = {}
        if head.has_class_map:
            # A CPU takes twelve times as long where channels are not beside each other.
            beside = prob_BCHW.contiguous(memory_format=torch.channels_last)
            maps[f"{head.name}/class"] = beside.argmax(1).to(torch.uint8)
        if head.prob_channels:
            first = 1 if head.kind == "instance" else 0  # an instance head's background
            maps[f"{head.name}/prob"] = (
                prob_BCHW[:, first:].mul(255).add(0.5).to(torch.uint8).contiguous()
            )
        return maps

    def _collect(
        self, batch: _Batch, maps: dict[str, Tensor], done: torch.cuda.Event | None
    ) -> Iterator[PredictionBlock]:
        if done is not None:
            done.synchronize()
        for index, tile in enumerate(batch.tiles):
            arrays = {}
            for head in self.spec.heads:
                width, height = tile.write.coarsen(head.stride).size
                for key in (f"{head.name}/prob", f"{head.name}/class"):
                    if key in maps:
                        # A copy, so that a kept block does not keep its batch.
                        full = maps[key][index].numpy()
                        arrays[key] = full[..., :height, :width].copy()
            yield PredictionBlock(tile=tile, arrays=arrays)


class _Feeder:
    """Batches of a slide's windows, prepared by a background thread.

    A context manager: leaving it stops the thread and waits for it.
    """

    def __init__(
        self, slide: WindowReader, tiles: TileGrid, batch_size: int, threads: int, *, pin: bool
    ) -> None:
        self._slide = slide
        self._tiles = tiles
        self._batch_size = batch_size
        self._threads = threads
        self._pin = pin
        self._cancelled = threading.Event()
        self._queue: queue.Queue[_Batch | None] = queue.Queue(_WAITING_BATCHES)
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="batches")

    def __enter__(self) -> Iterator[_Batch]:
        self._filling = self._pool.submit(self._fill)
        return self._batches()

    def __exit__(self, *_: object) -> None:
        self._cancelled.set()
        self._pool.shutdown(wait=True)

    def _batches(self) -> Iterator[_Batch]:
        while (batch := self._queue.get()) is not None:
            yield batch
        self._filling.result()

    def _fill(self) -> None:
        try:
            for batch in self._read():
                self._put(batch)
                if self._cancelled.is_set():
                    return
        finally:
            self._put(None)

    def _put(self, batch: _Batch | None) -> None:
        while not self._cancelled.is_set():
            with suppress(queue.Full):
                self._queue.put(batch, timeout=0.1)
                return

    def _read(self) -> Iterator[_Batch]:
        tiles, side = self._tiles.tiles, self._tiles.read_px
        windows = self._slide.read_windows(
            self._tiles.grid,
            [tile.read for tile in tiles],
            threads=self._threads,
            stop=self._cancelled.is_set,
        )
        for start in range(0, len(tiles), self._batch_size):
            part = tiles[start : start + self._batch_size]
            pixels = torch.zeros(
                (self._batch_size, side, side, 3), dtype=torch.uint8, pin_memory=self._pin
            )
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
            yield _Batch(tiles=part, pixels=pixels)


def _is_out_of_memory(error: BaseException) -> bool:
    # The CPU allocator raises a plain RuntimeError.
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "not enough memory" in str(
        error
    )


def _positive(what: str, value: int | str, *, auto: int) -> int:
    if value == "auto":
        return auto
    if not isinstance(value, int) or value < 1:
        raise JobError(f"{what} must be 'auto' or a positive number, not {value!r}")
    return value
