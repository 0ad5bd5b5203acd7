"""A network on all sets: every image is predicted once, and every measure looks at it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.quality.measures import (
    CalledArea,
    Measure,
    Objects,
    OneGland,
    known_only,
    whole_only,
)
from benchmarks.quality.sets import CROPS, ImageSet
from wsi_pipeline.metrics import bootstrap
from wsi_pipeline.spec import ModelSpec
from wsi_pipeline.training.begin import HeldOut
from wsi_pipeline.training.judges import Seen
from wsi_pipeline.training.predicted import ImagePredictor, find_objects

__all__ = ["Judged", "judge_set", "measures_for", "scores_json", "see"]

log = logging.getLogger(__name__)

MIN_PATIENTS = 5
"""With fewer patients the bootstrap draws images: intervals are then too narrow."""
GROUP_DRAWS = 300
"""At most so many draws of the bootstrap for a group of images (a diagnosis, a slide)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Judged:
    """A set and what was measured on it."""

    set: ImageSet
    """The images."""
    measures: Mapping[str, Measure]
    """By name; those that no image was labelled for are absent."""


def see(predictor: ImagePredictor, held: HeldOut) -> Seen:
    """Load an image and find its objects."""
    image = held.load()
    maps = predictor.predict(image.image)
    return Seen(image=image, maps=maps, found=find_objects(maps))


def measures_for(name: str, spec: ModelSpec) -> dict[str, Measure]:
    """Return what is measured on a set, as far as the network has the heads."""
    objects: dict[str, Measure] = {}
    for head in (head.name for head in spec.instance_heads):
        objects[head] = Objects(spec, head, known_only if head == "lumen" else None)
    if "gland" not in objects:
        return objects
    if name == "pt1":
        return {"one gland": OneGland("gland")}
    if name == "kather":
        return {"gland area": CalledArea("gland")}
    if name == "ebhi":
        return {**objects, "whole gland": Objects(spec, "gland", whole_only)}
    if name == CROPS:
        return {**objects, "gland area": CalledArea("gland")}
    return objects


def judge_set(predictor: ImagePredictor, images: ImageSet) -> Judged:
    """Predict the images of a set and measure."""
    measures = measures_for(images.plan.name, predictor.spec)
    for number, held in enumerate(images.images):
        seen = see(predictor, held)
        for measure in measures.values():
            measure.look(number, seen)
        if number % 50 == 49:
            log.info("%s: %d of %d images", images.plan.name, number + 1, len(images.images))
    used = {name: measure for name, measure in measures.items() if measure.images}
    for name in measures.keys() - used.keys():
        log.info("%s: no image can be judged for %s", images.plan.name, name)
    return Judged(set=images, measures=used)


def scores_json(judged: Judged, *, draws: int) -> dict[str, Any]:
    """Return the scores of a set with their intervals, for JSON.

    Args:
        judged: the set.
        draws: of the bootstrap, over patients where there are enough of them.
    """
    held = judged.set.images
    measures = {name: _measured(own, held, draws) for name, own in judged.measures.items()}
    return {
        "title": judged.set.plan.title,
        "standing": judged.set.standing,
        "images": len(held),
        "patients": len({one.item.patient for one in held}),
        "measures": measures,
    }


def _measured(measure: Measure, held: Sequence[HeldOut], draws: int) -> dict[str, Any]:
    own = [held[number] for number in measure.images]
    rows = np.arange(len(own))
    unit, scores = _intervals(measure, rows, own, draws)
    groups: dict[str, list[int]] = {}
    for row, one in enumerate(own):
        groups.setdefault(one.item.group or "", []).append(row)
    by_group = {}
    if len(groups) > 1:
        for group, chosen in sorted(groups.items()):
            few = min(draws, GROUP_DRAWS)
            drawn, values = _intervals(measure, np.array(chosen), own, few)
            by_group[group] = {"images": len(chosen), "drawn": drawn, "scores": values}
    by_image = {one.item.name: _plain(measure, row) for row, one in enumerate(own)}
    return {
        "images": len(own),
        "drawn": unit,
        "scores": scores,
        "details": measure.details(rows),
        **({"groups": by_group} if by_group else {}),
        **({"by_image": by_image} if len(own) <= 40 else {}),
    }


def _intervals(
    measure: Measure, rows: NDArray[np.intp], own: Sequence[HeldOut], draws: int
) -> tuple[str, dict[str, Any]]:
    """Return what was drawn, and each score with its 95 % interval."""
    patients = [own[row].item.patient for row in rows]
    by_patient = len(set(patients)) >= MIN_PATIENTS
    statistic: Callable[[NDArray[np.intp]], Mapping[str, float]]
    statistic = lambda drawn: measure.scores(rows[drawn])  # noqa: E731
    found = bootstrap(statistic, len(rows), clusters=patients if by_patient else None, draws=draws)
    numbers = {
        name: {
            "value": _number(one.value),
            "low": _number(one.low),
            "high": _number(one.high),
        }
        for name, one in found.items()
    }
    return "patients" if by_patient else "images", numbers


def _plain(measure: Measure, row: int) -> dict[str, float | None]:
    return {name: _number(value) for name, value in measure.scores(np.array([row])).items()}


def _number(value: float) -> float | None:
    return round(float(value), 6) if np.isfinite(value) else None
