"""The first round of a crop: a rectangle of a slide, and what a model found in it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import numpy as np
import shapely

from wsi_pipeline.curation.crops import HEADS, Crop, Outline, Round
from wsi_pipeline.curation.pieces import Board, polygons_of
from wsi_pipeline.errors import DatasetError, TableError
from wsi_pipeline.geometry import Box
from wsi_pipeline.slide import Slide
from wsi_pipeline.slide.planes import MPP_TOLERANCE
from wsi_pipeline.table import read_metadata, read_objects

__all__ = ["box_around", "new_crop", "predicted_outlines"]

_SMOOTH = 0.25
"""Pixels of the crop's frame by which an outline may be simplified."""


def box_around(centre: tuple[float, float], side_um: float, mpp: float) -> Box:
    """Return the square of level-0 pixels around a place.

    Raises:
        DatasetError: a number that is not finite, or a side that is not longer than 0.
    """
    if not np.isfinite([*centre, side_um]).all() or side_um <= 0:
        raise DatasetError(f"there is no square of {side_um} um around {centre}")
    side = round(side_um / mpp)
    x, y = (round(middle - side / 2) for middle in centre)
    return Box(x=x, y=y, width=side, height=side)


def new_crop(
    crop_id: str,
    slide_path: Path,
    *,
    centre: tuple[float, float],
    side_um: float,
    labels: Sequence[str],
    objects: Path | None = None,
    mpp: float | None = None,
    part: str = "train",
    tissue: str = "",
    note: str = "",
    by: str = "",
) -> Crop:
    """Begin a crop.

    Args:
        crop_id: of the new crop.
        slide_path: the slide.
        centre: x, y in level-0 pixels.
        side_um: of the square, in micrometres.
        labels: keys of ``HEADS``.
        objects: table of predictions of this slide; None: no object is drawn yet.
        mpp: micrometres per level-0 pixel; None: what the slide says.
        part: ``train`` or ``validation``.
        tissue: what is to be seen.
        note: what else a reader should know.
        by: who begins.

    Raises:
        DatasetError: a square that leaves the slide, unknown labels, or a table that is of
            another slide or of another pixel size.
        SlideError: the slide cannot be read, or does not say its pixel size.
        TableError: the table cannot be read, or does not say what it is of.
    """
    with Slide.open(slide_path, mpp=mpp) as slide:
        size, pixel = slide.size, slide.pixel_size
    own_mpp = round((pixel.x * pixel.y) ** 0.5, 6)
    box = box_around(centre, side_um, own_mpp)
    crop = Crop(
        id=crop_id,
        slide=slide_path.name,
        slide_size=size,
        mpp=own_mpp,
        box=box,
        labels=tuple(labels),
        part=part,
        tissue=tissue,
        note=note,
    )
    if objects is None:
        return replace(crop, history=(Round(round=0, by=by, how="nothing drawn"),))
    outlines = predicted_outlines(crop, objects)
    first = Round(round=0, by=by, how=f"predictions of {_model(objects, crop)}")
    return crop.with_outlines(outlines, next_id=len(outlines) + 1, history=(first,))


def predicted_outlines(crop: Crop, objects: Path) -> tuple[Outline, ...]:
    """Take a model's objects that meet a crop, clipped to it, their staircases made smooth.

    Args:
        crop: whose kinds are taken.
        objects: table of the crop's slide, as a run writes it.

    Returns:
        Outlines in reading order.

    Raises:
        DatasetError: it is of another slide, or of another pixel size.
        TableError: it cannot be read, or does not say what it is of.
    """
    source = f"model {_model(objects, crop)}"
    box = crop.box
    rows = read_objects(objects, bbox=(box.x, box.y, box.x1, box.y1), columns=["kind"])
    rows = rows[rows["kind"].isin(crop.kinds)]
    board = Board(replace(crop, outlines=()), source=source)
    shapes = [_unstepped(shape, crop.scale) for shape in rows.geometry]
    # the largest first: of two that overlap, the smaller keeps its pixels
    for index in np.argsort(-shapely.area(np.array(shapes, object)), kind="stable"):
        kind, shape = str(rows["kind"].iloc[index]), shapes[index]
        outline = Outline(id=board.new_id(), kind=kind, polygon=shape, source=source)
        # slivers at the crop's edge are nobody's loss
        with suppress(DatasetError):
            board.place(outline, shape, wins=True)
    kinds = list(HEADS.values())
    found = sorted(
        board.outlines.values(), key=lambda o: (kinds.index(o.kind), *o.polygon.bounds[1::-1])
    )
    return tuple(replace(outline, id=number) for number, outline in enumerate(found, start=1))


def _unstepped(shape: shapely.Geometry, pixel: float) -> shapely.Geometry:
    """Cut the corners off outlines that run along the edges of pixels.

    Through the middles of these edges instead: the centre of every pixel stays inside, and
    two outlines that share an edge stay apart.

    Args:
        shape: level-0 pixels.
        pixel: side of the pixels that it was drawn around, in level-0 pixels.
    """
    parts = []
    for polygon in polygons_of(shape):
        # a hair more than a pixel, lest rounding cut its edges in two
        fine = shapely.segmentize(polygon, 1.02 * pixel)
        rings = [np.asarray(ring.coords) for ring in (fine.exterior, *fine.interiors)]
        middles = [(ring[1:] + ring[:-1]) / 2 for ring in rings]
        parts.append(shapely.Polygon(middles[0], middles[1:]).simplify(_SMOOTH * pixel))
    joined = shapely.union_all(parts)
    return joined if joined.is_valid else joined.buffer(0)


def _model(objects: Path, crop: Crop) -> str:
    """Return the name of the model behind a table, which must be of the crop's slide."""
    metadata = read_metadata(objects)
    try:
        slide, pixel = metadata["slide"], metadata["pixel_size_um"]
        name = str(metadata["model"]["name"])
        found = str(slide["name"]), (int(slide["width"]), int(slide["height"]))
        mpp = math.sqrt(pixel["x"] * pixel["y"])
    except (KeyError, TypeError, ValueError) as error:
        raise TableError(f"{objects} does not say which slide and model it is of") from error
    if found != (crop.slide, crop.slide_size):
        msg = "{} is of {} of {} x {} px, this one is {} of {} x {} px"
        raise DatasetError(msg.format(objects, found[0], *found[1], crop.slide, *crop.slide_size))
    if abs(mpp / crop.mpp - 1) > MPP_TOLERANCE:
        msg = "{} was made with {:g} um a pixel of {}, not with {:g}; one of them is wrong"
        raise DatasetError(msg.format(objects, mpp, crop.slide, crop.mpp))
    return name
