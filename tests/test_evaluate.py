import json
import shutil

import numpy as np
import pytest
import shapely
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from skimage.measure import label as components
from torch import nn
from training_fixtures import write_discs, write_recipe

from wsi_pipeline.bundle import save_bundle
from wsi_pipeline.errors import DatasetError
from wsi_pipeline.geometry import PixelGrid
from wsi_pipeline.instances import outline_polygons
from wsi_pipeline.network import PATCH_CELLS
from wsi_pipeline.spec import AnchorRules, HeadSpec, ModelSpec, PeakRules
from wsi_pipeline.training.annotation import (
    AnnotatedImage,
    BoxLabel,
    ClassLabel,
    InstanceLabel,
    Item,
    PatchLabel,
)
from wsi_pipeline.training.evaluate import evaluate
from wsi_pipeline.training.judges import _centres
from wsi_pipeline.training.predicted import ImagePredictor, find_objects
from wsi_pipeline.training.raster import fill_polygons, mirrored
from wsi_pipeline.training.scoring import score_bundle

NUCLEI = HeadSpec(name="nuclei", kind="instance", object_kind="nucleus", rules=AnchorRules())
TYPES = HeadSpec(
    name="types", kind="class", classes=("none", "round", "square"), classifies="nuclei"
)
TISSUE = HeadSpec(name="tissue", kind="patch", stride=16, classes=("glass", "fat", "muscle"))
CELLS = HeadSpec(name="cells", kind="detect", object_kind="cell", rules=PeakRules(max_size_um=32))
SPEC = ModelSpec(
    name="t",
    architecture="t",
    mpp=0.5,
    halo_px=32,
    heads=(NUCLEI, TYPES, TISSUE, CELLS),
    options={},
)


class Painted(nn.Module):
    """A network that reads its answer off the colours.

    Red is the instance map (200 inner, 100 contour), green the type, blue the tissue; cells are
    where green is 250, faint ones where it is 240, 8 um wide.
    """

    def __init__(self):
        super().__init__()
        self.unused = nn.Parameter(torch.zeros(1))

    def forward(self, x):
        red, green, blue = x.unbind(1)
        inner, contour = (red - 200).abs() < 20, (red - 100).abs() < 20
        nuclei = torch.stack([~(inner | contour), inner, contour], 1) * 40.0
        kind = torch.div(green, 50, rounding_mode="floor").clamp(0, 2)
        types = torch.stack([kind == n for n in range(3)], 1) * 40.0
        cells = blue[:, ::16, ::16]
        tissue = torch.stack(
            [torch.div(cells, 80, rounding_mode="floor") == n for n in range(3)], 1
        )
        heat = torch.where((green - 250).abs() < 3, 6.0, -9.0)
        heat = torch.where((green - 240).abs() < 3, -2.0, heat)
        size = torch.full_like(heat, -1.0986)  # sigmoid: a quarter of 32 um
        return {
            "nuclei": nuclei,
            "types": types,
            "tissue": tissue * 40.0,
            "cells": torch.stack([heat, size, size], 1),
        }


def predictor():
    return ImagePredictor(SPEC, Painted().eval(), device="cpu", precision="fp32")


class Held:
    """As ``begin.HeldOut``."""

    def __init__(self, image, patient="p", group=None):
        self.image = image
        self.item = Item(name=image.name, patient=patient, group=group, load=lambda: image)
        self.source = self
        self.name = "drawn"

    def load(self):
        return self.image


def drawn(*squares, side=96, tissue=1):
    """Paint squares (x, y, width, type) as the network reads them; return pixels and truth."""
    pixels = np.zeros((side, side, 3), np.uint8)
    pixels[..., 2] = 80 * tissue + 10
    ids, types = np.zeros((side, side), np.int32), np.zeros((side, side), np.uint8)
    for number, (x, y, w, kind) in enumerate(squares, start=1):
        box = slice(y, y + w), slice(x, x + w)
        ids[box], types[box] = number, kind
        # as targets are: the contour is a pixel inside and a pixel outside of the border
        pixels[y - 1 : y + w + 1, x - 1 : x + w + 1, 0] = 100
        pixels[y + 1 : y + w - 1, x + 1 : x + w - 1, 0] = 200
        pixels[(*box, 1)] = 50 * kind
    return pixels, ids, types


def labelled(pixels, ids=None, types=None, tissue=None, boxes=None, name="a"):
    labels = {}
    if ids is not None:
        labels["nuclei"] = InstanceLabel(ids=ids)
    if types is not None:
        labels["types"] = ClassLabel(ids=types, classes=TYPES.classes)
    if tissue is not None:
        labels["tissue"] = PatchLabel(id=tissue, classes=TISSUE.classes)
    if boxes is not None:
        labels["cells"] = BoxLabel(boxes=np.array(boxes, np.float32).reshape(-1, 4))
    return AnnotatedImage(name=name, image=pixels, mpp=0.5, labels=labels)


def value(found, head, name):
    return found.heads[head][name].value


def test_a_network_that_is_right_has_perfect_scores():
    pixels, ids, types = drawn((10, 10, 16, 1), (50, 20, 20, 2), (30, 60, 12, 1))
    held = Held(labelled(pixels, ids, types, tissue=1))
    found = evaluate(predictor(), [held], resamples=0)
    for name in ("f1", "dq", "detection_f1", "precision", "recall", "glas_f1"):
        assert value(found, "nuclei", name) == 1.0, name
    for name in ("pq", "aji", "aji_plus", "object_dice", "dice"):
        assert value(found, "nuclei", name) == pytest.approx(1.0, abs=0.05), name
    assert value(found, "nuclei", "object_hausdorff_um") <= 0.75
    assert value(found, "types", "mpq_plus") == pytest.approx(1.0, abs=0.05)
    assert value(found, "types", "accuracy_of_found") == 1.0
    assert value(found, "types", "f1 square") == 1.0
    assert value(found, "tissue", "accuracy") == 1.0
    assert "cells" not in found.heads
    assert found.score == pytest.approx(
        np.mean([value(found, h, n) for h, n in found.main.items()])
    )


def test_what_is_wrong_costs_what_it_should():
    pixels, ids, types = drawn((10, 10, 16, 1), (50, 20, 20, 2))
    more, _, _ = drawn((10, 10, 16, 2), (50, 20, 20, 2), (30, 60, 12, 1))
    found = evaluate(predictor(), [Held(labelled(more, ids, types, tissue=2))], resamples=0)
    assert value(found, "nuclei", "precision") == pytest.approx(2 / 3)
    assert value(found, "nuclei", "recall") == 1.0
    assert value(found, "types", "accuracy_of_found") == 0.5
    assert value(found, "types", "f1 round") == 0.0
    # square: one right, one round called square: 2 / (2 + 1)
    assert value(found, "types", "f1 square") == pytest.approx(2 / 3)
    assert value(found, "tissue", "accuracy") == 0.0
    assert found.details["tissue"]["confusion"] == [[0, 0, 0], [0, 0, 0], [0, 1, 0]]
    assert found.details["nuclei"]["found"] == 3
    assert pixels.shape == more.shape


def test_unlabelled_and_unknown_are_not_judged():
    pixels, ids, types = drawn((10, 10, 16, 1), (60, 60, 20, 2))
    half = ids.copy()
    half[48:] = -1
    half[half == 2] = 0
    found = evaluate(
        predictor(), [Held(labelled(pixels, half)), Held(labelled(pixels, name="b"))], resamples=0
    )
    assert value(found, "nuclei", "f1") == 1.0
    assert value(found, "nuclei", "detection_f1") == 1.0
    assert set(found.heads) == {"nuclei"}
    assert found.details["nuclei"] == {
        "true": 1, "found": 1, "matched": 1, "area_um2_without_counterpart_in_the_image": 0.0,
    }  # fmt: skip
    assert types.any()


def test_groups_have_scores_of_their_own_and_intervals_are_over_patients():
    pixels, ids, _ = drawn((10, 10, 16, 1), (60, 60, 20, 2))
    empty = np.zeros_like(pixels)
    good = [Held(labelled(pixels, ids, name=f"g{i}"), f"p{i}", "clear") for i in range(4)]
    bad = [Held(labelled(empty, ids, name=f"b{i}"), "q", "blank") for i in range(4)]
    found = evaluate(predictor(), good + bad, resamples=200)
    assert found.groups["clear"]["nuclei"]["recall"].value == 1.0
    assert found.groups["blank"]["nuclei"]["recall"].value == 0.0
    score = found.heads["nuclei"]["recall"]
    assert score.value == 0.5
    # drawing five patients, of whom one has half of the images, is much wider than eight images
    assert score.low <= 0.2
    assert score.high == 1.0
    assert (found.images, found.patients) == (8, 5)
    text = json.dumps(found.to_json())
    assert "NaN" not in text
    assert json.loads(text)["groups"]["blank"]["nuclei"]["recall"] == {"value": 0.0}


def test_detections_are_judged_at_all_thresholds():
    pixels, _, _ = drawn()
    for x, y in ((20, 20), (70, 30), (40, 80)):
        pixels[y, x, 1] = 250
    boxes = [(x - 8, y - 8, x + 9, y + 9) for x, y in ((20, 20), (70, 30))]
    found = evaluate(predictor(), [Held(labelled(pixels, boxes=boxes))], resamples=0)
    assert value(found, "cells", "recall") == 1.0
    assert value(found, "cells", "precision") == pytest.approx(2 / 3)
    # all three have one score: precision 2/3 at all recalls; one false positive an image
    assert value(found, "cells", "ap") == pytest.approx(2 / 3)
    assert value(found, "cells", "froc") == 1.0
    assert found.details["cells"]["sensitivity_at_false_positives_per_image"]["1.0"] == 1.0


def test_nothing_to_judge():
    with pytest.raises(DatasetError, match="no image"):
        evaluate(predictor(), [])


@pytest.mark.parametrize("size", [(33, 20), (96, 64), (1700, 40)])
def test_maps_have_the_size_of_the_image_and_objects_its_coordinates(size):
    width, height = size
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[3:17, width - 15 : width - 1, 0] = 100
    pixels[5:15, width - 13 : width - 3, 0] = 200
    maps = predictor().predict(pixels)
    assert maps.arrays["nuclei/prob"].shape == (2, height, width)
    assert maps.arrays["tissue/prob"].shape == (3, -(-height // 16), -(-width // 16))
    (polygon,) = find_objects(maps)["nuclei"].polygons
    left, top, right, bottom = polygon.bounds
    assert (top, bottom) == (4, 16)
    assert (left, right) == (width - 14, width - 2)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**32 - 1), st.floats(0.2, 0.8))
def test_the_pipelines_outlines_come_back_as_the_same_pixels(seed, share):
    mask = np.random.default_rng(seed).random((23, 31)) < share
    drawn_ = outline_polygons(mask, PixelGrid.level0((31, 23)))
    polygons = shapely.from_wkb(np.array([wkb for _, wkb, _ in drawn_], object))
    ids = fill_polygons(polygons, mask.shape)
    labels = components(mask, connectivity=1)
    assert ((ids > 0) == mask).all()
    # the same partition: numbers differ at most by name
    pairs = {(int(a), int(b)) for a, b in zip(ids[mask], labels[mask], strict=True)}
    assert len(pairs) == labels.max()


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**32 - 1))
def test_a_polygon_holds_the_pixels_whose_centres_it_holds(seed):
    rng = np.random.default_rng(seed)
    blot = shapely.union_all(
        shapely.buffer(shapely.points(rng.uniform(-5, 35, (6, 2))), rng.uniform(2, 9, 6))
    )
    blot -= shapely.buffer(shapely.points(*rng.uniform(5, 25, 2)), 3)
    x, y = np.meshgrid(np.arange(31) + 0.5, np.arange(23) + 0.5)
    found = fill_polygons(np.array([blot]), (23, 31))
    np.testing.assert_array_equal(found == 1, shapely.contains_xy(blot, x, y))


def test_polygons_beyond_the_image_are_cut():
    ids = fill_polygons(
        np.array([shapely.box(-3, -3, 2, 2), shapely.box(8, 8, 20, 20), shapely.box(30, 0, 40, 5)]),
        (10, 10),
    )
    assert (ids[:2, :2] == 1).all()
    assert (ids[8:, 8:] == 2).all()
    assert (ids > 0).sum() == 8


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    spec = ModelSpec(
        name="tiny",
        architecture="cerberus",
        mpp=0.5,
        halo_px=32,
        heads=(NUCLEI,),
        options={"widths": [4, 6, 8, 10], "blocks": [1, 1, 1, 1], "head_width": 6},
    )
    from wsi_pipeline.network import build_network

    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("bundle") / "tiny"
    save_bundle(path, spec, build_network(spec), card="x")
    return path


def test_a_bundle_is_scored_on_a_folder_and_its_parts(bundle, tmp_path):
    data = write_discs(tmp_path / "data", 3)
    found = score_bundle(bundle, data, layout="plain", resamples=20)
    assert found.images == 3
    assert found.heads["nuclei"]["pq"].low is not None
    with pytest.raises(DatasetError, match="no images of the part 'test'"):
        score_bundle(bundle, data, layout="plain", part="test", resamples=0)
    (data / "images.csv").write_text("image,part\np0.png,test\np1.png,train\np2.png,train\n")
    assert score_bundle(bundle, data, layout="plain", part="test", resamples=0).images == 1


class Smeared(nn.Module):
    """A network that sees 31 px in each direction and a little less than its halo."""

    def __init__(self):
        super().__init__()
        self.unused = nn.Parameter(torch.zeros(1))
        self.seen = []

    def forward(self, x):
        self.seen.append(tuple(x.shape[-2:]))
        red = torch.nn.functional.avg_pool2d(x[:, :1] / 255, 31, 1, 15, count_include_pad=False)
        return {"nuclei": torch.cat([red, 1 - red, red * 0], 1) * 4}


def test_a_large_image_is_seen_in_tiles_with_the_same_result(monkeypatch):
    spec = ModelSpec(name="t", architecture="t", mpp=0.5, halo_px=32, heads=(NUCLEI,), options={})
    pixels = np.random.default_rng(0).integers(0, 256, (150, 210, 3), np.uint8)
    found = {}
    for name, limit in (("whole", 256), ("tiles", 128)):
        monkeypatch.setattr("wsi_pipeline.training.predicted.WHOLE_PX", limit)
        monkeypatch.setattr("wsi_pipeline.training.predicted.TILE_PX", 128)
        network = Smeared().eval()
        one = ImagePredictor(spec, network, device="cpu", precision="fp32")
        found[name] = one.predict(pixels).arrays["nuclei/prob"].astype(int), network.seen
    assert max(max(size) for size in found["whole"][1]) == 224
    assert max(max(size) for size in found["tiles"][1]) == 128 + 2 * 32
    # a whole image has no margin beyond itself: it is compared where both saw the same
    inner = (slice(None), slice(16, -16), slice(16, -16))
    assert abs(found["whole"][0][inner] - found["tiles"][0][inner]).max() <= 1


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 9), st.integers(0, 40))
def test_beyond_its_edges_an_image_is_its_own_mirror_image(size, margin):
    wanted = np.pad(np.arange(size), margin, mode="symmetric")
    assert (mirrored(np.arange(-margin, size + margin), size) == wanted).all()


def test_objects_belong_to_the_head_of_their_kind():
    pixels, _, _ = drawn((10, 10, 16, 1), (60, 60, 20, 2))
    pixels[20, 70, 1] = 250
    found = find_objects(predictor().predict(pixels))
    assert {name: len(own.polygons) for name, own in found.items()} == {"nuclei": 2, "cells": 1}
    assert found["cells"].centres[0] == pytest.approx((70.5, 20.5), abs=1)


def test_a_patch_is_judged_where_its_cells_see_a_whole_patch():
    side = 16 * (PATCH_CELLS + 2)
    pixels, _, _ = drawn(side=side, tissue=2)
    rim = 16 * (PATCH_CELLS // 2)
    pixels[rim:-rim, rim:-rim, 2] = 90  # 1
    found = evaluate(predictor(), [Held(labelled(pixels, tissue=1))], resamples=0)
    assert value(found, "tissue", "accuracy") == 1.0


def test_pixels_that_nobody_annotated_are_no_false_positives():
    pixels, ids, _ = drawn((10, 10, 16, 1), (60, 60, 20, 2))
    ids[48:] = -1
    found = evaluate(predictor(), [Held(labelled(pixels, ids))], resamples=0)
    assert value(found, "nuclei", "pixel_precision") > 0.95
    assert value(found, "nuclei", "pixel_recall") > 0.95


@pytest.mark.parametrize(("off_px", "f1"), [(0, 1.0), (5, 1.0), (7, 0.0)])
def test_a_nucleus_is_found_within_three_micrometres(off_px, f1):
    pixels, _, _ = drawn((30, 30, 16, 1))
    _, ids, _ = drawn((30 + off_px, 30, 16, 1))
    found = evaluate(predictor(), [Held(labelled(pixels, ids))], resamples=0)
    assert value(found, "nuclei", "detection_f1") == f1


def test_distances_and_areas_are_in_micrometres():
    pixels, ids, _ = drawn((30, 30, 16, 1))
    ids[ids > 0] = 0
    ids[30:46, 34:50] = 1  # 4 px to the right: 2 um
    found = evaluate(predictor(), [Held(labelled(pixels, ids))], resamples=0)
    assert value(found, "nuclei", "object_hausdorff_um") == pytest.approx(2.0, abs=0.5)
    blank = np.zeros_like(pixels)
    found = evaluate(predictor(), [Held(labelled(blank, ids))], resamples=0)
    lone = found.details["nuclei"]["area_um2_without_counterpart_in_the_image"]
    assert lone == pytest.approx(256 / 4)


def test_an_object_without_a_class_counts_for_no_class():
    pixels, ids, types = drawn((10, 10, 16, 1), (50, 20, 20, 1))
    types[ids == 2] = 0  # it is called round all the same
    found = evaluate(predictor(), [Held(labelled(pixels, ids, types))], resamples=0)
    assert value(found, "types", "f1 round") == 1.0
    assert value(found, "types", "pq round") > 0.9
    assert value(found, "types", "accuracy_of_found") == 1.0


def test_a_class_that_is_nowhere_is_not_in_the_mean():
    pixels, _, _ = drawn((10, 10, 16, 1), (50, 20, 20, 2))
    _, ids, types = drawn((10, 10, 16, 1))
    found = evaluate(predictor(), [Held(labelled(pixels, ids, types))], resamples=0)
    assert value(found, "types", "mpq_plus") == value(found, "types", "pq round") > 0.9
    assert value(found, "types", "pq square") == 0.0


def test_faint_cells_count_for_curves_and_not_for_the_models_threshold():
    pixels, _, _ = drawn()
    pixels[20, 20, 1], pixels[30, 70, 1], pixels[80, 40, 1] = 250, 240, 240
    boxes = [(x - 8, y - 8, x + 9, y + 9) for x, y in ((20, 20), (70, 30))]
    found = evaluate(predictor(), [Held(labelled(pixels, boxes=boxes))], resamples=0)
    assert value(found, "cells", "precision") == 1.0
    assert value(found, "cells", "recall") == 0.5
    # 1 of 1, then 2 of 3 at once: half of the recall at 1, half at 2/3
    assert value(found, "cells", "ap") == pytest.approx(0.5 + 0.5 * 2 / 3)
    # the picture shows what the model would find
    assert len(found.examples[0].found["cells"]) == 1


def test_cells_where_nobody_looked_are_excused():
    pixels, _, _ = drawn()
    pixels[20, 20, 1], pixels[80, 40, 1] = 250, 250
    image = labelled(pixels, boxes=[(12, 12, 29, 29)])
    ignore = np.zeros(pixels.shape[:2], np.bool_)
    ignore[50:] = True
    label = BoxLabel(boxes=image.labels["cells"].boxes, ignore=ignore)
    for known, precision in ((image.labels["cells"], 0.5), (label, 1.0)):
        one = AnnotatedImage(name="a", image=pixels, mpp=0.5, labels={"cells": known})
        found = evaluate(predictor(), [Held(one)], resamples=0)
        assert value(found, "cells", "precision") == precision
        assert value(found, "cells", "ap") == pytest.approx(precision)


def test_patients_are_told_apart_by_source_and_by_head():
    pixels, ids, types = drawn((10, 10, 16, 1))
    blank = np.zeros_like(pixels)
    images = []
    for name in ("here", "there"):
        for i in range(4):
            seen = pixels if name == "here" else blank
            held = Held(labelled(seen, ids, name=f"{name}{i}"), patient="1")
            held.name = name
            images.append(held)
    # images that have no label of the head must not shift who is whose
    other = [Held(labelled(pixels, tissue=1, name=f"o{i}"), patient="9") for i in range(8)]
    found = evaluate(predictor(), [*other, *images], resamples=100)
    assert (found.images, found.patients) == (16, 3)
    recall = found.heads["nuclei"]["recall"]
    assert (recall.low, recall.value, recall.high) == (0.0, 0.5, 1.0)
    assert set(found.groups) == {"drawn", "here", "there"}
    assert found.groups["there"]["nuclei"]["recall"].value == 0.0
    assert "nuclei" not in found.groups["drawn"]
    assert types.any()


def test_as_many_examples_as_asked_for():
    pixels, ids, _ = drawn((10, 10, 16, 1))
    images = [Held(labelled(pixels, ids, name=f"n{i}")) for i in range(4)]
    found = evaluate(predictor(), images, resamples=0, examples=2)
    assert [panel.caption for panel in found.examples] == ["n0", "n1"]
    assert (found.examples[0].found["nuclei"] > 0).sum() == pytest.approx(256, abs=30)


def test_the_middle_of_an_object_is_that_of_its_pixels():
    numbers = np.zeros((20, 30), np.int32)
    numbers[3, 4] = 1
    numbers[10:14, 6:16] = 2
    found = _centres(numbers, 3)
    assert found[0].tolist() == [4.5, 3.5]
    assert found[1].tolist() == [11.0, 12.0]


def test_of_a_recipe_the_validation_images_are_meant(bundle, tmp_path):
    data = write_discs(tmp_path / "data", 4)
    (data / "images.csv").write_text(
        "image,part\np0.png,validation\np1.png,train\np2.png,train\np3.png,train\n"
    )
    recipe = write_recipe(tmp_path, data)
    assert score_bundle(bundle, recipe, resamples=0).images == 1
    assert score_bundle(bundle, recipe, part="train", resamples=0).images == 3
    with pytest.raises(DatasetError, match="no source has a part 'test'"):
        score_bundle(bundle, recipe, part="test", resamples=0)


@pytest.mark.parametrize(
    ("learnt", "judged", "part", "flatters"),
    [
        ("", "", None, False),
        ("", "", "validation", False),
        ("", "", "train", True),
        ("", "", "all", True),
        ("split = false", "", None, True),  # it learnt from what validates here
        ("", "split = false", "train", True),
        ("[split]\nseed = 1", "", None, True),
        ("[split]\nseed = 1", "[split]\nseed = 1", None, False),
        ("[split]\nvalidation = 0.2", "", None, False),  # as is the default
    ],
)
def test_a_recipe_flatters_where_its_images_were_learnt_from(
    bundle, tmp_path, caplog, learnt, judged, part, flatters
):
    own = tmp_path / "own"
    shutil.copytree(bundle, own)
    data = write_discs(tmp_path / "data", 5)
    text = '[[source]]\nlayout = "plain"\npath = "{}"\n{}\n'
    (own / "train.toml").write_text(text.format("elsewhere/data", learnt))
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(text.format(data, judged))
    about = score_bundle(own, recipe, part=part, at_most=1, resamples=0).about
    assert about["learnt_from_this_folder"] is flatters
    assert ("these scores flatter" in caplog.text) is flatters
    recipe.write_text(text.format(write_discs(tmp_path / "others", 5), ""))
    about = score_bundle(own, recipe, part="train", at_most=1, resamples=0).about
    assert about["learnt_from_this_folder"] is False
    about = score_bundle(own, data, at_most=1, resamples=0).about
    assert about["learnt_from_this_folder"] is True


def test_an_object_in_two_pieces_is_one():
    pieces = shapely.union(shapely.box(1, 1, 4, 4), shapely.box(6, 6, 9, 8))
    ids = fill_polygons(np.array([shapely.box(0, 9, 2, 10), pieces]), (10, 10))
    assert (ids[1:4, 1:4] == 2).all()
    assert (ids[6:8, 6:9] == 2).all()
    assert ((ids == 2).sum(), (ids == 1).sum()) == (9 + 6, 2)
