"""All crops of a folder, alone and together."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import combinations
from pathlib import Path

from wsi_pipeline.curation.crops import PARTS, Crop, read_crop
from wsi_pipeline.curation.overlay import find_slide
from wsi_pipeline.errors import DatasetError, ImplausiblePixelSizeError, MissingPixelSizeError
from wsi_pipeline.slide import Slide
from wsi_pipeline.slide.planes import MPP_TOLERANCE

__all__ = ["check_crops", "read_crops"]

_SHARED = 0.1
"""Of the smaller of two crops for one head and part: neighbours may meet at a corner."""


def read_crops(folder: Path) -> tuple[Crop, ...]:
    """Read the crops of a folder, by id; or one, by its file.

    Raises:
        DatasetError: none, one that is wrong, or two that contradict each other: in the size of
            their slide or of its pixels, or by lying over one another.
    """
    paths = [folder] if folder.is_file() else sorted(folder.glob("*.geojson"))
    if not paths:
        raise DatasetError(f"{folder} holds no crop (<crop_id>.geojson)")
    crops = tuple(read_crop(path) for path in paths)
    for first, second in combinations(crops, 2):
        if first.slide == second.slide:
            _check_alike(first, second)
            _check_apart(first, second)
    return crops


def check_crops(
    folder: Path, slides: Path | None = None, *, mpp: Mapping[str, float] | None = None
) -> list[str]:
    """Check the crops of a folder.

    Args:
        folder: of the crops.
        slides: folder of their slides, whose sizes are compared; None: they are not opened.
        mpp: by the slide's file name, the micrometres per level-0 pixel where a slide says
            wrong ones; what no slide says and nobody gives is not compared.

    Returns:
        Lines for people: objects and area by part and kind, and by crop.

    Raises:
        DatasetError: what is wrong.
    """
    crops, given = read_crops(folder), mpp or {}
    strange = sorted(set(given) - {crop.slide for crop in crops})
    if strange:
        raise DatasetError(f"{folder} has no crop of the slides {strange}")
    if slides is not None:
        for crop in crops:
            _check_slide(crop, find_slide(crop, slides), given.get(crop.slide))
    lines = [_crop_line(crop) for crop in crops]
    for part in PARTS:
        own = [crop for crop in crops if crop.part == part]
        counts = Counter(outline.kind for crop in own for outline in crop.outlines)
        for label, kind in _heads(own):
            labelled = [crop for crop in own if label in crop.labels]
            area = sum(crop.box.area * crop.mpp**2 for crop in labelled) / 1e6
            lines.append(
                f"{part}: {counts[kind]} {kind} in {len(labelled)} crops of "
                f"{len({crop.slide for crop in labelled})} slides, {area:.3f} mm2"
            )
    return lines


def _heads(crops: Sequence[Crop]) -> list[tuple[str, str]]:
    pairs = {pair for crop in crops for pair in zip(crop.labels, crop.kinds, strict=True)}
    return sorted(pairs)


def _crop_line(crop: Crop) -> str:
    counts = Counter(outline.kind for outline in crop.outlines)
    objects = ", ".join(f"{counts[kind]} {kind}" for kind in (*crop.kinds, "ignore"))
    side = crop.box.width * crop.mpp, crop.box.height * crop.mpp
    return (
        f"{crop.id}\t{crop.part}\t{crop.slide}\t{side[0]:.0f} x {side[1]:.0f} um\t"
        f"rounds 0-{len(crop.history) - 1}\t{objects}"
    )


def _check_slide(crop: Crop, path: Path, mpp: float | None) -> None:
    try:
        slide = Slide.open(path, mpp=mpp)
    except (MissingPixelSizeError, ImplausiblePixelSizeError):
        if mpp is not None:
            raise
        slide = Slide.open(path, mpp=crop.mpp)  # nobody but the crop knows
    with slide:
        crop.check_slide(slide.size)
        pixel = slide.pixel_size
    if not _same_mpp(crop.mpp, math.sqrt(pixel.x * pixel.y)):
        msg = "crop {} says {:g} um a pixel, but {} has {:g} x {:g} according to {}"
        said = msg.format(crop.id, crop.mpp, crop.slide, pixel.x, pixel.y, pixel.source)
        raise DatasetError(f"{said}; if that is wrong, give --mpp {crop.slide}={crop.mpp:g}")


def _check_alike(first: Crop, second: Crop) -> None:
    if first.slide_size != second.slide_size or not _same_mpp(first.mpp, second.mpp):
        msg = (
            "the crops {} and {} are of {}, but one says {} x {} px of {:g} um, one {} x {} of {:g}"
        )
        facts = [(*crop.slide_size, crop.mpp) for crop in (first, second)]
        raise DatasetError(msg.format(first.id, second.id, first.slide, *facts[0], *facts[1]))


def _same_mpp(first: float, second: float) -> bool:
    return abs(first / second - 1) <= MPP_TOLERANCE


def _check_apart(first: Crop, second: Crop) -> None:
    shared = first.box.intersect(second.box).area
    if not shared:
        return
    ids = f"the crops {first.id} and {second.id} share pixels of {first.slide}"
    if first.part != second.part:
        raise DatasetError(f"{ids}, but one is for {first.part} and one for {second.part}")
    both = [label for label in first.labels if label in second.labels]
    share = shared / min(first.box.area, second.box.area)
    if both and share > _SHARED:
        heads = ", ".join(both)
        raise DatasetError(f"{ids}: {share:.0%} of the smaller, where {heads} would count twice")
