"""How much a score would vary with other images: percentile bootstrap intervals.

Images are drawn with replacement and the score is computed anew from the images drawn, so a
score that pools counts over images is pooled for each draw. Images of one patient are alike:
draw patients, not images, wherever patients are known.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

__all__ = ["Interval", "bootstrap"]

Statistic = Callable[[NDArray[np.intp]], Mapping[str, float]]


@dataclass(frozen=True, kw_only=True, slots=True)
class Interval:
    """A score and the range it would have in other samples of images."""

    value: float
    """The score of the images at hand."""
    low: float
    """Lower end; NaN where no draw defined the score."""
    high: float
    """Upper end."""
    draws: int
    """Draws that defined the score; few of them, or few images: a poor interval."""


def bootstrap(
    statistic: Statistic,
    n_images: int,
    *,
    clusters: Sequence[str] | None = None,
    draws: int = 1000,
    level: float = 0.95,
    seed: int = 0,
) -> dict[str, Interval]:
    """Return each score with its percentile interval.

    The ends are order statistics of the draws, without interpolation. Draws for which a
    score is NaN are left out for that score. The same arguments give the same intervals.

    >>> scores = np.array([0.25, 0.5, 0.75])
    >>> bootstrap(lambda drawn: {"mean": scores[drawn].mean()}, 3)["mean"].value
    0.5

    Args:
        statistic: takes indices of images, some repeated, and returns scores by name.
        n_images: number of images; an index is below it.
        clusters: for each image what it belongs to, its patient. Whole clusters are drawn,
            as many as there are.
        draws: how many.
        level: the share of the draws between the ends.
        seed: of the draws.

    Raises:
        ValueError: no image, a cluster missing, no draw, or a level not between 0 and 1.
    """
    if n_images < 1 or draws < 1 or not 0 < level < 1:
        msg = f"{n_images} images, {draws} draws, level {level}: 1, 1 and a share wanted"
        raise ValueError(msg)
    members = _members(n_images, clusters)
    rng = np.random.default_rng(seed)
    value = statistic(np.arange(n_images))
    drawn: dict[str, list[float]] = {name: [] for name in value}
    for _ in range(draws):
        chosen = rng.integers(len(members), size=len(members))
        scores = statistic(np.concatenate([members[index] for index in chosen]))
        for name, values in drawn.items():
            values.append(scores[name])
    return {name: _interval(value[name], np.array(drawn[name]), level) for name in value}


def _members(n_images: int, clusters: Sequence[str] | None) -> list[NDArray[np.intp]]:
    if clusters is None:
        return list(np.arange(n_images)[:, None])
    if len(clusters) != n_images:
        raise ValueError(f"{n_images} images, but clusters for {len(clusters)}")
    # In the order in which they are met: names do not decide what is drawn.
    numbers = {name: number for number, name in enumerate(dict.fromkeys(clusters))}
    owner = np.array([numbers[name] for name in clusters])
    return [np.flatnonzero(owner == number) for number in range(len(numbers))]


def _interval(value: float, scores: NDArray[np.float64], level: float) -> Interval:
    defined = scores[~np.isnan(scores)]
    low = high = float("nan")
    if defined.size:
        tails = [(1 - level) / 2, (1 + level) / 2]
        low, high = np.quantile(defined, tails, method="inverted_cdf").tolist()
    return Interval(value=float(value), low=low, high=high, draws=defined.size)
