"""Run this package and its peers on one slide, round by round, and compare.

    python -m benchmarks.peers --slide SLIDE --out FOLDER --environments FOLDER
        [--rounds 3] [--only ours tiatoolbox ...] [--network full --limit 8] [--json FILE]

The environments come from ``python -m benchmarks.peers.environment``. A round runs each tool
once (those of ``--once``: the first round), so that what disturbs the machine disturbs all; ratios
are taken within a round. With the
full network, peers take hours: each times some patches (ours: tiles) inside its own flow, and
the rest is extrapolated; ``--rest`` names the JSON of the colour network on the same slide,
from which each tool's time outside of prediction is added.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import platform
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

from benchmarks.peers.environment import ROOT, interpreter
from benchmarks.peers.process import RunFailedError, run_measured
from benchmarks.peers.tables import markdown, rest_seconds, summary, with_totals
from benchmarks.peers.worker import NETWORKS

TOOLS: dict[str, tuple[str, ...]] = {
    "ours": ("ours", "--precision", "fp32"),
    "ours-bf16": ("ours", "--precision", "bf16"),
    "ours-int8": ("ours", "--precision", "int8"),
    "tiatoolbox": ("tiatoolbox",),
    "tiatoolbox-1024": ("tiatoolbox", "--tile", "1024"),
    "original": ("original",),
    "original-crop-first": ("original", "--crop-first"),
    "hovernext": ("hovernext",),
}
"""Tools by name: the module of this package, and its arguments."""
USUAL = {
    "colour": (
        "ours", "hovernext", "tiatoolbox", "tiatoolbox-1024", "original", "original-crop-first",
    ),
    "full": ("ours", "ours-bf16", "tiatoolbox", "original"),
}  # fmt: skip
ENVIRONMENTS = {"tiatoolbox": "tiatoolbox", "original": "original", "hovernext": "original"}


def python_of(tool: str, environments: Path | None) -> Path | None:
    """Return the Python that a tool runs in; None, and a word about it, where there is none."""
    module = TOOLS[tool][0]
    if module == "ours":
        return Path(sys.executable)
    if environments is None:
        print(f"{tool} is left out: say with --environments where its environment is")
        return None
    python = interpreter(environments, ENVIRONMENTS[module])
    if not python.exists():
        make = f"python -m benchmarks.peers.environment {environments}"
        print(f"{tool} is left out: there is no {python}; make it with {make}")
        return None
    return python


def command(tool: str, python: Path, args: argparse.Namespace) -> list[str]:
    """Return the command that runs a tool once."""
    module, *options = TOOLS[tool]
    words = [str(python), "-m", f"benchmarks.peers.{module}", *options]
    words += ["--slide", str(args.slide.resolve()), "--mask", str(mask_path(args))]
    words += ["--out", str(args.out / tool), "--result", str(args.out / f"{tool}.json")]
    words += ["--network", args.network]
    if args.network == "full" and not (module == "ours" and args.whole):
        words += ["--limit", str(args.tiles if module == "ours" else args.limit)]
    if module == "hovernext":
        words += ["--maps", str(args.out / "ours" / "maps" / f"{args.slide.stem}.zarr")]
    return words


def mask_path(args: argparse.Namespace) -> Path:
    """Return where the tissue that all tools get is kept."""
    path: Path = args.out / f"{args.slide.stem}.mask.png"
    return path


def run_rounds(args: argparse.Namespace) -> Iterator[list[dict[str, Any]]]:
    """Run every tool once a round, and yield the rounds so far after each.

    A tool that fails is told about and not run again.
    """
    pythons = {tool: python_of(tool, args.environments) for tool in args.only}
    rounds: list[dict[str, Any]] = []
    for number in range(args.rounds):
        results: dict[str, Any] = {}
        for tool, python in pythons.items():
            if python is None or (number and tool in args.once):
                continue
            try:
                with held(args.lock):
                    results[tool] = run_measured(
                        command(tool, python, args), args.out / f"{tool}.json", root=ROOT
                    )
            except RunFailedError as error:
                print(error)
                pythons[tool] = None
                continue
            print(f"round {number + 1}: {tool} {results[tool]['wall_s']:.1f} s", flush=True)
        if results:
            rounds.append(results)
            yield rounds


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def held(lock: Path | None) -> Any:
    """Return a context in which a shared machine is this run's alone."""
    return nullcontext() if lock is None else _locked(lock)


def machine() -> dict[str, Any]:
    """Return what computes, in words."""
    import psutil

    model = platform.processor()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        lines = cpuinfo.read_text(errors="replace").splitlines()
        model = next((line.partition(":")[2].strip() for line in lines if "model name" in line), "")
    return {
        "processor": model,
        "logical_processors": psutil.cpu_count(),
        "cores": psutil.cpu_count(logical=False),
        "memory_gib": round(psutil.virtual_memory().total / (1 << 30), 1),
        "python": platform.python_version(),
    }


def rests_from(path: Path | None) -> dict[str, float]:
    """Return each tool's seconds outside of prediction, from the colour network's JSON."""
    if path is None:
        return {}
    rounds = json.loads(path.read_text())["rounds"]
    rests = {tool: rest_seconds(result) for one in rounds for tool, result in one.items()}
    ours = rests.get("ours", 0.0)
    return {"ours-bf16": ours, "ours-int8": ours, **rests}


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--slide", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True, help="folder for everything written")
    parser.add_argument("--environments", type=Path, help="folder with the peers' environments")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", nargs="+", choices=list(TOOLS), help="tools, in their order")
    parser.add_argument("--base", choices=list(TOOLS), default="ours", help="ratios are to it")
    parser.add_argument("--once", nargs="+", default=[], help="tools that one round is enough for")
    parser.add_argument("--network", choices=NETWORKS, default="colour")
    parser.add_argument("--limit", type=int, default=8, help="full network: patches timed")
    parser.add_argument("--tiles", type=int, default=2, help="full network: tiles of ours timed")
    parser.add_argument("--whole", action="store_true", help="full network: all tiles of ours")
    parser.add_argument("--rest", type=Path, help="full network: JSON of the colour network")
    parser.add_argument("--lock", type=Path, help="file to lock while a tool runs")
    parser.add_argument("--json", type=Path, help="where the figures go")
    args = parser.parse_args(arguments)
    if not args.slide.exists():
        parser.error(f"there is no slide {args.slide}")
    for name in ("rounds", "limit", "tiles"):
        if getattr(args, name) < 1:
            parser.error(f"--{name} must be 1 or more, not {getattr(args, name)}")
    if args.rest is not None and not args.rest.exists():
        parser.error(f"there is no {args.rest}: run the colour network on the slide first")
    args.out = args.out.resolve()
    args.only = args.only or list(USUAL[args.network])
    return args


def main() -> None:
    from benchmarks.peers.mask import write_mask

    args = parse()
    args.out.mkdir(parents=True, exist_ok=True)
    facts: dict[str, Any] = {
        "slide": args.slide.name,
        "network": args.network,
        "base": args.base,
        "tissue_share": round(write_mask(args.slide, mask_path(args)), 4),
        "machine": machine(),
    }
    path = args.json or args.out / f"{args.slide.stem}-{args.network}.json"
    for measured in run_rounds(args):
        rounds = with_totals(measured, rests_from(args.rest))
        facts |= {"tools": summary(rounds, args.base), "rounds": rounds}
        path.write_text(json.dumps(facts, indent=1) + "\n")
    if "tools" not in facts:
        raise SystemExit("no tool ran to its end")
    print(markdown(facts["tools"], args.base))
    print(f"figures: {path}")


if __name__ == "__main__":
    main()
