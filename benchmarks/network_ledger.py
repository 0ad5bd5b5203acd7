"""What each means of computing the network on a CPU is worth, one left out at a time.

    python -m benchmarks.network_ledger [--networks cerberus-lite cerberus] [--tiles 4]
        [--precisions bf16 fp32] [--rounds 3] [--tile-size 1024]

Every variant runs in a process of its own (freed memory, once kept, is kept for good), round by
round: two tiles that are not counted, then some that are. Windows are noise in memory, so nothing
is decoded; ``cerberus`` is the network of the paper with random weights. Prints JSON: for each
variant the seconds a tile (median of the rounds), the median of its ratios to ``all`` within a
round, and the peak memory of its process.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks.gpu import make_bundle, run
from wsi_pipeline import blocks, lite
from wsi_pipeline import network as networks
from wsi_pipeline.bundle import find_bundle
from wsi_pipeline.inference import TorchPredictor
from wsi_pipeline.machine import keep_freed_memory, peak_rss_mb

VARIANTS = (
    "all",
    "decoders see the whole halo",
    "every stage of a decoder sees 48 px",
    "maps as a whole, no strips",
    "doubled by torch's interpolate",
    "freed memory goes back to the system",
    "convolutions do not add and rectify",
    "none of these",
    "torch.compile in their place",
)
WIDTHS = [64, 128, 256, 512]


def measure(
    network: str, precision: str, variant: str, tiles: int, tile_size: int
) -> dict[str, float]:
    """Predict some tiles in this process without one of the means."""
    without = set(VARIANTS[1:-2]) if variant == "none of these" else {variant}
    if "freed memory goes back to the system" not in without:
        keep_freed_memory()
    if "maps as a whole, no strips" in without:
        blocks._STRIP_BYTES = 1 << 62
    if "doubled by torch's interpolate" in without:
        blocks._doubled = lambda x_BCHW: torch.nn.functional.interpolate(  # type: ignore[assignment]
            x_BCHW, scale_factor=2, mode="bilinear", align_corners=False
        )
    if "convolutions do not add and rectify" in without:
        blocks._ONEDNN = False
    if "every stage of a decoder sees 48 px" in without:
        for module in (networks, lite):
            setattr(module, "stage_margins", same_for_all)  # noqa: B010
    with tempfile.TemporaryDirectory() as folder:
        full = network == "cerberus"
        bundle = make_bundle(Path(folder), WIDTHS) if full else find_bundle(network)
        predictor = TorchPredictor.load(
            bundle, device="cpu", precision=precision, tile_size=tile_size
        )
        if "decoders see the whole halo" in without:
            predictor.margin_px = 0
        if "torch.compile in their place" in without:
            compiled = torch.compile(predictor._maps_of, dynamic=False)
            predictor._maps_of = compiled  # type: ignore[method-assign]
        run(predictor, 2)
        begun = time.perf_counter()
        run(predictor, tiles)
        seconds = (time.perf_counter() - begun) / tiles
    return {"seconds_a_tile": seconds, "peak_rss_mb": peak_rss_mb()}


def same_for_all(margin: int, scales: Sequence[int], *, reach: int) -> list[tuple[int, int]]:
    """Stand in for ``blocks.stage_margins``: all stages are given what the coarsest looks at."""
    del reach
    begin = max(0, (margin + 1 - 48) // 16 * 16)  # the predictor leaves one pixel of its halo
    cut = margin // scales[0] - begin // scales[0]
    return [(begin, cut), *((begin, 0) for _ in scales[1:])]


def compare(
    network: str, precision: str, tiles: int, rounds: int, tile_size: int
) -> dict[str, dict[str, float]]:
    """Measure all variants in turn, each in a fresh process."""
    found: dict[str, list[dict[str, float]]] = {variant: [] for variant in VARIANTS}
    for _ in range(rounds):
        for variant, rows in found.items():
            command = [sys.executable, "-m", "benchmarks.network_ledger", "--tiles", str(tiles)]
            command += ["--networks", network, "--precisions", precision, "--variant", variant]
            command += ["--tile-size", str(tile_size)]
            done = subprocess.run(command, check=True, capture_output=True, text=True)
            rows.append(json.loads(done.stdout))
            print(network, precision, variant, rows[-1], file=sys.stderr, flush=True)
    base = [row["seconds_a_tile"] for row in found["all"]]
    return {
        variant: {
            "seconds_a_tile": round(statistics.median(r["seconds_a_tile"] for r in rows), 3),
            "ratio": round(
                statistics.median(
                    r["seconds_a_tile"] / own for r, own in zip(rows, base, strict=True)
                ),
                2,
            ),
            "peak_rss_mb": round(max(r["peak_rss_mb"] for r in rows)),
        }
        for variant, rows in found.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--networks", nargs="+", default=["cerberus-lite", "cerberus"])
    parser.add_argument("--precisions", nargs="+", default=["bf16", "fp32"])
    parser.add_argument("--tiles", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tile-size", type=int, default=1024)
    parser.add_argument("--variant", choices=VARIANTS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.variant:
        one = args.networks[0], args.precisions[0], args.variant
        result: object = measure(*one, args.tiles, args.tile_size)
    else:
        how = args.tiles, args.rounds, args.tile_size
        result = {
            f"{network} {precision}": compare(network, precision, *how)
            for network in args.networks
            for precision in args.precisions
        }
    print(json.dumps(result, indent=None if args.variant else 2))


if __name__ == "__main__":
    main()
