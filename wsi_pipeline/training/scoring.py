"""Score a bundle on a dataset: what ``wsi evaluate`` does."""

from __future__ import annotations

import logging
import os
import tomllib
from dataclasses import replace
from pathlib import Path

from wsi_pipeline.bundle import find_bundle
from wsi_pipeline.device import choose_device, choose_precision
from wsi_pipeline.errors import DatasetError
from wsi_pipeline.job import versions
from wsi_pipeline.spec import ModelSpec
from wsi_pipeline.training.begin import held_out_images, open_parts
from wsi_pipeline.training.evaluate import Evaluation, evaluate
from wsi_pipeline.training.layouts import read_dataset
from wsi_pipeline.training.predicted import ImagePredictor
from wsi_pipeline.training.recipe import SplitRules, read_recipe
from wsi_pipeline.training.sources import Source
from wsi_pipeline.training.split import PARTS

__all__ = ["score_bundle"]

log = logging.getLogger(__name__)


def score_bundle(
    bundle: str | Path,
    dataset: Path,
    *,
    layout: str | None = None,
    mpp: float | None = None,
    part: str | None = None,
    at_most: int | None = None,
    resamples: int = 1000,
    device: str = "auto",
    precision: str = "auto",
) -> Evaluation:
    """Run a bundle's network and the pipeline's objects on annotated images, and score them.

    Args:
        bundle: a name in the model zoo or a folder.
        dataset: a folder of annotated images, or a recipe (``.toml``) whose sources and split
            are meant.
        layout: of the folder; None: recognised.
        mpp: micrometres per pixel of the folder's images; None: the layout's own.
        part: ``train``, ``validation``, ``test``, or ``all``. None: validation of a recipe,
            all of a folder.
        at_most: images, taken in turn from all groups; None: all.
        resamples: of the bootstrap over patients; 0: no intervals.
        device: as of ``wsi-run``.
        precision: as of ``wsi-run``.

    Raises:
        ModelBundleError: no such bundle.
        DatasetError: no image of that part, or files that cannot be read.
        RecipeError: labels that the model does not know.
    """
    found = find_bundle(bundle)
    sources = _sources(found.spec, dataset, layout, mpp, part)
    images = held_out_images(sources, at_most=at_most)
    device = choose_device(device)
    precision = choose_precision(precision, device, architecture=found.spec.architecture)
    predictor = ImagePredictor(found.spec, found.load_network(), device=device, precision=precision)
    about = {
        "model": {"name": found.name, "sha256": found.digest},
        "dataset": dataset.name,
        "layout": layout or sources[0].name,
        "part": part or ("validation" if dataset.is_file() else "all"),
        "mpp": found.spec.mpp,
        "device": device,
        "precision": precision,
        "resamples": resamples,
        "interval": "95 %, bootstrap over patients",
        "learnt_from_this_folder": _learnt_from(found.path, dataset, part),
        "versions": versions(),
    }
    if about["learnt_from_this_folder"]:
        log.warning(
            "%s was trained on images of %s: these scores flatter. Judge the validation part of "
            "its recipe (.toml), which leaves the training patients out, or another folder.",
            found.name,
            dataset,
        )
    return replace(evaluate(predictor, images, resamples=resamples), about=about)


def _learnt_from(bundle: Path, dataset: Path, part: str | None) -> bool:
    """Tell whether a bundle's recipe learns from what is judged, as far as names can tell.

    Args:
        bundle: its folder.
        dataset: a folder, of which every image counts as learnt from where it is a source; or a
            recipe, whose validation images do not where the bundle's recipe splits as it does.
        part: what is judged of it; None: see :func:`score_bundle`.
    """
    path = bundle / "train.toml"
    if not path.is_file():
        return False
    try:
        learnt = tomllib.loads(path.read_text(encoding="utf-8"))
        sources = [
            (Path(os.path.expandvars(str(source["path"]))).name, source.get("split", True))
            for source in learnt.get("source", [])
        ]
        split = SplitRules(**learnt.get("split", {}))
    except (ValueError, KeyError, TypeError, AttributeError):
        return False
    if dataset.suffix != ".toml":
        return any(name in _names(dataset) for name, _ in sources)
    recipe = read_recipe(dataset)
    all_parts = part in ("train", "all")
    judged = [own.path for own in recipe.source if own.split or all_parts]
    same = {name for path in judged for name in _names(path)}
    mixed = all_parts or split != recipe.split
    return any(name in same and (mixed or not apart) for name, apart in sources)


def _names(path: Path) -> set[str]:
    return {path.name, path.resolve().name}


def _sources(
    spec: ModelSpec, dataset: Path, layout: str | None, mpp: float | None, part: str | None
) -> list[Source]:
    if dataset.suffix != ".toml":
        folder = read_dataset(dataset, layout, mpp=mpp)
        named = {name: tuple(i for i in folder.items if i.part == name) for name in PARTS}
        named["all"] = folder.items
        items = named[part or "all"]
        if not items:
            counts = {name: len(own) for name, own in named.items()}
            raise DatasetError(f"{dataset} has no images of the part {part!r}: {counts}")
        return [Source(folder, items, spec)]
    parts = open_parts(read_recipe(dataset), spec)
    wanted = part or "validation"
    sources = [own.source for own in parts if wanted in (own.name, "all")]
    if not sources:
        raise DatasetError(f"{dataset}: no source has a part {wanted!r}")
    return sources
