"""Upstream Cerberus' result files (``.dat``) as our tables of objects.

A file holds a dict, written by joblib::

    Nuclei, Gland, Lumen                {key: {contour, type, prob or type_prob, box, centroid}};
                                        absent where there are none
    proc_resolution, base_resolution    {"resolution": mpp, "units": "mpp"}
    proc_dimensions, base_dimensions    rows, columns
    resolution                          older files: this instead of those four

What the files do not say is decided here. Contours are indices of pixels at the resolution of
processing, so a vertex is put at its pixel's centre; glands and lumina were found at twice that
pixel size and their indices doubled, so their centres are a whole pixel on. A contour runs
through the centres of the outermost pixels and is moved out to their borders, by half a pixel:
our own outlines run there, and a nucleus would lose a sixth of its area. Boxes are not used
(upstream writes those of glands with x and y mixed up), centroids neither: they are the
polygon's, like areas and axes. Contours that touch themselves are mended and the largest part is
kept. ``score`` is NaN and ``tissue`` null: upstream keeps neither. The parent is the gland that
the centroid lies in. Older files do not say the slide's own pixel size: it is the slide's.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import shapely
from numpy.typing import NDArray

from wsi_pipeline.errors import TableError
from wsi_pipeline.job import file_digest, versions
from wsi_pipeline.machine import memory_limit
from wsi_pipeline.plain_pickle import read_plain_pickle
from wsi_pipeline.polygons import shape_columns, valid_polygons
from wsi_pipeline.slide import Slide
from wsi_pipeline.table import OBJECT_SCHEMA, ObjectWriter
from wsi_pipeline.upstream import CLASSES

__all__ = ["Imported", "import_results"]

log = logging.getLogger(__name__)

Floats = NDArray[np.float64]

_ROWS = 65536
"""Rows that are made at a time."""
_PLACE_PX = 2048
"""Rows are ordered by squares of this side."""
_ID_BITS = 48
"""As in our own tables: the bits of an ``object_id`` above these are the kind's."""
_LARGEST = 1e9
"""No coordinate is as large."""
_MOST_POINTS = 1 << 27
"""Of all contours of a kind: some three million nuclei."""
_TOLERANCE_MPP = 0.02
"""By which the pixel sizes of file and slide may differ without a word."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Kind:
    """One of the three dicts of a file."""

    key: str
    name: str
    """Value of the table's ``kind`` column."""
    centre: float
    """Of the pixel with index 0, and half its side, in pixels of the file's resolution."""
    classes: tuple[str, ...] = ()
    """Names by ``type``; empty where objects have none."""


_KINDS = (
    _Kind(key="Nuclei", name="nucleus", centre=0.5, classes=CLASSES["nuclei-class"]),
    _Kind(key="Gland", name="gland", centre=1.0, classes=CLASSES["gland-class"]),
    _Kind(key="Lumen", name="lumen", centre=1.0),
)


@dataclass(frozen=True, kw_only=True)
class Imported:
    """What came out of a file."""

    counts: Mapping[str, int]
    """Objects written, by kind."""
    mended: int
    """Contours that touched or crossed themselves."""
    left_out: int
    """Contours without a point."""
    layout: str
    """``new``, or ``old`` (one resolution, no dimensions)."""


@dataclass(frozen=True, kw_only=True)
class _Objects:
    """The objects of a kind, in the order of the table."""

    kind: _Kind
    polygons: NDArray[np.object_]
    types: NDArray[np.int64]
    """Class ids; 0 for none."""
    probs: Floats
    """Share of pixels of that class; NaN where unsaid."""
    mended: int
    left_out: int


def import_results(
    path: Path,
    slide_path: str,
    out: Path,
    *,
    mpp: float | None = None,
    limit_bytes: int | None = None,
) -> Imported:
    """Convert a result file of upstream's to a table of objects; nothing in it is run.

    Args:
        path: the ``.dat`` file.
        slide_path: the slide it is about.
        out: the table; an older file there is replaced.
        mpp: pixel size of the slide, where it does not say it.
        limit_bytes: what the file may take in memory, some 4.5 kB a nucleus (which is more than
            it does take); None: three quarters of what this process may hold.

    Raises:
        TableError: the file is damaged, refused, of another layout, or about another slide.
        SlideError: the slide cannot be opened.
        DiskFullError: no space.
    """
    limit_bytes = memory_limit() // 4 * 3 if limit_bytes is None else limit_bytes
    content = read_plain_pickle(path, limit_bytes=limit_bytes)
    with Slide.open(slide_path, mpp=mpp) as slide:
        size, pixel_size = slide.size, (slide.pixel_size.x, slide.pixel_size.y)
        slide_id = Path(slide.name).stem
        about = {
            "name": slide.name,
            "slide_id": slide_id,
            "width": size[0],
            "height": size[1],
            "mpp": {"x": pixel_size[0], "y": pixel_size[1], "source": slide.pixel_size.source},
        }
    if not isinstance(content, dict) or not any(kind.key in content for kind in _KINDS):
        found = [f"{key!r:.40}" for key in [*content][:8]] if isinstance(content, dict) else "none"
        msg = f"{path} is no result file of Cerberus: no Nuclei, Gland or Lumen; found {found}"
        raise TableError(msg)
    layout, proc_mpp, spacing = _frame(path, content, size, pixel_size)
    parts = [_objects(path, kind, content, spacing, size) for kind in _KINDS]
    mended, left_out = (sum(getattr(p, what) for p in parts) for what in ("mended", "left_out"))
    metadata = {
        "slide": about,
        "model": {
            "name": "Cerberus, upstream's own results",
            "sha256": None,
            "classes": {kind.name: list(kind.classes) for kind in _KINDS if kind.classes},
        },
        "imported": {
            "from": path.name,
            "sha256": file_digest(path),
            "layout": layout,
            "working_mpp": proc_mpp,
            "mended": mended,
            "left_out": left_out,
        },
        "versions": versions(),
    }
    del content
    with ObjectWriter(out, metadata=metadata, pixel_size=pixel_size) as writer:
        for table in _tables(slide_id, parts, pixel_size):
            writer.write(table)
    return Imported(counts=writer.counts, mended=mended, left_out=left_out, layout=layout)


def _frame(
    path: Path, content: Mapping[Any, Any], size: tuple[int, int], pixel_size: tuple[float, float]
) -> tuple[str, float, tuple[float, float]]:
    """Return the layout, the mpp of processing, and the level-0 pixels that a pixel of it spans."""
    old = "proc_resolution" not in content
    (proc,) = _resolution(path, content, "resolution" if old else "proc_resolution")[:1]
    base = pixel_size
    if "base_resolution" in content:
        said = _resolution(path, content, "base_resolution")
        base = (said[0], said[-1])
        if any(abs(b / s - 1) > _TOLERANCE_MPP for b, s in zip(base, pixel_size, strict=True)):
            log.warning("%s was made with %s um a pixel, the slide has %s: places follow the "
                        "former, sizes the latter", path.name, base, pixel_size)  # fmt: skip
    if "base_dimensions" in content:
        rows, columns = _numbers(path, "base_dimensions", content["base_dimensions"], 2)
        if (columns, rows) != size:
            msg = (
                f"{path} is about a slide of {columns:.0f} x {rows:.0f} pixels, and this one has "
                f"{size[0]} x {size[1]}. Give the slide that it was made from."
            )
            raise TableError(msg)
    return "old" if old else "new", proc, (proc / base[0], proc / base[1])


def _resolution(path: Path, content: Mapping[Any, Any], key: str) -> tuple[float, ...]:
    """Return one or two micrometres a pixel."""
    entry = content.get(key)
    whole = entry if isinstance(entry, dict) else {"resolution": entry}
    found, units = (
        tuple(_plain(whole.get("resolution")).ravel().tolist()),
        whole.get("units", "mpp"),
    )
    if units != "mpp" or len(found) not in (1, 2) or not all(0.05 <= n <= 50 for n in found):
        # A value is not shown unless it is a text: its length may have no end.
        said = f"{units!r:.40}" if isinstance(units, str) else type(units).__name__
        msg = f"{path}: {key} must be micrometres a pixel ('mpp'); found {len(found)} numbers of "
        raise TableError(msg + said)
    return found


def _numbers(path: Path, key: str, value: object, count: int) -> tuple[float, ...]:
    """Return so many finite numbers from whatever holds them."""
    array = _plain(value).reshape(-1)
    if array.size != count or not np.isfinite(array).all():
        raise TableError(f"{path}: {key} must be {count} numbers, found {type(value).__name__}")
    return tuple(array.tolist())


def _plain(value: object) -> Floats:
    """Return an array of a number, of numbers or of pairs of them; an empty one of all else.

    Not by ``np.asarray`` alone: lists that hold one list over and over would grow without end.
    """
    if isinstance(value, np.ndarray) and value.dtype.kind in "iuf":
        return value.astype(np.float64)
    if isinstance(value, int | float):
        value = (value,)
    rows = value if isinstance(value, list | tuple) else ()
    pairs = [row for row in rows if isinstance(row, list | tuple)]
    if pairs and not (len(pairs) == len(rows) and all(len(pair) == 2 for pair in pairs)):
        return np.zeros(0)
    numbers = [number for pair in pairs for number in pair] or rows
    if not all(isinstance(n, int | float) and abs(n) < _LARGEST for n in numbers):
        return np.zeros(0)
    array = np.array(numbers, np.float64)
    return array.reshape(-1, 2) if pairs else array


def _objects(
    path: Path,
    kind: _Kind,
    content: Mapping[Any, Any],
    spacing: tuple[float, float],
    size: tuple[int, int],
) -> _Objects:
    """Read one of the dicts; those without outline are left out, the others put in order."""
    records = content.get(kind.key, {})
    if not isinstance(records, dict) or not all(isinstance(r, dict) for r in records.values()):
        raise TableError(f"{path}: {kind.key} is no dict of objects")
    rings: list[Floats] = []
    types: list[int] = []
    probs: list[float] = []
    points = 0
    count = len(records)
    for key in [*records]:
        record = records.pop(key)  # what was read makes room for what is made of it
        where = f"{kind.key} {key!r:.40}"
        contour = _contour(path, where, record.get("contour"))
        points += len(contour)
        if points > _MOST_POINTS:
            raise TableError(
                f"{path}: the contours of {kind.key} have over {_MOST_POINTS:,} points"
            )
        rings.append(contour)
        types.append(_class_id(path, where, kind, record.get("type", 0)))
        prob = record.get("prob", record.get("type_prob"))
        probs.append(math.nan if prob is None else _numbers(path, f"{where}: prob", prob, 1)[0])
    polygons, mended = valid_polygons(rings, grow=kind.centre)
    polygons = shapely.transform(polygons, lambda points: (points + kind.centre) * spacing)
    real = np.flatnonzero(~shapely.is_missing(polygons))
    bounds = shapely.bounds(polygons[real]).reshape(-1, 4)
    if len(real) and ((bounds[:, :2] > size).any() or (bounds[:, 2:] < 0).any()):
        msg = (
            f"{path}: {kind.key} lie outside of the slide's {size[0]} x {size[1]} pixels. Give the "
            "slide that the file was made from, and its right pixel size."
        )
        raise TableError(msg)
    x, y = bounds[:, 0], bounds[:, 1]
    order = real[np.lexsort((x, y, x // _PLACE_PX, y // _PLACE_PX))]
    return _Objects(
        kind=kind,
        polygons=polygons[order],
        types=np.array(types, np.int64)[order],
        probs=np.array(probs, np.float64)[order],
        mended=mended,
        left_out=count - len(real),
    )


def _contour(path: Path, where: str, value: object) -> Floats:
    """Return (N, 2) from a contour as (N, 2) or, as OpenCV has it, (N, 1, 2) numbers."""
    points = _plain(value)
    if points.ndim == 3 and points.shape[1] == 1:
        points = points[:, 0]
    if points.ndim != 2 or points.shape[1] != 2 or not (abs(points) < _LARGEST).all():
        raise TableError(f"{path}: {where} has no contour of (x, y) numbers")
    return points


def _class_id(path: Path, where: str, kind: _Kind, value: object) -> int:
    if not kind.classes:
        return 0
    (number,) = _numbers(path, f"{where}: type", value, 1)
    # Gland types may be fractions: upstream mixes ids when it shrinks its maps, and cuts them off.
    if not 0 <= number < len(kind.classes):
        known = dict(enumerate(kind.classes))
        raise TableError(f"{path}: {where} is of type {number:g}; known are {known}")
    return int(number)


def _tables(
    slide_id: str, found: list[_Objects], pixel_size: tuple[float, float]
) -> Iterator[pa.Table]:
    glands = next(objects.polygons for objects in found if objects.kind.name == "gland")
    tree, gland_base = shapely.STRtree(glands), _first_id("gland")
    for objects in found:
        for start in range(0, len(objects.polygons), _ROWS):
            rows = slice(start, start + _ROWS)
            shapes = shape_columns(objects.polygons[rows], pixel_size)
            places = shapely.points(shapes["centroid_x"], shapes["centroid_y"])
            parents = np.full(len(places), -1, np.int64)
            if objects.kind.name != "gland":
                inner, outer = tree.query(places, predicate="within")
                # Backwards: of several the first stays.
                parents[inner[::-1]] = outer[::-1]
            parent_ids = pa.array(gland_base + parents, pa.int64(), mask=parents < 0)
            yield _table(slide_id, objects, rows, shapes, parent_ids)


def _table(
    slide_id: str, objects: _Objects, rows: slice, shapes: Mapping[str, Floats], parents: pa.Array
) -> pa.Table:
    polygons, types, probs = objects.polygons[rows], objects.types[rows], objects.probs[rows]
    names = np.array((None, *objects.kind.classes[1:]), object)
    count = len(polygons)
    known: dict[str, Any] = {
        "slide_id": [slide_id] * count,
        "object_id": _first_id(objects.kind.name) + rows.start + np.arange(count),
        "kind": [objects.kind.name] * count,
        "class": names[types].tolist(),
        "class_prob": pa.array(probs, mask=np.isnan(probs) | (types == 0)),
        "score": np.full(count, math.nan),
        "parent_id": parents,
        "tissue": [None] * count,
        "bbox": pa.StructArray.from_arrays(
            [pa.array(side) for side in shapely.bounds(polygons).T],
            fields=list(OBJECT_SCHEMA.field("bbox").type),
        ),
        "geometry": pa.array(shapely.to_wkb(polygons), pa.binary()),
        **shapes,
    }
    columns = []
    for field in OBJECT_SCHEMA:
        values = known[field.name]
        if pa.types.is_dictionary(field.type):
            columns.append(pa.array(values, pa.string()).cast(field.type))
        else:
            columns.append(pa.array(values).cast(field.type))
    return pa.table(columns, schema=OBJECT_SCHEMA)


def _first_id(kind: str) -> int:
    return [k.name for k in _KINDS].index(kind) << _ID_BITS
