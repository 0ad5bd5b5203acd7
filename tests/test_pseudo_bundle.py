"""What a bundle is sure of, written as crops; the baseline teaches, on a synthetic slide."""

import json

import numpy as np
import pyarrow.parquet as pq
import pytest
import shapely
from click.testing import CliRunner

from workflows.weights import pseudo_bundle
from workflows.weights.pseudo_bundle import VIEWS, Confidence, averaged, believed
from wsi_pipeline.bundle import find_bundle
from wsi_pipeline.curation.crops import read_crop, write_crop
from wsi_pipeline.spec import AnchorRules, HeadSpec, ModelSpec, RunRules
from wsi_pipeline.synth import write_slide
from wsi_pipeline.training.annotation import IGNORE_ID
from wsi_pipeline.training.layouts import read_dataset
from wsi_pipeline.training.predicted import ImageMaps

SPEC = ModelSpec(
    name="s",
    architecture="cerberus",
    mpp=0.5,
    halo_px=16,
    options={},
    heads=(
        HeadSpec(name="nuclei", kind="instance", object_kind="nucleus", rules=AnchorRules()),
        HeadSpec(name="gland", kind="instance", stride=2, object_kind="gland", rules=RunRules()),
        HeadSpec(name="gland-class", kind="class", stride=2, classes=("n", "a", "b"),
                 classifies="gland"),
    ),
)  # fmt: skip


@pytest.fixture(scope="module")
def slide(tmp_path_factory):
    path = tmp_path_factory.mktemp("slide") / "s.svs"
    write_slide(path, width=1200, height=1200, mpp=0.4, seed=3, threads=2)
    return path


@pytest.fixture(scope="module")
def crops(slide, tmp_path_factory):
    out = tmp_path_factory.mktemp("taught") / "crops"
    call(slide, "--out", out, "--windows", 2, "--side-um", 130)
    return [read_crop(path) for path in sorted(out.iterdir())]


def invoke(*arguments):
    words = ["stain-baseline", *(str(argument) for argument in arguments)]
    return CliRunner().invoke(pseudo_bundle.main, [*words, "--device", "cpu"])


def call(*arguments):
    result = invoke(*arguments)
    assert result.exit_code == 0, result.output
    return result.output


def truth_of(slide, kind):
    table = pq.read_table(slide.with_suffix(".truth.parquet"))
    kinds = np.array(table["kind"].to_pylist())
    return shapely.from_wkb(table["geometry"].to_pylist())[kinds == kind]


def shapes_of(crop, kind, label=None):
    own = [o.polygon for o in crop.outlines if o.kind == kind and o.label == label]
    return np.array(own, object)


def test_crops_are_for_training_and_say_who_found_what(crops):
    assert len(crops) == 2
    digest = find_bundle("stain-baseline").digest[:12]
    for crop in crops:
        assert crop.part == "train"
        assert crop.labels == ("nuclei", "gland", "lumen")
        assert {o.source for o in crop.outlines} == {f"model stain-baseline {digest}"}
        assert digest in crop.history[0].how
        assert "not looked at" in crop.note
        unknown = {o.label for o in crop.outlines if o.kind == "ignore"}
        assert None not in unknown
        assert unknown <= set(crop.labels)


def test_sure_nuclei_are_where_nuclei_are(crops, slide):
    truth = truth_of(slide, "nucleus")
    tree = shapely.STRtree(truth)
    found = matched = 0
    for crop in crops:
        inner = shapely.buffer(crop.rectangle, -30)
        for shape in shapes_of(crop, "nucleus"):
            if inner.covers(shape):
                near = truth[tree.query(shape, predicate="intersects")]
                shared = shapely.area(shapely.intersection(near, shape))
                matched += bool((shared / (shape.area + shapely.area(near) - shared) > 0.5).any())
                found += 1
    assert found > 80
    assert matched > 0.95 * found


def test_glands_of_a_head_with_a_stride_are_where_glands_are(crops, slide):
    truth = shapely.union_all(truth_of(slide, "gland"))
    found = shapely.union_all([s for crop in crops for s in shapes_of(crop, "gland")])
    assert found.area > 0
    assert found.intersection(truth).area > 0.8 * found.area


def test_a_network_can_learn_from_them(crops, slide, tmp_path):
    for crop in crops:
        write_crop(crop, tmp_path / f"{crop.id}.geojson")
    read = read_dataset(tmp_path, "crops", slides=str(slide.parent))
    assert set(read.labels) == {"nuclei", "gland", "lumen"}
    image = read.items[0].load()
    outside = crops[0].grid.size[0] * crops[0].grid.size[1] / image.image[..., 0].size
    for label in ("nuclei", "gland"):
        ids = image.labels[label].ids
        assert (ids > 0).any()
        assert (ids == 0).any()
        assert (ids == IGNORE_ID).mean() > 1 - outside - 0.02  # the border, at least


def test_the_same_call_writes_the_same_bytes_and_views_count(slide, tmp_path):
    for name, more in (("a", ()), ("b", ()), ("c", ("--flips",)), ("d", ("--sure", "0.97"))):
        call(slide, "--out", tmp_path / name, "--windows", 1, "--side-um", 48, *more)
    a, b, c, d = (next((tmp_path / name).iterdir()).read_text() for name in "abcd")
    assert a == b
    how = [json.loads(text)["crop"]["history"][0]["how"] for text in (a, c, d)]
    assert ["1 views" in how[0], "8 views" in how[1], "from 0.97" in how[2]] == [True] * 3
    assert d.count('"nucleus"') < a.count('"nucleus"')
    assert d.count('"ignore"') > a.count('"ignore"')


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (("--sure", "0.2", "--doubt", "0.5"), "0 < doubt <= sure"),
        (("--precision", "fp8"), "fp8"),
    ],
)
def test_wrong_use_is_said(slide, tmp_path, more, said):
    result = invoke(slide, "--out", tmp_path / "x", *more)
    assert result.exit_code == 2
    assert said in result.output


def painted(paint):
    """A network: maps of an image from a function of its red channel, halved for the gland."""

    def predict(image):
        first = image[..., 0]
        arrays = {
            "nuclei/prob": np.stack([paint(first), first * 0]).astype(np.uint8),
            "gland/prob": np.stack([paint(first)[::2, ::2]] * 2).astype(np.uint8),
            "gland-class/class": first[::2, ::2],
        }
        return ImageMaps(spec=SPEC, size=first.shape[::-1], arrays=arrays)

    return predict


def test_views_are_turned_back():
    even = np.random.default_rng(0).integers(0, 250, (16, 16), np.uint8)
    even = np.kron(even, np.ones((2, 2), np.uint8))  # so that every second pixel is any of four
    image = np.repeat(even[..., None], 3, axis=2)
    same = averaged(painted(lambda red: red), image, len(VIEWS))
    assert (same.arrays["nuclei/prob"][0] == even).all()
    assert (same.arrays["gland/prob"][1] == even[::2, ::2]).all()
    assert (same.arrays["gland-class/class"] == even[::2, ::2]).all()


def test_views_are_averaged():
    image = np.zeros((16, 16, 3), np.uint8)

    def left_alone(red):  # an opinion about places, not about what is there
        out = red * 0
        out[:, : red.shape[1] // 2] = 200
        return out

    one = averaged(painted(left_alone), image, 1).arrays["nuclei/prob"][0]
    assert set(np.unique(one)) == {0, 200}
    eight = averaged(painted(left_alone), image, 8).arrays["nuclei/prob"][0]
    assert (eight == 100).all()


def test_what_is_believed():
    y, x = np.indices((60, 100))
    discs = [np.hypot(x - centre, y - 30) < 8 for centre in (15, 50, 85)]
    probability = np.full((60, 100), 0.05, np.float32)
    for disc, value in zip(discs, (0.9, 0.6, 0.4), strict=True):
        probability[disc] = value
    ring = (np.hypot(x - 15, y - 30) < 10) & ~discs[0]
    probability[ring] = 0.5
    labels = np.where(discs[0], 1, np.where(discs[1], 2, 0)).astype(np.int32)  # the third: too weak
    sure, doubtful = believed(labels, probability, Confidence(sure=0.8, doubt=0.2), rim_px=3)
    assert (sure == np.where(discs[0], 1, 0)).all()
    assert (doubtful == (discs[1] | discs[2])).all()
    _, wide = believed(labels, probability, Confidence(sure=0.8, doubt=0.2), rim_px=1)
    assert wide[ring].any()


def test_a_doubtful_object_beside_a_sure_one_is_doubtful_all_over():
    labels = np.repeat([[1, 1, 1, 1, 2, 2, 0, 0]], 4, axis=0).astype(np.int32)
    probability = np.where(labels == 1, 0.9, np.where(labels == 2, 0.5, 0.1)).astype(np.float32)
    sure, doubtful = believed(labels, probability, Confidence(), rim_px=3)
    assert (sure == np.where(labels == 1, 1, 0)).all()
    assert (doubtful == (labels == 2)).all()


def test_nothing_found_is_background():
    empty = np.zeros((8, 8), np.int32)
    sure, doubtful = believed(empty, np.zeros((8, 8), np.float32), Confidence(), rim_px=2)
    assert not sure.any()
    assert not doubtful.any()


def test_rims_follow_the_rules_of_a_head():
    assert pseudo_bundle.rim_um(SPEC.heads[0]) == AnchorRules().grow_um
    assert pseudo_bundle.rim_um(SPEC.heads[1]) == RunRules().grow_um / 2
