"""Crops: rectangles of slides in which objects of named heads are outlined completely.

A crop is one GeoJSON file, ``<crop_id>.geojson``, which QuPath and geopandas read. Its
features are polygons in level-0 pixels of the slide; its member ``crop`` says which slide and
rectangle, for which heads the outlines are complete, and how they came to be. An object a line,
in the order of their ids, numbers to a tenth of a pixel: the bytes are a function of what is
said, so that two rounds can be compared with any ``diff``.

What no object covers is background. Where nobody knows, there is an object of the kind
``ignore``: a region that is unknown for one head, or for all.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import shapely
import shapely.errors
import shapely.geometry

from wsi_pipeline.durable import durable_file
from wsi_pipeline.errors import DatasetError
from wsi_pipeline.geometry import Box, PixelGrid

__all__ = [
    "HEADS",
    "IGNORE",
    "MIN_AREA_UM2",
    "PARTS",
    "RULER_MPP",
    "Crop",
    "Outline",
    "Round",
    "read_crop",
    "rounded",
    "write_crop",
]

HEADS = {"nuclei": "nucleus", "gland": "gland", "lumen": "lumen"}
"""The kind of object of each head that a crop can be annotated for."""
IGNORE = "ignore"
"""The kind of a region in which nobody knows."""
PARTS = ("train", "validation")
RULER_MPP = 0.5
"""Micrometres a pixel of the crop's own frame, in which it is drawn and corrected."""
MIN_AREA_UM2 = 2.0
"""Smaller pieces are slivers: left over where outlines were cut."""

_BEYOND_UM = 2.0
"""How far an outline may reach out of its crop."""
_OVERLAP_UM2 = 1.0
"""What two objects of one kind may share: roundings, not mistakes."""
_DECIMALS = 1
"""Of coordinates, in level-0 pixels."""
_UNREADABLE = (
    AttributeError,
    IndexError,
    KeyError,
    OverflowError,
    TypeError,
    ValueError,
    shapely.errors.ShapelyError,
)
"""What members of another kind than a crop's lead to."""
_TEXTS = ("id", "slide", "part", "tissue", "note", "licence")
"""What a crop says in words."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Outline:
    """One object of a crop."""

    id: int
    """1 and up; unique in the crop and kept over the rounds."""
    kind: str
    """A value of ``HEADS``, or ``IGNORE``."""
    polygon: shapely.Polygon
    """Level-0 pixels."""
    source: str
    """Whose outline this is: ``hand``, or ``model`` and its name."""
    label: str | None = None
    """Of a region to ignore: the head it is unknown for; None: all."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Round:
    """One pass over a crop."""

    round: int
    """0 for the beginning."""
    by: str
    """Who."""
    how: str
    """What was done."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Crop:
    """A completely annotated rectangle of a slide."""

    id: str
    """The file's name without its ending."""
    slide: str
    """The slide's file name, without folders."""
    slide_size: tuple[int, int]
    """``(width, height)`` of level 0."""
    mpp: float
    """Micrometres per level-0 pixel, whatever the slide says."""
    box: Box
    """Level-0 pixels."""
    labels: tuple[str, ...]
    """Keys of ``HEADS``: for which the outlines are complete."""
    part: str
    """``train`` or ``validation``."""
    tissue: str = ""
    """What is to be seen, in words."""
    note: str = ""
    """What else a reader should know."""
    licence: str = "CC0-1.0"
    """SPDX identifier of the annotations' licence."""
    history: tuple[Round, ...] = ()
    """Oldest first."""
    next_id: int = 1
    """The id that the next new object gets: ids of deleted objects do not come back."""
    outlines: tuple[Outline, ...] = ()
    """By id."""

    def __post_init__(self) -> None:
        problem = next(_problems(self), None)
        if problem:
            raise DatasetError(f"crop {self.id}: {problem}")

    @property
    def scale(self) -> float:
        """Level-0 pixels that one pixel of the crop's own frame spans."""
        return RULER_MPP / self.mpp

    @property
    def grid(self) -> PixelGrid:
        """The crop's own frame: pixels of ``RULER_MPP`` from its top-left corner."""
        scale = self.scale
        size = math.ceil(self.box.width / scale), math.ceil(self.box.height / scale)
        return PixelGrid(origin=(self.box.x, self.box.y), spacing=(scale, scale), size=size)

    @property
    def rectangle(self) -> shapely.Polygon:
        """The box as a polygon."""
        return shapely.box(self.box.x, self.box.y, self.box.x1, self.box.y1)

    @property
    def kinds(self) -> tuple[str, ...]:
        """Kinds of object that are annotated."""
        return tuple(HEADS[label] for label in self.labels)

    def with_outlines(self, outlines: Iterable[Outline], **changes: Any) -> Crop:  # noqa: ANN401
        """Return the crop with other objects, in the order of their ids."""
        ordered = tuple(sorted(outlines, key=lambda outline: outline.id))
        return replace(self, outlines=ordered, **changes)

    def renamed(self, crop_id: str) -> Crop:
        """Return the crop under another id."""
        return replace(self, id=crop_id)

    def check_slide(self, size: tuple[int, int]) -> None:
        """Compare with the slide itself.

        Raises:
            DatasetError: its level 0 has another size, so it is another slide.
        """
        if tuple(size) != self.slide_size:
            msg = "crop {}: {} is {} x {} px, but the crop was drawn on one of {} x {} px"
            raise DatasetError(msg.format(self.id, self.slide, *size, *self.slide_size))


def rounded(shape: shapely.Geometry) -> shapely.Geometry:
    """Return a shape as files have it: on their grid of coordinates, its points in their order.

    It is valid if the shape was, but may have come apart.
    """
    snapped = shapely.set_precision(shape, 10.0**-_DECIMALS)
    return shapely.normalize(shapely.transform(snapped, lambda xy: np.round(xy, _DECIMALS)))


def read_crop(path: Path) -> Crop:
    """Read a crop.

    Raises:
        DatasetError: not a crop, or one that contradicts itself.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise DatasetError(f"{path} cannot be read as a crop: {error}") from error
    if not isinstance(data, dict) or not isinstance(data.get("crop"), dict):
        msg = "has no member 'crop': it is no crop, or a program that wrote it left that out"
        raise DatasetError(f"{path} {msg}")
    try:
        crop = _crop(data)
    except DatasetError as error:
        raise DatasetError(f"{path}: {error}") from error
    except _UNREADABLE as error:
        raise DatasetError(f"{path} is not laid out as a crop: {error!r}") from error
    if crop.id != path.stem:
        raise DatasetError(
            f"{path}: the crop's id is {crop.id!r}, the file's name must be the same"
        )
    return crop


def write_crop(crop: Crop, path: Path) -> None:
    """Write a crop; the file is complete or absent."""
    with durable_file(path) as beside:
        beside.write_text(_text(crop), encoding="utf-8")


def _text(crop: Crop) -> str:
    about = {
        "id": crop.id,
        "slide": crop.slide,
        "slide_size": list(crop.slide_size),
        "mpp": crop.mpp,
        "box": [crop.box.x, crop.box.y, crop.box.x1, crop.box.y1],
        "labels": list(crop.labels),
        "part": crop.part,
        "tissue": crop.tissue,
        "note": crop.note,
        "licence": crop.licence,
        "next_id": crop.next_id,
        "history": [asdict(entry) for entry in crop.history],
    }
    head = ",\n".join(f"  {json.dumps(key)}: {_json(value)}" for key, value in about.items())
    rows = ",\n".join(_json(_feature(outline)) for outline in crop.outlines)
    rows += "\n" if rows else ""
    return (
        f'{{\n"type": "FeatureCollection",\n"crop": {{\n{head}\n}},\n"features": [\n{rows}]\n}}\n'
    )


def _json(value: object) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(", ", ": "))


def _feature(outline: Outline) -> dict[str, Any]:
    properties: dict[str, Any] = {"kind": outline.kind, "id": outline.id, "from": outline.source}
    if outline.kind == IGNORE:
        properties["label"] = outline.label
    polygon = shapely.normalize(outline.polygon)
    rings = [
        [[round(x, _DECIMALS), round(y, _DECIMALS)] for x, y in ring.coords]
        for ring in (polygon.exterior, *polygon.interiors)
    ]
    geometry = {"type": "Polygon", "coordinates": rings}
    return {"type": "Feature", "properties": properties, "geometry": geometry}


def _crop(data: Mapping[str, Any]) -> Crop:
    about = dict(data["crop"])
    unknown = sorted(set(about) - {field.name for field in fields(Crop)} - {"outlines"})
    if unknown:
        raise DatasetError(f"the member 'crop' has unknown keys {unknown}")
    for key in _TEXTS:
        if not isinstance(about.get(key, ""), str):
            raise DatasetError(f"{key} must be text, not {about[key]!r}")
    outlines = tuple(_outline(feature) for feature in data["features"])
    x0, y0, x1, y1 = (_whole(edge, "an edge of the box") for edge in about.pop("box"))
    width, height = (_whole(side, "the slide's size") for side in about.pop("slide_size"))
    next_id = about.pop("next_id", 1 + max((o.id for o in outlines), default=0))
    return Crop(
        **{
            **about,
            "mpp": float(about["mpp"]),
            "labels": tuple(about["labels"]),
            "history": tuple(Round(**entry) for entry in about.get("history", ())),
        },
        box=Box.from_edges(x0, y0, x1, y1),
        slide_size=(width, height),
        next_id=_whole(next_id, "next_id"),
        outlines=tuple(sorted(outlines, key=lambda outline: outline.id)),
    )


def _whole(value: object, what: str) -> int:
    if not isinstance(value, int) or isinstance(value, bool):
        raise DatasetError(f"{what} must be a whole number, not {value!r}")
    return value


def _outline(feature: Mapping[str, Any]) -> Outline:
    about = feature["properties"]
    missing = [key for key in ("kind", "id", "from") if key not in about]
    if missing:
        msg = f"an object has no {' and no '.join(missing)}: another program wrote or changed it"
        raise DatasetError(f"{msg}; crops are corrected with wsi annotate apply")
    number, kind = _whole(about["id"], "an object's id"), about["kind"]
    shape = feature["geometry"]
    if shape["type"] != "Polygon":
        msg = (
            f"object {number} is a {shape['type']}; make its pieces Polygons with ids of their own"
        )
        raise DatasetError(msg)
    polygon = shapely.transform(shapely.geometry.shape(shape), lambda xy: np.round(xy, _DECIMALS))
    return Outline(
        id=number, kind=kind, polygon=polygon, source=about["from"], label=about.get("label")
    )


def _problems(crop: Crop) -> Iterator[str]:
    """Yield what is wrong with a crop."""
    yield from _head_problems(crop)
    seen: set[int] = set()
    margin = _BEYOND_UM / crop.mpp
    box = crop.box
    room = shapely.box(box.x - margin, box.y - margin, box.x1 + margin, box.y1 + margin)
    for outline in crop.outlines:
        name = f"object {outline.id}"
        if outline.id in seen or not 1 <= outline.id < crop.next_id:
            yield f"{name}: ids must be unique, from 1 to below next_id ({crop.next_id})"
        seen.add(outline.id)
        yield from (f"{name} {problem}" for problem in _outline_problems(crop, outline, room))
    yield from _overlaps(crop)


def _head_problems(crop: Crop) -> Iterator[str]:
    box, (width, height) = crop.box, crop.slide_size
    if not 0.05 <= crop.mpp <= 5:
        yield f"mpp must be from 0.05 to 5, not {crop.mpp}"
    if not box.area or not Box(x=0, y=0, width=width, height=height).contains(box):
        edges = [box.x, box.y, box.x1, box.y1]
        yield f"its box {edges} is empty or leaves the slide of {width} x {height} px"
    if not crop.labels or len(set(crop.labels)) < len(crop.labels) or set(crop.labels) - set(HEADS):
        yield f"labels must be some of {', '.join(HEADS)}, each once, not {list(crop.labels)}"
    if crop.part not in PARTS:
        yield f"part must be {' or '.join(PARTS)}, not {crop.part!r}"
    if crop.slide in ("", ".", "..") or "/" in crop.slide or "\\" in crop.slide:
        yield f"slide must be a file name without folders, not {crop.slide!r}"
    if not crop.licence:
        yield "it has no licence"
    if [entry.round for entry in crop.history] != list(range(len(crop.history))):
        yield "the rounds of its history must be 0, 1, 2, ..."


def _outline_problems(crop: Crop, outline: Outline, room: shapely.Polygon) -> Iterator[str]:
    if outline.kind not in (*crop.kinds, IGNORE):
        kinds = ", ".join((*crop.kinds, IGNORE))
        yield f"is of the kind {outline.kind!r}; the crop's labels have {kinds}"
    if outline.label is not None and (outline.kind != IGNORE or outline.label not in crop.labels):
        yield f"has the label {outline.label!r}; only {IGNORE!r} has one, of the crop's labels"
    polygon = outline.polygon
    if polygon.is_empty or not polygon.is_valid:
        yield f"has no valid outline: {shapely.is_valid_reason(polygon)}"
    elif not room.covers(polygon):
        yield f"reaches more than {_BEYOND_UM:g} um out of the crop's box"


def _overlaps(crop: Crop) -> Iterator[str]:
    for kind in crop.kinds:
        own = [outline for outline in crop.outlines if outline.kind == kind]
        polygons = np.array([outline.polygon for outline in own], object)
        if not shapely.is_valid(polygons).all():
            return
        tree = shapely.STRtree(polygons)
        for first, second in tree.query(polygons, predicate="intersects").T:
            if first >= second:
                continue
            shared = polygons[first].intersection(polygons[second]).area * crop.mpp**2
            if shared > _OVERLAP_UM2:
                ids = f"{own[first].id} and {own[second].id}"
                yield f"the objects {ids} of the kind {kind} overlap by {shared:.1f} um2"
