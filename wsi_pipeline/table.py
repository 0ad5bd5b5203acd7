"""The tables: GeoParquet 1.1 files of objects and of tissue.

Geometries are WKB polygons in level-0 pixels, origin at the top-left corner of the
top-left pixel, y down. The coordinate system is an *engineering* one that states the
pixel size: without one, GeoParquet means longitude and latitude. Nothing in a file
depends on when or in which portions it was written.
"""

from __future__ import annotations

import base64
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import reduce
from operator import and_
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import shapely
from numpy.typing import NDArray

from wsi_pipeline.checked import parse_json
from wsi_pipeline.durable import durable_file
from wsi_pipeline.errors import TableError, WsiPipelineError
from wsi_pipeline.geoparquet import SIDES, geo_metadata, pixel_crs

if TYPE_CHECKING:
    import geopandas as gpd

__all__ = [
    "OBJECT_SCHEMA",
    "TISSUE_SCHEMA",
    "ObjectWriter",
    "count_rows",
    "read_centroids",
    "read_metadata",
    "read_objects",
    "read_rings",
    "write_tissue",
]

ROW_GROUP_ROWS = 16384

_NAME = pa.dictionary(pa.int32(), pa.string())
_BBOX = pa.struct([pa.field(side, pa.float64(), nullable=False) for side in SIDES])

OBJECT_SCHEMA = pa.schema(
    [
        pa.field("slide_id", _NAME, nullable=False),
        pa.field("object_id", pa.int64(), nullable=False),
        pa.field("kind", _NAME, nullable=False),
        pa.field("class", _NAME),
        pa.field("class_prob", pa.float32()),
        pa.field("score", pa.float32(), nullable=False),
        pa.field("area_um2", pa.float32(), nullable=False),
        pa.field("perimeter_um", pa.float32(), nullable=False),
        pa.field("major_axis_um", pa.float32(), nullable=False),
        pa.field("minor_axis_um", pa.float32(), nullable=False),
        pa.field("solidity", pa.float32(), nullable=False),
        pa.field("centroid_x", pa.float64(), nullable=False),
        pa.field("centroid_y", pa.float64(), nullable=False),
        pa.field("parent_id", pa.int64()),
        pa.field("tissue", _NAME),
        pa.field("bbox", _BBOX, nullable=False),
        pa.field("geometry", pa.binary(), nullable=False),
    ]
)
"""Columns of ``objects/<slide_id>.parquet``."""

TISSUE_SCHEMA = pa.schema(
    [
        pa.field("slide_id", _NAME, nullable=False),
        pa.field("kind", _NAME, nullable=False),
        pa.field("class", _NAME),
        pa.field("area_um2", pa.float32(), nullable=False),
        pa.field("bbox", _BBOX, nullable=False),
        pa.field("geometry", pa.binary(), nullable=False),
    ]
)
"""Columns of ``tissue/<slide_id>.parquet``; kind is ``outline`` or ``region``."""


class ObjectWriter:
    """Writes a table row group by row group; the file appears when the block ends well.

    Use as a context manager. The bytes depend on the rows and the metadata alone, not on
    how the rows were portioned.
    """

    def __init__(
        self,
        path: Path,
        *,
        metadata: Mapping[str, Any],
        pixel_size: tuple[float, float],
        schema: pa.Schema = OBJECT_SCHEMA,
    ) -> None:
        """Prepare to write.

        Args:
            path: where the file will be.
            metadata: goes into the key ``wsi_pipeline`` as JSON, with the pixel size.
            pixel_size: micrometres per level-0 pixel, x and y.
            schema: the columns.

        Raises:
            ValueError: the pixel size is not positive and finite.
        """
        self._path = Path(path)
        self._metadata = metadata
        self._pixel_size = pixel_size
        self._crs = pixel_crs(pixel_size)
        self._schema = schema
        self._held: list[pa.Table] = []
        self._held_rows = 0
        self._counts: Counter[str] = Counter()
        self._extent: list[float] | None = None

    @property
    def counts(self) -> dict[str, int]:
        """Rows written so far, by kind."""
        return dict(self._counts)

    def __enter__(self) -> Self:
        self._file = durable_file(self._path)
        beside = self._file.__enter__()
        try:
            self._writer = pq.ParquetWriter(
                beside,
                self._schema,
                compression="zstd",
                compression_level=1,
                use_dictionary=[f.name for f in self._schema if f.type == _NAME],
                write_page_index=False,
                # The Arrow schema goes in at the end, because it carries the metadata, too:
                # readers of a whole folder look for it only there.
                store_schema=False,
            )
        except BaseException as error:
            self._file.__exit__(type(error), error, error.__traceback__)
            raise
        return self

    def write(self, batch: pa.RecordBatch | pa.Table) -> None:
        """Append rows.

        Raises:
            TableError: the columns are not those of the schema.
        """
        table = pa.Table.from_batches([batch]) if isinstance(batch, pa.RecordBatch) else batch
        if table.schema != self._schema:
            msg = f"{self._path.name}: rows have other columns than the table: {table.schema}"
            raise TableError(msg)
        if not len(table):
            return
        self._note(table)
        self._held.append(table)
        self._held_rows += len(table)
        if self._held_rows >= ROW_GROUP_ROWS:
            self._flush(self._held_rows // ROW_GROUP_ROWS * ROW_GROUP_ROWS)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            if error is None:
                self._flush(self._held_rows)
                keys = self._keys()
                arrow = self._schema.with_metadata(keys).serialize().to_pybytes()
                self._writer.add_key_value_metadata(
                    {**keys, "ARROW:schema": base64.b64encode(arrow).decode()}
                )
            self._writer.close()
            self._held = []
            pa.default_memory_pool().release_unused()  # Arrow hoards for itself
        except BaseException as late:
            self._file.__exit__(type(late), late, late.__traceback__)
            raise
        self._file.__exit__(kind, error, trace)

    def _flush(self, rows: int) -> None:
        """Write the first rows that are held, in full row groups except at the end."""
        if not self._held_rows:
            return
        table = pa.concat_tables(self._held).unify_dictionaries()
        for start in range(0, rows, ROW_GROUP_ROWS):
            size = min(ROW_GROUP_ROWS, rows - start)
            self._writer.write_table(table.slice(start, size).combine_chunks(), ROW_GROUP_ROWS)
        rest = table.slice(rows)
        self._held = [rest] if len(rest) else []
        self._held_rows = len(rest)

    def _note(self, table: pa.Table) -> None:
        for entry in pc.value_counts(table["kind"].cast(pa.string())).to_pylist():
            self._counts[entry["values"]] += entry["counts"]
        box = table["bbox"].combine_chunks()
        low = [pc.min(box.field(side)).as_py() for side in SIDES[:2]]
        high = [pc.max(box.field(side)).as_py() for side in SIDES[2:]]
        if self._extent is not None:
            low = [min(pair) for pair in zip(low, self._extent[:2], strict=True)]
            high = [max(pair) for pair in zip(high, self._extent[2:], strict=True)]
        self._extent = [*low, *high]

    def _keys(self) -> dict[str, str]:
        x, y = self._pixel_size
        own = {**self._metadata, "pixel_size_um": {"x": x, "y": y}}
        return {
            "geo": json.dumps(geo_metadata(self._crs, self._extent)),
            "wsi_pipeline": json.dumps(own, sort_keys=True),
        }


def write_tissue(
    path: Path,
    *,
    slide_id: str,
    outline: Sequence[tuple[bytes, float]],
    regions: Sequence[tuple[str, bytes, float]],
    pixel_size: tuple[float, float],
    metadata: Mapping[str, Any],
) -> None:
    """Write the tissue table.

    Args:
        path: where the file will be.
        slide_id: goes into every row.
        outline: ``(WKB polygon in level-0 pixels, area in um2)`` of each piece of tissue.
        regions: ``(class name, WKB polygon, area in um2)`` of each tissue region.
        pixel_size: micrometres per level-0 pixel, x and y.
        metadata: goes into the key ``wsi_pipeline`` as JSON.
    """
    rows: list[tuple[str, str | None, bytes, float]]
    rows = [("outline", None, *piece) for piece in outline]
    rows += [("region", *piece) for piece in regions]
    kinds, classes, geometries, areas = zip(*rows, strict=True) if rows else ((),) * 4
    bounds = shapely.bounds(shapely.from_wkb(np.array(geometries, object))).reshape(-1, 4)
    columns: dict[str, Any] = {
        "slide_id": pa.array([slide_id] * len(rows), pa.string()).cast(_NAME),
        "kind": pa.array(kinds, pa.string()).cast(_NAME),
        "class": pa.array(classes, pa.string()).cast(_NAME),
        "area_um2": pa.array(areas, pa.float32()),
        "bbox": pa.StructArray.from_arrays([pa.array(s) for s in bounds.T], fields=list(_BBOX)),
        "geometry": pa.array(geometries, pa.binary()),
    }
    with ObjectWriter(
        path, metadata=metadata, pixel_size=pixel_size, schema=TISSUE_SCHEMA
    ) as writer:
        writer.write(pa.table(list(columns.values()), schema=TISSUE_SCHEMA))


def read_objects(
    path: str | Path,
    *,
    kind: str | None = None,
    bbox: tuple[float, float, float, float] | None = None,
    columns: Iterable[str] | None = None,
) -> gpd.GeoDataFrame:
    """Read an objects or tissue table, or all tables of a folder.

    Args:
        path: a file, or a folder of ``*.parquet`` files.
        kind: only rows of this kind.
        bbox: ``(x0, y0, x1, y1)`` in level-0 pixels; only rows whose box meets it. Row
            groups that cannot hold any are not read.
        columns: names; None means all but the covering ``bbox``. ``geometry`` always comes.

    Returns:
        The rows in file order. The coordinate system is that of the files; None where
        files of different pixel sizes are read together.

    Raises:
        TableError: no such file, or not a table of this package.
    """
    path = Path(path)
    with _table_errors(path):
        return _read_frame(path, kind, bbox, columns)


def _read_frame(
    path: Path,
    kind: str | None,
    bbox: tuple[float, float, float, float] | None,
    columns: Iterable[str] | None,
) -> gpd.GeoDataFrame:
    import geopandas as gpd  # slow to import, and tables are written without it

    files = sorted(path.glob("*.parquet")) if path.is_dir() else [path]
    if not files:
        raise TableError(f"{path} holds no .parquet file")
    systems = [_read_geo(file)["columns"]["geometry"]["crs"] for file in files]
    known = pq.read_schema(files[0]).names
    names = [name for name in known if name != "bbox"]
    if columns is not None:
        names = list(dict.fromkeys([*columns, "geometry"]))
        unknown = sorted(set(names) - set(known))
        if unknown:
            raise TableError(f"{path} has no columns {unknown}; it has {known}")
    parts = [part for file in files for part in _read_groups(file, names, kind, bbox)]
    table = pa.concat_tables(parts).unify_dictionaries()
    frame = table.drop_columns("geometry").replace_schema_metadata().to_pandas()
    # to_pandas rather than numpy: an empty column must stay an object array.
    geometry = shapely.from_wkb(table["geometry"].to_pandas().to_numpy(object))
    crs = systems[0] if all(system == systems[0] for system in systems) else None
    return gpd.GeoDataFrame(frame, geometry=geometry, crs=crs)[names]


def read_centroids(path: Path, *, kind: str) -> NDArray[np.float64]:
    """Read where the objects of one kind are, a row group at a time and no geometry.

    Args:
        path: an objects table.
        kind: which objects.

    Returns:
        ``(N, 2)`` level-0 pixels.

    Raises:
        TableError: no such file, or not a table of objects.
    """
    names = ["centroid_x", "centroid_y"]
    with _table_errors(path):
        parts = [
            np.stack([part.column(name).to_numpy() for name in names], axis=1)
            for part in _read_groups(path, names, kind, None)
        ]
        return np.concatenate(parts).astype(np.float64, copy=False)


def read_rings(path: Path, *, kind: str) -> list[NDArray[np.float64]]:
    """Read the outer rings of the objects of one kind.

    Args:
        path: an objects table.
        kind: which objects.

    Returns:
        Of each object ``(N, 2)`` level-0 pixels; the last is the first.

    Raises:
        TableError: no such file, or not a table of objects.
    """
    with _table_errors(path):
        rings: list[NDArray[np.float64]] = []
        for part in _read_groups(path, ["geometry"], kind, None):
            polygons = shapely.from_wkb(part.column("geometry").to_pylist())
            outer = shapely.get_exterior_ring(np.asarray(polygons, object))
            ends = np.cumsum(shapely.get_num_coordinates(outer))
            rings += np.split(shapely.get_coordinates(outer), ends)[:-1]
        return rings


def read_metadata(path: str | Path) -> dict[str, Any]:
    """Return what the key ``wsi_pipeline`` of a table says.

    Raises:
        TableError: no such file, or not a table of this package.
    """
    return _read_key(Path(path), b"wsi_pipeline")


def count_rows(path: str | Path) -> int:
    """Return the number of rows of a table, from its footer.

    Raises:
        TableError: no such file, or not a table.
    """
    with _table_errors(Path(path)):
        return int(pq.read_metadata(path).num_rows)


@contextmanager
def _table_errors(path: Path) -> Iterator[None]:
    """Turn whatever damaged or foreign tables lead their readers into to :class:`TableError`."""
    try:
        yield
    except (WsiPipelineError, MemoryError):
        raise
    except Exception as error:
        msg = (
            f"{path} cannot be read as a table of this package: {error!r:.300}. "
            "If it is one, it is damaged: run its slide again with --overwrite"
        )
        raise TableError(msg) from error


def _read_groups(
    path: Path,
    names: list[str],
    kind: str | None,
    bbox: tuple[float, float, float, float] | None,
) -> Iterator[pa.Table]:
    """Yield the wanted rows of a file, one row group at a time; groups without any are not read.

    The first part is always empty: it carries the schema.
    """
    condition = _filter(kind, bbox)
    tested = ["kind"] * (kind is not None) + ["bbox"] * (bbox is not None)
    with pq.ParquetFile(path) as file:
        yield file.schema_arrow.empty_table().select(names)
        for number in range(file.num_row_groups):
            if not _may_match(file.metadata.row_group(number), kind, bbox):
                continue
            part = file.read_row_group(number, columns=[*names, *tested])
            yield (part if condition is None else part.filter(condition)).select(names)


def _may_match(
    group: pq.RowGroupMetaData,
    kind: str | None,
    bbox: tuple[float, float, float, float] | None,
) -> bool:
    """Tell from the statistics of a row group whether a wanted row may be in it."""
    columns = [group.column(i) for i in range(group.num_columns)]
    span = {
        column.path_in_schema: (column.statistics.min, column.statistics.max)
        for column in columns
        if column.statistics is not None and column.statistics.has_min_max
    }
    if kind is not None and "kind" in span and not span["kind"][0] <= kind <= span["kind"][1]:
        return False
    if bbox is None or not all(f"bbox.{side}" in span for side in SIDES):
        return True
    x0, y0, x1, y1 = bbox
    left, top, right, bottom = (span[f"bbox.{side}"] for side in SIDES)
    return bool(left[0] <= x1 and right[1] >= x0 and top[0] <= y1 and bottom[1] >= y0)


def _filter(
    kind: str | None, bbox: tuple[float, float, float, float] | None
) -> pc.Expression | None:
    conditions = []
    if kind is not None:
        conditions.append(pc.field("kind") == kind)
    if bbox is not None:
        x0, y0, x1, y1 = bbox
        conditions += [
            pc.field("bbox", "xmin") <= x1,
            pc.field("bbox", "xmax") >= x0,
            pc.field("bbox", "ymin") <= y1,
            pc.field("bbox", "ymax") >= y0,
        ]
    return reduce(and_, conditions) if conditions else None


def _read_geo(path: Path) -> dict[str, Any]:
    return _read_key(path, b"geo")


def _read_key(path: Path, key: bytes) -> dict[str, Any]:
    try:
        text = (pq.read_metadata(path).metadata or {})[key].decode()
        value: dict[str, Any] = parse_json(text)
        if not isinstance(value, dict):
            raise ValueError("it is no JSON object")
    except (OSError, pa.ArrowException, KeyError, ValueError) as error:
        msg = f"{path} is no table of this package (looked for {key.decode()!r}): {error!r}"
        raise TableError(msg) from error
    return value
