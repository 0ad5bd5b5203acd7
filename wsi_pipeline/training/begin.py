"""Everything before the first step: weights to start from, images to learn and validate on."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from torch import nn

from wsi_pipeline.errors import RecipeError
from wsi_pipeline.machine import total_memory
from wsi_pipeline.network import build_network
from wsi_pipeline.spec import ModelSpec
from wsi_pipeline.training.annotation import AnnotatedImage, Dataset, Item
from wsi_pipeline.training.augment import AugmentRules, Scales
from wsi_pipeline.training.layouts import read_dataset
from wsi_pipeline.training.losses import check_head_rules
from wsi_pipeline.training.recipe import Recipe, SourceRules, model_spec
from wsi_pipeline.training.sampler import SourceSize, check_sources
from wsi_pipeline.training.sources import ImageCache, Source
from wsi_pipeline.training.split import split_items
from wsi_pipeline.training.transfer import (
    Start,
    StartingPoint,
    TransferReport,
    apply_freeze,
    read_start,
    start_from,
)

__all__ = ["Beginning", "HeldOut", "Part", "begin", "held_out_images", "open_parts"]


_CACHE_SHARE = 0.3
"""Of the machine's memory, for decoded images; the processes of a machine share it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Part:
    """One part of a recipe's source."""

    name: str
    """``train``, ``validation`` or ``test``."""
    source: Source
    """Its images."""
    rules: SourceRules
    """What the recipe says of it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class HeldOut:
    """An image that the network does not learn from, not yet read."""

    source: Source
    """Where it is."""
    index: int
    """Its place there."""

    @property
    def item(self) -> Item:
        """Who it is from."""
        return self.source.items[self.index]

    def load(self) -> AnnotatedImage:
        """Read it at the model's mpp."""
        return self.source.image(self.index)


@dataclass(frozen=True, kw_only=True, slots=True)
class Beginning:
    """A network and what it will learn from."""

    spec: ModelSpec
    """What the network is to become."""
    network: nn.Module
    """On its device, with its starting weights, in training mode."""
    report: TransferReport | None
    """What was taken from where; None for a fresh network."""
    parts: tuple[Part, ...]
    """All parts of all sources."""
    sizes: tuple[SourceSize, ...]
    """Of the training parts, in their order."""
    held_out: tuple[HeldOut, ...]
    """Images that are validated on."""

    @property
    def sources(self) -> tuple[Source, ...]:
        """What is learnt from."""
        return tuple(part.source for part in self.parts if part.name == "train")

    @property
    def data(self) -> list[dict[str, Any]]:
        """One line a part: how many images and patients, for which heads."""
        return [
            {
                "source": part.source.name,
                "part": part.name,
                "images": len(part.source),
                "patients": len({item.patient for item in part.source.items}),
                "task": part.source.task,
                "heads": list(part.source.heads),
            }
            for part in self.parts
        ]

    def describe(self) -> dict[str, Any]:
        """Return what the log begins with."""
        count = sum(parameter.numel() for parameter in self.network.parameters())
        return {
            "parameters": count,
            "start": self.report.to_dict() if self.report else None,
            "data": self.data,
            "validated_on": len(self.held_out),
        }


def begin(
    recipe: Recipe, *, name: str, device: str, world: int = 1, encoder: Path | None = None
) -> Beginning:
    """Build the network and open the data.

    Args:
        recipe: what to train.
        name: of the bundle.
        device: where the network goes.
        world: number of processes that share each batch.
        encoder: what ``[pretrain]`` has led to.

    Raises:
        RecipeError: parts of the recipe contradict each other or the data.
        DatasetError: a folder without images of its layout, or a split without images.
        ModelBundleError: what it starts from cannot be read or does not fit.
    """
    if recipe.batches.size < world:
        msg = (
            f"[batches] size {recipe.batches.size} is less than the {world} processes that share it"
        )
        raise RecipeError(msg)
    start = read_start(recipe.start if encoder is None else Start(simclr=encoder))
    spec = model_spec(recipe, _kept(start, recipe.start.only), name=name)
    check_head_rules(recipe.heads, spec)
    recipe.augment.check_heads(spec)
    torch.manual_seed(recipe.seed)
    network = build_network(spec)
    report = start_from(network, spec, start, only=recipe.start.only) if start else None
    parts = open_parts(recipe, spec)
    learnt = [part for part in parts if part.name == "train"]
    _check_fresh_heads(spec, report, [part.source for part in learnt])
    sizes = tuple(_size(part, recipe) for part in learnt)
    check_sources(sizes)
    apply_freeze(network, recipe.freeze, 0)  # a wrong name is said before anything is read
    return Beginning(
        spec=spec,
        network=network.to(device),
        report=report,
        parts=parts,
        sizes=sizes,
        held_out=held_out_images(
            [part.source for part in parts if part.name == "validation"],
            at_most=recipe.validation.images,
        ),
    )


def _kept(start: StartingPoint | None, only: Sequence[str]) -> ModelSpec | None:
    """Return the spec to build on: without the heads that are not to be taken."""
    if start is None or start.spec is None or not only:
        return start.spec if start else None
    heads = [head for head in start.spec.heads if {"heads", f"heads.{head.name}"} & set(only)]
    names = {head.name for head in heads}
    kept = [head for head in heads if head.classifies is None or head.classifies in names]
    alone = [
        head if head.parent in names else replace(head, parent=None, inside_parent=False)
        for head in kept
    ]
    return replace(start.spec, heads=tuple(alone))


def open_parts(recipe: Recipe, spec: ModelSpec) -> tuple[Part, ...]:
    """Open a recipe's sources and split them by patient.

    Raises:
        RecipeError: labels or classes that the model does not know, images left out that are
            not there, or magnifications that make no sense.
        DatasetError: a folder without images of its layout, or an empty part.
    """
    parts = []
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    cache = ImageCache(int(_CACHE_SHARE * total_memory() / processes))
    for rules in recipe.source:
        dataset = read_dataset(rules.path, rules.layout, mpp=rules.mpp, **rules.options)
        used = _used(dataset, rules.leave_out)
        scales = _scales(rules, recipe.augment)
        split = {"train": used}
        if rules.split:
            split = split_items(
                used,
                validation=recipe.split.validation,
                seed=recipe.split.seed,
                published=recipe.split.published,
            )
        for name, items in split.items():
            source = Source(
                dataset,
                items,
                spec,
                task=rules.task,
                heads=rules.heads,
                class_map=rules.classes,
                object_share=rules.object_share,
                scales=scales,
                cache=cache if name == "train" else ImageCache(0),
            )
            parts.append(Part(name=name, source=source, rules=rules))
    return tuple(parts)


def _used(dataset: Dataset, leave_out: Sequence[str]) -> tuple[Item, ...]:
    """Return the images of a dataset whose names fit no pattern."""

    def fits(item: Item, pattern: str) -> bool:
        # Names are tried as they are too: a bracket in one would be a pattern.
        return item.name == pattern or fnmatchcase(item.name, pattern)

    where = f"{dataset.name} ({dataset.path}): leave_out"
    idle = [p for p in leave_out if not any(fits(item, p) for item in dataset.items)]
    if idle:
        some = ", ".join(repr(item.name) for item in dataset.items[:3])
        msg = f"{where} names {idle}, which no image is called; there are {some}, ..."
        raise RecipeError(msg)
    used = tuple(
        item for item in dataset.items if not any(fits(item, pattern) for pattern in leave_out)
    )
    if not used:
        raise RecipeError(f"{where} {list(leave_out)} leaves none of {len(dataset.items)} images")
    return used


def _scales(rules: SourceRules, augment: AugmentRules) -> Scales | None:
    """Return a source's magnifications, what it does not say from ``[augment]``; None: all."""
    if rules.scale_min is None and rules.scale_max is None:
        return None
    least = augment.scale_min if rules.scale_min is None else rules.scale_min
    most = augment.scale_max if rules.scale_max is None else rules.scale_max
    try:
        replace(augment, scale_min=least, scale_max=most)  # which knows what makes sense
    except RecipeError as error:
        raise RecipeError(f"[[source]] {rules.path}: {error}") from error
    return least, most


def held_out_images(
    sources: Sequence[Source], *, at_most: int | None = None
) -> tuple[HeldOut, ...]:
    """Choose images to score.

    Args:
        sources: what to choose from.
        at_most: how many; taken in turn from every group of every source, so that a large
            one does not crowd out the others. None: all.
    """
    lists: dict[tuple[int, str], list[HeldOut]] = {}
    for number, source in enumerate(sources):
        for index, item in enumerate(source.items):
            held = HeldOut(source=source, index=index)
            lists.setdefault((number, item.group or ""), []).append(held)
    chosen = list(_in_turn(list(lists.values())))
    return tuple(chosen[:at_most])


def _in_turn(lists: Sequence[list[HeldOut]]) -> Iterator[HeldOut]:
    for turn in range(max(map(len, lists), default=0)):
        for own in lists:
            if turn < len(own):
                # Spread over the list: neighbours are often of one patient.
                yield own[turn * _stride(len(own)) % len(own)]


def _stride(count: int) -> int:
    """Return a step that visits all of ``count`` places, about 0.62 of the way on each time."""
    step = max(1, round(count * 0.618))
    while math.gcd(step, count) > 1:
        step += 1
    return step


def _size(part: Part, recipe: Recipe) -> SourceSize:
    return SourceSize(
        task=part.source.task,
        images=len(part.source),
        weight=part.rules.weight,
        crop_px=part.rules.crop_px or recipe.batches.crop_px,
    )


def _check_fresh_heads(
    spec: ModelSpec, report: TransferReport | None, sources: Sequence[Source]
) -> None:
    labelled = {head for source in sources for head in source.heads}
    if report is None:
        fresh = {head.name for head in spec.heads}
    else:
        fresh = {name.split(".")[1] for name in report.fresh if name.startswith("heads.")}
    lost = [head.name for head in spec.heads if head.name in fresh - labelled]
    if lost:
        msg = (
            f"heads {lost} are new and no source labels them, so they would stay as they "
            f"were drawn; the sources label {sorted(labelled)}. Leave them out of [model] heads, "
            "or add a source"
        )
        raise RecipeError(msg)
