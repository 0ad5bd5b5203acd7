"""An annotated image as a model wants it: at its pixel size, with its heads and class ids.

Images are resampled by the arithmetic by which inference reads slides, so that a network
learns from the pixels it will see. Labels are never interpolated: an output pixel bears the
id of the input pixel that its centre lies in.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from wsi_pipeline.errors import RecipeError
from wsi_pipeline.slide.planes import MPP_TOLERANCE
from wsi_pipeline.slide.resample import axis_taps, resample
from wsi_pipeline.spec import HeadSpec, ModelSpec
from wsi_pipeline.training.annotation import (
    IGNORE_CLASS,
    AnnotatedImage,
    BoxLabel,
    ClassLabel,
    InstanceLabel,
    Label,
    PatchLabel,
)

__all__ = ["UNKNOWN_CLASS", "LabelRule", "label_rules", "resampled"]

UNKNOWN_CLASS = ("", "ignore")
"""What a recipe writes for a class whose pixels shall count as unknown."""

_KINDS: dict[str, type[Label]] = {
    "instance": InstanceLabel,
    "class": ClassLabel,
    "patch": PatchLabel,
    "detect": BoxLabel,
}
_WORDS: dict[type[Label], str] = {
    InstanceLabel: "objects by their pixels",
    ClassLabel: "a class for every pixel",
    PatchLabel: "one class for the whole image",
    BoxLabel: "objects by their boxes",
}
T = TypeVar("T", np.int32, np.uint8, np.bool_)


@dataclass(frozen=True, kw_only=True, slots=True)
class LabelRule:
    """Which label of a dataset teaches which head of a model, and how its classes are called."""

    label: str
    """Name in the dataset."""
    head: HeadSpec
    """The model's."""
    classes: Mapping[str, str] = field(default_factory=dict)
    """The dataset's class and the model's, where the names differ."""

    def apply(self, label: Label) -> Label | None:
        """Return the label in the model's class ids; None where it says nothing about the image.

        Raises:
            RecipeError: a label of another kind than the head, or a class the model lacks.
        """
        if not isinstance(label, _KINDS[self.head.kind]):
            msg = (
                f"label {self.label!r} is {_WORDS[type(label)]}, but head {self.head.name!r} is "
                f"of kind {self.head.kind!r}, which learns from {_WORDS[_KINDS[self.head.kind]]}"
            )
            raise RecipeError(msg)
        if isinstance(label, ClassLabel):
            ids = self.class_ids(label.classes)[label.ids]
            return ClassLabel(ids=ids, classes=self.head.classes)
        if isinstance(label, PatchLabel):
            model_id = int(self.class_ids(label.classes)[label.id])
            if model_id == IGNORE_CLASS:
                return None
            return PatchLabel(id=model_id, classes=self.head.classes)
        return label

    def class_ids(self, classes: tuple[str, ...]) -> NDArray[np.uint8]:
        """Return the model's class id for each of the dataset's.

        Id 0 of a class label is "none" by either's name, so it maps to 0 unless the recipe
        says otherwise.

        Args:
            classes: the dataset's names by id.

        Returns:
            (256,) uint8; ``IGNORE_CLASS`` for unknown pixels and for ids beyond the names.

        Raises:
            RecipeError: classes that neither the map nor the model knows.
        """
        table = np.full(256, IGNORE_CLASS, np.uint8)
        known = {name: i for i, name in enumerate(self.head.classes)}
        strange = []
        for i, name in enumerate(classes):
            target = self.classes.get(name, name)
            if name not in self.classes and i == 0 and self.head.kind == "class":
                table[i] = 0
            elif target in known:
                table[i] = known[target]
            elif target not in UNKNOWN_CLASS:
                strange.append(name if target == name else f"{name} (to be {target})")
        if strange:
            msg = (
                f"label {self.label!r}: the classes {strange} are none of head "
                f"{self.head.name!r}, which has {list(self.head.classes)}; map each to one of "
                f'those, or to "ignore", in the classes of a recipe\'s source'
            )
            raise RecipeError(msg)
        return table


def label_rules(
    labels: Mapping[str, tuple[str, ...]],
    spec: ModelSpec,
    *,
    heads: Mapping[str, str],
    classes: Mapping[str, Mapping[str, str]],
) -> tuple[LabelRule, ...]:
    """Decide which labels of a dataset teach which heads of a model.

    Args:
        labels: a dataset's labels and their class names.
        spec: the model.
        heads: label and head, where the names differ; ``""`` leaves a label out. A label
            that is not named teaches the head of its own name, and none where there is none.
        classes: by label: the dataset's class and the model's, where the names differ;
            ``"ignore"`` makes those pixels unknown.

    Returns:
        The rules, in the order of the model's heads; at least one.

    Raises:
        RecipeError: a name that one side does not have, two labels for one head, classes
            that the model lacks, or no label that the model has a head for.
    """
    _check_known("heads", heads, labels)
    _check_known("classes", classes, labels)
    known = {head.name: head for head in spec.heads}
    rules: dict[str, LabelRule] = {}
    for label, names in labels.items():
        name = heads.get(label, label)
        if name not in known:
            if label in heads and name:
                raise RecipeError(f"label {label!r}: no head {name!r}; there are {list(known)}")
            continue
        if name in rules:
            msg = f"labels {rules[name].label!r} and {label!r} are both for head {name!r}"
            raise RecipeError(f"{msg}; leave one out by naming its head as an empty string")
        rule = LabelRule(label=label, head=known[name], classes=classes.get(label, {}))
        _check_classes(rule, names)
        rules[name] = rule
    if not rules:
        msg = f"the model has the heads {list(known)}, the images labels for {list(labels)}"
        raise RecipeError(f"{msg}; say which teaches which")
    return tuple(rules[head.name] for head in spec.heads if head.name in rules)


def resampled(image: AnnotatedImage, mpp: float) -> AnnotatedImage:
    """Bring an image and its labels to another pixel size, corner on corner.

    As for slides, a whole-number reduction by a power of two (or none) is used where it
    comes within 3 % of the wanted pixel size. Pixels are area-averaged when they become
    larger and interpolated linearly when they become smaller. Objects that no output pixel's
    centre lies in keep the pixels they touch.

    Args:
        image: at its own pixel size.
        mpp: wanted micrometres per pixel.

    Returns:
        The image; its ``mpp`` says what was reached. Sizes are rounded to whole pixels.
    """
    ratio = _ratio(image.mpp, mpp)
    if ratio == 1:
        return image
    height, width = image.image.shape[:2]
    size = max(1, round(width / ratio)), max(1, round(height / ratio))
    return AnnotatedImage(
        name=image.name,
        image=_resampled_pixels(image.image, ratio, size),
        mpp=image.mpp * ratio,
        labels={name: _resampled_label(label, ratio, size) for name, label in image.labels.items()},
    )


def _ratio(mpp: float, wanted: float) -> float:
    """Return the input pixels that an output pixel spans."""
    ratio = wanted / mpp
    reduction = 2 ** max(0, round(math.log2(ratio)))
    return reduction if abs(reduction / ratio - 1) <= MPP_TOLERANCE else ratio


def _resampled_pixels(
    pixels: NDArray[np.uint8], ratio: float, size: tuple[int, int]
) -> NDArray[np.uint8]:
    height, width = pixels.shape[:2]
    taps = (
        axis_taps(0, size[0], scale=ratio, offset=0, size=width),
        axis_taps(0, size[1], scale=ratio, offset=0, size=height),
    )
    target = np.empty((size[1], size[0], 3), np.uint8)
    first = taps[0].span[0], taps[1].span[0]
    stop = taps[0].span[1], taps[1].span[1]
    part = np.ascontiguousarray(pixels[first[1] : stop[1], first[0] : stop[0]])
    resample(part, first, taps, target)
    return target


def _resampled_label(label: Label, ratio: float, size: tuple[int, int]) -> Label:
    if isinstance(label, InstanceLabel):
        ids = _nearest(label.ids, ratio, size)
        _restore_lost(label.ids, ids, ratio)
        return InstanceLabel(ids=ids)
    if isinstance(label, ClassLabel):
        return ClassLabel(ids=_nearest(label.ids, ratio, size), classes=label.classes)
    if isinstance(label, BoxLabel):
        ignore = None if label.ignore is None else _nearest(label.ignore, ratio, size)
        return BoxLabel(boxes=(label.boxes / ratio).astype(np.float32), ignore=ignore)
    return label


def _nearest(ids: NDArray[T], ratio: float, size: tuple[int, int]) -> NDArray[T]:
    columns, rows = (
        np.minimum(((np.arange(count) + 0.5) * ratio).astype(np.intp), length - 1)
        for count, length in zip(size, ids.shape[::-1], strict=True)
    )
    nearest: NDArray[T] = ids[rows[:, None], columns]
    return nearest


def _restore_lost(ids: NDArray[np.int32], smaller: NDArray[np.int32], ratio: float) -> None:
    """Paint the objects that nearest sampling has stepped over."""
    lost = np.setdiff1d(ids, smaller)
    lost = lost[lost > 0]
    if not lost.size:
        return
    y, x = np.nonzero(np.isin(ids, lost))
    rows = np.minimum(((y + 0.5) / ratio).astype(np.intp), smaller.shape[0] - 1)
    columns = np.minimum(((x + 0.5) / ratio).astype(np.intp), smaller.shape[1] - 1)
    smaller[rows, columns] = ids[y, x]


def _check_known(what: str, given: Mapping[str, object], labels: Mapping[str, object]) -> None:
    unknown = sorted(set(given) - set(labels))
    if unknown:
        msg = f"{what}: the images have no labels {unknown}; they have {list(labels)}"
        raise RecipeError(msg)


def _check_classes(rule: LabelRule, names: tuple[str, ...]) -> None:
    by_class = rule.head.kind in ("class", "patch")
    if by_class != bool(names):
        has = f"has the classes {list(names)}" if names else "has objects, no classes"
        msg = f"label {rule.label!r} {has}, but head {rule.head.name!r} is of kind"
        raise RecipeError(f"{msg} {rule.head.kind!r}")
    unknown = sorted(set(rule.classes) - set(names))
    if unknown:
        msg = f"label {rule.label!r} has no classes {unknown} to map; it has {list(names)}"
        raise RecipeError(msg)
    rule.class_ids(names)
