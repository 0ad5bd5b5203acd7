import json

import numpy as np
import pytest
import shapely
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from skimage.measure import label as components
from torch import nn
from training_fixtures import write_discs

from wsi_pipeline.bundle import save_bundle
from wsi_pipeline.errors import DatasetError
from wsi_pipeline.geometry import PixelGrid
from wsi_pipeline.instances import outline_polygons
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
from wsi_pipeline.training.predicted import ImagePredictor, find_objects
from wsi_pipeline.training.raster import fill_polygons
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
    where green is 250, 8 um wide.
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
