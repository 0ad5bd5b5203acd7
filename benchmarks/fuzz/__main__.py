"""Whether hostile inputs end in a result or in one of our errors.

    python -m benchmarks.fuzz [--cases 5000] [--seed 0] [--json FILE]
    python -m benchmarks.fuzz --target slide --number 17      # one case again, and what it said

Each case is a good input with something changed (bits, lengths, tags, sizes, offsets, bombs), and
runs in a process which may hold and take only so much; one serves several cases, one after another,
as long as they are clean. Clean is a result or a
``WsiPipelineError``; any other exception, a signal, a time-out or too much memory is not. Prints
one line a target and exits with 1 if any case is not clean. A case is a function of the seed, its
target and its number, and of the versions of the libraries that wrote the good inputs (but for
the times in archives, and the addresses that torch's older format of checkpoints holds).
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

for _name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMBA_NUM_THREADS"):
    os.environ.setdefault(_name, "1")  # processes that fork have one thread

from benchmarks.fuzz.executor import Limits, Outcome, run_cases  # noqa: E402
from benchmarks.fuzz.targets import TARGETS, case, cases, prepare  # noqa: E402

TOGETHER = 16
"""Cases that one process runs, as long as they end clean."""
_KIT = Path(os.environ.get("WSI_DATA", "../shared/data")) / "slides_broken"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a campaign; return the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.fuzz",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--cases", type=int, default=5000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--target", action="append", choices=list(TARGETS))
    parser.add_argument("--number", type=int, help="run only this case of one target")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--kit", action="store_true", help="begin from the data kit's slides, too")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--keep", type=Path, help="with --number: write the input here")
    options = parser.parse_args(arguments)
    names = options.target or list(TARGETS)
    prepare(_KIT if options.kit else None)
    limits = Limits()
    if options.number is not None:
        return _again(names[0], options.number, options.seed, options.keep, limits)
    begun = time.monotonic()
    outcomes = list(
        run_cases(
            cases(names, options.cases, options.seed),
            limits=limits,
            jobs=options.jobs,
            together=TOGETHER,
        )
    )
    for line in summary(outcomes):
        print(line)
    clean = sum(outcome.is_clean for outcome in outcomes)
    print(f"{clean} of {len(outcomes)} clean (seed {options.seed}, "
          f"{time.monotonic() - begun:.0f} s)")  # fmt: skip
    if options.json is not None:
        report = {"seed": options.seed, "cases": len(outcomes), "clean": clean,
                  "outcomes": [asdict(outcome) for outcome in outcomes]}  # fmt: skip
        options.json.write_text(json.dumps(report, indent=1) + "\n")
    return 0 if clean == len(outcomes) else 1


def summary(outcomes: Sequence[Outcome]) -> list[str]:
    """Return a line a target, then one a case that is not clean."""
    by_target = defaultdict(list)
    for outcome in outcomes:
        by_target[outcome.target].append(outcome)
    lines = []
    for name, own in by_target.items():
        how = Counter(outcome.how for outcome in own)
        codes = Counter(o.code for o in own if o.how == "refused")
        lines.append(
            f"{name:<11} {sum(o.is_clean for o in own):>5} of {len(own)} clean: "
            f"{how.pop('fine', 0)} fine, {how.pop('refused', 0)} refused "
            f"({', '.join(f'{n} {code}' for code, n in codes.most_common()) or 'none'})"
            + "".join(f", {n} {what}" for what, n in how.items())
            + f"; at most {max(o.memory_mib for o in own):.0f} MiB, "
            f"{max(o.seconds for o in own):.1f} s; mean {_mean_ms(own):.0f} ms"
        )
    for outcome in sorted(outcomes, key=lambda o: (o.target, o.number)):
        if not outcome.is_clean:
            last = outcome.detail.strip().splitlines()[-1:] or [""]
            lines.append(f"  {outcome.target} --number {outcome.number}: {outcome.how}: "
                         f"{last[0][:160]} [{outcome.done[:120]}]")  # fmt: skip
    return lines


def _mean_ms(outcomes: Sequence[Outcome]) -> float:
    return 1000 * sum(o.seconds for o in outcomes) / len(outcomes)


def _again(name: str, number: int, seed: int, keep: Path | None, limits: Limits) -> int:
    again = case(name, number, seed)
    if keep is not None:
        keep.mkdir(parents=True, exist_ok=True)
        again.make(keep)
    outcome = next(run_cases([again], limits=limits, jobs=1))
    print(f"{outcome.how} in {outcome.seconds:.2f} s, {outcome.memory_mib:.0f} MiB\n"
          f"{outcome.done}\n{outcome.code} {outcome.detail}")  # fmt: skip
    return 0 if outcome.is_clean else 1


if __name__ == "__main__":
    sys.exit(main())
