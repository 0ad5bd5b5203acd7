"""Which image goes where: batches of one task or of several, the same on every machine.

::

    fixed     AAAA BBBB AAAA CCCC     one task a batch, tasks by their probability
    mixed     AABC AABC ABBC AABC     several tasks in a batch, shares by their probability

A task has one or more sources; tasks whose crops have another size cannot share a batch, so
``mixed`` first draws among the sizes. Everything is a function of (seed, epoch): a run that
is interrupted goes on with the batches it would have had, and every rank of a distributed run
knows the whole batch. Sampling is Cerberus' (Graham et al., 2023): one task a batch
("fixed") and mixed tasks, an epoch as long as the largest source times the number of tasks.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from wsi_pipeline.errors import RecipeError

__all__ = ["BatchRules", "Sampler", "Slot", "SourceSize", "check_sources"]


@dataclass(frozen=True, kw_only=True, slots=True)
class BatchRules:
    """How sources are mixed."""

    mode: Literal["mixed", "fixed"] = "mixed"
    """``mixed``: several tasks in a batch; ``fixed``: one."""
    size: int = 12
    """Crops a batch, over all devices."""
    crop_px: int = 448
    """Side of a crop at the model's mpp, a multiple of 16."""
    tasks: Mapping[str, float] = field(default_factory=dict)
    """Probability of each task, in any unit; none: all alike."""
    epoch_steps: int = 0
    """Batches an epoch; 0: the largest source's images times the number of tasks."""
    workers: int = 0
    """Threads that read and cut; 0: what suits the machine."""

    def __post_init__(self) -> None:
        if min(self.epoch_steps, self.workers) < 0:
            raise RecipeError("[batches] epoch_steps and workers cannot be negative")
        if self.size < 1 or self.crop_px < 16 or self.crop_px % 16:
            raise RecipeError("[batches] wants size >= 1 and crop_px a multiple of 16")
        if any(share < 0 for share in self.tasks.values()):
            raise RecipeError(f"[batches] tasks: shares cannot be negative: {dict(self.tasks)}")


@dataclass(frozen=True, kw_only=True, slots=True)
class SourceSize:
    """What the sampler must know of a source."""

    task: str
    """What it is drawn for."""
    images: int
    """How many it has."""
    weight: float
    """Relative to the other sources of the task."""
    crop_px: int
    """Side of its crops."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Slot:
    """A place in a batch."""

    source: int
    """Index of the source."""
    image: int
    """Index of its image."""
    seed: int
    """Of everything drawn for this crop."""


class Sampler:
    """The batches of a run, epoch by epoch."""

    def __init__(self, sources: Sequence[SourceSize], rules: BatchRules, *, seed: int) -> None:
        """Prepare to draw.

        Args:
            sources: at least one, none empty.
            rules: ``[batches]``.
            seed: another one, other batches.

        Raises:
            RecipeError: a task of the rules has no source, or no source can be drawn.
        """
        self._sources = sources
        self._rules = rules
        self._seed = seed
        tasks = list(dict.fromkeys(source.task for source in sources))
        self._shares = _shares(tasks, rules.tasks)
        largest = max(source.images for source in sources)
        drawn = sum(share > 0 for share in self._shares.values())
        self.steps_per_epoch: int = rules.epoch_steps or -(-largest * drawn // rules.size)
        """Batches an epoch."""

    def batches(self, first_step: int = 0) -> Iterator[tuple[Slot, ...]]:
        """Yield batch after batch without end.

        Args:
            first_step: how many batches to leave out, as a run that goes on does.
        """
        epoch, left_out = divmod(first_step, self.steps_per_epoch)
        while True:
            for step, batch in enumerate(self._epoch(epoch)):
                if step >= left_out:
                    yield batch
            epoch, left_out = epoch + 1, 0

    def crop_px(self, batch: Sequence[Slot]) -> int:
        """Return the side of a batch's crops."""
        return self._sources[batch[0].source].crop_px

    def _epoch(self, epoch: int) -> Iterator[tuple[Slot, ...]]:
        rng = np.random.default_rng((self._seed, epoch))
        streams = [_shuffled(source.images, rng.spawn(1)[0]) for source in self._sources]
        groups = self._groups()
        plan = rng.permutation(_spread([share for _, share in groups], self.steps_per_epoch, rng))
        for group in plan:
            tasks, _ = groups[group]
            names = list(tasks)
            places = _spread([tasks[name] for name in names], self._rules.size, rng)
            yield tuple(self._slot(names[place], streams, rng) for place in places)

    def _groups(self) -> list[tuple[dict[str, float], float]]:
        """Return what a batch may be made of: shares of tasks, and how often."""
        shares = {task: share for task, share in self._shares.items() if share > 0}
        if self._rules.mode == "fixed":
            return [({task: 1.0}, share) for task, share in shares.items()]
        by_size: dict[int, dict[str, float]] = {}
        for task, share in shares.items():
            side = next(source.crop_px for source in self._sources if source.task == task)
            by_size.setdefault(side, {})[task] = share
        return [(tasks, sum(tasks.values())) for tasks in by_size.values()]

    def _slot(self, task: str, streams: list[Iterator[int]], rng: np.random.Generator) -> Slot:
        own = [i for i, source in enumerate(self._sources) if source.task == task]
        weights = np.array([self._sources[i].weight for i in own])
        source = own[int(rng.choice(len(own), p=weights / weights.sum()))]
        return Slot(source=source, image=next(streams[source]), seed=int(rng.integers(1 << 62)))


def check_sources(sources: Sequence[SourceSize]) -> None:
    """Check that the sources of each task can be mixed.

    Raises:
        RecipeError: crops of two sizes for one task, or weights that are not positive.
    """
    for task in {source.task for source in sources}:
        own = [source for source in sources if source.task == task]
        sizes = sorted({source.crop_px for source in own})
        if len(sizes) > 1:
            raise RecipeError(f"task {task!r}: its sources want crops of {sizes} px; choose one")
        if not all(source.weight >= 0 for source in own) or not sum(s.weight for s in own):
            raise RecipeError(f"task {task!r}: weights of its sources must be positive")


def _shares(tasks: Sequence[str], wanted: Mapping[str, float]) -> dict[str, float]:
    unknown = sorted(set(wanted) - set(tasks))
    lacking = sorted(set(tasks) - set(wanted)) if wanted else []
    if unknown or lacking:
        msg = f"[batches] tasks: {sorted(wanted)}, but the sources' tasks are {sorted(tasks)}"
        raise RecipeError(msg)
    shares = {task: float(wanted.get(task, 1.0)) for task in tasks}
    if not any(shares.values()):
        raise RecipeError("[batches] tasks: no task has a share above 0")
    total = sum(shares.values())
    return {task: share / total for task, share in shares.items()}


def _spread(shares: Sequence[float], places: int, rng: np.random.Generator) -> NDArray[np.intp]:
    """Deal places by share, each share to the nearest whole number (systematic sampling)."""
    edges = np.cumsum(shares) / np.sum(shares)
    points = (np.arange(places) + rng.random()) / places
    return np.minimum(np.searchsorted(edges, points, side="right"), len(shares) - 1)


def _shuffled(count: int, rng: np.random.Generator) -> Iterator[int]:
    """Yield indices without end, each once before any comes again."""
    while True:
        yield from (int(i) for i in rng.permutation(count))
