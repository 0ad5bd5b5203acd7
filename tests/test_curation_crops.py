"""Crops as files: what they say, what is refused, and that their bytes depend on nothing else."""

import json
from contextlib import suppress
from pathlib import Path

import geopandas as gpd
import pytest
import shapely
from crop_fixtures import make_crop, outline, square
from hypothesis import given, settings
from hypothesis import strategies as st
from slide_fixtures import picture, write_slide

from wsi_pipeline.curation.checking import check_crops, read_crops
from wsi_pipeline.curation.crops import Round, read_crop, rounded, write_crop
from wsi_pipeline.curation.start import new_crop
from wsi_pipeline.errors import DatasetError, ImplausiblePixelSizeError, MissingPixelSizeError
from wsi_pipeline.geometry import Box
from wsi_pipeline.table import OBJECT_SCHEMA, ObjectWriter

ANYTHING = st.recursive(
    st.none()
    | st.booleans()
    | st.sampled_from([0, -1, 1.5, 10**400, float("inf"), float("nan"), "", "x", "Polygon"]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.just("id"), inner, max_size=1),
    max_leaves=6,
)
"""Any JSON."""


def crop():
    return make_crop(
        outline(7, square(120.3, 80)),
        outline(2, shapely.Polygon([(200, 100), (230.5, 110), (210, 140)]), source="hand"),
        outline(3, square(250, 150, 50), "ignore", label="nuclei", source="hand"),
        outline(4, square(150, 180), "ignore", source="hand"),
        tissue="crypts, süß",
        note="blurred",
    )


def edited(path, change):
    """Change a crop's file by hand."""
    data = json.loads(path.read_text(encoding="utf-8"))
    change(data)
    path.write_text(json.dumps(data), encoding="utf-8")


def test_a_crop_comes_back_from_its_file(tmp_path):
    path = tmp_path / "c.geojson"
    write_crop(crop(), path)
    assert read_crop(path) == crop()
    text = path.read_text(encoding="utf-8")
    rows = [line for line in text.splitlines() if line.startswith('{"type": "Feature",')]
    assert len(rows) == 4  # an object a line
    write_crop(read_crop(path), tmp_path / "again.geojson")
    assert (tmp_path / "again.geojson").read_text(encoding="utf-8") == text


def test_bytes_do_not_depend_on_who_wrote_the_file_before(tmp_path):
    path = tmp_path / "c.geojson"
    write_crop(crop(), path)
    text = path.read_text(encoding="utf-8")

    def shuffle(data):
        data["features"].reverse()
        ring = data["features"][0]["geometry"]["coordinates"][0]
        ring[:] = [*ring[1:-1][::-1], ring[0], ring[-2]]
        data["crop"] = dict(reversed(data["crop"].items()))

    edited(path, shuffle)
    assert path.read_text(encoding="utf-8") != text
    write_crop(read_crop(path), path)
    assert path.read_text(encoding="utf-8") == text


def test_geopandas_reads_a_crop(tmp_path):
    write_crop(crop(), tmp_path / "c.geojson")
    frame = gpd.read_file(tmp_path / "c.geojson")
    assert list(frame["id"]) == [2, 3, 4, 7]
    assert list(frame["kind"]) == ["nucleus", "ignore", "ignore", "nucleus"]
    assert frame.geometry[3].equals(square(120.3, 80))
    assert frame.geometry[0].area == pytest.approx(crop().outlines[0].polygon.area)


def first_corner(data, value):
    """Change the x of the first point of the first object."""
    data["features"][0]["geometry"]["coordinates"][0][0][0] = value


@given(st.lists(st.tuples(st.floats(0, 200), st.floats(0, 150)), min_size=3, max_size=12))
def test_rounding_keeps_shapes_valid_and_is_done_once(points):
    shape = shapely.MultiPoint(points).convex_hull.buffer(0.3, quad_segs=3)
    once = rounded(shape)
    assert once.is_valid
    assert rounded(once).equals_exact(once)
    assert once.hausdorff_distance(shape) < 0.2
    for x, y in shapely.get_coordinates(once):
        assert (x, y) == (round(x, 1), round(y, 1))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda d: d["features"][0]["properties"].update(id=3), "object 3: ids must be unique"),
        (lambda d: d["features"][0]["properties"].update(id=90), "below next_id"),
        (lambda d: d["features"][0]["properties"].update(kind="cell"), "kind 'cell'"),
        (lambda d: d["features"][0]["properties"].update(kind="gland"), "kind 'gland'"),
        (lambda d: d["features"][0]["properties"].update(label="nuclei"), "has the label 'nuclei'"),
        (lambda d: d["features"][1]["properties"].update(label="gland"), "has the label 'gland'"),
        (lambda d: d["features"][0]["geometry"].update(type="MultiPolygon"), "is a MultiPolygon"),
        (
            lambda d: d["features"][0]["geometry"].update(
                coordinates=[[[200, 100], [230, 130], [230, 100], [200, 130], [200, 100]]]
            ),
            "object 2 has no valid outline: Self-intersection",
        ),
        (
            lambda d: d["features"][0]["geometry"].update(
                coordinates=[[[280, 100], [308.5, 100], [308.5, 130], [280, 100]]]
            ),
            "object 2 reaches more than 2 um out",
        ),
        (
            lambda d: d["features"][0].update(geometry=d["features"][3]["geometry"]),
            "the objects 2 and 7 of the kind nucleus overlap by 25.0 um2",
        ),
        (lambda d: first_corner(d, float("inf")), "object 2 has no valid outline"),
        (lambda d: first_corner(d, float("nan")), "not laid out as a crop"),
        (lambda d: first_corner(d, "x"), "not laid out as a crop"),
        (lambda d: first_corner(d, 1e300), "object 2"),
        (lambda d: d["features"][0]["geometry"].update(coordinates=[]), "object 2 has no valid"),
        (lambda d: d["features"][0]["geometry"].update(coordinates=[[[1, 2]]]), "not laid out"),
        (lambda d: d["crop"].update(box=[100, 60, 600, 220]), "leaves the slide"),
        (lambda d: d["crop"].update(labels=["nucleus"]), "labels must be some of nuclei, gland"),
        (lambda d: d["crop"].update(part="test"), "part must be train or validation"),
        (lambda d: d["crop"].update(slide="/a/s.svs"), "without folders"),
        (lambda d: d["crop"].update(slide=""), "without folders"),
        (lambda d: d["crop"].update(slide=".."), "without folders"),
        (lambda d: d["crop"].update(slide=5), "slide must be text, not 5"),
        (lambda d: d["crop"].update(tissue=None), "tissue must be text"),
        (lambda d: d["crop"].update(licence=""), "no licence"),
        (lambda d: d["crop"].update(box=[100.5, 60, 300, 220]), "whole number, not 100.5"),
        (lambda d: d["crop"].update(box=[100, 60, float("inf"), 220]), "whole number, not inf"),
        (lambda d: d["crop"].update(slide_size=[512.5, 384]), "whole number, not 512.5"),
        (lambda d: d["crop"].update(next_id="9"), "next_id must be a whole number"),
        (lambda d: d["crop"].update(mpp=10**400), "not laid out as a crop"),
        (lambda d: d["features"][0]["properties"].update(id=2.5), "whole number, not 2.5"),
        (
            lambda d: d["features"][0].update(
                id="1f0e", properties={"objectType": "annotation", "classification": {}}
            ),
            "an object has no kind and no id and no from: another program",
        ),
        (lambda d: d["crop"].update(mpp=0.0), "mpp must be"),
        (lambda d: d["crop"].update(colour=1), "unknown keys ['colour']"),
        (lambda d: d["crop"].update(id="d"), "the crop's id is 'd'"),
        (lambda d: d["crop"].update(history=[{"round": 1, "by": "", "how": ""}]), "rounds"),
        (lambda d: d["crop"].pop("slide"), "not laid out as a crop"),
        (lambda d: d.pop("crop"), "has no member 'crop'"),
    ],
)
def test_what_contradicts_itself_is_refused(tmp_path, change, words):
    path = tmp_path / "c.geojson"
    write_crop(crop(), path)
    edited(path, change)
    with pytest.raises(DatasetError) as caught:
        read_crop(path)
    assert words in str(caught.value)
    assert str(path) in str(caught.value)


@given(st.data())
@settings(deadline=None, max_examples=80)
def test_whatever_a_file_says_it_is_read_or_refused(tmp_path_factory, data):
    """No member of another kind ends in another error."""
    path = tmp_path_factory.mktemp("any") / "c.geojson"
    write_crop(crop(), path)
    said = json.loads(path.read_text(encoding="utf-8"))
    places = [(said, key) for key in said] + [(said["crop"], key) for key in said["crop"]]
    for feature in said["features"]:
        places += [(part, key) for part in (feature, *feature.values()) if isinstance(part, dict)
                   for key in part]  # fmt: skip
    place, key = data.draw(st.sampled_from(places))
    place[key] = data.draw(ANYTHING)
    path.write_text(json.dumps(said), encoding="utf-8")
    with suppress(DatasetError):
        read_crop(path)


def test_what_is_no_json_is_refused(tmp_path):
    (tmp_path / "c.geojson").write_text("{", encoding="utf-8")
    with pytest.raises(DatasetError, match="cannot be read as a crop"):
        read_crop(tmp_path / "c.geojson")
    (tmp_path / "c.geojson").write_text("[" * 100_000, encoding="utf-8")
    with pytest.raises(DatasetError, match="cannot be read as a crop"):
        read_crop(tmp_path / "c.geojson")


def test_outlines_may_reach_a_little_beyond_the_crop_and_touch():
    # 2 um are 8 px; QuPath lets people draw there
    make_crop(
        outline(1, shapely.box(93, 100, 120, 120)), outline(2, shapely.box(120, 100, 130, 120))
    )


def test_the_frame_of_a_crop_is_that_of_its_ruler():
    grid = crop().grid
    assert grid.size == (100, 80)
    assert grid.to_level0([[0, 0], [10, 5]]).tolist() == [[100, 60], [120, 70]]


def write(folder, name, box, part="train", **changes):
    own = make_crop(id=name, box=Box.from_edges(*box), part=part, **changes)
    write_crop(own, folder / f"{name}.geojson")


def test_parts_must_not_share_pixels(tmp_path):
    write(tmp_path, "a", (0, 0, 100, 100))
    write(tmp_path, "b", (99, 0, 199, 100))  # of the same part: allowed
    write(tmp_path, "v", (199, 0, 299, 100), "validation")
    write(tmp_path, "w", (0, 0, 100, 100), "validation", slide="t.svs")
    assert [own.id for own in read_crops(tmp_path)] == ["a", "b", "v", "w"]
    write(tmp_path, "v", (198, 99, 298, 199), "validation")
    with pytest.raises(DatasetError, match=r"crops b and v share pixels of s\.svs.*train.*valid"):
        read_crops(tmp_path)


def test_no_object_is_counted_twice(tmp_path):
    write(tmp_path, "a", (0, 0, 100, 100))
    write(tmp_path, "b", (70, 70, 170, 170))  # 9 % of a: neighbours
    write(tmp_path, "g", (0, 0, 100, 100), labels=("gland",))  # another head
    assert len(read_crops(tmp_path)) == 3
    write(tmp_path, "small", (60, 10, 70, 20), labels=("gland", "nuclei"))
    with pytest.raises(DatasetError, match=r"a and small share .*100% of the smaller.*nuclei"):
        read_crops(tmp_path)
    (tmp_path / "small.geojson").unlink()
    write(tmp_path, "b", (60, 60, 160, 160))  # 16 %
    with pytest.raises(DatasetError, match=r"a and b share pixels of s\.svs: 16% of the smaller"):
        read_crops(tmp_path)


@pytest.mark.parametrize("change", [{"mpp": 0.26}, {"slide_size": (512, 390)}])
def test_crops_of_one_slide_agree_about_it(tmp_path, change):
    write(tmp_path, "a", (0, 0, 100, 100))
    write(tmp_path, "b", (200, 0, 300, 100), mpp=0.2501)
    write(tmp_path, "c", (200, 200, 300, 300), slide="t.svs", **change)
    assert len(read_crops(tmp_path)) == 3
    write(tmp_path, "c", (200, 200, 300, 300), **change)
    with pytest.raises(DatasetError, match=r"a and c are of s\.svs, but one says 512 x 384 px"):
        read_crops(tmp_path)


def test_what_no_slide_says_is_the_crops_word(tmp_path):
    write_slide(tmp_path / "s.svs", picture(512, 384), description="")
    write_crop(crop(), tmp_path / "crops" / "c.geojson")
    assert len(check_crops(tmp_path / "crops", tmp_path)) == 2
    with pytest.raises(DatasetError, match=r"says 0\.25 um a pixel, but"):
        check_crops(tmp_path / "crops", tmp_path, mpp={"s.svs": 0.3})
    with pytest.raises(ImplausiblePixelSizeError):
        check_crops(tmp_path / "crops", tmp_path, mpp={"s.svs": 30})


def test_the_crops_that_are_given_away_agree_and_are_free():
    folder = Path(__file__).parents[1] / "annotations" / "crops"
    assert {own.licence for own in read_crops(folder)} == {"CC0-1.0"}


def test_check_counts_and_compares_slides(tmp_path):
    slides = tmp_path / "slides"
    slides.mkdir()
    crops = tmp_path / "crops"
    with pytest.raises(DatasetError, match="holds no crop"):
        check_crops(crops)
    write_crop(crop(), crops / "c.geojson")
    assert check_crops(crops) == [
        "c\ttrain\ts.svs\t50 x 40 um\trounds 0-0\t2 nucleus, 2 ignore",
        "train: 2 nucleus in 1 crops of 1 slides, 0.002 mm2",
    ]
    with pytest.raises(DatasetError, match=r"s\.svs, which is not in"):
        check_crops(crops, slides)
    write_slide(slides / "s.svs", picture(512, 320))
    with pytest.raises(
        DatasetError, match="512 x 320 px, but the crop was drawn on one of 512 x 38"
    ):
        check_crops(crops, slides)
    write_slide(slides / "s.svs", picture(512, 384))
    assert len(check_crops(crops, slides)) == 2


# -- the first round -------------------------------------------------------------------------


@pytest.fixture(scope="module")
def slide(tmp_path_factory):
    return write_slide(tmp_path_factory.mktemp("slides") / "s.svs", picture(512, 384))


def write_objects(path, shapes, size=(512, 384), name="s.svs", mpp=0.25):
    """Write predictions (kind, polygon) as a run does."""
    import pyarrow as pa

    kinds, polygons = zip(*shapes, strict=True)
    bounds = shapely.bounds(polygons)
    columns = {
        "kind": pa.array(kinds).dictionary_encode(),
        "bbox": pa.StructArray.from_arrays(
            [pa.array(side) for side in bounds.T],
            fields=list(OBJECT_SCHEMA.field("bbox").type),
        ),
        "geometry": pa.array(shapely.to_wkb(list(polygons)).tolist()),
        "object_id": pa.array(range(len(kinds)), pa.int64()),
    }
    arrays = []
    for field in OBJECT_SCHEMA:
        own = columns.get(field.name)
        if own is None:
            zero = "s" if "string" in str(field.type) else 0
            own = pa.array([None if field.nullable else zero] * len(kinds))
        arrays.append(own.cast(field.type))
    slide = {"name": name, "width": size[0], "height": size[1]}
    metadata = {"slide": slide, "model": {"name": "tiny"}}
    with ObjectWriter(path, metadata=metadata, pixel_size=(mpp, mpp)) as writer:
        writer.write(pa.RecordBatch.from_arrays(arrays, schema=OBJECT_SCHEMA))
    return path


def stairs(x, y, n):
    """A staircase of pixels of 2 x 2, and the number of pixels in it."""
    pixels = [shapely.box(x + 2 * i, y + 2 * j, x + 2 * i + 2, y + 2 * j + 2)
              for i in range(n) for j in range(i + 1)]  # fmt: skip
    return shapely.union_all(pixels), len(pixels)


def test_a_crop_begins_with_predictions_clipped_to_it(tmp_path, slide):
    table = write_objects(
        tmp_path / "o.parquet",
        [
            ("nucleus", square(150, 100)),
            ("nucleus", square(90, 200)),  # half of it is in the crop
            ("nucleus", square(89, 100, 12)),  # a sliver of it is
            ("nucleus", square(400, 300)),
            ("gland", square(120, 80, 60)),
        ],
    )
    crop = new_crop("c", slide, centre=(200, 140), side_um=50, labels=["nuclei"], objects=table,
                    part="validation", tissue="t", by="me")  # fmt: skip
    assert crop.box == Box.from_edges(100, 40, 300, 240)
    assert (crop.slide, crop.slide_size, crop.mpp) == ("s.svs", (512, 384), 0.25)
    assert crop.history == (Round(round=0, by="me", how="predictions of tiny"),)
    first, second = crop.outlines
    assert (first.id, first.kind, first.source) == (1, "nucleus", "model tiny")
    # corners are cut by half a pixel of 2 px in x and y
    assert shapely.box(150, 100, 170, 120).covers(first.polygon)
    assert 400 - 4 * 0.5 >= first.polygon.area >= 400 - 8
    assert second.polygon.bounds == (100, 200, 110, 220)
    assert crop.next_id == 3


def test_staircases_become_smooth_and_keep_their_pixels(tmp_path, slide):
    shape, count = stairs(150, 100, 12)
    table = write_objects(tmp_path / "o.parquet", [("nucleus", shape)])
    crop = new_crop("c", slide, centre=(200, 140), side_um=50, labels=["nuclei"], objects=table)
    (found,) = crop.outlines
    centres = [(151 + 2 * i, 101 + 2 * j) for i in range(-3, 16) for j in range(-3, 16)]
    inside = sum(found.polygon.contains(shapely.Point(place)) for place in centres)
    assert inside == count
    assert len(found.polygon.exterior.coords) < len(shape.exterior.coords)


def test_of_predictions_that_overlap_the_smaller_keeps_its_pixels(tmp_path, slide):
    table = write_objects(
        tmp_path / "o.parquet", [("nucleus", square(150, 100, 60)), ("nucleus", square(170, 120))]
    )
    crop = new_crop("c", slide, centre=(200, 140), side_um=50, labels=["nuclei"], objects=table)
    large, small = crop.outlines
    assert large.polygon.intersection(small.polygon).area < 1e-6
    assert small.polygon.area > 390
    assert len(large.polygon.interiors) == 1


def test_a_crop_may_begin_empty_and_must_lie_on_the_slide(tmp_path, slide):
    crop = new_crop("c", slide, centre=(200, 140), side_um=40, labels=["gland", "lumen"], mpp=0.5)
    assert (crop.mpp, crop.box.size, crop.outlines) == (0.5, (80, 80), ())
    assert crop.kinds == ("gland", "lumen")
    with pytest.raises(DatasetError, match="leaves the slide"):
        new_crop("c", slide, centre=(20, 140), side_um=50, labels=["nuclei"])
    bare = write_slide(tmp_path / "bare.svs", picture(512, 384), description="")
    with pytest.raises(MissingPixelSizeError):
        new_crop("c", bare, centre=(200, 140), side_um=50, labels=["nuclei"])


@pytest.mark.parametrize(
    ("other", "words"),
    [
        ({"size": (9, 9)}, r"of s\.svs of 9 x 9 px, this one is s\.svs of 512 x 384"),
        ({"name": "t.svs"}, r"of t\.svs of 512 x 384 px, this one is s\.svs of"),
        ({"mpp": 0.5}, r"with 0\.5 um a pixel of s\.svs, not with 0\.25"),
    ],
)
def test_predictions_of_another_slide_are_refused(tmp_path, slide, other, words):
    table = write_objects(tmp_path / "o.parquet", [("nucleus", square(150, 100))], **other)
    with pytest.raises(DatasetError, match=words):
        new_crop("c", slide, centre=(200, 140), side_um=50, labels=["nuclei"], objects=table)
