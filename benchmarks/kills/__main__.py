"""Kills the work at a slide at points spread over all its stages, and runs it again.

::

    python -m benchmarks.kills                          # 240 points
    python -m benchmarks.kills --points 60 --keep DIR   # fewer; what went wrong stays in DIR

Every point is a process of its own, forked from one that has run the job before, and ended by
SIGKILL: at a change to the file system (counted by an audit hook: files opened for writing,
renames, removals, folders, syncs), at one that leaves the file it was about half written, or after
a time. Then the job is run again (some of these runs are killed, too), and must end as if
nothing had happened: the same bytes of tables, maps and pictures, a report that says done, and no
other file anywhere.

Ends with 1 if any point does not.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
from collections import Counter
from pathlib import Path

import numpy as np

from benchmarks.kills.choice import again, choose
from benchmarks.kills.countdown import STAGES
from benchmarks.kills.scenarios import prepare, scenarios, settle
from benchmarks.kills.trial import Outcome, measured, try_until_killed


def walk(folder: Path, *, points: int, seed: int) -> dict[str, list[Outcome]]:
    """Go through kill points; return their outcomes by scenario."""
    prepare()
    rng = np.random.default_rng(seed)
    listed = scenarios(folder)
    listed[-1].work(folder / "warm")
    settle()
    outcomes: dict[str, list[Outcome]] = {}
    for index, plan in enumerate(listed):
        scenario = measured(plan, folder / f"whole {index}")
        left = sum(other.weight for other in listed[index:])
        share = round((points - sum(map(len, outcomes.values()))) * scenario.weight / left)
        outcomes[scenario.name] = [
            try_until_killed(scenario, point, again(scenario, number, rng), folder / str(number))
            for number, point in enumerate(choose(scenario, share, rng))
        ]
        shutil.rmtree(folder / f"whole {index}")
    return outcomes


def table(outcomes: dict[str, list[Outcome]]) -> str:
    """Return the numbers of clean kill points by scenario and stage."""
    lines = [f"{'':16}" + "".join(f"{stage:>11}" for stage in STAGES) + f"{'too late':>11}"]
    for name, own in outcomes.items():
        counts = Counter(o.stage if o.killed else "too late" for o in own if not o.complaints)
        cells = [f"{counts[stage]:>11}" for stage in (*STAGES, "too late")]
        lines.append(f"{name:16}" + "".join(cells))
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    """Run as a command."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.kills", description=__doc__)
    parser.add_argument("--points", type=int, default=240)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep", type=Path, help="folder for what went wrong")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.keep or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        outcomes = walk(folder.resolve(), points=options.points, seed=options.seed)
    listed = [outcome for own in outcomes.values() for outcome in own]
    clean = sum(outcome.killed and not outcome.complaints for outcome in listed)
    print(table(outcomes))
    print(f"{clean} of {len(listed)} kill points: same bytes")
    return 0 if clean == len(listed) else 1


if __name__ == "__main__":
    sys.exit(main())
