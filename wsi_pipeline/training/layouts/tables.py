"""Tables of objects as labels: what a model found, corrected by hand.

::

    RUN/objects/<slide_id>.parquet      polygons in level-0 pixels, as `wsi run` writes them
    RUN/reports/<slide_id>.json         where the slide is
    RUN/regions/<slide_id>.parquet      where the table is complete, if not everywhere;
                                        or .geojson

A folder of ``<slide_id>.parquet`` files will do, or one file. Tables may have been edited: of
each, only ``kind``, ``class`` and ``geometry`` are read. The slide is cut into windows; the
polygons of each become masks by the pixels whose centres they hold.
"""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import geopandas as gpd
import numpy as np
import shapely
from numpy.typing import NDArray

from wsi_pipeline.errors import DatasetError, SlideError, TableError
from wsi_pipeline.geometry import Box, PixelGrid
from wsi_pipeline.slide import Slide
from wsi_pipeline.table import read_objects
from wsi_pipeline.training.annotation import (
    IGNORE_CLASS,
    IGNORE_ID,
    AnnotatedImage,
    BoxLabel,
    ClassLabel,
    Dataset,
    InstanceLabel,
    Item,
    Label,
)
from wsi_pipeline.training.raster import number_pixels, on_grid

__all__ = ["read_objects_labels"]

_HEADS = {"nucleus": "nuclei"}
"""Heads of the kinds that are not called like their head."""

Polygons = NDArray[np.object_]


@dataclass(frozen=True, kw_only=True, slots=True)
class _Objects:
    """The objects of one head in one window; picklable."""

    polygons: Polygons
    """Level-0 pixels."""
    classes: tuple[str, ...]
    """Class names by id, ``none`` first; empty where the head's objects have no class."""
    ids: NDArray[np.uint8]
    """Class of each object; ``IGNORE_CLASS`` for one without."""
    as_boxes: bool
    """Whether the label is the objects' boxes."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Window:
    """A window of a slide and what is in it; picklable."""

    name: str
    slide: Path
    mpp: float | None
    """Of level 0; None: what the file says."""
    read_mpp: float
    box: Box
    """On the slide's working grid for ``read_mpp``."""
    heads: Mapping[str, _Objects]
    complete: Polygons | None
    """Regions that bound what is known; None: everything is."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Table:
    """One slide's table."""

    slide_id: str
    slide: Path
    geometry: Polygons
    kinds: NDArray[np.object_]
    classes: NDArray[np.object_]
    """Names; None for an object without."""
    regions: Polygons | None


def read_objects_labels(
    folder: Path,
    *,
    mpp: float | None = None,
    slides: Path | None = None,
    kinds: Collection[str] | None = None,
    boxes: Collection[str] = (),
    window_um: float = 512.0,
    read_mpp: float = 0.5,
) -> Dataset:
    """List windows of slides whose objects a table holds.

    The head of a kind bears the kind's name (``nuclei`` for ``nucleus``); where objects have
    classes, ``<head>-class`` has them, ``none`` first and then by name, and an object without
    one is unknown there. A slide whose table has no object of a kind is not labelled for it.
    What no polygon covers is background, so a table must be complete wherever there are
    windows: on the regions given, else in each window with an object. The patient is the slide.

    All geometries are kept in memory.

    Args:
        folder: a results folder, a folder of tables, or a table.
        mpp: micrometres per level-0 pixel of the slides; default what their files say.
        slides: folder of the slides, by ``slide_id``; default where the run read them.
        kinds: which to use; default all.
        boxes: kinds to be learnt as boxes, by a detect head.
        window_um: about the side of a window.
        read_mpp: micrometres per pixel at which windows are read and drawn.

    Raises:
        DatasetError: no tables, a table that cannot be read, no slide for one, more than 254
            classes, or no object at all.
    """
    tables = [_read_table(path, slides) for path in _table_files(folder)]
    wanted = {kind for table in tables for kind in table.kinds if not kinds or kind in kinds}
    if not wanted:
        what = "object" if not kinds else f"object of the kinds {sorted(kinds)}"
        raise DatasetError(f"{folder}: the tables hold no {what}")
    names = {kind: _class_names(kind, tables) for kind in sorted(wanted)}
    items = [
        Item(name=window.name, patient=table.slide_id, load=partial(_load, window))
        for table in tables
        for window in _windows(table, names, boxes, window_um, read_mpp, mpp)
    ]
    labels: dict[str, tuple[str, ...]] = {}
    for kind, classes in names.items():
        labels[_head(kind)] = ()
        if classes:
            labels[f"{_head(kind)}-class"] = classes
    return Dataset(name="objects", path=folder, labels=labels, items=tuple(items))


def _table_files(folder: Path) -> list[Path]:
    if folder.is_file():
        return [folder]
    home = folder / "objects" if (folder / "objects").is_dir() else folder
    found = sorted(home.glob("*.parquet"))
    if not found:
        raise DatasetError(f"{home} holds no table (<slide_id>.parquet)")
    return found


def _read_table(path: Path, slides: Path | None) -> _Table:
    try:
        rows = read_objects(path, columns=["kind", "class"])
    except TableError as error:
        raise DatasetError(f"{path} cannot be read as labels: {error}") from error
    geometry = rows.geometry.to_numpy()
    wrong = ~np.isin(shapely.get_type_id(geometry), (3, 6)) | shapely.is_empty(geometry)
    if wrong.any():
        msg = f"{path}: {int(wrong.sum())} rows hold no polygon, the first is row"
        raise DatasetError(f"{msg} {int(np.argmax(wrong))}; take them away")
    classes = rows["class"].astype(object)
    run = path.parent.parent if path.parent.name == "objects" else path.parent
    return _Table(
        slide_id=path.stem,
        slide=_find_slide(path, run, slides),
        geometry=geometry,
        kinds=rows["kind"].astype(object).to_numpy(),
        classes=classes.where(classes.notna(), None).to_numpy(),
        regions=_regions(run / "regions", path.stem),
    )


def _find_slide(table: Path, run: Path, slides: Path | None) -> Path:
    if slides is not None:
        # not a pattern of glob: a slide's name may hold brackets
        found = sorted(path for path in slides.iterdir() if path.stem == table.stem)
        if len(found) != 1:
            what = f"{len(found)} files" if found else "no file"
            raise DatasetError(f"{table}: {slides} holds {what} named {table.stem}.*; one wanted")
        return found[0]
    report = run / "reports" / f"{table.stem}.json"
    try:
        path = Path(json.loads(report.read_text(encoding="utf-8"))["path"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        msg = f"{table}: where is its slide? {report} does not say; name the folder of the slides"
        raise DatasetError(msg) from error
    if not path.exists():
        raise DatasetError(f"{table}: its slide {path} is not there; name the folder of the slides")
    return path


def _regions(folder: Path, slide_id: str) -> Polygons | None:
    parquet, text = (folder / f"{slide_id}{suffix}" for suffix in (".parquet", ".geojson"))
    path = parquet if parquet.is_file() else text
    if not path.is_file():
        return None
    try:
        frame = gpd.read_parquet(path) if path is parquet else gpd.read_file(path)
        polygons: Polygons = frame.geometry.to_numpy()
    except (OSError, ValueError, RuntimeError) as error:
        raise DatasetError(f"{path} cannot be read as regions: {error}") from error
    return polygons


def _head(kind: str) -> str:
    return _HEADS.get(kind, kind)


def _class_names(kind: str, tables: Collection[_Table]) -> tuple[str, ...]:
    found = {name for table in tables for name in table.classes[table.kinds == kind]}
    names = sorted(found - {None, "none"})
    if len(names) >= IGNORE_CLASS:
        raise DatasetError(f"{len(names)} classes of {kind!r}; 254 are possible")
    return ("none", *names) if names else ()


def _windows(
    table: _Table,
    names: Mapping[str, tuple[str, ...]],
    boxes: Collection[str],
    window_um: float,
    read_mpp: float,
    mpp: float | None,
) -> Iterator[_Window]:
    """Yield the windows of a slide that hold objects or regions."""
    try:
        with Slide.open(table.slide, mpp=mpp) as slide:
            grid = slide.working_grid(read_mpp)
    except SlideError as error:
        raise DatasetError(f"{table.slide} (slide of a table): {error}") from error
    objects = shapely.STRtree(table.geometry)
    present = [kind for kind in names if (table.kinds == kind).any()]
    for box in _lattice(grid.size, window_um / read_mpp):
        place = _level0(grid, box)
        inside = np.sort(objects.query(place))
        complete = table.regions
        if complete is not None:
            complete = complete[shapely.intersects(complete, place)]
        used = inside[np.isin(table.kinds[inside], present)]
        if not len(used if complete is None else complete):
            continue
        heads = {}
        for kind in present:
            own = used[table.kinds[used] == kind]
            heads[_head(kind)] = _Objects(
                polygons=table.geometry[own],
                classes=names[kind],
                ids=_class_ids(table.classes[own], names[kind]),
                as_boxes=kind in boxes,
            )
        yield _Window(
            name=f"{table.slide_id}@{box.x},{box.y}",
            slide=table.slide,
            mpp=mpp,
            read_mpp=read_mpp,
            box=box,
            heads=heads,
            complete=complete,
        )


def _lattice(size: tuple[int, int], side_px: float) -> Iterator[Box]:
    """Yield boxes of about one size that tile a grid: no slivers at its edges."""
    edges = [
        np.linspace(0, length, max(1, round(length / side_px)) + 1).round().astype(int).tolist()
        for length in size
    ]
    for top, bottom in zip(edges[1], edges[1][1:], strict=False):
        for left, right in zip(edges[0], edges[0][1:], strict=False):
            yield Box.from_edges(left, top, right, bottom)


def _level0(grid: PixelGrid, box: Box) -> shapely.Polygon:
    corners = np.array([[box.x, box.y], [box.x1, box.y1]], np.float64)
    return shapely.box(*grid.to_level0(corners).ravel())


def _class_ids(names: Polygons, classes: tuple[str, ...]) -> NDArray[np.uint8]:
    known = {name: i for i, name in enumerate(classes)}
    return np.array([known.get(name, IGNORE_CLASS) for name in names], np.uint8)


def _load(window: _Window) -> AnnotatedImage:
    try:
        with Slide.open(window.slide, mpp=window.mpp) as slide:
            grid = slide.working_grid(window.read_mpp)
            image = slide.read(grid, window.box)
            pixel_um = (
                grid.spacing[0] * slide.pixel_size.x,
                grid.spacing[1] * slide.pixel_size.y,
            )
            if slide.holes:
                raise DatasetError(f"{window.name}: parts of {window.slide} cannot be decoded")
    except SlideError as error:
        raise DatasetError(f"{window.name}: {window.slide}: {error}") from error
    local = grid.window(window.box)
    unknown = np.zeros(image.shape[:2], np.bool_)
    if window.complete is not None:
        unknown = number_pixels(on_grid(window.complete, local), image.shape[:2]) == 0
    labels: dict[str, Label] = {}
    for head, objects in window.heads.items():
        labels |= _labels(head, objects, local, unknown)
    return AnnotatedImage(
        name=window.name, image=image, mpp=math.sqrt(math.prod(pixel_um)), labels=labels
    )


def _labels(
    head: str, objects: _Objects, grid: PixelGrid, unknown: NDArray[np.bool_]
) -> dict[str, Label]:
    polygons = on_grid(objects.polygons, grid)
    if objects.as_boxes:
        bounds = shapely.bounds(polygons).reshape(-1, 4).astype(np.float32)
        return {head: BoxLabel(boxes=bounds, ignore=unknown if unknown.any() else None)}
    ids = number_pixels(polygons, unknown.shape)
    classes = np.concatenate([np.zeros(1, np.uint8), objects.ids])[ids]
    classes[unknown] = IGNORE_CLASS
    ids[unknown] = IGNORE_ID
    labels: dict[str, Label] = {head: InstanceLabel(ids=ids)}
    if objects.classes:
        labels[f"{head}-class"] = ClassLabel(ids=classes, classes=objects.classes)
    return labels
