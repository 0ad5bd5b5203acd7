"""Annotated images that are quick to learn from, in the plain layout."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

PINK, VIOLET, WHITE = (226, 170, 200), (90, 50, 120), (245, 243, 246)

RECIPE = """
description = "discs"
seed = 3
[model]
architecture = "cerberus"
mpp = 0.5
halo_px = 32
heads = [
  {{ name = "nuclei", kind = "instance", object_kind = "nucleus", rules = {{ by = "anchor" }} }},
]
options = {{ widths = [4, 6, 8, 12], blocks = [1, 1, 1, 1], head_width = 6, patch_width = 6 }}
[[source]]
layout = "plain"
path = "{data}"
[split]
validation = 0.3
[batches]
mode = "fixed"
size = 4
crop_px = 32
workers = 1
[heads.nuclei]
element_um = 1.5
[schedule]
steps = 6
optimiser = "adamw"
learning_rate = 5e-3
decay = "cosine"
ema = 0.9
precision = "fp32"
[validation]
every = 3
images = 3
"""


def write_discs(folder: Path, count: int = 8, *, side: int = 80, seed: int = 0) -> Path:
    """Write images of violet discs on pink, with their instances; 0.5 um a pixel."""
    rng = np.random.default_rng(seed)
    for name in ("images", "instances"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    y, x = np.mgrid[:side, :side]
    for number in range(count):
        image = np.full((side, side, 3), PINK, np.float64)
        ids = np.zeros((side, side), np.uint16)
        for cell in range(1, 9):
            cx, cy, r = rng.uniform(6, side - 6), rng.uniform(6, side - 6), rng.uniform(4, 7)
            inside = (np.hypot(x - cx, y - cy) < r) & (ids == 0)
            ids[inside] = cell
            image[inside] = VIOLET
        image += rng.normal(0, 6, image.shape)
        pixels = np.clip(image, 0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(folder / "images" / f"p{number}.png")
        Image.fromarray(ids).save(folder / "instances" / f"p{number}.png")
    (folder / "dataset.toml").write_text("mpp = 0.5\n")
    return folder


def write_recipe(folder: Path, data: Path, more: str = "") -> Path:
    """Write the recipe of a network that learns the discs in seconds."""
    path = folder / "recipe.toml"
    path.write_text(RECIPE.format(data=data) + more)
    return path
