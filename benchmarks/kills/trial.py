"""One kill: a scenario killed at a point, run again, and compared with an undisturbed run."""

from __future__ import annotations

import shutil
from dataclasses import dataclass, replace
from pathlib import Path

from benchmarks.kills.countdown import Point, in_child
from benchmarks.kills.scenarios import Scenario

__all__ = ["Outcome", "contents", "measured", "try_point", "try_until_killed", "whole_after_kill"]

TRIES = 5
"""How often a process is begun for a point that it does not live to see."""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What came of a kill point."""

    stage: str
    killed: bool
    """False: the process was done before its time came."""
    complaints: tuple[str, ...]


def measured(scenario: Scenario, folder: Path) -> Scenario:
    """Run a scenario undisturbed; note what it leaves, what it changes and how long it takes."""
    out = folder / "out"
    if scenario.start is None:
        out.mkdir(parents=True)
    else:
        shutil.copytree(scenario.start, out)
    ended = in_child(scenario.work, out, None)
    if ended.code != 0:
        raise RuntimeError(f"{scenario.name}: the undisturbed run ended with {ended.code}")
    return replace(scenario, wanted=contents(out), changes=ended.changes, seconds=ended.seconds)


def try_until_killed(
    scenario: Scenario, point: Point, second: Point | None, folder: Path
) -> Outcome:
    """Try a point, and earlier ones if the process is done before; keep what went wrong."""
    for _ in range(TRIES):
        outcome = try_point(scenario, point, second, folder)
        if outcome.complaints:
            print(f"{scenario.name}: {point}, then {second}: {outcome.complaints}", flush=True)
            folder.rename(folder.with_name(f"wrong {scenario.name} {folder.name}"))
            break
        shutil.rmtree(folder)
        if outcome.killed:
            break
        point = point.earlier()
    return outcome


def try_point(scenario: Scenario, point: Point, second: Point | None, folder: Path) -> Outcome:
    """Kill a scenario at a point (and its recovery at another), and finish it."""
    out = folder / "out"
    if scenario.start is None:
        out.mkdir(parents=True)
    else:
        shutil.copytree(scenario.start, out)
    first = in_child(scenario.work, out, point)
    wrong = whole_after_kill(out, scenario.wanted)
    complaints = [f"half under its final name: {name}" for name in wrong]
    if not first.killed and first.code != 0:
        complaints.append(f"ended with {first.code} before the point")
    if second is not None:
        in_child(scenario.work, out, second)
    last = in_child(scenario.work, out, None)
    if last.code != 0:
        complaints.append(f"the last run ended with {'a signal' if last.killed else last.code}")
    found = contents(out)
    complaints += [f"left over: {name}" for name in sorted(found.keys() - scenario.wanted.keys())]
    complaints += [f"missing: {name}" for name in sorted(scenario.wanted.keys() - found.keys())]
    both = found.keys() & scenario.wanted.keys()
    complaints += [f"other bytes: {n}" for n in sorted(both) if found[n] != scenario.wanted[n]]
    return Outcome(stage=first.stage, killed=first.killed, complaints=tuple(complaints))


def contents(out: Path) -> dict[str, bytes]:
    """Read a results folder; what holds times (reports, logs, the summary) by its names alone."""
    timed = ("reports", "logs", "run.json", "summary")
    return {
        name: b"" if name.startswith(timed) else path.read_bytes()
        for path in sorted(out.rglob("*"))
        if path.is_file()
        for name in [path.relative_to(out).as_posix()]
    }


def whole_after_kill(out: Path, wanted: dict[str, bytes]) -> list[str]:
    """Return the files under final names that are not what they will be in the end."""
    finals = ("objects/", "tissue/", "previews/", "maps/")
    return [
        name
        for name, data in contents(out).items()
        if name.startswith(finals) and "/." not in name and name in wanted and data != wanted[name]
    ]
