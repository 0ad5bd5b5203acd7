"""What a training step costs beside the forward and backward pass of the same network.

    python benchmarks/training_step.py [--device auto] [--widths 64 128 256 512] [--crop-px 448]
        [--size 12] [--steps 30] [--workers 0] [--json]

Blocks of steps in turns, on the same machine, with batches of the same shapes. `ours` is
everything: threads that cut windows, transfer, augmentation, targets, losses, backward, clipping,
optimiser, moving average. `bare` is forward, a mean of the logits, and backward, of the same heads
on the same rows and in the same precision. Images are decoded once and then held. Prints the
ratio of the medians.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from wsi_pipeline.device import choose_device
from wsi_pipeline.training.begin import begin
from wsi_pipeline.training.fit import Learner
from wsi_pipeline.training.loader import load_batches
from wsi_pipeline.training.ranks import Ranks
from wsi_pipeline.training.recipe import read_recipe
from wsi_pipeline.training.sampler import Sampler

BLOCKS = 3
"""Of which medians are taken. A block is much longer than the loader's queue."""
RECIPE = """
[model]
architecture = "cerberus"
mpp = 0.5
heads = ["nuclei", "gland", "lumen"]
options = {{ widths = {widths}, blocks = {blocks}, head_width = {head_width} }}
[[source]]
layout = "plain"
path = "{folder}/nuclei"
task = "nuclei"
[[source]]
layout = "plain"
path = "{folder}/gland"
task = "gland"
[split]
validation = 0.1
[batches]
size = {size}
crop_px = {crop_px}
workers = {workers}
[heads.gland]
element_um = 5.5
[schedule]
steps = 100000
[validation]
every = 100000
"""


def write_images(folder: Path, heads: list[str], radius: tuple[float, float], count: int) -> None:
    """Write annotated images of 1000 px with discs of about the density of real tissue."""
    rng = np.random.default_rng(0)
    side = 1000
    (folder / "images").mkdir(parents=True)
    y, x = np.mgrid[:side, :side]
    for number in range(count):
        ids = np.zeros((side, side), np.uint16)
        for cell in range(1, int(0.5 * side**2 / (np.pi * np.mean(radius) ** 2))):
            cx, cy = rng.uniform(0, side, 2)
            r = rng.uniform(*radius)
            box = (slice(max(0, int(cy - r)), int(cy + r) + 1),
                   slice(max(0, int(cx - r)), int(cx + r) + 1))  # fmt: skip
            ids[box][np.hypot(x[box] - cx, y[box] - cy) < r] = cell
        pixels = np.where((ids > 0)[..., None], (90, 50, 120), (226, 170, 200))
        noisy = np.clip(pixels + rng.normal(0, 8, pixels.shape), 0, 255).astype(np.uint8)
        Image.fromarray(noisy).save(folder / "images" / f"{number}.png")
        for head in heads:
            (folder / "instances" / head).mkdir(parents=True, exist_ok=True)
            Image.fromarray(ids).save(folder / "instances" / head / f"{number}.png")
    (folder / "dataset.toml").write_text("mpp = 0.5\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="auto")
    parser.add_argument("--widths", type=int, nargs=4, default=[64, 128, 256, 512])
    parser.add_argument("--blocks", type=int, nargs=4, default=[3, 4, 6, 3])
    parser.add_argument("--head-width", type=int, default=96)
    parser.add_argument("--crop-px", type=int, default=448)
    parser.add_argument("--size", type=int, default=12)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--json", action="store_true", help="compact, on one line")
    options = parser.parse_args()
    device = choose_device(options.device)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_images(folder / "nuclei", ["nuclei"], (6, 11), 6)
        write_images(folder / "gland", ["gland", "lumen"], (40, 90), 6)
        recipe_path = folder / "recipe.toml"
        recipe_path.write_text(RECIPE.format(folder=folder, **vars(options)))
        recipe = read_recipe(recipe_path)
        start = begin(recipe, name="bench", device=device)
        learner = Learner(recipe, start.spec, start.network, Ranks(rank=0, world=1, device=device))
        sampler = Sampler(start.sizes, recipe.batches, seed=1)
        batches = load_batches(start.sources, sampler, start.spec, workers=options.workers)
        rows = {"nuclei": [], "gland": [], "lumen": []}
        for i in range(options.size):
            rows["nuclei" if i % 2 else "gland"].append(i)
        rows["lumen"] = rows["gland"]
        at = {head: torch.tensor(own, device=device) for head, own in rows.items()}
        shape = (options.size, 3, options.crop_px, options.crop_px)
        pixels = torch.rand(shape, device=device) * 255
        pixels = pixels.to(memory_format=torch.channels_last)

        def ours() -> None:
            learner.learn(next(batches))

        def bare() -> None:
            learner.network.zero_grad(set_to_none=True)
            half = learner.precision != "fp32"
            with torch.autocast(device.partition(":")[0], torch.bfloat16, enabled=half):
                logits = learner.network(pixels, at)
            sum(value.float().mean() for value in logits.values()).backward()

        times: dict[str, list[float]] = {"ours": [], "bare": []}
        for block in range(BLOCKS + 1):
            for label, work in (("ours", ours), ("bare", bare)):
                _wait(device)
                begun = time.perf_counter()
                for _ in range(options.steps):
                    work()
                _wait(device)
                if block:  # the first warms up, and finds the loader's queue full
                    times[label].append((time.perf_counter() - begun) / options.steps)
        batches.close()
    medians = {label: statistics.median(own) for label, own in times.items()}
    result = {
        "device": torch.cuda.get_device_name() if device.startswith("cuda") else "cpu",
        "threads": torch.get_num_threads(),
        "precision": learner.precision,
        "batch": [options.size, options.crop_px],
        "widths": options.widths,
        "seconds": {label: round(value, 5) for label, value in medians.items()},
        "ratio": round(medians["ours"] / medians["bare"], 3),
    }
    print(json.dumps(result, indent=None if options.json else 2))


def _wait(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize()


if __name__ == "__main__":
    main()
