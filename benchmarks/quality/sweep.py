"""Other rules by which maps become objects: which of them score better, and by how much.

Maps are made once; objects are found anew for each set of rules. Thresholds are tried first, all
with all, then sizes and growth with the best of them. The score is PQ, pooled over the images of
a set, and the mean over sets. MoNuSeg is never among them. The gain of the best rules has a
paired bootstrap interval; it still flatters, as they were chosen on these images.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import product
from typing import Any

import numpy as np

from benchmarks.quality.measures import known_only
from benchmarks.quality.sets import CROPS, ImageSet
from wsi_pipeline.bundle import ModelBundle, open_bundle
from wsi_pipeline.durable import durable_file
from wsi_pipeline.golden import GOLDEN, write_golden
from wsi_pipeline.metrics import PanopticCounts, bootstrap, mean_defined, panoptic_counts, pooled
from wsi_pipeline.spec import AnchorRules, HeadSpec, ModelSpec, RunRules
from wsi_pipeline.training.annotation import AnnotatedImage, InstanceLabel
from wsi_pipeline.training.judges import Seen
from wsi_pipeline.training.predicted import ImageMaps, ImagePredictor, find_objects

__all__ = ["grids", "sweep", "write_rules"]

log = logging.getLogger(__name__)

MAY_TUNE = ("dsb2018", "ebhi", CROPS)
"""Sets that rules may be chosen on."""
MOST_IMAGES = {False: 48, True: 12}
DRAWS = 1000
SHOWN = 5
"""Rules of each stage that are kept in the result."""
Rules = AnchorRules | RunRules


@dataclass(frozen=True, kw_only=True, slots=True)
class _Shot:
    """An image and its maps."""

    set: str
    patient: str
    image: AnnotatedImage
    maps: ImageMaps


def sweep(predictor: ImagePredictor, sets: Sequence[ImageSet], *, fast: bool) -> dict[str, Any]:
    """Try other rules for every instance head.

    Args:
        predictor: the network.
        sets: images; those that nobody may tune on are left out.
        fast: take few images.

    Returns:
        By head: the present and the best rules, their scores by set, the gain with its interval,
        and the runners-up of each stage.
    """
    shots = [
        shot
        for own in sets
        if own.plan.name in MAY_TUNE
        for shot in _shots(predictor, own, MOST_IMAGES[fast])
    ]
    return {
        head.name: _sweep_head(predictor.spec, head, shots)
        for head in predictor.spec.instance_heads
        if any(head.name in shot.image.labels for shot in shots)
    }


def write_rules(bundle: ModelBundle, found: Mapping[str, Any]) -> ModelBundle:
    """Put the best rules of a sweep into a bundle's ``spec.json``; nothing else of it changes.

    Golden tiles count objects, so where the bundle has some they are written anew.

    Args:
        bundle: what was swept; its digest will be another one.
        found: what :func:`sweep` returned.

    Returns:
        The bundle as it is now.
    """
    heads = tuple(
        replace(head, rules=replace(head.rules, **found[head.name]["best"]["rules"]))
        if head.name in found
        else head
        for head in bundle.spec.heads
    )
    with durable_file(bundle.path / "spec.json") as beside:
        beside.write_text(replace(bundle.spec, heads=heads).to_json(), encoding="utf-8")
    changed = open_bundle(bundle.path)
    if (bundle.path / GOLDEN).is_file():
        write_golden(changed)
    return changed


def grids(rules: Rules) -> list[dict[str, tuple[float, ...]]]:
    """Return the values to try, stage by stage; the present ones are always among them."""
    if isinstance(rules, AnchorRules):
        stages: list[dict[str, tuple[float, ...]]] = [
            {
                "inner_threshold": (0.4, 0.5, 0.6, 0.7),
                "foreground_threshold": (0.5, 0.6, 0.7, 0.8, 0.9),
            },
            {
                "min_core_um2": (1.0, 2.0, 4.0),
                "min_area_um2": (2.0, 6.0, 10.0),
                "grow_um": (1.0, 1.5, 2.0),
            },
        ]
    else:
        core = rules.min_core_um2
        stages = [
            {
                "inner_threshold": (0.3, 0.4, 0.5, 0.6, 0.7),
                "contour_threshold": (0.3, 0.4, 0.5, 0.6, 1.0),
            },
            {
                "min_core_um2": (core / 2, core, core * 2, core * 4),
                "grow_um": tuple(max(0.0, rules.grow_um + step) for step in (-2, 0, 1, 2, 4)),
            },
        ]
    return [
        {name: tuple(sorted({*values, getattr(rules, name)})) for name, values in stage.items()}
        for stage in stages
    ]


def _shots(predictor: ImagePredictor, own: ImageSet, at_most: int) -> Iterator[_Shot]:
    step = -(-len(own.images) // at_most)  # evenly: images come sorted by group
    for held in own.images[::step]:
        image = held.load()
        yield _Shot(
            set=own.plan.name,
            patient=held.item.patient,
            image=image,
            maps=predictor.predict(image.image),
        )


def _sweep_head(spec: ModelSpec, head: HeadSpec, shots: Sequence[_Shot]) -> dict[str, Any]:
    own = [shot for shot in shots if isinstance(shot.image.labels.get(head.name), InstanceLabel)]
    assert isinstance(head.rules, AnchorRules | RunRules)
    present = best = head.rules
    counts = {present: _counts(spec, head, present, own)}
    stages = []
    for stage in grids(present):
        tried = [
            replace(best, **dict(zip(stage, values, strict=True)))
            for values in product(*stage.values())
        ]
        for rules in tried:
            if rules not in counts:
                counts[rules] = _counts(spec, head, rules, own)
        ranked = sorted(tried, key=lambda rules: _mean(counts[rules], own), reverse=True)
        best = ranked[0]
        stages.append(
            [
                {name: getattr(rules, name) for name in stage}
                | {"score": round(_mean(counts[rules], own), 4)}
                for rules in ranked[:SHOWN]
            ]
        )
    gain = _gain(counts[present], counts[best], own)
    log.info("%s: %+.4f (%.4f to %.4f) by %s", head.name, *gain.values(), best)
    return {
        "images": {name: sum(shot.set == name for shot in own) for name in _names(own)},
        "present": {"rules": asdict(present), "pq": _by_set(counts[present], own)},
        "best": {"rules": asdict(best), "pq": _by_set(counts[best], own)},
        "gain": gain,
        "stages": stages,
    }


def _counts(
    spec: ModelSpec, head: HeadSpec, rules: Rules, shots: Sequence[_Shot]
) -> list[PanopticCounts]:
    """Return the counts of each image under some rules."""
    alone = _alone(spec, replace(head, rules=rules))
    counts = []
    for shot in shots:
        maps = ImageMaps(spec=alone, size=shot.maps.size, arrays=shot.maps.arrays)
        seen = Seen(image=shot.image, maps=maps, found=find_objects(maps))
        if head.name == "lumen":
            seen = known_only(seen, head.name)
        label = shot.image.labels[head.name]
        assert isinstance(label, InstanceLabel)
        counts.append(panoptic_counts(seen.overlap(head.name, label)))
    return counts


def _alone(spec: ModelSpec, head: HeadSpec) -> ModelSpec:
    """Return a model of one head, and of the head that confines it if there is one."""
    if not head.inside_parent:
        return replace(spec, heads=(replace(head, parent=None),))
    assert head.parent is not None
    return replace(spec, heads=(replace(spec.head(head.parent), parent=None), head))


def _names(shots: Sequence[_Shot]) -> list[str]:
    return list(dict.fromkeys(shot.set for shot in shots))


def _by_set(counts: Sequence[PanopticCounts], shots: Sequence[_Shot]) -> dict[str, float]:
    pairs = list(zip(counts, shots, strict=True))
    return {
        name: round(pooled([own for own, shot in pairs if shot.set == name]).pq, 4)
        for name in _names(shots)
    }


def _mean(counts: Sequence[PanopticCounts], shots: Sequence[_Shot]) -> float:
    return mean_defined(_by_set(counts, shots).values())


def _gain(
    present: Sequence[PanopticCounts], best: Sequence[PanopticCounts], shots: Sequence[_Shot]
) -> Mapping[str, float]:
    def gained(drawn: np.ndarray) -> dict[str, float]:
        own = [shots[index] for index in drawn]
        values = [_mean([counts[index] for index in drawn], own) for counts in (best, present)]
        return {"gain": values[0] - values[1]}

    patients = [f"{shot.set}/{shot.patient}" for shot in shots]
    found = bootstrap(gained, len(shots), clusters=patients, draws=DRAWS)["gain"]
    return {
        "value": round(found.value, 4),
        "low": round(found.low, 4),
        "high": round(found.high, 4),
    }
