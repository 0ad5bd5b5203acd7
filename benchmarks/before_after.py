"""Stages of `wsi bench` in two checkouts, by turns: what a change of the code gained.

    python -m benchmarks.before_after --before FOLDER --slide SLIDE --model cerberus-lite

FOLDER holds the older `wsi_pipeline` (`git worktree add FOLDER COMMIT`). Each round starts a
process for each of both, which measures work and limit of the stages in turn: by the clock, and
by the processor time of all threads, which other programs on the machine disturb less. Medians
of all rounds; `ratio` is work over limit, within a round.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

STAGES = ("read", "maps", "objects")
HERE = Path(__file__).resolve().parent.parent
CLOCKS = {"wall_s": time.perf_counter, "cpu_s": time.process_time}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--before", type=Path, required=True, help="the older checkout")
    parser.add_argument("--slide", type=Path, required=True)
    parser.add_argument("--model", default="cerberus-lite")
    parser.add_argument("--rounds", type=int, default=3, help="[3]")
    parser.add_argument("--repeat", type=int, default=3, help="in each process  [3]")
    parser.add_argument("--json", type=Path, help="write the figures there, too")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        print(json.dumps(measured(args.slide, args.model, args.repeat)))
        return 0
    found: dict[str, list[Any]] = {"before": [], "after": []}
    for _ in range(args.rounds):
        for name, folder in (("before", args.before), ("after", HERE)):
            found[name] += rounds_in(folder, args)
    figures = {
        "slide": args.slide.name,
        "model": args.model,
        "load": os.getloadavg()[0],
        "medians": {name: medians(rounds) for name, rounds in found.items()},
        "rounds": found,
    }
    if args.json:
        args.json.write_text(json.dumps(figures, indent=1) + "\n")
    print(json.dumps(figures["medians"], indent=1))
    return 0


def rounds_in(folder: Path, args: argparse.Namespace) -> list[Any]:
    """Measure with the package of a folder, in a process of its own."""
    command = [sys.executable, str(Path(__file__).resolve()), "--child", "--before", ".",
               "--slide", str(args.slide.resolve()), "--model", args.model,
               "--repeat", str(args.repeat)]  # fmt: skip
    environment = {**os.environ, "PYTHONPATH": str(folder.resolve()), "PYTHONSAFEPATH": "1"}
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, check=True, text=True)
    rounds: list[Any] = json.loads(done.stdout.splitlines()[-1])
    return rounds


def measured(slide: Path, model: str, repeat: int) -> list[dict[str, dict[str, float]]]:
    """Return seconds of work and limit by stage, a dictionary a round."""
    from wsi_pipeline.bench.stages import stages_of
    from wsi_pipeline.bench.subject import BenchOptions, prepared
    from wsi_pipeline.machine import keep_freed_memory

    keep_freed_memory()  # as wsi-run and wsi bench do
    rounds = []
    with tempfile.TemporaryDirectory() as folder:
        options = BenchOptions(slide=slide, model=model)
        with prepared(options, Path(folder)) as subject:
            stages = [stage for stage in stages_of(subject) if stage.name in STAGES]
            for _ in range(repeat + 1):
                found = {}
                for stage in stages:
                    assert stage.limit is not None
                    found[stage.name] = {
                        f"{what}_{unit}": seconds
                        for unit, clock in CLOCKS.items()
                        for what, seconds in (
                            ("work", stage.work(clock)),
                            ("limit", stage.limit(clock).seconds),
                        )
                    }
                rounds.append(found)
    return rounds[1:]  # the first one compiles


def medians(rounds: list[dict[str, dict[str, float]]]) -> dict[str, dict[str, float]]:
    """Return the median of each figure, and of the ratios within the rounds."""
    result = {}
    for name in rounds[0]:
        figures = {
            key: round(statistics.median(each[name][key] for each in rounds), 3)
            for key in rounds[0][name]
        }
        for unit in CLOCKS:
            ratios = (each[name][f"work_{unit}"] / each[name][f"limit_{unit}"] for each in rounds)
            figures[f"ratio_{unit.removesuffix('_s')}"] = round(statistics.median(ratios), 2)
        result[name] = figures
    return result


if __name__ == "__main__":
    sys.exit(main())
