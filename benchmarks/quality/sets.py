"""The images that a bundle is judged on: which they are, who learnt from them, what may be shown.

Held-out images are those that a recipe with the standard split (a fifth of the patients, seed 0)
keeps for validation. Whether a bundle kept to it is read off the recipes of all its stages.
"""

from __future__ import annotations

import logging
import os
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from wsi_pipeline.errors import DatasetError, RecipeError
from wsi_pipeline.spec import ModelSpec
from wsi_pipeline.training.annotation import Item
from wsi_pipeline.training.begin import HeldOut, held_out_images
from wsi_pipeline.training.layouts import LAYOUTS, read_dataset
from wsi_pipeline.training.sources import ImageCache, Source
from wsi_pipeline.training.split import split_items

__all__ = [
    "CROPS",
    "PLANS",
    "SPLIT",
    "ImageSet",
    "Plan",
    "open_set",
    "open_sets",
    "standing",
    "training_history",
]

log = logging.getLogger(__name__)

SPLIT = {"validation": 0.2, "seed": 0}
"""The split of the recipes: share of the patients that validates, and the seed."""
HEADS = ("nuclei", "gland", "lumen")
"""Labels that are judged; others a dataset has are left aside."""
CROPS = "crops"
"""Name of the set of own annotations, and of their layout."""
OWN = "annotations"
"""Name of the folder of own annotations in this project and in its recipes."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """A set of images, as it can be found in a data folder."""

    name: str
    """Key in the scores."""
    title: str
    """What it is, for a table."""
    folder: str
    """In the data folder."""
    layout: str
    """Of :data:`~wsi_pipeline.training.layouts.LAYOUTS`."""
    mpp: float | None = None
    """Micrometres a pixel, where the layout does not know."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """Of the layout's reader."""
    held_out: bool = True
    """Only the validation part; False: all of it, as nobody may learn from it."""
    shown: str | None = None
    """Attribution under a picture; None: its pixels are never shown."""
    fast: int | None = None
    """Images in a fast run, taken in turn from all groups; None: all."""


PLANS = (
    Plan(
        name="monuseg",
        title="MoNuSeg, six tiles at 0.5 um, never learnt from",
        folder="nuclei_monuseg_NC",
        layout="monuseg",
        held_out=False,
    ),
    Plan(
        name="dsb2018",
        title="DSB 2018, held-out images scaled to nuclei of 6.5 um",
        folder="nuclei_dsb2018_CC0",
        layout="dsb2018",
        options={"nucleus_um": 6.5},
        shown="DSB 2018 (BBBC038), CC0",
        fast=8,
    ),
    Plan(
        name="ebhi",
        title="EBHI-Seg, held-out patients at 1.1 um",
        folder="glands_ebhi",
        layout="ebhi",
        mpp=1.1,
        shown="EBHI-Seg (Shi et al. 2023), CC BY 4.0",
        fast=30,
    ),
    Plan(
        name="pt1",
        title="GG-pT1, held-out images, one annotated gland a crop",
        folder="glands_pt1",
        layout="pt1",
        mpp=0.5,
        shown="GG-pT1, MIT",
        fast=8,
    ),
    Plan(
        name="kather",
        title="Kather tiles without glands, held out",
        folder="tissue_kather",
        layout="kather",
        options={"gland_free": True},
        shown="NCT-CRC-HE (Kather et al. 2019), CC BY 4.0",
    ),
)
"""What the data folder holds."""

CROPS_PLAN = Plan(
    name=CROPS,
    title="own annotations, validation crops",
    folder=OWN,
    layout=CROPS,
    shown="slides CC0 and MIT",
    fast=10,
)


@dataclass(frozen=True, kw_only=True, slots=True)
class ImageSet:
    """Images to judge a network on."""

    plan: Plan
    """Where they are from."""
    images: tuple[HeldOut, ...]
    """At the network's pixel size once loaded."""
    standing: str
    """Whether the network learnt from them; see :func:`standing`."""


def open_sets(
    spec: ModelSpec, *, data: Path, annotations: Path | None, recipes: Sequence[Path], fast: bool
) -> list[ImageSet]:
    """Open what is there; what is missing or cannot be judged is said in the log and left out.

    Args:
        spec: of the network.
        data: the folder that the plans' folders are in.
        annotations: the folder of own annotations, which holds ``crops``.
        recipes: what the network was trained by; see :func:`standing`.
        fast: take few images.
    """
    plans = [(plan, data / plan.folder, {}) for plan in PLANS]
    if annotations is not None:
        own = replace(CROPS_PLAN, folder=annotations.resolve().name)
        plans.append((own, annotations / CROPS, {"slides": data / "slides"}))
    found = []
    for plan, folder, options in plans:
        try:
            found.append(open_set(plan, folder, spec, recipes=recipes, fast=fast, options=options))
        except (DatasetError, RecipeError) as error:
            log.warning("%s is left out: %s", plan.name, error)
    return found


def open_set(
    plan: Plan,
    folder: Path,
    spec: ModelSpec,
    *,
    recipes: Sequence[Path],
    fast: bool,
    options: Mapping[str, Any],
) -> ImageSet:
    """Open one set.

    Args:
        plan: what is wanted of it.
        folder: where it is.
        spec: of the network.
        recipes: what it was trained by.
        fast: take few images.
        options: further arguments of the layout's reader, as far as it knows them.

    Raises:
        DatasetError: the folder is missing or in another layout, or nothing is held out.
        RecipeError: the network has no head for any of the labels.
    """
    if plan.layout not in LAYOUTS:
        raise DatasetError(f"there is no layout {plan.layout!r} yet")
    dataset = read_dataset(folder, plan.layout, mpp=plan.mpp, **plan.options, **options)
    items: Sequence[Item] = dataset.items
    if plan.held_out:
        items = split_items(items, **SPLIT).get("validation", ())
    unjudged = {label: "" for label in dataset.labels if label not in HEADS}
    source = Source(dataset, items, spec, heads=unjudged, cache=ImageCache(0))
    images = held_out_images([source], at_most=plan.fast if fast else None)
    return ImageSet(plan=plan, images=images, standing=standing(plan, recipes))


def training_history(recipe: Path) -> tuple[list[Path], bool]:
    """Return a bundle's recipe, that of the bundle it started from, and so on.

    Returns:
        The recipes that were found, and whether they go back to fresh weights.
    """
    found: list[Path] = []
    while recipe.is_file() and recipe not in found:
        found.append(recipe)
        start = tomllib.loads(recipe.read_text(encoding="utf-8")).get("start", {})
        if not {"bundle", "model"} & start.keys():
            return found, True
        folder = Path(os.path.expandvars(str(start.get("bundle", ""))))
        recipe = recipe.parent / folder / "train.toml"
    return found, False


def standing(plan: Plan, recipes: Sequence[Path]) -> str:
    """Tell from recipes whether a network learnt from the images of a set.

    Args:
        plan: the set.
        recipes: of all stages, or the last one, whose ancestors are then looked for.

    Returns:
        ``held out``, ``never seen``, ``learnt from``, or why that is not known.
    """
    complete = len(recipes) > 1
    if len(recipes) == 1:
        recipes, complete = training_history(recipes[0])
    if not recipes:
        return "not known: there is no recipe"
    found = {_standing_in(plan, tomllib.loads(r.read_text(encoding="utf-8"))) for r in recipes}
    unclear = sorted(one for one in found if one.startswith("not known"))
    if "learnt from" in found:
        return "learnt from"
    if unclear or not complete:
        return unclear[0] if unclear else "not known: the recipe of an earlier stage is missing"
    return "held out" if "held out" in found else "never seen"


def _standing_in(plan: Plan, recipe: Mapping[str, Any]) -> str:
    own = [source for source in recipe.get("source", []) if _is_of(source, plan)]
    if not own:
        return "never seen"
    if not plan.held_out or any(not source.get("split", True) for source in own):
        return "learnt from"
    rules = {**SPLIT, "published": True, **recipe.get("split", {})}
    if rules == {**SPLIT, "published": True}:
        return "held out"
    return f"not known: a recipe splits by {rules}"


def _is_of(source: Mapping[str, Any], plan: Plan) -> bool:
    """Tell whether a source's images are those of a plan.

    A layout other than ``crops`` belongs to one dataset. Crops are of whoever drew them, such as
    pseudo-labels of other windows; the own ones are known by the name of their folder.
    """
    path = Path(os.path.expandvars(str(source["path"])))
    if plan.layout != CROPS:
        return plan.layout == source.get("layout") or plan.folder == path.name
    if path.suffix == ".geojson":
        path = path.parent
    folder = path.parent if path.name == CROPS else path
    return folder.name in (plan.folder, OWN)
