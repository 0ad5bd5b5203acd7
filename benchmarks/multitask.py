"""Does one network for several tasks lose against a network a task? Same images, same budget.

    python benchmarks/multitask.py DATA [--steps 500] [--seeds 1 2 3] [--work FOLDER] [--device cpu]

DATA is the folder of the data kit (glands_ebhi, nuclei_dsb2018_CC0, nuclei_monuseg_NC).

    mixed    nuclei, glands and lumina together, N steps, half of each batch for either source
    half     a network a source, N/2 steps: each task sees as many crops as in `mixed`
    full     a network a source, N steps: each task sees twice as many

Prints JSON: for each row the scores of all seeds and their mean, on held-out patients of the
training sets and, for nuclei, on MoNuSeg, which nobody trained on. What is finished in FOLDER is
not done again.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

import numpy as np

from wsi_pipeline.training.fit import train
from wsi_pipeline.training.recipe import read_recipe
from wsi_pipeline.training.scoring import score_bundle

RECIPE = """
description = "{row}"
seed = {seed}
[model]
architecture = "cerberus"
mpp = 0.5
heads = {heads}
options = {{ widths = [16, 24, 48, 96], blocks = [1, 1, 2, 2], head_width = 24 }}
{sources}
[batches]
mode = "mixed"
size = 8
crop_px = 128
workers = 1
[schedule]
steps = {steps}
optimiser = "adamw"
learning_rate = 2e-3
weight_decay = 1e-3
decay = "cosine"
warmup = 40
[validation]
every = {steps}
images = 4
pictures = 1
"""
NUCLEI = """
[[source]]
layout = "dsb2018"
path = "{data}/nuclei_dsb2018_CC0"
mpp = 0.25
task = "nuclei"
[heads.nuclei]
element_um = 1.5
channel_weights = [1.0, 2.0, 1.0]
"""
GLANDS = """
[[source]]
layout = "ebhi"
path = "{data}/glands_ebhi"
mpp = 1.05
heads = {{ gland-class = "" }}
task = "gland"
[heads.gland]
element_um = 5.5
"""
ROWS = {
    "mixed": (["nuclei", "gland", "lumen"], NUCLEI + GLANDS, 1.0),
    "nuclei half": (["nuclei"], NUCLEI, 0.5),
    "nuclei full": (["nuclei"], NUCLEI, 1.0),
    "glands half": (["gland", "lumen"], GLANDS, 0.5),
    "glands full": (["gland", "lumen"], GLANDS, 1.0),
}
SCORES = {"nuclei": ("pq", "dice", "detection_f1"), "gland": ("pq", "object_dice", "dice"),
          "lumen": ("pq", "dice")}  # fmt: skip


def run(row: str, seed: int, options: argparse.Namespace, work: Path) -> dict[str, float]:
    """Train one network and score it; read the scores where that was done before."""
    name = f"{row.replace(' ', '-')}-{options.steps}-{seed}"
    kept = work / f"{name}.json"
    if kept.is_file():
        return json.loads(kept.read_text())
    heads, sources, share = ROWS[row]
    recipe = work / f"{name}.toml"
    data = options.data.resolve()
    recipe.write_text(
        RECIPE.format(
            row=row,
            heads=json.dumps(heads),
            seed=seed,
            sources=sources.format(data=data),
            steps=round(options.steps * share),
        )
    )
    bundle = work / name
    train(read_recipe(recipe), bundle, device=options.device)
    held_out = score_bundle(
        bundle, recipe, resamples=0, device=options.device, at_most=options.images
    )
    scores = _scores("", held_out)
    if "nuclei" in heads:
        monuseg = score_bundle(
            bundle, data / "nuclei_monuseg_NC", layout="monuseg", resamples=0, device=options.device
        )
        scores |= _scores("MoNuSeg ", monuseg)
    kept.write_text(json.dumps(scores))
    return scores


def _scores(prefix: str, found) -> dict[str, float]:
    return {
        f"{prefix}{head} {name}": found.heads[head][name].value
        for head, own in found.heads.items()
        for name in SCORES[head]
        if name in own
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path)
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--images", type=int, default=60, help="held-out images to judge")
    parser.add_argument("--work", type=Path)
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        work = options.work or Path(folder)
        work.mkdir(parents=True, exist_ok=True)
        table = {}
        for seed in options.seeds:
            for row in ROWS:
                for name, value in run(row, seed, options, work).items():
                    table.setdefault(name, {}).setdefault(row, []).append(round(value, 4))
    means = {
        name: {row: {"mean": round(float(np.mean(v)), 4), "seeds": v} for row, v in rows.items()}
        for name, rows in table.items()
    }
    print(json.dumps({"steps": options.steps, "seeds": options.seeds, "scores": means}, indent=2))


if __name__ == "__main__":
    main()
