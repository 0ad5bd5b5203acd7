"""Upstream's result files become tables like our own; hostile ones become errors."""

import json
import pickle
import subprocess
import sys

import cv2
import joblib
import numpy as np
import pytest
import shapely
from click.testing import CliRunner
from hostile import Bomb, bomb_bytes
from slide_fixtures import picture, write_slide

from wsi_pipeline.cerberus_results import import_results
from wsi_pipeline.cli import wsi
from wsi_pipeline.errors import TableError
from wsi_pipeline.polygons import shape_columns, valid_polygons
from wsi_pipeline.table import OBJECT_SCHEMA, read_metadata, read_objects

# 0.25 um a pixel; upstream's files count at 0.5.
SIZE = (640, 512)
SPACING = 2.0


@pytest.fixture(scope="module")
def slide(tmp_path_factory):
    path = tmp_path_factory.mktemp("slide") / "case 7.svs"
    return str(write_slide(path, picture(*SIZE)))


def disc(x, y, radius, *, shape=(256, 320)):
    """Return the contour of a drawn disc, as OpenCV and so upstream have it."""
    mask = np.zeros(shape, np.uint8)
    cv2.circle(mask, (x, y), radius, 1, -1)
    (contour,), _ = cv2.findContours(mask, cv2.RETR_TREE, cv2.CHAIN_APPROX_SIMPLE)
    return np.squeeze(contour).astype(np.int32)


def entry(contour, **more):
    low, high = contour.min(axis=0), contour.max(axis=0)
    return {"box": np.array([*low, *high]), "centroid": contour.mean(axis=0), "contour": contour,
            **more}  # fmt: skip


def content(layout="new", **changes):
    values = {
        "Nuclei": {
            "c0": entry(disc(200, 200, 6), prob=0.75, type=1),
            "a1": entry(disc(60, 60, 5), prob=0.5, type=np.int64(6)),
            "b2": entry(disc(61, 90, 4), prob=1.0, type=0),
        },
        "Gland": {
            "g1": entry(disc(250, 60, 20), type=2.0, type_prob=0.9),
            "g0": entry(disc(60, 70, 40), type=1.4, type_prob=0.6),
        },
        "Lumen": {"l0": entry(disc(60, 62, 12))},
    }
    new = {
        "proc_resolution": {"resolution": 0.5, "units": "mpp"},
        "base_resolution": {"resolution": [0.25, 0.25], "units": "mpp"},
        "proc_dimensions": np.array([256, 320]),
        "base_dimensions": np.array([512, 640]),
    }
    old = {"resolution": {"resolution": 0.5, "units": "mpp"}}
    return {**values, **(new if layout == "new" else old), **changes}


def convert(tmp_path, slide, values, *, how=joblib.dump, **more):
    file, out = tmp_path / "r.dat", tmp_path / "r.parquet"
    how(values, file)
    found = import_results(file, slide, out, **more)
    return found, read_objects(out)


@pytest.mark.parametrize("layout", ["new", "old"])
@pytest.mark.parametrize("packed", [0, 3])
def test_both_layouts_become_one_table(tmp_path, slide, layout, packed):
    found, table = convert(
        tmp_path, slide, content(layout), how=lambda v, f: joblib.dump(v, f, compress=packed)
    )
    assert found.layout == layout
    assert found.counts == {"nucleus": 3, "gland": 2, "lumen": 1}
    assert (found.mended, found.left_out) == (0, 0)
    columns = [name for name in OBJECT_SCHEMA.names if name != "bbox"]
    assert list(table.columns) == columns
    assert set(table.slide_id) == {"case 7"}
    assert table.object_id.is_unique
    assert table.kind.tolist() == ["nucleus"] * 3 + ["gland"] * 2 + ["lumen"]
    by = {(k, round(x)): row for (k, x), row in zip(zip(table.kind, table.centroid_x, strict=True),
          table.itertuples(), strict=True)}  # fmt: skip
    nucleus = by["nucleus", round(200.5 * SPACING)]
    assert nucleus.class_prob == 0.75
    assert (nucleus.centroid_x, nucleus.centroid_y) == pytest.approx((401, 401), abs=0.01)
    # 113 pixels of 0.5 um; the corners of its outline are the pixels' own.
    assert nucleus.area_um2 == pytest.approx(113 * 0.25, rel=0.04)
    assert nucleus.major_axis_um == pytest.approx(6.0, rel=0.05)
    assert np.isnan(table.score).all()
    assert table.tissue.isna().all()
    lumen = by["lumen", round(61 * SPACING)]
    assert lumen.centroid_y == pytest.approx(63 * SPACING, abs=0.01)
    gland = by["gland", round(61 * SPACING)]
    inside = table[table.parent_id == gland.object_id]
    assert sorted(inside.kind) == ["lumen", "nucleus", "nucleus"]
    assert table.parent_id.isna().sum() == 3
    assert shapely.is_valid(table.geometry.values).all()
    assert shapely.is_ccw(shapely.get_exterior_ring(table.geometry.values)).all()


def test_classes_follow_upstreams_release(tmp_path, slide):
    _, table = convert(tmp_path, slide, content())
    found = {
        (kind, round(x)): (name if isinstance(name, str) else None)
        for kind, x, name in zip(table.kind, table.centroid_x, table["class"], strict=True)
    }
    assert found == {
        ("nucleus", 401): "neutrophil",
        ("nucleus", 121): "connective",
        ("nucleus", 123): None,
        ("gland", 122): "gland",  # a mixed id of 1.4 is cut off, as upstream does
        ("gland", 502): "surface epithelium",
        ("lumen", 122): None,
    }
    assert table[table["class"].isna()].class_prob.isna().all()


def test_rows_do_not_depend_on_the_order_of_the_file(tmp_path, slide):
    values = content()
    _, one = convert(tmp_path, slide, values)
    values["Nuclei"] = dict(reversed(values["Nuclei"].items()))
    _, other = convert(tmp_path, slide, values)
    assert one.to_csv() == other.to_csv()


def test_metadata_says_where_it_is_from(tmp_path, slide):
    convert(tmp_path, slide, content())
    said = read_metadata(tmp_path / "r.parquet")
    assert said["slide"]["name"] == "case 7.svs"
    assert said["imported"]["layout"] == "new"
    assert len(said["imported"]["sha256"]) == 64
    assert said["pixel_size_um"] == {"x": 0.25, "y": 0.25}
    assert str(tmp_path) not in json.dumps(said)


def test_outlines_go_around_the_pixels_and_are_valid(tmp_path, slide):
    rectangle = np.array([[100, 20], [100, 24], [107, 24], [107, 20]])
    nuclei = {
        "rectangle": entry(rectangle, prob=1.0, type=5),
        "opencv": entry(rectangle, prob=1.0, type=5) | {"contour": rectangle[:, None]},
        "lists": entry(rectangle, prob=1.0, type=5) | {"contour": rectangle.tolist()},
        "eight": entry(np.array([[10, 10], [30, 30], [30, 10], [10, 30]]), prob=1.0, type=1),
        "spike": entry(
            np.array([[50, 50], [60, 50], [60, 60], [60, 80], [60, 60], [50, 60]]), prob=1.0, type=2
        ),
        "point": entry(np.array([[90, 90]]), prob=1.0, type=3),
        "pair": entry(np.array([[90, 95], [93, 95]]), prob=1.0, type=4),
        "line": entry(np.array([[90, 99], [95, 99], [99, 99], [92, 99]]), prob=1.0, type=6),
        "nothing": entry(np.zeros((1, 2)), prob=1.0, type=6) | {"contour": np.zeros((0, 2))},
    }
    lumina = {"l": entry(2 * rectangle, prob=1.0)}
    found, table = convert(tmp_path, slide, content(Nuclei=nuclei, Gland={}, Lumen=lumina))
    assert (found.mended, found.left_out) == (2, 1)
    assert found.counts == {"nucleus": 8, "lumen": 1}
    nuclei = table[table.kind == "nucleus"].set_index("class")
    px = 0.5**2
    assert nuclei.loc["eosinophil"].area_um2.tolist() == [pytest.approx(8 * 5 * px)] * 3
    assert nuclei.loc["lymphocyte"].area_um2 == pytest.approx(1 * px)
    assert nuclei.loc["plasma"].area_um2 == pytest.approx(4 * px)
    assert nuclei.loc["connective"].area_um2 == pytest.approx(10 * px)
    assert nuclei.loc["neutrophil"].area_um2 == pytest.approx((100 + 25) * px, rel=0.02)
    assert nuclei.loc["epithelial"].area_um2 == pytest.approx(11 * 11 * px)
    (lumen,) = table[table.kind == "lumen"].itertuples()
    assert lumen.area_um2 == pytest.approx(8 * 5 * 4 * px)
    assert lumen.geometry.bounds == (400, 80, 432, 100)
    boxes = {g.bounds for g in nuclei.loc["eosinophil"].geometry}
    assert boxes == {(200, 40, 216, 50)}
    assert shapely.is_valid(table.geometry.values).all()
    assert shapely.is_ccw(shapely.get_exterior_ring(table.geometry.values)).all()


def test_a_slide_without_objects_has_an_empty_table(tmp_path, slide):
    values = content(Nuclei={})
    del values["Gland"], values["Lumen"]
    found, table = convert(tmp_path, slide, values)
    assert found.counts == {}
    assert len(table) == 0


def test_places_follow_the_files_own_pixel_size(tmp_path, slide, caplog):
    # A slide whose pixel size was corrected later: level-0 pixels are where they were.
    _, table = convert(tmp_path, slide, content(), mpp=0.2)
    assert "has (0.2, 0.2)" in caplog.text
    row = table[table["class"] == "neutrophil"].iloc[0]
    assert row.centroid_x == pytest.approx(401, abs=0.01)
    assert row.area_um2 == pytest.approx(113 * 4 * 0.2**2, rel=0.04)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"base_dimensions": np.array([640, 512])}, "about a slide of 512 x 640"),
        ({"proc_resolution": {"resolution": 20, "units": "power"}}, "micrometres a pixel"),
        ({"proc_resolution": {"resolution": 0.0, "units": "mpp"}}, "micrometres a pixel"),
        ({"proc_resolution": None}, "micrometres a pixel"),
        ({"base_resolution": {"resolution": [0.25, "a"]}}, "micrometres a pixel"),
        ({"base_dimensions": "large"}, "must be 2 numbers"),
        ({"Nuclei": [1, 2]}, "no dict of objects"),
        ({"Nuclei": {"x": {"type": 1, "prob": 1.0}}}, "'x' has no contour"),
        ({"Nuclei": {"x": entry(disc(9, 9, 3), prob=1.0, type=7)}}, "type 7; known are"),
        ({"Nuclei": {"x": entry(disc(9, 9, 3), prob="a", type=1)}}, "prob must be 1 numbers"),
        ({"Nuclei": {"x": entry(disc(9, 9, 3) * 1e30, prob=1.0, type=1)}}, "no contour"),
        ({"Nuclei": {"x": entry(disc(9, 9, 3) + np.nan, prob=1.0, type=1)}}, "no contour"),
        ({"Lumen": {"x": entry(disc(9, 9, 3) + 5000)}}, "outside of the slide"),
        ({"Lumen": {"x": entry(disc(9, 9, 3) - 50)}}, "outside of the slide"),
    ],
)
def test_files_that_make_no_sense_are_refused(tmp_path, slide, changes, says):
    with pytest.raises(TableError, match=says) as caught:
        convert(tmp_path, slide, content(**changes))
    assert "r.dat" in str(caught.value)
    assert not (tmp_path / "r.parquet").exists()


def test_lists_that_would_grow_without_end_are_refused(tmp_path, slide):
    laughing = [1.0, 2.0]
    for _ in range(40):
        laughing = [laughing, laughing]
    for changes in (
        {"Nuclei": {"x": {"contour": laughing, "type": 1}}},
        {"base_dimensions": laughing},
        {"proc_resolution": {"resolution": laughing, "units": laughing}},
    ):
        with pytest.raises(TableError):
            convert(tmp_path, slide, content(**changes))


def test_the_command(tmp_path, slide):
    joblib.dump(content("old"), tmp_path / "a.dat")
    command = ["import-cerberus", str(tmp_path / "a.dat"), "--slide", slide, "--out"]
    done = CliRunner().invoke(wsi, [*command, str(tmp_path / "new" / "a.parquet")])
    assert done.exit_code == 0, done.output
    assert "3 nucleus, 2 gland, 1 lumen; old layout, 0 contours mended" in done.output
    assert len(read_objects(tmp_path / "new" / "a.parquet")) == 6
    wrong = CliRunner().invoke(wsi, [*command, str(tmp_path / "a.csv")])
    assert wrong.exit_code == 2
    assert "must end in .parquet" in wrong.output
    again = [*command, str(tmp_path / "b.parquet"), "--memory"]
    small = CliRunner().invoke(wsi, [*again, "9K"])
    assert small.exit_code == 2
    assert "would take more than 0 MiB of memory, the limit" in small.output
    assert CliRunner().invoke(wsi, [*again, "9M"]).exit_code == 0


def test_a_hostile_file_runs_nothing(tmp_path, slide):
    marker, out = tmp_path / "marker", tmp_path / "o.parquet"
    pickled, dumped = tmp_path / "pickled.dat", tmp_path / "dumped.dat"
    pickled.write_bytes(bomb_bytes(marker))
    joblib.dump(content(Nuclei={"x": {"contour": np.zeros((3, 2)), "type": Bomb(marker)}}), dumped)
    for file in (pickled, dumped):
        command = ["import-cerberus", str(file), "--slide", slide, "--out", str(out)]
        done = CliRunner().invoke(wsi, command)
        assert done.exit_code == 2
        assert "only plain arrays and containers are read" in done.output
    assert not marker.exists()
    assert not out.exists()


def test_reading_a_result_file_imports_neither_pickle_users_nor_joblib(tmp_path):
    joblib.dump(content(), tmp_path / "a.dat")
    code = (
        "import sys; from pathlib import Path\n"
        "from wsi_pipeline.plain_pickle import read_plain_pickle\n"
        f"read_plain_pickle(Path({str(tmp_path / 'a.dat')!r}))\n"
        "print('joblib' in sys.modules, 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "False False", done.stderr


def test_shapes_of_known_figures():
    square = np.array([[0, 0], [0, 4], [4, 4], [4, 0]], float)  # clockwise where y goes up
    turn = np.linspace(0, 2 * np.pi, 720)[:-1]
    ellipse = np.stack([30 + 10 * np.cos(turn), 5 + 4 * np.sin(turn)], axis=1)
    polygons, mended = valid_polygons([square, ellipse, np.zeros((0, 2))], grow=0)
    assert mended == 0
    assert [p is None for p in polygons] == [False, False, True]
    shapes = shape_columns(polygons[:2], (0.5, 0.25))
    assert shapes["area_um2"] == pytest.approx([2.0, 10 * 4 * np.pi / 8], rel=1e-3)
    assert shapes["perimeter_um"][0] == pytest.approx(6.0)
    assert shapes["major_axis_um"][1] == pytest.approx(10, rel=1e-3)
    assert shapes["minor_axis_um"][1] == pytest.approx(2, rel=1e-3)
    assert shapes["solidity"] == pytest.approx([1, 1])
    assert (shapes["centroid_x"][1], shapes["centroid_y"][1]) == pytest.approx((30, 5))


def test_far_from_the_corner_shapes_are_as_exact():
    square = np.array([[0, 0], [4, 0], [4, 4], [0, 4]], float)
    near, _ = valid_polygons([square], grow=0)
    far, _ = valid_polygons([square + 250_000], grow=0)
    for name in ("area_um2", "major_axis_um", "minor_axis_um"):
        wanted = shape_columns(near, (0.25, 0.25))[name]
        assert shape_columns(far, (0.25, 0.25))[name] == pytest.approx(wanted, rel=1e-9)


def test_plain_pickle_files_are_read_as_well(tmp_path, slide):
    found, _ = convert(tmp_path, slide, content(), how=lambda v, f: f.write_bytes(pickle.dumps(v)))
    assert sum(found.counts.values()) == 6
