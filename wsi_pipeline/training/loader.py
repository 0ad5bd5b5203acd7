"""Threads that cut windows ahead of the network, and one that joins them into batches."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch

from wsi_pipeline.machine import available_cpus
from wsi_pipeline.spec import ModelSpec
from wsi_pipeline.training.batch import Batch
from wsi_pipeline.training.sampler import Sampler, Slot
from wsi_pipeline.training.sources import Source, Window, collate

__all__ = ["WINDOW_SCALE", "Loaded", "load_batches"]

WINDOW_SCALE = 2
"""Side of a window in sides of a crop: a crop that is turned by 45 degrees and shrunk to 0.7
still lies inside."""
_AHEAD = 3
"""Batches in preparation while the network works."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Loaded:
    """A batch of windows, as far as this rank computes it."""

    windows: Batch
    """On the CPU, in pinned memory where there is a CUDA device."""
    seeds: tuple[int, ...]
    """One a window, for augmentation."""
    scales: tuple[tuple[float, float] | None, ...]
    """One a window: the magnifications of its source, if it has its own."""
    crop_px: int
    """Side of the crops to cut."""


def load_batches(
    sources: Sequence[Source],
    sampler: Sampler,
    spec: ModelSpec,
    *,
    first_step: int = 0,
    workers: int = 0,
    rank: int = 0,
    world: int = 1,
) -> Iterator[Loaded]:
    """Yield the batches of a run from a step on, without end.

    A window depends on its slot alone, not on the number of threads or ranks.

    Args:
        sources: in the sampler's order.
        sampler: says what goes into each batch.
        spec: the network's.
        first_step: how many batches to leave out.
        workers: threads; 0: what suits the machine.
        rank: this process takes every ``world``-th slot from here on.
        world: number of processes.

    Raises:
        DatasetError: an image cannot be read; it comes when its batch is asked for.
    """
    threads = workers or max(1, min(16, available_cpus() - 1))
    pin = torch.cuda.is_available()
    waiting: deque[tuple[list[Future[Window]], Future[Loaded]]] = deque()
    with (
        ThreadPoolExecutor(threads, thread_name_prefix="windows") as cutters,
        ThreadPoolExecutor(1, thread_name_prefix="batches") as joiner,
    ):
        try:
            for batch in sampler.batches(first_step):
                crop_px = sampler.crop_px(batch)
                own = _own(batch, rank, world)
                cut = [cutters.submit(_cut, sources, slot, crop_px) for slot in own]
                joined = joiner.submit(_join, cut, sources, own, crop_px, spec, pin)
                waiting.append((cut, joined))
                if len(waiting) > _AHEAD:
                    yield waiting.popleft()[1].result()
        finally:
            for cut, joined in waiting:
                joined.cancel()
                for future in cut:
                    future.cancel()


def _own(batch: tuple[Slot, ...], rank: int, world: int) -> tuple[Slot, ...]:
    """Return a rank's slots, in no order of tasks: each rank sees all tasks in time."""
    if world == 1:
        return batch
    order = np.random.default_rng(batch[0].seed).permutation(len(batch))
    return tuple(batch[place] for place in order[rank::world])


def _cut(sources: Sequence[Source], slot: Slot, crop_px: int) -> Window:
    rng = np.random.default_rng(slot.seed)
    return sources[slot.source].window(slot.image, rng, crop_px * WINDOW_SCALE)


def _join(
    cut: Sequence[Future[Window]],
    sources: Sequence[Source],
    slots: Sequence[Slot],
    crop_px: int,
    spec: ModelSpec,
    pin: bool,
) -> Loaded:
    windows = collate([future.result() for future in cut], spec)
    return Loaded(
        windows=windows.pinned() if pin else windows,
        seeds=tuple(slot.seed for slot in slots),
        scales=tuple(sources[slot.source].scales for slot in slots),
        crop_px=crop_px,
    )
