"""What every tool's process begins and ends with: the same arguments, the same clock."""

from __future__ import annotations

import argparse
import json
import resource
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

NETWORKS = ("colour", "full")


def parser(description: str) -> argparse.ArgumentParser:
    """Return the arguments that all tools have in common."""
    made = argparse.ArgumentParser(description=description.splitlines()[0])
    made.add_argument("--slide", type=Path, required=True)
    made.add_argument("--mask", type=Path, required=True, help="tissue, a PNG of the whole slide")
    made.add_argument("--out", type=Path, required=True, help="folder for what the tool writes")
    made.add_argument("--result", type=Path, required=True, help="JSON: what it took")
    made.add_argument("--network", choices=NETWORKS, default="colour")
    made.add_argument("--precision", default="fp32", help="ours only: fp32, bf16, int8 or auto")
    made.add_argument("--limit", type=int, help="stop after so many patches or tiles")
    made.add_argument("--threads", type=int, help="of torch; default: by network")
    made.add_argument("--crop-first", action="store_true", help="crop before the softmax")
    made.add_argument("--tile", type=int, help="side of a tile")
    return made


def set_threads(threads: int | None, network: str) -> None:
    """Give torch one thread for the colour network, as loaders share the processors; else all.

    Raises:
        SystemExit: no positive number.
    """
    import torch

    if threads is not None and threads < 1:
        raise SystemExit(f"--threads must be 1 or more, not {threads}")
    if threads or network == "colour":
        torch.set_num_threads(threads or 1)


class Clock:
    """Seconds since it was made, by stage, and the processor seconds of it and its children."""

    def __init__(self) -> None:
        self.stages: dict[str, float] = {}
        self._begun = time.perf_counter()
        self._cpu = cpu_seconds()

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Add what is done inside to a stage."""
        begun = time.perf_counter()
        try:
            yield
        finally:
            self.stages[name] = self.stages.get(name, 0.0) + time.perf_counter() - begun

    def stop(self) -> dict[str, Any]:
        """Return what a result says of time."""
        return {
            "wall_s": round(time.perf_counter() - self._begun, 3),
            "cpu_s": round(cpu_seconds() - self._cpu, 2),
            "stages_s": {name: round(seconds, 3) for name, seconds in self.stages.items()},
        }


def cpu_seconds() -> float:
    """User and system seconds of this process and of its children that have ended."""
    who = (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    return sum(usage.ru_utime + usage.ru_stime for usage in map(resource.getrusage, who))


def write_result(path: Path, **facts: object) -> None:
    """Write what a run has to say."""
    path.write_text(json.dumps(facts, indent=2) + "\n")
