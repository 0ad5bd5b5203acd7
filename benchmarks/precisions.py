"""What 8-bit integers and half precision gain on a CPU, and what they cost in scores.

    python -m benchmarks.precisions --data $WSI_DATA --annotations annotations
        [--precisions bf16 int8] [--networks cerberus-lite cerberus] [--rounds 7] [--sets ...]
    python -m benchmarks.precisions --data $WSI_DATA --half

Prints JSON. ``seconds``: of a tile of 1024 px, noise in memory, every precision in turn within a
round; medians, and the median of its ratios to bf16 within a round. ``cerberus`` is the network of
the paper with random weights. ``scores``: PQ of ``cerberus-lite`` on held-out annotated images.
``objects``: PQ of the objects of a precision against those of float32, on regions of real slides.
``--half``: the same for bf16 as torch casts it, with exact pixels, and with sums of kernels kept.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from contextlib import nullcontext
from pathlib import Path
from unittest.mock import patch

import numpy as np
import torch

from benchmarks.gpu import make_bundle
from benchmarks.network_ledger import WIDTHS
from benchmarks.quality.consistency import compare_maps, region_maps
from benchmarks.quality.judging import judge_set
from benchmarks.quality.sets import open_sets
from wsi_pipeline import half, inference
from wsi_pipeline.bundle import find_bundle
from wsi_pipeline.fixed_images import golden_tiles
from wsi_pipeline.geometry import Box
from wsi_pipeline.inference import TorchPredictor
from wsi_pipeline.machine import keep_freed_memory
from wsi_pipeline.slide.slide import Slide
from wsi_pipeline.training.predicted import ImagePredictor

MODEL = "cerberus-lite"
TILE_PX = 1024
REGIONS = (
    ("crohn_colon_biopsy_HE4_crop.svs", None, (4240, 2720), 2048),
    ("acute_appendicitis_HE_crop.tiff", None, (4000, 4000), 2048),
    ("CMU-1-Small-Region.svs", None, (0, 0), 1024),
    ("TCGA-CR-7395-01A-01-TS1.svs", 0.25, (512, 512), 1024),
    ("colon_submucosal_lipoma_HE_nompp.tiff", 0.37, (6000, 5008), 2048),
)
"""Slide, its pixel size where the file has none, corner and side on the model's grid."""


def speed(network: str, precisions: list[str], rounds: int) -> dict[str, dict[str, float]]:
    """Time the passes of one network, every precision in every round."""
    with tempfile.TemporaryDirectory() as folder:
        bundle = (
            make_bundle(Path(folder), WIDTHS) if network == "cerberus" else find_bundle(network)
        )
        how = {"device": "cpu", "tile_size": TILE_PX}
        loaded = {p: TorchPredictor.load(bundle, precision=p, **how) for p in precisions}
    side = TILE_PX + 2 * bundle.spec.halo_px
    tissue = np.tile(golden_tiles(bundle.spec.mpp)["tissue"], (4, 4, 1))[:side, :side]
    pixels = torch.from_numpy(tissue.copy())[None]
    seconds: dict[str, list[float]] = {p: [] for p in precisions}
    for number in range(rounds + 1):
        for precision, predictor in loaded.items():
            begun = time.perf_counter()
            predictor._compute(pixels)
            if number:  # the first one warms up
                seconds[precision].append(time.perf_counter() - begun)
    return {
        precision: {
            "seconds_a_tile": round(statistics.median(own), 3),
            "ratio": round(
                statistics.median(a / b for a, b in zip(own, seconds["bf16"], strict=True)), 2
            ),
        }
        for precision, own in seconds.items()
    }


def scores(precisions: list[str], names: list[str], data: Path, annotations: Path) -> dict:
    """Return PQ on annotated images, by set, head and precision."""
    bundle = find_bundle(MODEL)
    sets = open_sets(
        bundle.spec, data=data, annotations=annotations, recipes=[bundle.path / "train.toml"],
        fast=False,
    )  # fmt: skip
    found: dict[str, dict[str, float]] = {}
    for own in (own for own in sets if own.plan.name in names):
        for precision in precisions:
            network = bundle.load_network()
            predictor = ImagePredictor(bundle.spec, network, device="cpu", precision=precision)
            for name, measure in judge_set(predictor, own).measures.items():
                values = measure.scores(np.arange(len(measure.images)))
                if "pq" in values:
                    row = found.setdefault(f"{own.plan.name}: {name}", {})
                    row[precision] = round(values["pq"], 4)
            print(own.plan.name, precision, file=sys.stderr, flush=True)
    return found


def objects(precisions: list[str], slides: Path) -> dict:
    """Return PQ of objects against those of float32, by region, precision and head."""
    bundle, found = find_bundle(MODEL), {}
    for name, mpp, (x, y), side in REGIONS:
        box = Box(x=x, y=y, width=side, height=side)
        with Slide.open(slides / name, mpp=mpp) as slide:
            maps = {
                precision: region_maps(
                    bundle, slide, box, tile_px=TILE_PX, device="cpu", precision=precision
                )
                for precision in ("fp32", *precisions)
            }
        exact = maps.pop("fp32")
        found[name] = {precision: compare_maps(exact, own) for precision, own in maps.items()}
        print(name, file=sys.stderr, flush=True)
    return found


def half_steps(slides: Path) -> dict:
    """Return PQ of bf16 objects against those of float32, by region and what is done for them."""
    found: dict[str, dict] = {}
    for name, patched in {
        "cast": patch.object(inference, "to_half", lambda _network, _dtype: None),
        "pixels exact": patch.object(half, "rounded_to_format", lambda weights, _dtype: weights),
        "sums of kernels kept": nullcontext(),
    }.items():
        with patched:
            for region, row in objects(["bf16"], slides).items():
                found.setdefault(region, {})[name] = row["bf16"]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--annotations", type=Path, default=Path("annotations"))
    parser.add_argument("--precisions", nargs="+", default=["bf16", "int8"])
    parser.add_argument("--networks", nargs="*", default=[MODEL, "cerberus"])
    parser.add_argument("--sets", nargs="*", default=["monuseg", "crops", "ebhi"])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--no-regions", action="store_true")
    parser.add_argument("--half", action="store_true")
    options = parser.parse_args()
    keep_freed_memory()
    if options.half:
        print(json.dumps(half_steps(options.data / "slides"), indent=2))
        return
    others = [p for p in options.precisions if p != "fp32"]
    every = ["fp32", *others]
    result: dict[str, object] = {
        "threads": torch.get_num_threads(),
        "seconds": {own: speed(own, every, options.rounds) for own in options.networks},
        "scores": scores(every, options.sets, options.data, options.annotations),
    }
    if not options.no_regions:
        result["objects"] = objects(others, options.data / "slides")
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
