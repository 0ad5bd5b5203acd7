"""What commands that write crops without a human share: where windows lie, how they are written.

Windows lie at random over the tissue, the more often the more stain there is, and away from crops
that are for validation. A command says what is in a window, as label images: what is sure is an
object, what is doubtful is to be ignored, the rest is background.
"""

from __future__ import annotations

import csv
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import click
import numpy as np
import shapely
from numpy.typing import NDArray
from scipy import ndimage

from workflows.weights.label_polygons import connected, polygons
from wsi_pipeline.curation.crops import (
    HEADS,
    IGNORE,
    MIN_AREA_UM2,
    Crop,
    Outline,
    Round,
    read_crop,
    rounded,
    write_crop,
)
from wsi_pipeline.geometry import Box, PixelGrid
from wsi_pipeline.slide import Slide
from wsi_pipeline.tissue import detect_tissue

__all__ = [
    "Place",
    "Plan",
    "empty_crop",
    "listed_places",
    "outlines_of",
    "plan_slide",
    "share_out",
    "validation_places",
    "window_options",
    "write_crops",
]

THUMBNAIL_MPP = 8.0
MIN_TISSUE = 0.2
"""Share of a window that must be tissue."""
MARGIN_UM = 20.0
"""Kept free around crops that are for validation."""
SMOOTH_PX = 0.3
"""By which outlines, which follow pixels, may be simplified."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Place:
    """A rectangle that must stay unseen."""

    slide: str
    """File name without folders."""
    box: Box
    """Level-0 pixels, the margin included."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """A slide and where its windows may lie."""

    path: Path
    mpp: float
    """Micrometres per level-0 pixel."""
    size: tuple[int, int]
    """Of level 0."""
    boxes: tuple[Box, ...]
    """Level-0 pixels, disjoint; in the order in which they are taken."""
    stained_mm2: float
    """Area of tissue, weighted by how much light it takes."""


def validation_places(folder: Path) -> list[Place]:
    """Return the places of the validation crops of a folder, with their margin."""
    crops = [read_crop(path) for path in sorted(folder.glob("*.geojson"))]
    return [
        Place(slide=crop.slide, box=crop.box.pad(round(MARGIN_UM / crop.mpp)))
        for crop in crops
        if crop.part == "validation"
    ]


def listed_places(path: Path) -> list[Place]:
    """Return the places of a list, with their margin.

    Args:
        path: CSV with the columns ``slide``, ``mpp``, ``x``, ``y`` (the centre in level-0
            pixels), ``side_um`` and ``part``; only rows of the part ``validation`` count.
    """
    places = []
    with open(path, newline="", encoding="utf-8") as stream:
        for row in csv.DictReader(stream):
            mpp, half_um = float(row["mpp"]), float(row["side_um"]) / 2
            x, y, half = float(row["x"]), float(row["y"]), (half_um + MARGIN_UM) / mpp
            edges = [round(edge) for edge in (x - half, y - half, x + half, y + half)]
            if row["part"] == "validation":
                places.append(Place(slide=row["slide"], box=Box.from_edges(*edges)))
    return places


def plan_slide(
    path: Path, *, mpp: float | None, side_um: float, seed: int, places: Iterable[Place]
) -> Plan:
    """Choose where the windows of a slide may lie.

    They are the cells of a lattice with a random offset that hold tissue and touch none of the
    places, in random order, those with more stain more often near its front (Efraimidis &
    Spirakis, Information Processing Letters 97 (2006)).

    Args:
        path: the slide.
        mpp: micrometres per level-0 pixel; None: what the slide says.
        side_um: of a window; the whole slide where it is smaller.
        seed: of the offset and the order; together with the slide's name.
        places: to keep away from.
    """
    with Slide.open(path, mpp=mpp) as slide:
        pixel = slide.pixel_size
        image, grid = slide.thumbnail(THUMBNAIL_MPP)
        size = slide.size
    own = round((pixel.x * pixel.y) ** 0.5, 6)
    tissue = detect_tissue(image, grid, (pixel.x, pixel.y))
    taken = np.where(tissue.mask, 1 - image[..., 1] / 255.0, 0)
    width, height = (min(round(side_um / own), length) for length in size)
    random = np.random.default_rng([seed, zlib.crc32(path.name.encode())])
    left, top = (
        int(random.integers(0, min(side, length - side) + 1))
        for side, length in ((width, size[0]), (height, size[1]))
    )
    near = [place.box for place in places if place.slide == path.name]
    frame = PixelGrid.level0(size)
    found = []
    for y in range(top, size[1] - height + 1, height):
        for x in range(left, size[0] - width + 1, width):
            box = Box(x=x, y=y, width=width, height=height)
            cut = grid.cover(frame, box).intersect(grid.box).slices
            luck = random.random()
            if tissue.mask[cut].mean() < MIN_TISSUE or any(box.intersect(b).area for b in near):
                continue
            found.append((luck ** (1 / max(float(taken[cut].mean()), 1e-6)), box))
    found.sort(key=lambda pair: -pair[0])
    pixel_mm2 = (grid.spacing[0] * own / 1e3) ** 2
    return Plan(
        path=path,
        mpp=own,
        size=size,
        boxes=tuple(box for _, box in found),
        stained_mm2=float(taken.sum()) * pixel_mm2,
    )


def share_out(plans: Sequence[Plan], windows: int) -> list[int]:
    """Return how many windows each slide gives, as far as it has them.

    One each, the rest as the roots of their stained areas, so that a large slide does not
    drown the others.
    """
    counts = [min(1, len(plan.boxes)) for plan in plans]
    while sum(counts) < windows:
        open_ = [k for k, plan in enumerate(plans) if counts[k] < len(plan.boxes)]
        if not open_:
            break
        # The next goes to whom it is due most (Sainte-Lague).
        best = max(open_, key=lambda k: plans[k].stained_mm2 ** 0.5 / (2 * counts[k] + 1))
        counts[best] += 1
    return counts


def empty_crop(
    plan: Plan, index: int, *, labels: Sequence[str], mark: str, note: str, by: str, how: str
) -> Crop:
    """Return a window of a plan as a crop for training, without objects.

    Args:
        plan: of the slide.
        index: of the window.
        labels: heads that will be annotated.
        mark: letter before the window's number in the crop's id.
        note: of the crop.
        by: which command, for its history.
        how: by what, likewise.
    """
    return Crop(
        id=f"{plan.path.stem}-{mark}{index + 1:03d}",
        slide=plan.path.name,
        slide_size=plan.size,
        mpp=plan.mpp,
        box=plan.boxes[index],
        labels=tuple(labels),
        part="train",
        note=note,
        history=(Round(round=0, by=by, how=how),),
    )


def outlines_of(
    labels: NDArray[np.int32],
    doubtful: NDArray[np.bool_],
    crop: Crop,
    *,
    head: str,
    source: str,
    first_id: int = 1,
) -> Iterator[Outline]:
    """Yield the objects of one head of a crop, then the regions that are unknown for it.

    Args:
        labels: ``(H, W)`` of the crop's grid.
        doubtful: ``(H, W)``.
        crop: whose they are.
        head: key of ``HEADS``; one of the crop's.
        source: of the outlines.
        first_id: of the first outline; the others follow.
    """
    scale, least = crop.scale, MIN_AREA_UM2 / crop.mpp**2
    # A region without a label is unknown for all of a crop's heads: shorter where there is one.
    unknown = None if crop.labels == (head,) else head
    images = (
        (HEADS[head], None, connected(labels)),
        (IGNORE, unknown, ndimage.label(doubtful)[0]),
    )
    number = first_id
    for kind, label, image in images:
        for polygon in polygons(image, crop.grid):
            shape = polygon.simplify(SMOOTH_PX * scale).intersection(crop.rectangle)
            for part in shapely.get_parts(rounded(shape)):
                if part.geom_type == "Polygon" and part.area >= least:
                    yield Outline(id=number, kind=kind, polygon=part, source=source, label=label)
                    number += 1


def write_crops(
    label_slide: Callable[[Plan, int], Iterator[Crop]],
    *,
    slides: Sequence[Path],
    out: Path,
    windows: int,
    side_um: float,
    seed: int,
    sizes: Sequence[str],
    avoid: Path | None,
    exclude: Path | None,
) -> None:
    """Choose windows of slides, and write a crop of each.

    Args:
        label_slide: yields the crops of the first windows of a plan, as many as are asked for.
        slides: files.
        out: folder; new or empty.
        windows: of all slides together.
        side_um: of a window.
        seed: of their places.
        sizes: ``FILE_NAME=MICROMETRES`` a pixel, for slides that do not say it.
        avoid: folder of crops; those for validation are kept away from.
        exclude: CSV of places; see :func:`listed_places`.
    """
    if out.is_dir() and any(out.iterdir()):
        raise click.UsageError(f"{out} is not empty: crops of another run would stay among these")
    places = [*(validation_places(avoid) if avoid else [])]
    places += listed_places(exclude) if exclude else []
    mpp = _pixel_sizes(sizes)
    plans = [
        plan_slide(path, mpp=mpp.get(path.name), side_um=side_um, seed=seed, places=places)
        for path in slides
    ]
    out.mkdir(parents=True, exist_ok=True)
    for plan, count in zip(plans, share_out(plans, windows), strict=True):
        crops = []
        for crop in label_slide(plan, count):
            write_crop(crop, out / f"{crop.id}.geojson")
            crops.append(crop)
        click.echo(f"{plan.path.name}: {_summary(crops)}")


def window_options(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command the arguments of :func:`write_crops`."""
    there = click.Path(path_type=Path, exists=True)
    options = (
        click.argument("slides", nargs=-1, required=True, type=there),
        click.option(
            "--out", required=True, type=click.Path(path_type=Path), help="Folder; new or empty."
        ),
        click.option("--windows", default=300, show_default=True, help="Of all slides together."),
        click.option("--side-um", default=256.0, show_default=True, help="Of a window."),
        click.option("--seed", default=0, show_default=True),
        click.option(
            "--mpp", "sizes", multiple=True, help="FILE_NAME=MICROMETRES a pixel, for one slide."
        ),
        click.option("--avoid", type=there, help="Folder of crops."),
        click.option("--exclude", type=there, help="CSV of places."),
    )
    for option in reversed(options):
        command = option(command)
    return command


def _summary(crops: Sequence[Crop]) -> str:
    outlines = [outline for crop in crops for outline in crop.outlines]
    heads = list(dict.fromkeys(label for crop in crops for label in crop.labels))
    counts = [f"{sum(o.kind == HEADS[head] for o in outlines)} {head}" for head in heads]
    doubtful = sum(o.polygon.area for o in outlines if o.kind == IGNORE)
    share = doubtful / max(sum(crop.box.area for crop in crops) * len(heads), 1)
    return ", ".join([f"{len(crops)} windows", *counts, f"{share:.0%} doubtful"])


def _pixel_sizes(values: Sequence[str]) -> dict[str, float]:
    try:
        return {name: float(mpp) for name, mpp in (value.rsplit("=", 1) for value in values)}
    except ValueError as error:
        raise click.BadParameter(f"--mpp wants FILE_NAME=MICROMETRES, not {values}") from error
