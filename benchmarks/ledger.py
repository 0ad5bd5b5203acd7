"""What each means of training is worth: the same short run with one thing left out at a time.

    python -m benchmarks.ledger --data $WSI_DATA --annotations annotations --pseudo $PSEUDO
        --out DIR [--steps 250] [--rows NAME ...] [--device cpu]

Every row trains a network of cerberus-lite's size from fresh weights, with the recipe's seed, by
``workflows/weights/stage-5.toml`` and one change, for nuclei or for glands and lumina alone. The
networks are judged on images that none learnt from. DIR gets a bundle a row, ``ledger.json`` and
``ledger.md``: PQ, and what the row has less than the complete recipe, with a paired 95 %
bootstrap interval over images. One seed a row: differences below 0.02 may be chance.
What is finished in DIR is not trained again.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import tomllib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import tomli_w
from numpy.typing import NDArray

from benchmarks.quality.judging import Judged, judge_set
from benchmarks.quality.sets import ImageSet, open_sets
from wsi_pipeline.bundle import ModelBundle, open_bundle
from wsi_pipeline.device import choose_device, choose_precision
from wsi_pipeline.metrics import bootstrap
from wsi_pipeline.training.fit import train
from wsi_pipeline.training.predicted import ImagePredictor
from wsi_pipeline.training.recipe import read_recipe

log = logging.getLogger("ledger")

RECIPE = Path(__file__).parent.parent / "workflows" / "weights" / "stage-5.toml"
DRAWS = 1000
Change = Callable[[dict[str, Any]], None]
"""Changes a parsed recipe."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Task:
    """What a row learns, and what it is judged by."""

    heads: tuple[str, ...]
    """Of the network; the first is the sources' task."""
    scores: Mapping[str, tuple[str, ...]]
    """By set of images: the heads whose PQ counts."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One change to a recipe."""

    name: str
    task: str
    change: Change


TASKS = {
    "nuclei": Task(
        heads=("nuclei",),
        scores={"monuseg": ("nuclei",), "crops": ("nuclei",), "dsb2018": ("nuclei",)},
    ),
    "gland": Task(
        heads=("gland", "lumen"),
        scores={"ebhi": ("gland", "lumen"), "crops": ("gland",)},
    ),
}


def without(layout: str, path: str = "") -> Change:
    """Leave out the sources of a layout (whose path has ``path`` in it)."""

    def change(recipe: dict[str, Any]) -> None:
        recipe["source"] = [
            own for own in recipe["source"] if own["layout"] != layout or path not in own["path"]
        ]

    return change


def own_crops(patterns: Sequence[str]) -> Change:
    """Keep only the own crops whose name fits none of some patterns."""

    def change(recipe: dict[str, Any]) -> None:
        for own in recipe["source"]:
            if "ANNOTATIONS" in own["path"]:
                own["leave_out"] = list(patterns)

    return change


def augment(**rules: float) -> Change:
    """Change rules of augmentation."""
    return lambda recipe: recipe["augment"].update(rules)


def nothing(_: dict[str, Any]) -> None:
    """Change nothing."""


ROWS = (
    Row(name="nuclei", task="nuclei", change=nothing),
    Row(name="no own crops", task="nuclei", change=without("crops", "ANNOTATIONS")),
    Row(name="a fifth of own crops", task="nuclei", change=own_crops(["*[!48]"])),
    Row(name="half of own crops", task="nuclei", change=own_crops(["*[13579]"])),
    Row(name="no pseudo-labels", task="nuclei", change=without("crops", "PSEUDO")),
    Row(name="no DSB 2018", task="nuclei", change=without("dsb2018")),
    Row(name="no pale nuclei", task="nuclei", change=augment(vesicular_p=0.0)),
    Row(
        name="no change of stain",
        task="nuclei",
        change=augment(
            stain_h=0.0, stain_e=0.0, stain_rest=0.0, stain_jitter=0.0, stain_offset=0.0
        ),
    ),
    Row(name="gland", task="gland", change=nothing),
    Row(name="no own glands", task="gland", change=without("crops", "ANNOTATIONS")),
    Row(name="no gland-free tiles", task="gland", change=without("kather")),
    Row(name="no GG-pT1", task="gland", change=without("pt1")),
)
"""A task's first row is the complete recipe, which the others are compared with."""


def recipe_text(row: Row, *, steps: int) -> str:
    """Return the TOML that a row is trained by; paths are made absolute."""
    recipe = tomllib.loads(RECIPE.read_text(encoding="utf-8"))
    task = TASKS[row.task]
    del recipe["start"]
    recipe["description"] = f"Ledger: {row.name}"
    recipe["model"]["heads"] = [
        {key: value for key, value in head.items() if not _names_another(key, value, task)}
        for head in recipe["model"]["heads"]
        if head["name"] in task.heads
    ]
    recipe["heads"] = {name: recipe["heads"][name] for name in task.heads}
    scales = recipe["model"]["options"]["scales"]
    recipe["model"]["options"]["scales"] = {name: scales[name] for name in task.heads}
    recipe["source"] = [own for own in recipe["source"] if own["task"] == task.heads[0]]
    for own in recipe["source"]:
        own.pop("classes", None)
        if own["layout"] in ("ebhi", "pt1"):
            own["heads"] = {"gland-class": ""}
        own["path"] = own["path"].replace("../../annotations", "$ANNOTATIONS")
    recipe["batches"] = {"size": 8, "crop_px": 256}
    recipe["schedule"] |= {"steps": steps, "warmup": 30, "ema": 0.98, "learning_rate": 2e-3}
    recipe["validation"] = {"every": steps, "images": 4, "pictures": 1}
    row.change(recipe)
    if row.task != "nuclei":
        recipe["augment"].pop("vesicular_p")
    return tomli_w.dumps(recipe)


def _names_another(key: str, value: object, task: Task) -> bool:
    return key == "parent" and value not in task.heads


def judged(bundle: ModelBundle, sets: Sequence[ImageSet], device: str) -> list[Judged]:
    """Show a row's network the images."""
    precision = choose_precision("auto", device, architecture=bundle.spec.architecture)
    predictor = ImagePredictor(
        bundle.spec, bundle.load_network(), device=device, precision=precision
    )
    return [judge_set(predictor, own) for own in sets]


def compare(task: Task, own: Sequence[Judged], complete: Sequence[Judged]) -> dict[str, Any]:
    """Return PQ by set and head, and how much less it is than the complete recipe's."""
    found = {}
    for mine, theirs in zip(own, complete, strict=True):
        for head in task.scores[mine.set.plan.name]:
            one, other = mine.measures[head], theirs.measures[head]

            def less(
                drawn: NDArray[np.intp], one: Any = one, other: Any = other
            ) -> dict[str, float]:
                return {"less": one.scores(drawn)["pq"] - other.scores(drawn)["pq"]}

            rows = np.arange(len(one.images))
            interval = bootstrap(less, len(rows), draws=DRAWS)["less"]
            found[f"{mine.set.plan.name}/{head}"] = {
                "pq": round(float(one.scores(rows)["pq"]), 4),
                "difference": [round(v, 4) for v in (interval.value, interval.low, interval.high)],
            }
    return found


def markdown(results: Mapping[str, Mapping[str, Any]]) -> str:
    """Return a table a task."""
    lines = []
    for name, task in TASKS.items():
        rows = {
            row.name: results[row.name] for row in ROWS if row.task == name and row.name in results
        }
        if not rows:
            continue
        keys = [f"{own}/{head}" for own, heads in task.scores.items() for head in heads]
        lines += ["| " + " | ".join(["recipe", *keys]) + " |", "|---" * (len(keys) + 1) + "|"]
        for row, scores in rows.items():
            cells = [_cell(scores[key], complete=row == name) for key in keys]
            lines.append("| " + " | ".join([row, *cells]) + " |")
        lines.append("")
    return "\n".join(lines)


def _cell(score: Mapping[str, Any], *, complete: bool) -> str:
    if complete:
        return f"{score['pq']:.3f}"
    value, low, high = score["difference"]
    return f"{score['pq']:.3f}, {value:+.3f} ({low:+.3f} to {high:+.3f})"


def main() -> None:
    """Train what is not there, judge all, write the ledger."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    options = _options()
    out: Path = options.out
    out.mkdir(parents=True, exist_ok=True)
    os.environ |= {
        "WSI_DATA": str(options.data.resolve()),
        "ANNOTATIONS": str(options.annotations.resolve()),
        "PSEUDO": str(options.pseudo.resolve()),
    }
    rows = [row for row in ROWS if not options.rows or row.name in (*options.rows, row.task)]
    bundles = {}
    for row in rows:
        file = out / f"{row.name.replace(' ', '-')}.toml"
        file.write_text(recipe_text(row, steps=options.steps), encoding="utf-8")
        log.info("%s: training", row.name)
        train(read_recipe(file), file.with_suffix(""), device=options.device)
        bundles[row.name] = open_bundle(file.with_suffix(""))
    device = choose_device(options.device)
    results: dict[str, Any] = {}
    for name, task in TASKS.items():
        own = [row for row in rows if row.task == name]
        if not own:
            continue
        sets = _sets(bundles[name], task, options)
        complete = judged(bundles[name], sets, device)
        for row in own:
            mine = complete if row.name == name else judged(bundles[row.name], sets, device)
            results[row.name] = compare(task, mine, complete)
            log.info("%s: %s", row.name, results[row.name])
    text = json.dumps({"steps": options.steps, "rows": results}, indent=2)
    (out / "ledger.json").write_text(f"{text}\n", encoding="utf-8")
    (out / "ledger.md").write_text(markdown(results), encoding="utf-8")


def _sets(bundle: ModelBundle, task: Task, options: argparse.Namespace) -> list[ImageSet]:
    found = open_sets(
        bundle.spec, data=options.data, annotations=options.annotations, recipes=[], fast=False
    )
    kept = [own for own in found if own.plan.name in task.scores]
    return [
        replace(own, images=own.images[:: max(1, len(own.images) // options.images)])
        for own in kept
    ]


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="benchmarks.ledger", description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="the data kit's folder")
    parser.add_argument("--annotations", type=Path, required=True, help="the folder of own crops")
    parser.add_argument("--pseudo", type=Path, required=True, help="the folder of pseudo-labels")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=250, help="batches of 8 crops a row")
    parser.add_argument("--rows", nargs="+", default=[], choices=[row.name for row in ROWS])
    parser.add_argument("--images", type=int, default=75, help="at most about so many a set")
    parser.add_argument("--device", default="auto")
    return parser.parse_args()


if __name__ == "__main__":
    main()
