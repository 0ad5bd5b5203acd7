"""How soon a command answers: the help, and the first block of maps of a slide.

    python -m benchmarks.startup [SLIDE] [--model cerberus-lite] [--repeat 5]

Without a SLIDE a synthetic one of 4096 x 4096 px is written. Every figure is the median of
processes of their own, after one that is not counted (it fills the caches of compiled loops and
of the disk). Prints JSON in seconds from the start of the process: of the first block ``program``
(libraries), ``model`` (found, weights loaded), ``tissue`` (slide opened, tissue found), ``block``.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from wsi_pipeline.synth import write_slide

_FIRST_BLOCK = """
import json, sys, time
begun, marks = float(sys.argv[1]), {}
def mark(name):
    marks.setdefault(name, time.time() - begun)
from wsi_pipeline.command import collect_seldom
collect_seldom()  # as wsi-run does
import wsi_pipeline.cli
from wsi_pipeline.api import execute, plan_run
import wsi_pipeline.inference
mark("program")
class Clock:
    def start(self, job):
        mark("model")
    def advance(self, job, stage, done, total):
        if stage == "predict":
            mark("block" if done else "tissue")
    def finish(self, job, report, *, skipped):
        assert report.done, report.reason
slide, out, model = sys.argv[2:]
execute(plan_run([slide], out, model=model), overwrite=True, watcher=Clock())
print(json.dumps(marks))
"""


def help_seconds(command: str) -> float:
    """Return how long ``wsi-run --help`` or ``wsi --help`` takes."""
    code = f"from wsi_pipeline.cli import {command}; {command}(['--help'])"
    begun = time.perf_counter()
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - begun


def first_block(slide: str, out: Path, model: str) -> dict[str, float]:
    """Return when a run of one slide has its program, its model, its tissue, its first block."""
    command = [sys.executable, "-c", _FIRST_BLOCK, str(time.time()), slide, str(out), model]
    found: dict[str, float] = json.loads(subprocess.check_output(command))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("slide", nargs="?")
    parser.add_argument("--model", default="cerberus-lite", help="NAME or DIR")
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--json", action="store_true", help="compact, on one line")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        slide = options.slide or str(Path(scratch) / "small.svs")
        if not options.slide:
            write_slide(Path(slide), width=4096, height=4096, mpp=0.25, seed=1, truth=False)
        first_block(slide, Path(scratch) / "out", options.model)
        blocks = [
            first_block(slide, Path(scratch) / "out", options.model) for _ in range(options.repeat)
        ]
    result = {
        "wsi_run_help": [help_seconds("main_run") for _ in range(options.repeat + 1)][1:],
        "wsi_help": [help_seconds("main_wsi") for _ in range(options.repeat + 1)][1:],
        **{name: [block[name] for block in blocks] for name in blocks[0]},
    }
    medians = {name: round(statistics.median(each), 3) for name, each in result.items()}
    print(json.dumps(medians, indent=None if options.json else 2))


if __name__ == "__main__":
    main()
