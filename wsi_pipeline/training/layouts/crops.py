"""Own annotations: crops of slides in which named objects are outlined completely.

::

    FOLDER/crops/<crop_id>.geojson      see ``curation.crops``

A folder of crops will do, or one file. Pixels are read from the slides; a border around the
crop is read too, so that a network sees what surrounds it, and is unknown for every label.

The patient is the slide, and a slide may have crops of both parts, in different regions: such
parts are the annotators', and scores on them say less than scores on another patient would.
Splits that are drawn instead, and folds, keep a slide's crops together.
"""

from __future__ import annotations

import math
import os
from collections.abc import Collection, Iterable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import shapely
from numpy.typing import NDArray

from wsi_pipeline.curation.checking import read_crops
from wsi_pipeline.curation.crops import HEADS, IGNORE, RULER_MPP, Crop
from wsi_pipeline.curation.overlay import find_slide
from wsi_pipeline.errors import DatasetError, SlideError
from wsi_pipeline.geometry import PixelGrid
from wsi_pipeline.slide import Slide
from wsi_pipeline.training.annotation import (
    IGNORE_ID,
    AnnotatedImage,
    Dataset,
    InstanceLabel,
    Item,
    Label,
)
from wsi_pipeline.training.raster import number_pixels, on_grid

__all__ = ["read_crops_labels"]


@dataclass(frozen=True, kw_only=True, slots=True)
class _Plan:
    """A crop to read; picklable."""

    crop: Crop
    slide: Path
    read_mpp: float
    context_um: float


def read_crops_labels(
    folder: Path,
    *,
    mpp: float | None = None,
    slides: str | Path | None = None,
    labels: Collection[str] = (),
    context_um: float = 32.0,
    read_mpp: float = RULER_MPP,
) -> Dataset:
    """List crops. Their ``part`` is the item's; scores are also given by slide.

    Args:
        folder: with ``crops/*.geojson``, or the folder of the crops, or one of them.
        mpp: None: each crop says its slide's.
        slides: folder of the slides; may name environment variables, as in ``$WSI_DATA/slides``.
        labels: only the crops that are annotated for one of these heads, and only for these;
            none given: all. Lets one folder be two sources, each with its share of a batch.
        context_um: width of the border that is read around a crop, where the slide goes on.
        read_mpp: micrometres per pixel at which crops are read and drawn.

    Raises:
        DatasetError: no crops, one that is wrong, a slide that is not in the folder or is
            not the crop's, an option that makes no sense, or ``mpp`` given.
    """
    if mpp is not None:
        raise DatasetError(f"{folder}: mpp = {mpp} is not used; every crop says its own")
    if not 0 <= context_um < math.inf:
        raise DatasetError(f"{folder}: context_um must be 0 or more, not {context_um}")
    if not 0 < read_mpp < math.inf:
        raise DatasetError(f"{folder}: read_mpp must be more than 0, not {read_mpp}")
    home = _home(folder, slides)
    crops = read_crops(folder / "crops" if (folder / "crops").is_dir() else folder)
    if labels:
        crops = _only(crops, labels, folder)
    items = []
    for crop in crops:
        path = find_slide(crop, home)
        plan = _Plan(crop=crop, slide=path, read_mpp=read_mpp, context_um=context_um)
        patient = path.stem
        load = partial(_load, plan)
        items.append(Item(name=crop.id, patient=patient, load=load, part=crop.part, group=patient))
    heads = {label: () for label in HEADS if any(label in crop.labels for crop in crops)}
    return Dataset(name="crops", path=folder, labels=heads, items=tuple(items))


def _home(folder: Path, slides: str | Path | None) -> Path:
    """Return the folder of the slides."""
    if slides is None:
        msg = 'where are the slides? A recipe says so: options = { slides = "FOLDER" }'
        raise DatasetError(f"{folder}: {msg}")
    expanded = os.path.expandvars(slides)
    if "$" in str(expanded):
        msg = f"slides = {str(slides)!r} names an environment variable that is not set"
        raise DatasetError(f"{folder}: {msg}")
    return Path(expanded)


def _only(crops: tuple[Crop, ...], labels: Collection[str], folder: Path) -> tuple[Crop, ...]:
    """Return the crops that are annotated for a head, and these heads alone of each."""
    if isinstance(labels, str) or set(labels) - set(HEADS):
        msg = f"labels must be a list of some of {', '.join(HEADS)}, not {labels!r}"
        raise DatasetError(f"{folder}: {msg}")
    found = tuple(_of(crop, labels) for crop in crops if set(crop.labels) & set(labels))
    if not found:
        have = sorted({label for crop in crops for label in crop.labels})
        raise DatasetError(f"{folder}: no crop has the labels {list(labels)}, only {have}")
    return found


def _of(crop: Crop, labels: Collection[str]) -> Crop:
    own = tuple(label for label in crop.labels if label in labels)
    kinds, regions = {HEADS[label] for label in own}, {None, *own}
    outlines = tuple(
        outline
        for outline in crop.outlines
        if outline.kind in kinds or (outline.kind == IGNORE and outline.label in regions)
    )
    return replace(crop, labels=own, outlines=outlines)


def _load(plan: _Plan) -> AnnotatedImage:
    crop = plan.crop
    try:
        with Slide.open(plan.slide, mpp=crop.mpp) as slide:
            crop.check_slide(slide.size)
            grid = slide.working_grid(plan.read_mpp)
            pixel_um = math.sqrt(math.prod(grid.spacing)) * crop.mpp
            box = grid.cover(PixelGrid.level0(slide.size), crop.box)
            box = box.pad(round(plan.context_um / pixel_um)).intersect(grid.box)
            image = slide.read(grid, box)
            if slide.holes:
                raise DatasetError(f"crop {crop.id}: parts of {plan.slide} cannot be decoded")
    except SlideError as error:
        raise DatasetError(f"crop {crop.id}: {plan.slide}: {error}") from error
    local, shape = grid.window(box), image.shape[:2]
    outside = _drawn([crop.rectangle], local, shape) == 0
    labels: dict[str, Label] = {}
    for label, kind in zip(crop.labels, crop.kinds, strict=True):
        ids = _drawn((o.polygon for o in crop.outlines if o.kind == kind), local, shape)
        unknown = _drawn(
            (o.polygon for o in crop.outlines if o.kind == IGNORE and o.label in (None, label)),
            local,
            shape,
        )
        ids[outside | (unknown > 0)] = IGNORE_ID
        labels[label] = InstanceLabel(ids=ids)
    return AnnotatedImage(name=crop.id, image=image, mpp=pixel_um, labels=labels)


def _drawn(
    polygons: Iterable[shapely.Polygon], grid: PixelGrid, shape: tuple[int, ...]
) -> NDArray[np.int32]:
    return number_pixels(on_grid(np.array(list(polygons), object), grid), shape)
