"""Where to kill: points spread over the stages of a scenario."""

from __future__ import annotations

from collections import defaultdict

import numpy as np

from benchmarks.kills.countdown import Point
from benchmarks.kills.scenarios import Scenario

__all__ = ["again", "choose"]

TIMES_SHARE = 6
"""One point in so many is a time, the others are changes to the file system."""


def choose(scenario: Scenario, count: int, rng: np.random.Generator) -> list[Point]:
    """Choose kill points: times, and changes spread evenly over the stages that make any."""
    times = count // TIMES_SHARE
    points = [
        Point(after_s=scenario.seconds * (number + rng.random()) / times) for number in range(times)
    ]
    by_stage: dict[str, list[int]] = defaultdict(list)
    for number, (stage, _) in enumerate(scenario.changes):
        by_stage[stage].append(number)
    left = count - times
    chosen: list[int] = []
    for index, numbers in enumerate(sorted(by_stage.values(), key=len)):
        share = min(len(numbers), -(-(left - len(chosen)) // (len(by_stage) - index)))
        places = np.linspace(0, len(numbers) - 1, share).round().astype(int)
        chosen += [numbers[place] for place in places]
    extra = left - len(chosen)
    # What is renamed was just written; a kill may come before its last byte.
    torn = [n for n, (_, event) in enumerate(scenario.changes) if event == "os.rename"]
    torn = [int(n) for n in rng.permutation(torn)][: max(extra, len(chosen) // 4)]
    points += [Point(at=number, is_torn=True) for number in torn]
    plain = [number for number in chosen if number not in torn] + chosen
    points += [Point(at=number) for number in plain[: count - len(points)]]
    return points[:count]


def again(scenario: Scenario, number: int, rng: np.random.Generator) -> Point | None:
    """Choose where the run after a kill is killed, too; two in five are."""
    if number % 5 == 0:
        return Point(after_s=scenario.seconds * rng.random())
    return Point(at=int(rng.integers(len(scenario.changes)))) if number % 5 == 1 else None
