"""Score a bundle on a dataset: what ``wsi evaluate`` does."""

from __future__ import annotations

from pathlib import Path

from wsi_pipeline.bundle import find_bundle
from wsi_pipeline.device import choose_device, choose_precision
from wsi_pipeline.errors import DatasetError
from wsi_pipeline.spec import ModelSpec
from wsi_pipeline.training.begin import held_out_images, open_parts
from wsi_pipeline.training.evaluate import Evaluation, evaluate
from wsi_pipeline.training.layouts import read_dataset
from wsi_pipeline.training.predicted import ImagePredictor
from wsi_pipeline.training.recipe import read_recipe
from wsi_pipeline.training.sources import Source
from wsi_pipeline.training.split import PARTS

__all__ = ["score_bundle"]


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
    half = found.spec.architecture != "stain-baseline"
    predictor = ImagePredictor(
        found.spec,
        found.load_network(),
        device=device,
        precision=choose_precision(precision, device, half_pays=half),
    )
    return evaluate(predictor, images, resamples=resamples)


def _sources(
    spec: ModelSpec, dataset: Path, layout: str | None, mpp: float | None, part: str | None
) -> list[Source]:
    if dataset.is_dir():
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
