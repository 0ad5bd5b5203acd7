"""Stages of `wsi bench` in two checkouts, by turns: what a change of the code gained.

    python -m benchmarks.before_after --before FOLDER --slide SLIDE --model cerberus-lite

FOLDER holds the older `wsi_pipeline` (`git worktree add FOLDER COMMIT`). Each round starts a
process for each of both, which measures work and limit of the stages in turn: by the clock, and
by the processor time of all threads, which other programs on the machine disturb less. Medians
of all rounds; `ratio` is work over limit, within a round.

`--writers` writes maps with so many threads (4 beside a GPU). `--journal-ms` puts a slow disk below
whose file system has a journal, one commit of which takes so long; a sync waits for one that begins
after it. The commits that were waited for are counted.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
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
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=list(STAGES))
    parser.add_argument("--writers", type=int, help="of maps  [as the device has it]")
    parser.add_argument("--journal-ms", type=float, help="what a commit of the disk takes")
    parser.add_argument("--json", type=Path, help="write the figures there, too")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        print(json.dumps(measured(args)))
        return 0
    found: dict[str, list[Any]] = {"before": [], "after": []}
    for _ in range(args.rounds):
        for name, folder in (("before", args.before), ("after", HERE)):
            found[name] += rounds_in(folder, args)
    figures = {
        "slide": args.slide.name,
        "model": args.model,
        "writers": args.writers,
        "journal_ms": args.journal_ms,
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
               "--repeat", str(args.repeat), "--stages", *args.stages]  # fmt: skip
    for name in ("writers", "journal_ms"):
        if getattr(args, name) is not None:
            command += [f"--{name.replace('_', '-')}", str(getattr(args, name))]
    environment = {**os.environ, "PYTHONPATH": str(folder.resolve()), "PYTHONSAFEPATH": "1"}
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, check=True, text=True)
    rounds: list[Any] = json.loads(done.stdout.splitlines()[-1])
    return rounds


def measured(args: argparse.Namespace) -> list[dict[str, dict[str, float]]]:
    """Return seconds of work and limit by stage, a dictionary a round."""
    from wsi_pipeline.bench import stages
    from wsi_pipeline.bench.subject import BenchOptions, prepared
    from wsi_pipeline.machine import keep_freed_memory

    keep_freed_memory()  # as wsi-run and wsi bench do
    if args.writers is not None:
        stages.writers_beside = lambda device: args.writers
    rounds = []
    with tempfile.TemporaryDirectory() as folder:
        options = BenchOptions(slide=args.slide, model=args.model)
        with prepared(options, Path(folder)) as subject:
            chosen = [stage for stage in stages.stages_of(subject) if stage.name in args.stages]
            journal = None if args.journal_ms is None else Journal(args.journal_ms / 1000)
            for _ in range(args.repeat + 1):
                rounds.append({stage.name: in_turn(stage, journal) for stage in chosen})
    return rounds[1:]  # the first one compiles


def in_turn(stage: Any, journal: Journal | None) -> dict[str, float]:
    """Measure work and limit of a stage, by each clock; count commits, if a journal does."""
    found: dict[str, float] = {}
    for unit, clock in CLOCKS.items():
        for what in ("work", "limit"):
            before = 0 if journal is None else journal.finished
            done = stage.work(clock) if what == "work" else stage.limit(clock).seconds
            found[f"{what}_{unit}"] = done
            if journal is not None:
                found[f"{what}_commits"] = journal.finished - before
    return found


class Journal:
    """Takes the place of ``os.fsync``: a commit takes a while, and serves whoever came before."""

    def __init__(self, seconds: float) -> None:
        self.finished = 0
        self._begun = 0
        self._seconds = seconds
        self._changed = threading.Condition()
        os.fsync = self._sync

    def _sync(self, descriptor: int) -> None:
        with self._changed:
            turn = self._begun + 1
            while self.finished < turn:
                if self._begun > self.finished:
                    self._changed.wait()
                    continue
                self._begun += 1
                self._changed.release()
                time.sleep(self._seconds)
                self._changed.acquire()
                self.finished = self._begun
                self._changed.notify_all()


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
