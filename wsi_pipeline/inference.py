"""Tiles -> batches -> device -> blocks of uint8 maps.

::

    reader threads        a background thread         here
    slide.read_windows -> copy into (pinned) batches -> to device, network, softmax, crop the
                          at most two waiting           halo, shrink, quantise -> uint8 blocks

Batches always have their full size (the last is filled up), and a CPU computes their tiles
one by one: a tile's bytes cannot depend on the tiles it shares a batch with. Batches of one, the
default, let every window be only as large as the tissue in its tile.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from wsi_pipeline.blocks import cropped, enlarged, fold_batch_norms
from wsi_pipeline.bundle import ModelBundle
from wsi_pipeline.device import (
    DTYPES,
    DeviceSpan,
    auto_workers,
    choose_device,
    choose_precision,
)
from wsi_pipeline.eight_bit import pixel_levels, to_eight_bits
from wsi_pipeline.errors import JobError, ModelBundleError, OutOfMemoryError
from wsi_pipeline.feeding import WAITING_BATCHES, Batch, Feeder, WindowReader
from wsi_pipeline.fixed_images import golden_tiles
from wsi_pipeline.half import to_half
from wsi_pipeline.machine import SAID_OF_NO_MEMORY, available_cpus, release_memory, resident_bytes
from wsi_pipeline.memory import CANVASES, Demand, Sizes, fit_sizes
from wsi_pipeline.spec import HeadSpec, ModelSpec
from wsi_pipeline.steady import keep_to_one_kernel
from wsi_pipeline.store import PredictionBlock
from wsi_pipeline.tiling import Tile, TileGrid

__all__ = ["TorchPredictor", "WindowReader"]

log = logging.getLogger(__name__)

_LEAST_PIECE_PX = 64
"""Smaller pieces of a tile would be nearly all halo."""


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
        extractors: int = 1,
        canvas_bytes: int = CANVASES,
        host_bytes: int | None = None,
    ) -> None:
        """Take a network that is ready.

        Args:
            spec: what the network promises.
            network: in evaluation mode; its normalisations are folded into its convolutions,
                and it is moved to the device and the precision.
            device: ``cpu``, ``cuda``, ``cuda:N``, ``mps``.
            precision: ``fp32``, ``bf16``, ``fp16``; ``int8`` on a CPU.
            tile_px: side of a write box, a multiple of 16 and of the heads' strides.
            halo_px: margin around it that the network sees, a multiple of the same.
            batch_size: tiles a pass.
            workers: threads that read.
            extractors: threads that extract objects from the maps, for whoever does.
            canvas_bytes: of the canvases that the slide is decoded into.
            host_bytes: a network on the CPU gives memory that it keeps for its next maps back
                when the process holds more; None: never.

        ``busy_s`` counts the seconds in which the network has run; ``is_lost`` says that the device
        has failed so that only another process may use it.
        """
        self.spec = spec
        self.device = device
        self.precision = precision
        self.tile_px = tile_px
        self.halo_px = halo_px
        self.batch_size = batch_size
        self.workers = workers
        self.extractors = extractors
        self.canvas_bytes = canvas_bytes
        self._host_bytes = host_bytes if device == "cpu" else None
        self.busy_s = 0.0
        self.is_lost = False
        # Tiles the device takes at once. A CPU gains nothing by more than one, and its kernels
        # round differently by the number; there a batch is what is read ahead.
        self._at_once = 1 if device == "cpu" else batch_size
        self._limit = self._at_once  # out-of-memory halves it
        # Nothing binds windows to one size: no batch, and no network that looks at all of them.
        self._is_local = not getattr(network, "sees_whole_input", False)
        self.is_fitting = self._at_once == 1 and self._is_local
        # No logits are wanted of all but one pixel of the halo: rounded down to whole logits, that
        # leaves one beyond the box at every scale.
        takes_margin = getattr(network, "takes_margin", False)
        self.margin_px = max(0, halo_px - 1) if takes_margin else 0
        # Side of the pieces in which a tile is computed; out-of-memory halves this, too.
        self._piece_px = tile_px
        fold_batch_norms(network)
        if precision == "int8":
            to_eight_bits(network, golden_tiles(spec.mpp).values())
        elif DTYPES[precision] is not torch.float32:
            to_half(network, DTYPES[precision])
        keep_to_one_kernel(network)
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
        memory: int | str | None = None,
        share: int = 1,
    ) -> TorchPredictor:
        """Load a bundle's network; ``auto`` chooses what suits the machine.

        Args:
            bundle: the model.
            device: ``auto`` (cuda, else mps, else cpu), ``cpu``, ``cuda``, ``cuda:N``, ``mps``.
            precision: ``auto``, ``fp32``, ``bf16``, ``fp16``, ``int8``. Auto: for
                networks of convolutions half precision, see :func:`choose_precision`; else fp32.
            tile_size: side of a write box in pixels, multiple of 16. Auto: 2048 on CUDA,
                else 1024, less where ``memory`` asks for it.
            batch_size: tiles a pass. Auto: 1, so that windows are as small as the tissue in
                them; one tile keeps a device busy, and larger batches are of whole tiles.
            workers: threads that decode the slide, and that extract objects.
            memory: what a run holds at most on the host, see :mod:`wsi_pipeline.memory`.
            share: processes like this one at the same time; memory and processors are divided.

        Raises:
            JobError: an impossible choice.
            ModelBundleError: weights that do not fit.
        """
        device = choose_device(device)
        precision = choose_precision(precision, device, architecture=bundle.spec.architecture)
        tile_px = _positive(
            "tile size", tile_size, auto=2048 if device.startswith("cuda") else 1024
        )
        strides = [head.stride for head in bundle.spec.heads]
        if tile_px % 16 or any(tile_px % stride for stride in strides):
            msg = f"tile size {tile_px} must be a multiple of 16 and of the strides {strides}"
            raise JobError(msg)
        asked = {"tile_px": tile_size, "batch_size": batch_size, "extractors": workers}
        network = bundle.load_network()
        demand = _demand(bundle.spec, network, device, precision)
        sizes = fit_sizes(
            demand,
            Sizes(
                tile_px=tile_px,
                batch_size=_positive("batch size", batch_size, auto=1),
                extractors=_positive("workers", workers, auto=max(1, available_cpus() // share)),
            ),
            cap=memory,
            fixed=[name for name, value in asked.items() if value != "auto"],
            share=share,
        )
        predictor = cls(
            bundle.spec,
            network,
            device=device,
            precision=precision,
            tile_px=sizes.tile_px,
            halo_px=bundle.spec.halo_px,
            batch_size=sizes.batch_size,
            workers=_positive("workers", workers, auto=auto_workers(device, share)),
            extractors=sizes.extractors,
            canvas_bytes=sizes.canvas_bytes,
            host_bytes=demand.enough(sizes, cap=memory, share=share),
        )
        log.info(
            "%s on %s, %s, tiles of %d px, batches of %d, %d readers",
            bundle.name, device, precision, sizes.tile_px, sizes.batch_size, predictor.workers,
        )  # fmt: skip
        return predictor

    def begin(self, slide: WindowReader, tiles: TileGrid) -> Feeder:
        """Begin to read the windows of tiles into batches, in the background.

        Returns:
            For :meth:`predict` of the same tiles, which closes it; so must who does without.
        """
        ahead = WAITING_BATCHES * self.batch_size // self._at_once
        pin = self.device.startswith("cuda")
        return Feeder(slide, tiles, self._at_once, self.workers, ahead=ahead, pin=pin).start()

    def predict(
        self,
        slide: WindowReader,
        tiles: TileGrid,
        *,
        stop: Callable[[], bool] = lambda: False,
        warn: Callable[[str, str], None] = lambda _code, _message: None,
        feed: Feeder | None = None,
    ) -> Iterator[PredictionBlock]:
        """Predict tiles in their order.

        Where the memory does not suffice, batches are halved, then tiles are cut into pieces
        that are computed one by one; so they are from then on.

        Args:
            slide: where the pixels come from.
            tiles: of this predictor's tile size and halo.
            stop: asked before each batch; True ends the iteration early.
            warn: told ``out_of_memory`` and a message, once, if anything was computed in
                smaller batches or pieces than planned.
            feed: what :meth:`begin` has returned for these tiles; None: begin now.

        Yields:
            One block a tile. Closing the iterator ends its threads.

        Raises:
            OutOfMemoryError: not even a piece of a tile fits.
            SlideError: the slide cannot be read.
        """
        if (tiles.tile_px, tiles.halo_px) != (self.tile_px, self.halo_px):
            msg = f"tiles of {tiles.tile_px}+{tiles.halo_px} px, not {self.tile_px}+{self.halo_px}"
            raise ValueError(msg)
        # On a GPU the next batch is queued before the last one's maps are waited for.
        depth = 1 if self.device.startswith("cuda") else 0
        warned = False
        running: deque[tuple[Batch, dict[str, Tensor], DeviceSpan | None]] = deque()
        with feed or self.begin(slide, tiles) as batches, self._noting_loss():
            for batch in batches:
                if stop():
                    return
                running.append((batch, *self._launch(batch)))
                if self._is_reduced and not warned:
                    warned = True
                    warn("out_of_memory", self._how_reduced())
                if len(running) > depth:
                    yield from self._collect(*running.popleft())
            while running and not stop():
                yield from self._collect(*running.popleft())

    @contextmanager
    def _noting_loss(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            self.is_lost = self.is_lost or _is_of_device(error)
            raise

    def _launch(self, batch: Batch) -> tuple[dict[str, Tensor], DeviceSpan | None]:
        """Start the work for a batch; the maps are complete when the span's end has passed."""
        span = DeviceSpan(self.device) if self.device.startswith("cuda") else None
        begun = time.perf_counter()
        if self._host_bytes is not None and resident_bytes() > self._host_bytes:
            # What is kept of windows of other sizes: it fits maps of this one badly.
            release_memory()
        while True:
            try:
                host = self._maps_on_host(batch, wait=span is None)
                break
            except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
                if not _is_out_of_memory(error):
                    raise
                if self._limit == 1 and not self._can_halve_pieces:
                    msg = (
                        f"{self.device} has too little memory for {self._piece_px} px of a tile of "
                        f"{self.tile_px} px; choose a smaller --tile-size"
                    )
                    raise OutOfMemoryError(msg) from error
            # Outside the handler, where the traceback no longer holds the tensors.
            if self._limit > 1:
                self._limit //= 2
            else:
                self._piece_px //= 2
            log.warning("%s", self._how_reduced())
            if self.device.startswith("cuda"):
                torch.cuda.empty_cache()
        if span is None:
            self.busy_s += time.perf_counter() - begun
        else:
            span.end()
        return host, span

    def _maps_on_host(self, batch: Batch, *, wait: bool) -> dict[str, Tensor]:
        """Compute a batch; without ``wait``, its maps are there once the device has come so far."""
        parts = [self._compute_in_pieces(part) for part in torch.split(batch.pixels, self._limit)]
        maps = {key: torch.cat([part[key] for part in parts]) for key in parts[0]}
        if wait:
            return {key: map_.cpu() for key, map_ in maps.items()}
        return {
            key: torch.empty(map_.shape, dtype=map_.dtype, pin_memory=True).copy_(
                map_, non_blocking=True
            )
            for key, map_ in maps.items()
        }

    @property
    def _can_halve_pieces(self) -> bool:
        half = self._piece_px // 2
        return (
            self._is_local
            and half >= _LEAST_PIECE_PX
            and not any(half % side for side in (16, *(head.stride for head in self.spec.heads)))
        )

    @property
    def _is_reduced(self) -> bool:
        return self._limit < self._at_once or self._piece_px < self.tile_px

    def _how_reduced(self) -> str:
        pieces = ""
        if self._piece_px < self.tile_px:
            pieces = f", each in pieces of {self._piece_px} px with their own halo"
        return (
            f"{self.device} ran out of memory: {self._limit} of {self._at_once} tiles of "
            f"{self.tile_px} px at once{pieces}; values may differ as they do between tile sizes"
        )

    def _compute_in_pieces(self, pixels_BHWC: Tensor) -> dict[str, Tensor]:
        """Compute windows as a whole, or piece by piece where memory is short."""
        if self._piece_px == self.tile_px:
            return self._compute(pixels_BHWC)
        halos = 2 * self.halo_px
        side = self._piece_px + halos
        height, width = (full - halos for full in pixels_BHWC.shape[1:3])
        rows = []
        for y in range(0, height, self._piece_px):
            row = [
                self._compute(pixels_BHWC[:, y : y + side, x : x + side].contiguous())
                for x in range(0, width, self._piece_px)
            ]
            rows.append({key: torch.cat([part[key] for part in row], -1) for key in row[0]})
        return {key: torch.cat([row[key] for row in rows], -2) for key in rows[0]}

    @torch.inference_mode()
    def _compute(self, pixels_BHWC: Tensor) -> dict[str, Tensor]:
        """Run the network on uint8 windows and return the uint8 maps of their write boxes."""
        pixels = pixels_BHWC.to(self.device, non_blocking=True)
        # BHWC seen as BCHW is the channels_last format, without a copy.
        x_BCHW = pixels.permute(0, 3, 1, 2)
        if self.precision == "int8":
            x_BCHW = pixel_levels(x_BCHW)
        else:
            x_BCHW = x_BCHW.to(DTYPES[self.precision])
        with torch.backends.cudnn.flags(
            enabled=True, benchmark=False, deterministic=True, allow_tf32=False
        ):
            return self._maps_of(x_BCHW)

    def _maps_of(self, x_BCHW: Tensor) -> dict[str, Tensor]:
        """Run the network on floats 0..255 and quantise what its heads say of the write boxes."""
        how = {"margin": self.margin_px} if self.margin_px else {}
        logits = self._network(x_BCHW, **how)
        maps: dict[str, Tensor] = {}
        for head in self.spec.heads:
            maps |= self._maps(head, logits[head.name], x_BCHW.shape[-1])
        return maps

    def _maps(self, head: HeadSpec, logits_BCHW: Tensor, width: int) -> dict[str, Tensor]:
        """Make the maps of a head from what it says of a window ``width`` pixels wide."""
        scale = self._scale_of(logits_BCHW.shape[-1], width)
        around = self.halo_px - self.margin_px // scale * scale  # what is still there of the halo
        if scale > head.stride and scale % head.stride == 0:
            # Interpolation needs one logit beyond the box.
            beyond = min(around, scale)
            logits_BCHW = cropped(logits_BCHW, around - beyond, scale)
            logits_BCHW = enlarged(logits_BCHW, scale // head.stride)
            around, scale = beyond, head.stride
        if head.stride % scale or around % scale:
            msg = f"head {head.name!r}: stride {head.stride} on logits of scale {scale}"
            raise ModelBundleError(msg)
        kept_BCHW = cropped(logits_BCHW, around, scale)
        kept_BCHW = kept_BCHW.to(torch.float32, memory_format=torch.channels_last)
        prob_BCHW = kept_BCHW  # the largest logit is the largest probability
        if head.prob_channels or head.stride > scale:
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

    def _scale_of(self, logits: int, width: int) -> int:
        """Return how many pixels one of the logits across a window of some width spans."""
        if not self.margin_px:
            return width // logits
        return (width - 2 * self.halo_px) // (logits - 2)  # one beyond the box on every side

    def _collect(
        self, batch: Batch, maps: dict[str, Tensor], span: DeviceSpan | None
    ) -> Iterator[PredictionBlock]:
        if span is not None:
            self.busy_s += span.wait_s()
        for index, tile in enumerate(batch.tiles):
            # Copies, so that a kept block does not keep its batch.
            arrays = {
                key: _placed(maps[key][index].numpy(), tile, head.stride)
                for key, head in self.spec.maps.items()
            }
            yield PredictionBlock(tile=tile, arrays=arrays)


def _placed(map_: NDArray[np.uint8], tile: Tile, stride: int) -> NDArray[np.uint8]:
    """Return the write box's part of a map of what was computed, blank where nothing was."""
    write, computed = tile.write.coarsen(stride), tile.computed.coarsen(stride)
    there = write.intersect(computed)
    placed = np.zeros((*map_.shape[:-2], write.height, write.width), np.uint8)
    placed[(..., *there.relative_to(write).slices)] = map_[
        (..., *there.relative_to(computed).slices)
    ]
    return placed


def _demand(spec: ModelSpec, network: nn.Module, device: str, precision: str) -> Demand:
    return Demand(
        spec=spec,
        weights=sum(weight.numel() for weight in network.parameters()),
        # Of what a pass in 8 bits holds, logits and sums of strips are larger than bytes.
        value_bytes=2 if precision == "int8" else DTYPES[precision].itemsize,
        on_host=not device.startswith("cuda"),
        in_bytes=precision == "int8",
        ahead=device != "cpu",
    )


def _is_out_of_memory(error: BaseException) -> bool:
    # On a CPU the allocator of torch, and oneDNN's, raise plain RuntimeErrors; so do CUDA's pinned
    # memory, cuDNN and cuBLAS.
    said = (*SAID_OF_NO_MEMORY, "ALLOC_FAILED")
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or any(
        words in str(error) for words in said
    )


def _is_of_device(error: RuntimeError) -> bool:
    """Tell whether a device has failed in a way that leaves its process no use of it."""
    return "CUDA error" in str(error) and not _is_out_of_memory(error)


def _positive(what: str, value: int | str, *, auto: int) -> int:
    if value == "auto":
        return auto
    if not isinstance(value, int) or value < 1:
        raise JobError(f"{what} must be 'auto' or a positive number, not {value!r}")
    return value
