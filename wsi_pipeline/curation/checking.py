"""All crops of a folder, alone and together."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import combinations
from pathlib import Path

from wsi_pipeline.curation.crops import PARTS, Crop, read_crop
from wsi_pipeline.curation.overlay import find_slide
from wsi_pipeline.errors import DatasetError
from wsi_pipeline.slide import Slide

__all__ = ["check_crops", "read_crops"]


def read_crops(folder: Path) -> tuple[Crop, ...]:
    """Read the crops of a folder, by id; or one, by its file.

    Raises:
        DatasetError: none, one that is wrong, or two parts that share pixels of a slide.
    """
    paths = [folder] if folder.is_file() else sorted(folder.glob("*.geojson"))
    if not paths:
        raise DatasetError(f"{folder} holds no crop (<crop_id>.geojson)")
    crops = tuple(read_crop(path) for path in paths)
    _check_apart(crops)
    return crops


def check_crops(folder: Path, slides: Path | None = None) -> list[str]:
    """Check the crops of a folder.

    Args:
        folder: of the crops.
        slides: folder of their slides, whose sizes are compared; None: they are not opened.

    Returns:
        Lines for people: objects and area by part and kind, and by crop.

    Raises:
        DatasetError: what is wrong.
    """
    crops = read_crops(folder)
    if slides is not None:
        for crop in crops:
            with Slide.open(find_slide(crop, slides), mpp=crop.mpp) as slide:
                crop.check_slide(slide.size)
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


def _check_apart(crops: Sequence[Crop]) -> None:
    for first, second in combinations(crops, 2):
        if first.slide != second.slide or first.part == second.part:
            continue
        if first.box.intersect(second.box).area:
            msg = "share pixels of {}, but one is for {} and one for {}"
            said = msg.format(first.slide, first.part, second.part)
            raise DatasetError(f"the crops {first.id} and {second.id} {said}")
