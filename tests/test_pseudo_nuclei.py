"""Nuclei found by stain alone: nearly all are nuclei, and no nucleus is called background."""

import numpy as np
import pyarrow.parquet as pq
import pytest
import shapely
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy import ndimage

from workflows.weights import pseudo_crops, pseudo_nuclei
from workflows.weights.label_polygons import connected, polygons
from workflows.weights.pseudo_crops import Plan, plan_slide, share_out
from workflows.weights.slide_stain import STAINS, Stain, fit_stain
from workflows.weights.stained_nuclei import find_nuclei
from wsi_pipeline.curation.crops import Crop, read_crop, write_crop
from wsi_pipeline.geometry import Box, PixelGrid
from wsi_pipeline.synth import write_slide

SIDE = 1600
MPP = 0.4


@pytest.fixture(scope="module")
def slide(tmp_path_factory):
    path = tmp_path_factory.mktemp("slide") / "s.svs"
    write_slide(path, width=SIDE, height=SIDE, mpp=MPP, seed=3, threads=2)
    return path


@pytest.fixture(scope="module")
def crops(slide, tmp_path_factory):
    out = tmp_path_factory.mktemp("found") / "crops"
    call(slide, "--out", out, "--windows", 3, "--side-um", 160)
    return [read_crop(path) for path in sorted(out.iterdir())]


@pytest.fixture(scope="module")
def truth(slide):
    table = pq.read_table(slide.with_suffix(".truth.parquet"))
    kind = np.array(table["kind"].to_pylist())
    shapes = shapely.from_wkb(table["geometry"].to_pylist())
    return shapes[kind == "nucleus"]


def call(*arguments):
    result = CliRunner().invoke(pseudo_nuclei.main, [str(argument) for argument in arguments])
    assert result.exit_code == 0, result.output
    return result.output


def shapes_of(crop, kind):
    return np.array([o.polygon for o in crop.outlines if o.kind == kind], object)


def test_windows_are_disjoint_squares_on_tissue_for_training(crops):
    assert len(crops) == 3
    assert {crop.part for crop in crops} == {"train"}
    assert {crop.box.size for crop in crops} == {(400, 400)}
    boxes = [crop.box for crop in crops]
    assert not any(a.intersect(b).area for i, a in enumerate(boxes) for b in boxes[:i])


def test_what_is_called_a_nucleus_is_one(crops, truth):
    matched = found = 0
    tree = shapely.STRtree(truth)
    for crop in crops:
        inner = shapely.buffer(crop.rectangle, -40)
        for shape in shapes_of(crop, "nucleus"):
            if inner.covers(shape):
                near = truth[tree.query(shape, predicate="intersects")]
                shared = shapely.area(shapely.intersection(near, shape))
                iou = shared / (shape.area + shapely.area(near) - shared)
                matched += bool((iou > 0.5).any())
                found += 1
    assert found > 150
    assert matched > 0.95 * found


def test_nuclei_that_were_not_found_are_not_background(crops, truth):
    hidden = total = 0.0
    for crop in crops:
        here = shapely.intersection(truth, crop.rectangle)
        known = shapely.union_all([o.polygon for o in crop.outlines])
        inside = shapely.buffer(here[shapely.area(here) > 60], -0.5 / MPP)
        hidden += shapely.area(shapely.difference(inside, known)).sum()
        total += shapely.area(inside).sum()
    assert hidden < 0.03 * total


def test_most_of_a_crop_is_known(crops):
    for crop in crops:
        doubtful = shapely.area(shapes_of(crop, "ignore")).sum()
        assert doubtful < 0.4 * crop.box.area


def test_nuclei_and_doubt_do_not_overlap(crops):
    for crop in crops:
        nuclei, doubt = (shapely.union_all(shapes_of(crop, k)) for k in ("nucleus", "ignore"))
        assert nuclei.intersection(doubt).area < 0.02 * nuclei.area


def test_the_same_call_writes_the_same_bytes(slide, tmp_path):
    for name in ("a", "b"):
        call(slide, "--out", tmp_path / name, "--windows", 1, "--side-um", 64)
    (a,), (b,) = (list((tmp_path / name).iterdir()) for name in ("a", "b"))
    assert a.read_bytes() == b.read_bytes()


def test_a_folder_with_crops_is_not_added_to(slide, tmp_path):
    (tmp_path / "old.geojson").touch()
    result = CliRunner().invoke(pseudo_nuclei.main, [str(slide), "--out", str(tmp_path)])
    assert result.exit_code == 2
    assert "not empty" in result.output


def distances_um(boxes, box):
    """How far windows are from a box."""
    place = shapely.box(box.x, box.y, box.x1, box.y1)
    rectangles = [shapely.box(b.x, b.y, b.x1, b.y1) for b in boxes]
    return shapely.distance(rectangles, place) * MPP


@pytest.mark.parametrize("how", ["crops", "list"])
def test_windows_stay_away_from_validation_crops(slide, tmp_path, how):
    everywhere = plan_slide(slide, mpp=None, side_um=16, seed=0, places=[])
    taken = plan_slide(slide, mpp=None, side_um=50, seed=0, places=[]).boxes[0]
    if how == "crops":
        for part in ("validation", "train"):
            box = taken if part == "validation" else everywhere.boxes[0]
            crop = Crop(id=part, slide=slide.name, slide_size=(SIDE, SIDE), mpp=MPP, box=box,
                        labels=("nuclei",), part=part)  # fmt: skip
            write_crop(crop, tmp_path / f"{part}.geojson")
        places = pseudo_crops.validation_places(tmp_path)
    else:
        x, y, side = taken.x + taken.width / 2, taken.y + taken.height / 2, taken.width * MPP
        (tmp_path / "places.csv").write_text(
            "crop_id,slide,mpp,x,y,side_um,labels,part,tissue\n"
            f"a,{slide.name},{MPP},{x},{y},{side},nuclei,validation,fat\n"
            f"b,{slide.name},{MPP},{SIDE / 2},{SIDE / 2},9999,nuclei,train,fat\n"
        )
        places = pseudo_crops.listed_places(tmp_path / "places.csv")
    (place,) = places
    assert place.slide == slide.name
    plan = plan_slide(slide, mpp=None, side_um=16, seed=0, places=places)
    assert set(plan.boxes) < set(everywhere.boxes)
    rounding = 2 * MPP
    assert distances_um(plan.boxes, taken).min() > 20 - rounding
    assert distances_um(set(everywhere.boxes) - set(plan.boxes), taken).max() < 20 + rounding


def test_another_slides_crops_do_not_matter(slide):
    place = pseudo_crops.Place(slide="other.svs", box=Box(x=0, y=0, width=SIDE, height=SIDE))
    assert plan_slide(slide, mpp=None, side_um=100, seed=0, places=[place]).boxes


def test_windows_come_to_every_slide_and_more_to_larger_ones(slide):
    def plan(area, cells):
        box = Box(x=0, y=0, width=1, height=1)
        return Plan(path=slide, mpp=0.5, size=(9, 9), boxes=(box,) * cells, stained_mm2=area)

    plans = [plan(100.0, 50), plan(1.0, 50), plan(1.0, 1), plan(9.0, 0)]
    assert share_out(plans, 24) == [21, 2, 1, 0]
    assert share_out([plan(1.0, 2)], 9) == [2]


@settings(deadline=None, max_examples=60)
@given(
    arrays(np.int32, st.tuples(st.integers(1, 12), st.integers(1, 12)), elements=st.integers(0, 3))
)
def test_polygons_hold_the_centres_of_their_pixels_and_no_others(image):
    labels = connected(image)
    grid = PixelGrid(origin=(5.0, 7.0), spacing=(2.0, 2.0), size=image.shape[::-1])
    found = polygons(labels, grid)
    assert len(found) == labels.max()
    assert ((labels > 0) == (image > 0)).all()
    y, x = np.indices(image.shape)
    for number, shape in enumerate(found, start=1):
        assert shape.is_valid
        inside = shapely.contains_xy(shape, 2 * (x + 0.5) + 5, 2 * (y + 0.5) + 7)
        assert (inside == (labels == number)).all()
        pieces = ndimage.label(labels == number)[1]
        assert pieces == 1
        assert len(set(image[labels == number])) == 1


def dyed(haematoxylin, eosin):
    """Pixels with so much of each dye, by Beer and Lambert."""
    vectors = np.array(STAINS) / np.linalg.norm(STAINS, axis=1, keepdims=True)
    density = np.stack([haematoxylin, eosin], axis=-1) @ vectors
    return np.rint(250 * np.exp(-density)).astype(np.uint8)


def discs(centres, radius, shape=(160, 160)):
    y, x = np.indices(shape)
    return np.any([np.hypot(x - a, y - b) < radius for a, b in centres], axis=0)


@pytest.fixture
def picture():
    """Three nuclei alone, two that touch, on eosin; glass on the right. And its stain."""
    nuclei = discs([(40, 40), (40, 80), (40, 120), (90, 60), (102, 60)], 6.5)
    soft = ndimage.gaussian_filter(nuclei.astype(float), 0.8)
    tissue = np.arange(160) < 130
    rgb = dyed(1.4 * soft + 0.25 * tissue, np.broadcast_to(0.8 * tissue, soft.shape))
    return rgb, nuclei, fit_stain([rgb])


def test_nuclei_that_touch_are_two(picture):
    rgb, nuclei, stain = picture
    labels, doubtful = find_nuclei(rgb, stain)
    numbers = [labels[y, x] for x, y in [(40, 40), (40, 80), (40, 120), (88, 60), (103, 60)]]
    assert 0 not in numbers
    assert len(set(numbers)) == 5 == len(np.unique(labels)) - 1
    assert 2 * np.sum((labels > 0) & nuclei) > 0.9 * (np.sum(labels > 0) + nuclei.sum())
    assert not doubtful.any()


def test_what_is_not_shaped_like_a_nucleus_is_doubtful(picture):
    rgb, _, stain = picture
    rgb = rgb.copy()
    bar = np.zeros((160, 160), bool)
    bar[20:140, 110:114] = True
    rgb[bar] = rgb[40, 40]
    labels, doubtful = find_nuclei(rgb, stain)
    assert not labels[bar].any()
    assert doubtful[bar].all()
    assert labels[40, 40]


def test_red_cells_are_background(picture):
    rgb, _, stain = picture
    rgb = rgb.copy()
    cells = discs([(100, 100), (112, 110), (104, 125)], 6)
    rgb[cells] = (190, 70, 75)
    labels, doubtful = find_nuclei(rgb, stain)
    assert not (labels > 0)[cells].any()
    assert not doubtful[cells].any()


def test_stain_is_one_at_the_threshold_and_has_the_glass_of_the_slide(picture):
    rgb, nuclei, stain = picture
    assert np.allclose(stain.white, 250, atol=1)
    dark = stain.nuclear(rgb)
    assert dark[nuclei].mean() > 1.2
    assert dark[~discs([(40, 40), (40, 80), (40, 120), (95, 60)], 20)].max() < 0.5


def test_stain_needs_tissue():
    with pytest.raises(ValueError, match="more tissue"):
        fit_stain([np.full((64, 64, 3), 250, np.uint8)])


def test_density_of_glass_is_nothing():
    stain = Stain(white=np.full(3, 240, np.float32), unmix=np.ones(3, np.float32))
    assert (stain.density(np.full((2, 2, 3), 250, np.uint8)) == 0).all()
