"""Scores of a network on annotated images, by the pipeline's own maps and objects.

::

    HeldOut.load -> ImagePredictor -> maps -> objects -> a judge a head -> scores, intervals
      at model's mpp   inference              instances     metrics         bootstrap: patients
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from wsi_pipeline.errors import DatasetError
from wsi_pipeline.metrics import bootstrap, mean_defined
from wsi_pipeline.spec import PeakRules
from wsi_pipeline.training.annotation import (
    BoxLabel,
    InstanceLabel,
    PatchLabel,
)
from wsi_pipeline.training.begin import HeldOut
from wsi_pipeline.training.judges import MAIN_SCORES, Judge, Seen, make_judge, order_rows
from wsi_pipeline.training.pictures import Panel
from wsi_pipeline.training.predicted import (
    FoundObjects,
    ImageMaps,
    ImagePredictor,
    find_objects,
    patch_probabilities,
)

__all__ = ["Evaluation", "Score", "evaluate"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Score:
    """A score and, if asked for, its interval."""

    value: float
    """NaN where it is undefined."""
    low: float | None = None
    """Lower end of the 95 % interval; None without a bootstrap."""
    high: float | None = None
    """Upper end."""

    def to_json(self) -> dict[str, float | None]:
        """Return numbers, null for NaN."""
        ends = {} if self.low is None else {"low": _number(self.low), "high": _number(self.high)}
        return {"value": _number(self.value), **ends}


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Scores of one network on one set of images."""

    images: int
    """How many were judged."""
    patients: int
    """How many they are from."""
    heads: Mapping[str, Mapping[str, Score]]
    """Scores by head; a head that no image is labelled for is absent."""
    details: Mapping[str, Mapping[str, Any]]
    """By head: counts, confusion tables."""
    groups: Mapping[str, Mapping[str, Mapping[str, Score]]]
    """By group of images and head: the same scores without intervals."""
    main: Mapping[str, str]
    """By head: the score by which networks are compared."""
    about: Mapping[str, Any] = field(default_factory=dict)
    """What was judged on what, and how."""
    examples: tuple[Panel, ...] = ()
    """Some images with truth and prediction, in turn from all groups."""

    @property
    def score(self) -> float:
        """Mean of the heads' main scores; NaN where none is defined."""
        return mean_defined(self.heads[head][name].value for head, name in self.main.items())

    def scores(self) -> dict[str, dict[str, float | None]]:
        """Return the main score of each head, for a log."""
        return {
            head: {name: _number(self.heads[head][name].value)} for head, name in self.main.items()
        }

    def to_json(self) -> dict[str, Any]:
        """Return everything but the pictures, for JSON."""
        return {
            "about": dict(self.about),
            "images": self.images,
            "patients": self.patients,
            "score": _number(self.score),
            "heads": {head: _scores_json(own) for head, own in self.heads.items()},
            "details": {head: dict(own) for head, own in self.details.items()},
            "groups": {
                group: {head: _scores_json(own) for head, own in heads.items()}
                for group, heads in self.groups.items()
            },
        }


def evaluate(
    predictor: ImagePredictor,
    images: Sequence[HeldOut],
    *,
    resamples: int = 1000,
    examples: int = 12,
    watching: bool = False,
) -> Evaluation:
    """Judge a network on images that it has not learnt from.

    Args:
        predictor: the network.
        images: what to judge; they are read one by one.
        resamples: draws of the bootstrap over patients; 0: no intervals.
        examples: how many of the first images are kept for pictures.
        watching: leave out what is slow on the poor maps of a network that is still learning
            (Hausdorff distances).

    Raises:
        DatasetError: no image, or one that cannot be read.
    """
    if not images:
        raise DatasetError("there is no image to judge the network on")
    spec = predictor.spec
    judges = {head.name: make_judge(head, spec, watching=watching) for head in spec.heads}
    kept: list[Panel] = []
    for number, held in enumerate(images):
        image = held.load()
        maps = predictor.predict(image.image)
        found = find_objects(_all_peaks(maps))
        seen = Seen(image=image, maps=maps, found=found)
        for judge in judges.values():
            judge.look(number, seen)
        if len(kept) < examples:
            kept.append(_panel(seen, held.item.group))
    used = {name: judge for name, judge in judges.items() if judge.images}
    patients = [f"{held.source.name}/{held.item.patient}" for held in images]
    groups: dict[str, list[int]] = {}
    for number, held in enumerate(images):
        groups.setdefault(held.item.group or held.source.name, []).append(number)
    return Evaluation(
        images=len(images),
        patients=len(set(patients)),
        heads={name: _scored(judge, patients, resamples) for name, judge in used.items()},
        details={name: judge.details(np.arange(len(judge.images))) for name, judge in used.items()},
        groups={group: _group_scores(used, numbers) for group, numbers in groups.items()}
        if len(groups) > 1
        else {},
        main={name: MAIN_SCORES[spec.head(name).kind] for name in used},
        examples=tuple(kept),
    )


def _scored(judge: Judge, patients: Sequence[str], resamples: int) -> dict[str, Score]:
    if not resamples:
        return {n: Score(value=v) for n, v in judge.scores(np.arange(len(judge.images))).items()}
    intervals = bootstrap(
        judge.scores,
        len(judge.images),
        clusters=[patients[number] for number in judge.images],
        draws=resamples,
    )
    return {
        name: Score(value=own.value, low=own.low, high=own.high) for name, own in intervals.items()
    }


def _group_scores(
    judges: Mapping[str, Judge], numbers: Sequence[int]
) -> dict[str, dict[str, Score]]:
    scores = {}
    for name, judge in judges.items():
        rows = order_rows(judge.images, numbers)
        if len(rows):
            scores[name] = {n: Score(value=v) for n, v in judge.scores(rows).items()}
    return scores


def _all_peaks(maps: ImageMaps) -> ImageMaps:
    """Ask detect heads for faint objects too: FROC and AP need all thresholds."""
    heads = tuple(
        replace(head, rules=replace(head.rules, threshold=min(0.02, head.rules.threshold)))
        if isinstance(head.rules, PeakRules)
        else head
        for head in maps.spec.heads
    )
    return ImageMaps(spec=replace(maps.spec, heads=heads), size=maps.size, arrays=maps.arrays)


def _panel(seen: Seen, group: str | None) -> Panel:
    truth: dict[str, NDArray[Any]] = {}
    found: dict[str, NDArray[Any]] = {}
    words = [seen.image.name] + ([group] if group else [])
    for head in seen.maps.spec.heads:
        label = seen.image.labels.get(head.name)
        if isinstance(label, InstanceLabel):
            truth[head.name] = label.ids
        elif isinstance(label, BoxLabel):
            truth[head.name] = label.boxes
        elif isinstance(label, PatchLabel):
            guess = head.classes[int(patch_probabilities(seen.maps, head).argmax())]
            words.append(f"{head.classes[label.id]}, called {guess}")
        if isinstance(head.rules, PeakRules):
            found[head.name] = _sure_boxes(seen.found[head.name], head.rules)
        elif head.name in seen.found:
            found[head.name] = seen.drawn(head.name)
    return Panel(image=seen.image.image, truth=truth, found=found, caption=" - ".join(words))


def _sure_boxes(own: FoundObjects, rules: PeakRules) -> NDArray[np.float32]:
    bounds = [polygon.bounds for polygon in own.polygons[own.scores > rules.threshold]]
    return np.array(bounds, np.float32).reshape(-1, 4)


def _scores_json(scores: Mapping[str, Score]) -> dict[str, dict[str, float | None]]:
    return {name: score.to_json() for name, score in scores.items()}


def _number(value: float | None) -> float | None:
    return None if value is None or not math.isfinite(value) else round(value, 6)
