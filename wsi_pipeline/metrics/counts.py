"""Scores as sums: what one image adds, and the score of any number of images.

An image yields counts; counts of several images are added; a score is a property of counts.
So one score is at hand for each image, for a whole set, and for each resample of the set.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from functools import reduce
from operator import add
from typing import Self, TypeVar

import numpy as np
from numpy.typing import NDArray

__all__ = [
    "Counts",
    "DetectionCounts",
    "check_classes",
    "mean_defined",
    "pooled",
    "pooled_classes",
    "ratio",
]


class Counts:
    """Something that is added field by field; the base of all counts."""

    __slots__ = ()

    def __add__(self, other: Self) -> Self:
        names = [field.name for field in fields(self)]  # type: ignore[arg-type]
        return type(self)(**{name: getattr(self, name) + getattr(other, name) for name in names})


C = TypeVar("C", bound=Counts)


@dataclass(frozen=True, kw_only=True, slots=True)
class DetectionCounts(Counts):
    """How many objects were found.

    All three scores are NaN where they would divide by zero: there is nothing to judge.
    """

    tp: int = 0
    """True objects that were found; as many predicted objects found them."""
    fp: int = 0
    """Predicted objects without a true one."""
    fn: int = 0
    """True objects without a predicted one."""

    @property
    def precision(self) -> float:
        """Share of the predicted objects that are true."""
        return ratio(self.tp, self.tp + self.fp)

    @property
    def recall(self) -> float:
        """Share of the true objects that were found."""
        return ratio(self.tp, self.tp + self.fn)

    @property
    def f1(self) -> float:
        """Harmonic mean of precision and recall; NaN where nothing is true or predicted."""
        return ratio(2 * self.tp, 2 * self.tp + self.fp + self.fn)


def ratio(part: float, whole: float, *, empty: float = math.nan) -> float:
    """Return ``part / whole``, or ``empty`` where the whole is zero."""
    return part / whole if whole else empty


def pooled(parts: Sequence[C]) -> C:
    """Return the sum of the counts of one or more images.

    Raises:
        ValueError: there are none.
    """
    if not parts:
        raise ValueError("no counts to pool: at least one image is needed")
    return reduce(add, parts)


def pooled_classes(images: Sequence[Sequence[C]]) -> tuple[C, ...]:
    """Return the sums by class; ``images`` holds the counts of each class for each image."""
    return tuple(pooled(parts) for parts in zip(*images, strict=True))


def mean_defined(values: Iterable[float]) -> float:
    """Return the mean of the values that are not NaN, or NaN where there are none."""
    defined = [value for value in values if not math.isnan(value)]
    return ratio(sum(defined), len(defined))


def check_classes(name: str, ids: NDArray[np.integer], n_classes: int) -> None:
    """Raise ``ValueError`` unless all ids are in 0..n_classes - 1."""
    if ids.size and (ids.min() < 0 or ids.max() >= n_classes):
        msg = f"{name}: class ids {ids.min()}..{ids.max()}, wanted 0..{n_classes - 1}"
        raise ValueError(msg)
