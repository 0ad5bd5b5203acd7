"""Multi-task transfer against U-Net, SegNet and MedT on EBHI-Seg, by one loop.

    python benchmarks/comparison.py DATA [--steps 300] [--published] [--rows ROW ...]
        [--images 0] [--seed 1] [--work FOLDER] [--device auto]

DATA holds `glands_ebhi` (or `EBHI-SEG`), and for the transfer row whatever there is of
`nuclei_dsb2018_CC0`, `glands_pt1` and `tissue_kather`.

    transfer  Cerberus' network, first trained on all the other sources together
    fresh     the same network without that
    unet, segnet, medt

Every row learns from the same patients with the same crops, steps, augmentation and loss, and is
judged by the pipeline's own objects on the patients left out. Without --published the networks
are narrow, so that a laptop finishes; with it they have their published widths. Prints JSON:
Dice, Jaccard, precision and recall of the gland pixels for each class of EBHI-Seg.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

from wsi_pipeline.training.fit import train
from wsi_pipeline.training.recipe import read_recipe
from wsi_pipeline.training.scoring import score_bundle

GLAND = (
    '{ name = "gland", kind = "instance", object_kind = "gland", rules = { by = "run", '
    "inner_threshold = 0.5, min_core_um2 = 250.0, grow_um = 5.0 } }"
)
NUCLEI = (
    '{ name = "nuclei", kind = "instance", object_kind = "nucleus", rules = { by = "anchor" } }'
)
TISSUE = (
    '{ name = "tissue", kind = "patch", stride = 16, classes = ["adipose", "background", "debris", '
    '"lymphocytes", "mucus", "smooth muscle", "normal mucosa", "stroma", "tumour epithelium"] }'
)
OTHERS = {
    "nuclei_dsb2018_CC0": ("nuclei", NUCLEI, 'layout = "dsb2018"\nmpp = 0.25\ntask = "nuclei"'),
    "glands_pt1": (
        "gland",
        GLAND,
        'layout = "pt1"\nmpp = 0.5\ntask = "gland"\nheads = { gland-class = "" }',
    ),
    "tissue_kather": ("tissue", TISSUE, 'layout = "kather"\ntask = "tissue"\ncrop_px = 144'),
}
EBHI = 'layout = "ebhi"\nmpp = 1.05\nheads = { gland-class = "" }\n'
EBHI += 'task = "gland"\noptions = { lumen = false }'
NARROW = {
    "cerberus": "{ widths = [16, 24, 48, 96], blocks = [1, 1, 2, 2], head_width = 24 }",
    "unet": "{ width = 10 }",
    "segnet": "{ width = 12 }",
    "medt": "{ width = 8, attention_heads = 4 }",
}
RECIPE = """
description = "{row}"
seed = {seed}
[model]
architecture = "{architecture}"
mpp = {mpp}
heads = [{heads}]
{options}
{start}
{sources}
[batches]
mode = "mixed"
size = 8
crop_px = {crop_px}
[heads.gland]
element_um = 5.5
[schedule]
steps = {steps}
optimiser = "adamw"
learning_rate = 1e-3
weight_decay = 1e-3
decay = "cosine"
warmup = 20
[validation]
every = {steps}
images = 12
"""
MPP = 1.05
"""The model sees EBHI's pixels as they are."""


def recipe_text(row: str, options: argparse.Namespace, data: Path, start: str = "") -> str:
    """Return the recipe of a row's training on EBHI-Seg."""
    architecture = "cerberus" if row in ("transfer", "fresh") else row
    return RECIPE.format(
        row=row,
        seed=options.seed,
        architecture=architecture,
        mpp=MPP,
        heads=GLAND,
        options="" if options.published else f"options = {NARROW[architecture]}",
        start=start,
        sources=f'[[source]]\npath = "{data}"\n{EBHI}',
        crop_px=128,
        steps=options.steps,
    )


def multitask_text(options: argparse.Namespace, folders: dict[str, Path]) -> str:
    """Return the recipe of the training on everything but EBHI-Seg."""
    heads = dict.fromkeys(OTHERS[name][1] for name in folders)
    sources = [f'[[source]]\npath = "{path}"\n{OTHERS[name][2]}' for name, path in folders.items()]
    text = recipe_text("fresh", options, Path("unused"))
    head, _, rest = text.partition("[[source]]")
    _, _, rest = rest.partition("[batches]")
    head = head.replace(f"heads = [{GLAND}]", f"heads = [{', '.join(heads)}]")
    if "glands_pt1" not in folders:
        rest = rest.replace("[heads.gland]\nelement_um = 5.5\n", "")
    return head + "\n".join(sources) + "\n[batches]" + rest


def run(row: str, options: argparse.Namespace, ebhi: Path, work: Path) -> dict[str, object]:
    """Train and judge one row; read its scores where that was done before."""
    work = work / f"{options.steps}-{options.seed}{'-published' * options.published}"
    work.mkdir(exist_ok=True)
    kept = work / f"{row}.json"
    if kept.is_file():
        return json.loads(kept.read_text())
    start = ""
    if row == "transfer":
        folders = {
            name: path for name in OTHERS if (path := options.data.resolve() / name).is_dir()
        }
        if not folders:
            raise SystemExit(f"nothing to transfer from: {options.data} has none of {list(OTHERS)}")
        first = work / "multitask.toml"
        first.write_text(multitask_text(options, folders))
        train(read_recipe(first), work / "multitask", device=options.device)
        start = f'[start]\nbundle = "{work.resolve() / "multitask"}"\n'
        start += 'only = ["encoder", "project"]'
    recipe = work / f"{row}.toml"
    recipe.write_text(recipe_text(row, options, ebhi, start))
    train(read_recipe(recipe), work / row, device=options.device)
    found = score_bundle(
        work / row, recipe, resamples=0, device=options.device, at_most=options.images or None
    )
    names = {"dice": "dice", "jaccard": "jaccard", "precision": "pixel_precision",
             "recall": "pixel_recall"}  # fmt: skip
    groups = {**{g: own["gland"] for g, own in found.groups.items()}, "all": found.heads["gland"]}
    scores = {
        group: {name: own[key].to_json()["value"] for name, key in names.items()}
        for group, own in groups.items()
    }
    weights = open_parameters(work / row)
    result = {"images": found.images, "parameters": weights, "scores": scores}
    kept.write_text(json.dumps(result))
    return result


def open_parameters(bundle: Path) -> int:
    """Return how many parameters a bundle's network has."""
    from wsi_pipeline.bundle import open_bundle

    return sum(p.numel() for p in open_bundle(bundle).load_network().parameters())


def main() -> None:
    rows = ("transfer", "fresh", "unet", "segnet", "medt")
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--published", action="store_true", help="published widths")
    parser.add_argument("--rows", nargs="+", choices=rows, default=rows)
    parser.add_argument("--images", type=int, default=0, help="judge at most so many; 0: all")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--work", type=Path)
    parser.add_argument("--device", default="auto")
    options = parser.parse_args()
    names = [options.data.resolve() / name for name in ("glands_ebhi", "EBHI-SEG")]
    ebhi = next((path for path in names if path.is_dir()), None)
    if ebhi is None:
        raise SystemExit(f"{options.data} holds neither glands_ebhi nor EBHI-SEG")
    with tempfile.TemporaryDirectory() as folder:
        work = options.work or Path(folder)
        work.mkdir(parents=True, exist_ok=True)
        table = {row: run(row, options, ebhi, work) for row in options.rows}
    print(json.dumps({"steps": options.steps, "seed": options.seed, "rows": table}, indent=2))


if __name__ == "__main__":
    main()
