"""Objects to rows: pixel sums become micrometres, names and parents."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property

import numpy as np
import pyarrow as pa

from wsi_pipeline.instances.heads import HeadMaps, MapStore, Objects
from wsi_pipeline.instances.kernels import Ints
from wsi_pipeline.instances.regions import Regions
from wsi_pipeline.spec import ModelSpec
from wsi_pipeline.table import OBJECT_SCHEMA

__all__ = ["ID_BITS", "RowMaker", "Surroundings"]

ID_BITS = 48
"""The lower bits of an ``object_id`` are the raster index of the anchor on its head's grid;
the bits above are the head's place in the model."""


class RowMaker:
    """Makes the table's rows for one slide, without what lies around the objects."""

    def __init__(self, spec: ModelSpec, slide_id: str) -> None:
        self._spec = spec
        self._slide_id = slide_id

    @cached_property
    def _names(self) -> _Names:
        # Late: pyarrow's first array imports pandas, for which no first tile should wait.
        return _Names(self._spec, self._slide_id)

    def rows(self, maps: HeadMaps, objects: Objects) -> pa.RecordBatch:
        """Return one row of ``OBJECT_SCHEMA`` for each object, in the given order.

        The columns ``parent_id`` and ``tissue`` are null: see :class:`Surroundings`.
        """
        outlines, names = objects.outlines, self._names
        centroid = _centroids(maps, objects)
        class_codes, class_prob = _vote(objects, self._class_codes(maps))
        offsets, data = outlines.wkb(maps.grid)
        n = len(objects.anchors)
        geometry = pa.Array.from_buffers(
            pa.binary(), n, [None, pa.py_buffer(offsets), pa.py_buffer(data)]
        )
        columns = {
            "slide_id": _coded(np.zeros(n, np.int32), names.slide_ids),
            "object_id": object_ids(self._spec, maps, objects.anchors),
            "kind": _coded(self._kind_codes(maps, n), names.kinds),
            "class": _coded(class_codes, names.classes),
            "class_prob": pa.array(class_prob, mask=class_codes < 0),
            "score": _float(objects.sums[:, 1] / (255.0 * objects.sums[:, 0])),
            **_shape_columns(maps, objects),
            "centroid_x": centroid[:, 0],
            "centroid_y": centroid[:, 1],
            "parent_id": pa.nulls(n, pa.int64()),
            "tissue": _coded(np.full(n, -1, np.int32), names.tissues),
            "bbox": pa.StructArray.from_arrays(
                [pa.array(side) for side in outlines.bounds(maps.grid).T],
                fields=list(OBJECT_SCHEMA.field("bbox").type),
            ),
            "geometry": geometry,
        }
        arrays = [pa.array(columns[name]) for name in OBJECT_SCHEMA.names]
        return pa.RecordBatch.from_arrays(arrays, schema=OBJECT_SCHEMA)

    def _kind_codes(self, maps: HeadMaps, n: int) -> Ints:
        return np.full(n, self._names.code_of_kind[maps.head.object_kind], np.int32)

    def _class_codes(self, maps: HeadMaps) -> Ints:
        """Return the dictionary code of each class id of the head; -1 for "none"."""
        names = maps.class_head.classes if maps.class_head else ("",)
        return np.array([-1, *(self._names.code_of_class[name] for name in names[1:])], np.int32)


class _Names:
    """The words of a table: the same dictionaries in every batch, so batches can be joined."""

    def __init__(self, spec: ModelSpec, slide_id: str) -> None:
        self.slide_ids = pa.array([slide_id])
        self.kinds = _distinct(head.object_kind for head in spec.object_heads)
        self.classes = _distinct(
            name for head in spec.heads if head.kind == "class" for name in head.classes[1:]
        )
        self.tissues = _tissue_names(spec)
        self.code_of_kind, self.code_of_class = _codes(self.kinds), _codes(self.classes)


class Surroundings:
    """Says where objects lie: in which parent object, on which tissue."""

    def __init__(self, store: MapStore, regions: Mapping[str, Regions]) -> None:
        """Read the tissue map.

        Args:
            store: finished maps.
            regions: all objects of the heads with run rules, by name.
        """
        self._store = store
        self._regions = regions
        self._tissues = _tissue_names(store.spec)
        self._tissue_map: Ints | None = None
        patch = store.spec.patch_head
        if patch is not None:
            # One pixel for 16 x 16 or more of the network's: small for any slide.
            self._tissue_grid = store.head_grid(patch.name)
            box = self._tissue_grid.box
            predicted = store.read(f"{patch.name}/prob", box).any(axis=0)
            # Classes from 1 on; 0 where nothing was predicted, which is no tissue class.
            self._tissue_map = np.where(predicted, store.read(f"{patch.name}/class", box) + 1, 0)

    def fill(
        self, maps: HeadMaps, rows: pa.RecordBatch, parents: Ints | None = None
    ) -> pa.RecordBatch:
        """Return rows with the columns ``parent_id`` and ``tissue``.

        Args:
            maps: of the head the rows come from.
            rows: as :class:`RowMaker` makes them.
            parents: (N,) labels of the parents where they are known beforehand; else the
                parent is what the centroid lies in.
        """
        centroid = np.stack(
            [rows.column(name).to_numpy() for name in ("centroid_x", "centroid_y")], axis=1
        )
        known = {
            "parent_id": self._parents(maps, centroid, parents),
            "tissue": self._tissue(centroid),
        }
        columns = [known.get(name, rows.column(name)) for name in OBJECT_SCHEMA.names]
        return pa.RecordBatch.from_arrays(columns, schema=OBJECT_SCHEMA)

    def _parents(self, maps: HeadMaps, centroid: Ints, labels: Ints | None) -> pa.Array:
        if maps.head.parent is None:
            return pa.nulls(len(centroid), pa.int64())
        spec = self._store.spec
        parent_maps = HeadMaps(store=self._store, head=spec.head(maps.head.parent))
        regions = self._regions[maps.head.parent]
        if labels is None:
            pixel = np.floor(parent_maps.grid.from_level0(centroid)).astype(np.int64)
            labels = regions.runs.at(*_clipped(pixel, parent_maps.grid.size))
        ids = object_ids(spec, parent_maps, regions.anchors)
        found = np.append(np.int64(0), ids)[labels]
        return pa.array(found, mask=labels == 0)

    def _tissue(self, centroid: Ints) -> pa.Array:
        patch = self._store.spec.patch_head
        if patch is None or self._tissue_map is None:
            return _coded(np.full(len(centroid), -1, np.int32), self._tissues)
        pixel = np.floor(self._tissue_grid.from_level0(centroid)).astype(np.int64)
        x, y = _clipped(pixel, self._tissue_grid.size)
        found = _codes(self._tissues)
        codes = np.array([-1, *(found[name] for name in patch.classes)], np.int32)
        return _coded(codes[self._tissue_map[y, x]], self._tissues)


def object_ids(spec: ModelSpec, maps: HeadMaps, anchors: Ints) -> Ints:
    """Return the (N,) int64 ids of objects with the given (N, 2) anchors."""
    head = [h.name for h in spec.heads].index(maps.head.name)
    ids: Ints = (head << ID_BITS) + anchors[:, 1] * maps.grid.size[0] + anchors[:, 0]
    return ids


def _tissue_names(spec: ModelSpec) -> pa.Array:
    return _distinct(spec.patch_head.classes if spec.patch_head else ())


def _distinct(names: object) -> pa.Array:
    return pa.array(list(dict.fromkeys(names)), pa.string())  # type: ignore[call-overload]


def _codes(names: pa.Array) -> dict[str | None, int]:
    """Return the place of each name."""
    return {name: code for code, name in enumerate(names.to_pylist())}


def _coded(codes: Ints, names: pa.Array) -> pa.Array:
    """Return a dictionary array; negative codes are null."""
    return pa.DictionaryArray.from_arrays(pa.array(codes, pa.int32(), mask=codes < 0), names)


def _float(values: Ints) -> Ints:
    return values.astype(np.float32)


def _clipped(pixel: Ints, size: tuple[int, int]) -> tuple[Ints, Ints]:
    return np.clip(pixel[:, 0], 0, size[0] - 1), np.clip(pixel[:, 1], 0, size[1] - 1)


def _centroids(maps: HeadMaps, objects: Objects) -> Ints:
    area = objects.outlines.column("area")
    mean = np.stack([objects.outlines.column(name) / area for name in ("x", "y")], axis=1)
    return maps.grid.to_level0(objects.anchors + mean + 0.5)


def _vote(objects: Objects, codes: Ints) -> tuple[Ints, Ints]:
    """Return dictionary codes (-1 = none) and the share of pixels that voted for each.

    The majority id wins (the smaller one when equal); if that is 0, "none", the
    runner-up when there is one: upstream Cerberus' rule.
    """
    n, n_classes = objects.votes.shape
    if n_classes < 2 or n == 0:
        return np.full(n, -1, np.int32), np.zeros(n, np.float32)
    best = objects.votes.argmax(axis=1)
    second = 1 + objects.votes[:, 1:].argmax(axis=1)
    votes = np.take_along_axis(objects.votes, second[:, None], axis=1)[:, 0]
    winner = np.where(best > 0, best, np.where(votes > 0, second, 0))
    share = np.take_along_axis(objects.votes, winner[:, None], axis=1)[:, 0] / objects.sums[:, 0]
    return codes[winner], _float(share)


def _shape_columns(maps: HeadMaps, objects: Objects) -> dict[str, Ints]:
    """Return area, perimeter, axes and solidity.

    The perimeter is the length of all rings. The axes are those of the ellipse with the
    same second central moments (each pixel a unit square, hence 1/12). Solidity is the
    polygon's area over that of the outer ring's convex hull.
    """
    mx, my = maps.mpp
    outlines = objects.outlines
    area, x, y, xx, xy, yy = (
        outlines.column(name).astype(np.float64) for name in ("area", "x", "y", "xx", "xy", "yy")
    )
    mean_x, mean_y = x / area, y / area
    a = (xx / area - mean_x * mean_x + 1 / 12) * (mx * mx)
    b = (xy / area - mean_x * mean_y) * (mx * my)
    c = (yy / area - mean_y * mean_y + 1 / 12) * (my * my)
    spread = np.sqrt((a - c) * (a - c) + 4 * b * b)
    major = 4 * np.sqrt((a + c + spread) / 2)
    minor = 4 * np.sqrt(np.maximum(a + c - spread, 0) / 2)
    steps = [outlines.column(f"steps_{name}") for name in ("x", "y", "diagonal")]
    diagonal = np.sqrt(mx * mx + my * my) / 2
    # Each corner cut costs 1/8 pixel or adds it: -1/2 for the outer ring, +1/2 for a hole.
    # A ring without diagonal steps is a stated box, whose corners are not cut.
    cut = np.where(steps[2] > 0, 0.5, 0.0)
    polygon = area - cut + 0.5 * (outlines.ring_counts - 1)
    return {
        "area_um2": _float(area * (mx * my)),
        "perimeter_um": _float(steps[0] * mx + steps[1] * my + steps[2] * diagonal),
        "major_axis_um": _float(major),
        "minor_axis_um": _float(minor),
        "solidity": _float(polygon / (outlines.column("hull") / 8)),
    }
