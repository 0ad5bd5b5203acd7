from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import duckdb
import duckdb_extension_spatial
import geopandas as gpd
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import shapely
from object_maps import tissue_like

from wsi_pipeline.errors import TableError
from wsi_pipeline.instances import extract_objects
from wsi_pipeline.table import (
    OBJECT_SCHEMA,
    ROW_GROUP_ROWS,
    TISSUE_SCHEMA,
    ObjectWriter,
    read_metadata,
    read_objects,
    read_rings,
    write_tissue,
)


@pytest.fixture(scope="module")
def rows():
    extraction = extract_objects(tissue_like(0), slide_id="a")
    return pa.Table.from_batches(list(extraction.batches), OBJECT_SCHEMA)


def write(path, table, *, pixel_size=(0.25, 0.25), portion=100):
    with ObjectWriter(path, metadata={"model": {"name": "m"}}, pixel_size=pixel_size) as writer:
        for batch in table.to_batches(max_chunksize=portion):
            writer.write(batch)
    return writer


@pytest.fixture(scope="module")
def file(rows, tmp_path_factory):
    path = tmp_path_factory.mktemp("objects") / "a.parquet"
    write(path, rows)
    return path


@pytest.fixture(scope="module")
def checker():
    """The GeoParquet checker, with the signed extension it needs put where it looks."""
    extension = next(Path(duckdb_extension_spatial.__file__).parent.rglob("*.duckdb_extension"))
    duckdb.connect().install_extension(str(extension), force_install=True)

    def check(path):
        gpio = Path(sys.executable).parent / "gpio"
        done = subprocess.run(
            [str(gpio), "check", "spec", "--json", str(path)],
            capture_output=True,
            text=True,
            check=False,
        )
        return done.returncode, done.stdout + done.stderr

    return check


def many(n):
    """A table of many small squares in a row."""
    x = np.arange(n, dtype=float)
    geometry = shapely.to_wkb(shapely.box(x, 0, x + 0.75, 1))
    empty = OBJECT_SCHEMA.empty_table().to_pandas()
    columns = {name: np.zeros(n) for name in empty.columns}
    name = pa.DictionaryArray.from_arrays(
        pa.array(np.arange(n) % 2, pa.int32()), ["gland", "nucleus"]
    )
    columns |= {
        "slide_id": pa.DictionaryArray.from_arrays(np.zeros(n, np.int32), ["a"]),
        "object_id": np.arange(n),
        "kind": name,
        "class": pa.nulls(n, pa.dictionary(pa.int32(), pa.string())),
        "parent_id": pa.nulls(n, pa.int64()),
        "tissue": pa.nulls(n, pa.dictionary(pa.int32(), pa.string())),
        "bbox": pa.StructArray.from_arrays(
            [pa.array(v) for v in (x, np.zeros(n), x + 0.75, np.ones(n))],
            fields=list(OBJECT_SCHEMA.field("bbox").type),
        ),
        "geometry": pa.array(geometry),
    }
    arrays = [pa.array(columns[f.name]).cast(f.type) for f in OBJECT_SCHEMA]
    return pa.table(arrays, schema=OBJECT_SCHEMA)


# ---- judged by others ----------------------------------------------------------------


def test_the_checker_accepts_it(file, checker):
    code, text = checker(file)
    assert code == 0, text


def test_the_checker_accepts_an_empty_table(tmp_path, checker):
    path = tmp_path / "empty.parquet"
    writer = write(path, OBJECT_SCHEMA.empty_table())
    assert writer.counts == {}
    code, text = checker(path)
    assert code == 0, text
    frame = read_objects(path)
    assert len(frame) == 0
    assert pq.read_schema(path).remove_metadata() == OBJECT_SCHEMA
    assert len(gpd.read_parquet(path)) == 0


def test_the_checker_would_complain(file, tmp_path, checker):
    table = pq.read_table(file)
    flipped = shapely.orient_polygons(
        shapely.from_wkb(table["geometry"].to_numpy()), exterior_cw=True
    )
    column = pa.array(shapely.to_wkb(flipped))
    index = table.schema.get_field_index("geometry")
    path = tmp_path / "clockwise.parquet"
    pq.write_table(table.set_column(index, table.field("geometry"), column), path)
    assert checker(path)[0] != 0


def test_geopandas_reads_it(file, rows):
    frame = gpd.read_parquet(file)
    assert len(frame) == len(rows)
    assert frame.geometry.is_valid.all()
    assert frame.crs.is_engineering
    units = [axis.unit_conversion_factor for axis in frame.crs.axis_info]
    assert units == [0.25e-6, 0.25e-6]
    assert [axis.unit_name for axis in frame.crs.axis_info] == ["pixel", "pixel"]
    x0, y0, x1, y1 = 100.0, 200.0, 400.0, 500.0
    part = gpd.read_parquet(file, bbox=(x0, y0, x1, y1))
    expected = frame.cx[x0:x1, y0:y1]
    assert 0 < len(expected) <= len(part) < len(frame)
    assert (
        list(frame.total_bounds)
        == json.loads(pq.read_metadata(file).metadata[b"geo"])["columns"]["geometry"]["bbox"]
    )


def test_duckdb_reads_it(file, rows):
    query = f"select kind, count(*) n, sum(area_um2) from '{file}' group by kind order by kind"
    found = {kind: (n, area) for kind, n, area in duckdb.sql(query).fetchall()}
    frame = rows.select(["kind", "area_um2"]).to_pandas()
    for kind, group in frame.groupby("kind", observed=True):
        assert found[kind] == (len(group), pytest.approx(group["area_um2"].sum(), rel=1e-5))


def test_pandas_reads_a_folder(rows, tmp_path):
    write(tmp_path / "a.parquet", rows)
    write(tmp_path / "b.parquet", OBJECT_SCHEMA.empty_table())
    write(tmp_path / "c.parquet", many(3))
    frame = pd.read_parquet(tmp_path)
    assert len(frame) == len(rows) + 3
    assert frame.index.equals(pd.RangeIndex(len(frame)))
    assert isinstance(frame["kind"].dtype, pd.CategoricalDtype)
    assert set(frame["class"].dropna()) == {"epithelial", "immune", "stromal"}


# ---- the file itself -------------------------------------------------------------------


def test_row_groups_have_a_fixed_size_and_hold_all_rows(tmp_path):
    table = many(70_000)
    write(tmp_path / "x.parquet", table, portion=9999)
    meta = pq.read_metadata(tmp_path / "x.parquet")
    sizes = [meta.row_group(i).num_rows for i in range(meta.num_row_groups)]
    assert sizes == [ROW_GROUP_ROWS] * 4 + [70_000 - 4 * ROW_GROUP_ROWS]
    assert pq.read_table(tmp_path / "x.parquet").replace_schema_metadata().equals(table)
    column = meta.row_group(0).column(0)
    assert column.compression == "ZSTD"


def test_bytes_do_not_depend_on_the_portions(rows, tmp_path):
    table = pa.concat_tables([rows, many(40_000)]).unify_dictionaries()
    texts = set()
    for portion in (7_001, 16_384, 100_000):
        write(tmp_path / "x.parquet", table, portion=portion)
        texts.add((tmp_path / "x.parquet").read_bytes())
    assert len(texts) == 1


def test_bytes_do_not_depend_on_windows(tmp_path):
    texts = set()
    for window, halo, workers in [(1024, 32, 1), (200, 8, 2), (97, 0, 1)]:
        extraction = extract_objects(
            tissue_like(5, (300, 260)),
            slide_id="a",
            window_px=window,
            halo_px=halo,
            workers=workers,
        )
        with ObjectWriter(tmp_path / "x.parquet", metadata={}, pixel_size=(0.25, 0.25)) as writer:
            for batch in extraction.batches:
                writer.write(batch)
        texts.add((tmp_path / "x.parquet").read_bytes())
    assert len(texts) == 1


def test_dictionaries_of_portions_may_differ(rows, tmp_path):
    three = many(3)
    with ObjectWriter(tmp_path / "x.parquet", metadata={}, pixel_size=(1, 1)) as writer:
        writer.write(rows.slice(0, 5))
        writer.write(three)
    assert writer.counts == {"nucleus": 6, "gland": 2}
    kinds = pq.read_table(tmp_path / "x.parquet")["kind"].to_pylist()
    assert kinds == [*["nucleus"] * 5, "gland", "nucleus", "gland"]


def test_the_covering_covers(file):
    table = pq.read_table(file)
    bounds = shapely.bounds(shapely.from_wkb(table["geometry"].to_numpy()))
    box = table["bbox"].combine_chunks()
    sides = [box.field(name).to_numpy() for name in ("xmin", "ymin", "xmax", "ymax")]
    assert (sides[0] <= bounds[:, 0]).all()
    assert (sides[1] <= bounds[:, 1]).all()
    assert (sides[2] >= bounds[:, 2]).all()
    assert (sides[3] >= bounds[:, 3]).all()


def test_metadata(file):
    assert read_metadata(file) == {
        "model": {"name": "m"},
        "pixel_size_um": {"x": 0.25, "y": 0.25},
    }
    keys = pq.read_metadata(file).metadata
    assert set(keys) == {b"geo", b"wsi_pipeline", b"ARROW:schema"}
    geo = json.loads(keys[b"geo"])
    column = geo["columns"]["geometry"]
    assert geo["version"] == "1.1.0"
    assert column["encoding"] == "WKB"
    assert column["geometry_types"] == ["Polygon"]
    assert column["orientation"] == "counterclockwise"
    assert list(column["covering"]["bbox"]) == ["xmin", "ymin", "xmax", "ymax"]
    for other in ("slide_id", "kind", "class", "tissue"):
        assert pa.types.is_dictionary(pq.read_schema(file).field(other).type)


def test_a_failure_leaves_nothing_and_keeps_the_old_file(rows, tmp_path):
    path = tmp_path / "x.parquet"

    def fail():
        with ObjectWriter(path, metadata={}, pixel_size=(1, 1)) as writer:
            writer.write(rows)
            raise KeyError("in the middle")

    with pytest.raises(KeyError, match="middle"):
        fail()
    assert list(tmp_path.iterdir()) == []
    write(path, rows)
    before = path.read_bytes()
    with pytest.raises(KeyError, match="middle"):
        fail()
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["x.parquet"]
    with (
        pytest.raises(TableError, match="columns"),
        ObjectWriter(path, metadata={}, pixel_size=(1, 1)) as writer,
    ):
        writer.write(rows.drop_columns("score"))
    with (
        pytest.raises(TypeError),
        ObjectWriter(path, metadata={"x": object()}, pixel_size=(1, 1)) as writer,
    ):
        writer.write(rows)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["x.parquet"]


# ---- reading ---------------------------------------------------------------------------


def test_read_by_kind_and_columns(file, rows):
    frame = read_objects(file, kind="gland", columns=["area_um2"])
    assert list(frame.columns) == ["area_um2", "geometry"]
    kinds = rows["kind"].to_pylist()
    assert len(frame) == kinds.count("gland") > 0
    assert frame.crs.is_engineering
    everything = read_objects(file)
    assert list(everything.columns) == [n for n in OBJECT_SCHEMA.names if n != "bbox"]
    assert len(everything) == len(rows)
    assert "bbox" in read_objects(file, columns=["bbox"]).columns
    with pytest.raises(TableError, match="nonsense"):
        read_objects(file, columns=["nonsense"])


def test_rings_are_the_outlines_that_geopandas_reads(file, rows):
    for kind in sorted(set(rows["kind"].to_pylist())):
        rings = read_rings(file, kind=kind)
        expected = read_objects(file, kind=kind).geometry.exterior
        assert len(rings) == len(expected) > 0
        for ring, outline in zip(rings, expected, strict=True):
            np.testing.assert_array_equal(ring, outline.coords)


def test_rings_of_nothing(file, tmp_path):
    assert read_rings(file, kind="no such kind") == []
    with pytest.raises(TableError, match="absent"):
        read_rings(tmp_path / "absent.parquet", kind="gland")


def test_read_by_place_is_exact_and_prunes_row_groups(tmp_path):
    path = tmp_path / "x.parquet"
    write(path, many(70_000))
    frame = read_objects(path, bbox=(40_000.0, 0.5, 40_010.5, 0.6), kind="gland")
    assert frame["object_id"].tolist() == list(range(40_000, 40_011, 2))
    # Break every row group but the third: it alone is read.
    data = bytearray(path.read_bytes())
    meta = pq.read_metadata(path)
    for i in (0, 1, 3, 4):
        for k in range(meta.num_columns):
            column = meta.row_group(i).column(k)
            start = column.dictionary_page_offset or column.data_page_offset
            data[start : start + column.total_compressed_size] = (
                b"\xff" * column.total_compressed_size
            )
    path.write_bytes(data)
    again = read_objects(path, bbox=(40_000.0, 0.5, 40_010.5, 0.6), kind="gland")
    assert again.equals(frame)


def test_read_a_folder(rows, tmp_path):
    write(tmp_path / "a.parquet", rows)
    write(tmp_path / "b.parquet", many(4))
    frame = read_objects(tmp_path, kind="nucleus")
    assert len(frame) == rows["kind"].to_pylist().count("nucleus") + 2
    assert frame.crs.is_engineering
    write(tmp_path / "b.parquet", many(4), pixel_size=(0.5, 0.5))
    assert read_objects(tmp_path).crs is None


def test_what_is_no_table(tmp_path):
    with pytest.raises(TableError, match="holds no"):
        read_objects(tmp_path)
    with pytest.raises(TableError, match="missing"):
        read_objects(tmp_path / "missing.parquet")
    (tmp_path / "text.parquet").write_text("no table")
    with pytest.raises(TableError, match="text"):
        read_metadata(tmp_path / "text.parquet")
    pq.write_table(pa.table({"a": [1]}), tmp_path / "other.parquet")
    with pytest.raises(TableError, match="geo"):
        read_objects(tmp_path / "other.parquet")


def test_tissue_table(tmp_path, checker):
    path = tmp_path / "t.parquet"
    ring = shapely.Polygon([(0, 0), (9, 0), (9, 9), (0, 9)], [[(3, 3), (3, 6), (6, 6), (6, 3)]])
    write_tissue(
        path,
        slide_id="a",
        outline=[(shapely.to_wkb(ring), 4.5)],
        regions=[("mucosa", shapely.to_wkb(shapely.box(20, 30, 40, 60)), 3.0)],
        pixel_size=(0.5, 0.25),
        metadata={"x": 1},
    )
    assert pq.read_schema(path).remove_metadata() == TISSUE_SCHEMA
    assert checker(path)[0] == 0
    frame = read_objects(path)
    assert frame["kind"].tolist() == ["outline", "region"]
    assert frame["class"].isna().tolist() == [True, False]
    assert frame["area_um2"].tolist() == [4.5, 3.0]
    assert frame.geometry[0].equals(ring)
    assert read_metadata(path)["pixel_size_um"] == {"x": 0.5, "y": 0.25}
    write_tissue(path, slide_id="a", outline=[], regions=[], pixel_size=(1, 1), metadata={})
    assert len(read_objects(path)) == 0
    assert checker(path)[0] == 0


def test_a_pixel_size_that_is_none():
    with (
        pytest.raises(ValueError, match="pixel size"),
        ObjectWriter(Path("never"), metadata={}, pixel_size=(float("nan"), 1)),
    ):
        pass
