"""The command that judges a bundle: its scores against scores by hand, and what it leaves out."""

import json
import shutil
import sys
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import shapely
from scipy import ndimage
from skimage.measure import label as components
from skimage.measure import regionprops

from benchmarks.quality import __main__ as quality_command
from benchmarks.quality import sets as quality_sets
from benchmarks.quality.consistency import compare_maps
from benchmarks.quality.failures import count_failures
from benchmarks.quality.judging import judge_set, scores_json
from benchmarks.quality.measures import (
    CalledArea,
    Objects,
    OneGland,
    known_only,
    one_gland,
    whole_only,
)
from benchmarks.quality.pictures import draw_cases
from benchmarks.quality.report import markdown
from benchmarks.quality.sets import CROPS_PLAN, PLANS, ImageSet, Plan, standing
from benchmarks.quality.sweep import grids, sweep, write_rules
from wsi_pipeline.bundle import find_bundle, open_bundle
from wsi_pipeline.geometry import PixelGrid
from wsi_pipeline.golden import check_golden, read_golden
from wsi_pipeline.instances.extract import outline_polygons
from wsi_pipeline.metrics import compare
from wsi_pipeline.spec import AnchorRules, HeadSpec, ModelSpec, RunRules
from wsi_pipeline.training.annotation import AnnotatedImage, Dataset, InstanceLabel, Item
from wsi_pipeline.training.begin import HeldOut
from wsi_pipeline.training.judges import Seen
from wsi_pipeline.training.predicted import FoundObjects, ImageMaps
from wsi_pipeline.training.sources import Source

SPEC = ModelSpec(
    name="two-heads",
    architecture="none",
    mpp=0.5,
    halo_px=0,
    options={},
    heads=(
        HeadSpec(name="nuclei", kind="instance", object_kind="nucleus", rules=AnchorRules()),
        HeadSpec(name="gland", kind="instance", object_kind="gland", rules=RunRules(grow_um=0.0)),
    ),
)
SIDE = 96


def blobs(seed, side=SIDE, sigma=3.0):
    """A label image of roundish objects that do not touch."""
    noise = ndimage.gaussian_filter(
        np.random.default_rng(seed).standard_normal((side, side)), sigma
    )
    return components(noise > 0.6 * noise.std(), connectivity=1).astype(np.int32)


def objects_of(ids):
    """Return a label image's objects (each 4-connected) as polygons."""
    grid = PixelGrid.level0(ids.shape[::-1])
    masks = [(ids == number).astype(np.uint8) for number in np.unique(ids[ids > 0])]
    rows = [row for mask in masks for row in outline_polygons(mask, grid)]
    polygons = shapely.from_wkb(np.array([wkb for _, wkb, _ in rows], object))
    return FoundObjects(
        polygons=polygons,
        classes=(None,) * len(polygons),
        scores=np.ones(len(polygons), np.float32),
        centres=shapely.get_coordinates(shapely.centroid(polygons)).reshape(-1, 2),
    )


def seen_of(true, pred, head="nuclei"):
    height, width = true.shape
    image = AnnotatedImage(
        name="image",
        image=np.full((height, width, 3), 200, np.uint8),
        mpp=0.5,
        labels={head: InstanceLabel(ids=true.astype(np.int32))},
    )
    maps = ImageMaps(spec=SPEC, size=(width, height), arrays={})
    return Seen(image=image, maps=maps, found={head: objects_of(pred)})


def boxes(*places, side=SIDE):
    """Draw boxes (top, bottom, left, right), numbered from 1."""
    ids = np.zeros((side, side), np.int32)
    for number, (top, bottom, left, right) in enumerate(places, start=1):
        ids[top:bottom, left:right] = number
    return ids


def by_hand(pairs):
    """PQ, F1, AJI, pixel Dice, object Dice and centre F1 of images, by loops over masks."""
    tp = fp = fn = 0
    iou_sum = shared = union_sum = both = sizes = hits = misses = 0.0
    weights = {"true": [0.0, 0], "pred": [0.0, 0]}
    for true, pred in pairs:
        left = {p.label: true == p.label for p in regionprops(true)}
        right = {p.label: pred == p.label for p in regionprops(pred)}
        iou = {
            (i, j): (a & b).sum() / (a | b).sum() for i, a in left.items() for j, b in right.items()
        }
        good = [pair for pair, value in iou.items() if value > 0.5]
        tp, fp, fn = tp + len(good), fp + len(right) - len(good), fn + len(left) - len(good)
        iou_sum += sum(iou[pair] for pair in good)
        taken = set()
        for i, a in left.items():
            j = max(right, key=lambda j: iou[i, j])
            if iou[i, j] == 0:
                union_sum += a.sum()
                continue
            taken.add(j)
            shared += (a & right[j]).sum()
            union_sum += (a | right[j]).sum()
        union_sum += sum(b.sum() for j, b in right.items() if j not in taken)
        both += 2 * ((true > 0) & (pred > 0)).sum()
        sizes += (true > 0).sum() + (pred > 0).sum()
        for name, own, others in (("true", left, right), ("pred", right, left)):
            for a in own.values():
                b = max(others.values(), key=lambda b: (a & b).sum())
                dice = 2 * (a & b).sum() / (a.sum() + b.sum()) if (a & b).any() else 0.0
                weights[name][0] += a.sum() * dice
                weights[name][1] += a.sum()
        centres = [np.array([p.centroid for p in regionprops(ids)]) for ids in (true, pred)]
        apart = centres[0][:, None] - centres[1][None]
        near = np.hypot(*apart.transpose(2, 0, 1)) * SPEC.mpp <= 3.0
        assert max(near.sum(0).max(), near.sum(1).max()) == 1  # so that pairs are plain
        hits, misses = hits + near.sum(), misses + len(left) + len(right) - 2 * near.sum()
    return {
        "pq": iou_sum / (tp + fp / 2 + fn / 2),
        "f1": 2 * tp / (2 * tp + fp + fn),
        "aji": shared / union_sum,
        "dice": both / sizes,
        "object_dice": sum(total / area for total, area in weights.values()) / 2,
        "detection_f1": 2 * hits / (2 * hits + misses),
    }


def discs(seed):
    """Discs of 3 to 7 px radius around jittered points 20 px apart."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:SIDE, :SIDE]
    ids = np.zeros((SIDE, SIDE), np.int32)
    places = [(a, b) for a in range(12, SIDE - 8, 20) for b in range(12, SIDE - 8, 20)]
    for number, place in enumerate(places, start=1):
        cy, cx = np.array(place) + rng.uniform(-2, 2, 2)
        ids[np.hypot(y - cy, x - cx) < rng.uniform(3, 7)] = number
    return ids


def pairs_of_images():
    """Three annotations, and predictions that miss, invent, merge and shift."""
    pairs = []
    for seed in range(3):
        true = discs(seed)
        pred = np.roll(discs(seed) * (discs(seed) != 2), (1, seed), (0, 1))
        pred[0:4, 0:4] = 90
        pred[pred == 6] = 7
        pred[31:34, 32:52] = 7
        pairs.append((true, pred))
    return pairs


def test_scores_of_objects_are_those_by_hand():
    pairs = pairs_of_images()
    measure = Objects(SPEC, "nuclei")
    for number, (true, pred) in enumerate(pairs):
        measure.look(number, seen_of(true, pred))
    scores, wanted = measure.scores(np.arange(3)), by_hand(pairs)
    assert {name: scores[name] for name in wanted} == pytest.approx(wanted, abs=1e-9)
    assert 0.2 < wanted["pq"] < 0.95
    some = measure.scores(np.array([1, 1, 2]))
    assert some["pq"] == pytest.approx(by_hand([pairs[1], pairs[1], pairs[2]])["pq"])


def test_failures_are_sorted_by_their_kind():
    true = boxes((0, 10, 0, 10), (0, 10, 12, 22),  # one object covers both
                 (20, 40, 0, 20),  # in two pieces
                 (20, 40, 30, 50),  # a quarter of it
                 (50, 60, 0, 10),  # four times as much
                 (50, 60, 30, 40),  # half beside it
                 (80, 90, 0, 10), (80, 90, 20, 30))  # not found; found  # fmt: skip
    pred = boxes((0, 10, 0, 22), (20, 40, 0, 9), (20, 40, 11, 20), (20, 30, 30, 40),
                 (50, 70, 0, 20), (50, 60, 36, 46), (80, 90, 20, 29), (80, 90, 60, 70))  # fmt: skip
    found = count_failures(compare(true, pred))
    assert (found.merged, found.split, found.too_small, found.too_large) == (2, 1, 1, 1)
    assert (found.shifted, found.missed, found.matched, found.false) == (1, 1, 1, 1)
    assert np.exp(found.log_area) == pytest.approx(0.9)


def test_every_true_object_is_counted_once():
    for seed in range(5):
        true, pred = blobs(seed), blobs(seed + 50)
        own = count_failures(compare(true, pred))
        wrong = own.merged + own.split + own.too_small + own.too_large + own.shifted + own.missed
        assert own.matched + wrong == true.max()


def test_one_gland_is_judged_by_the_object_that_fits_it_best():
    gland = boxes((10, 30, 10, 30)) > 0  # 400 px
    found = boxes((10, 30, 10, 25), (10, 30, 26, 60))  # 300 of it; 80 of it and 600 beside
    scores = one_gland(gland, found)
    assert scores["best_dice"] == pytest.approx(2 * 300 / (400 + 300))
    assert scores["coverage"] == pytest.approx(380 / 400)
    assert scores["crop_dice"] == pytest.approx(2 * 380 / (400 + 980))
    assert scores["found"] == 1.0
    nothing = one_gland(gland, np.zeros_like(found))
    assert nothing == {"best_dice": 0.0, "coverage": 0.0, "found": 0.0, "crop_dice": 0.0}
    everything = one_gland(gland, np.ones_like(found))
    assert everything["coverage"] == 1.0
    assert everything["best_dice"] == pytest.approx(2 * 400 / (400 + SIDE**2))


def test_one_gland_looks_only_at_crops_with_a_gland():
    measure = OneGland("gland")
    unknown = np.where(boxes((10, 30, 10, 30)) > 0, 1, -1)
    measure.look(4, seen_of(unknown, boxes((10, 30, 10, 30)), "gland"))
    measure.look(5, seen_of(np.zeros((SIDE, SIDE)), boxes((0, 9, 0, 9)), "gland"))
    assert measure.images == [4]
    assert measure.scores(np.array([0]))["best_dice"] == 1.0


def test_area_called_gland_counts_known_pixels_of_images_without_one():
    measure = CalledArea("gland")
    measure.look(0, seen_of(boxes((0, 9, 0, 9)), boxes((0, 9, 0, 9)), "gland"))
    empty = np.zeros((SIDE, SIDE), np.int32)
    measure.look(1, seen_of(empty, boxes((0, 20, 0, 20)), "gland"))
    half = empty.copy()
    half[:, : SIDE // 2] = -1
    measure.look(2, seen_of(half, boxes((0, 10, 43, 53)), "gland"))
    assert measure.images == [1, 2]
    wanted = (400 + 50) / (SIDE**2 + SIDE**2 / 2)
    assert measure.scores(np.arange(2))["called_share"] == pytest.approx(wanted)
    assert measure.details(np.arange(2)) == {"objects": 2}


def test_objects_that_are_mostly_unknown_are_left_out():
    true = boxes((0, 10, 0, 10))
    true[40:60] = -1
    pred = boxes((0, 10, 0, 10), (34, 44, 0, 10), (35, 45, 20, 30), (80, 90, 0, 10))
    kept = known_only(seen_of(true, pred), "nuclei").found["nuclei"]
    tops = sorted(polygon.bounds[1] for polygon in kept.polygons)
    assert tops == [0, 34, 80]  # 0.4 of the second is unknown, 0.5 of the third
    assert len(kept.scores) == len(kept.centres) == len(kept.classes) == 3


def test_whole_objects_are_judged_without_those_that_the_edge_cuts():
    true = boxes((0, 20, 0, 20), (30, 50, 30, 50), (60, 80, 1, 21), (60, 80, 60, 80))
    pred = boxes((0, 20, 0, 20), (30, 50, 30, 50), (60, 80, 0, 21), (85, 96, 60, 80),
                 (0, 9, 70, 80), (10, 20, 70, 80))  # fmt: skip
    measure = Objects(SPEC, "gland", whole_only)
    measure.look(0, seen_of(true, pred, "gland"))
    details = measure.details(np.array([0]))
    # The third prediction touches the edge and still is the third gland; a false one inside.
    assert (details["true"], details["matched"], details["found"]) == (3, 2, 3)


def source_of(images, name="own", groups=(), patients=()):
    """Return held-out images from label images."""

    def load(number, ids):
        return lambda: AnnotatedImage(
            name=f"{name}{number}", image=np.full((*ids.shape, 3), number % 250, np.uint8), mpp=0.5,
            labels={"nuclei": InstanceLabel(ids=ids)},
        )  # fmt: skip

    items = tuple(
        Item(
            name=f"{name}{n:02}",
            patient=patients[n] if patients else f"p{n}",
            load=load(n, ids),
            group=groups[n] if groups else None,
        )
        for n, ids in enumerate(images)
    )
    dataset = Dataset(name=name, path=Path(name), labels={"nuclei": ()}, items=items)
    source = Source(dataset, items, SPEC)
    return tuple(HeldOut(source=source, index=n) for n in range(len(items)))


class Painter:
    """A network that knows what to say: maps by the grey of the image."""

    spec = SPEC

    def __init__(self, maps):
        self.maps = maps

    def predict(self, image):
        inner, contour = self.maps[int(image[0, 0, 0])]
        prob = np.stack([inner, contour]).astype(np.uint8)
        none = np.zeros_like(prob)
        size = image.shape[1], image.shape[0]
        arrays = {"nuclei/prob": prob, "gland/prob": none}
        return ImageMaps(spec=SPEC, size=size, arrays=arrays)


def as_maps(ids):
    """Maps that the default rules turn back into about these objects."""
    rim = ndimage.binary_dilation(ids > 0) & (ids == 0)
    return np.where(ids > 0, 230, 5), np.where(rim, 200, 0)


@pytest.fixture
def judged():
    truths = [blobs(seed) for seed in range(6)]
    painter = Painter([as_maps(ids) for ids in [*truths[:4], truths[5], truths[4]]])
    plan = Plan(name="dsb2018", title="dots", folder="dots", layout="plain", shown="nobody, CC0")
    images = source_of(truths, groups=["a", "a", "b", "b", "b", "b"])
    own = ImageSet(plan=plan, images=images, standing="held out")
    return judge_set(painter, own)


def test_a_set_is_judged_once_with_intervals_over_patients(judged):
    result = scores_json(judged, draws=40)
    nuclei = result["measures"]["nuclei"]
    assert (result["images"], result["patients"], nuclei["drawn"]) == (6, 6, "patients")
    score = nuclei["scores"]["pq"]
    assert 0 <= score["low"] < score["value"] < score["high"] <= 1
    images = nuclei["by_image"]
    assert images["own00"]["pq"] > 0.8 > 0.4 > images["own05"]["pq"]
    json.dumps(result, allow_nan=False)


def test_few_patients_mean_that_images_are_drawn(judged):
    held = source_of([blobs(n) for n in range(6)], patients=["a", "a", "a", "b", "b", "b"])
    few = replace(judged, set=replace(judged.set, images=held))
    assert scores_json(few, draws=5)["measures"]["nuclei"]["drawn"] == "images"


def scores_of(judged, name):
    about = {"model": name, "precision": "fp32", "device": "cpu", "mpp": 0.5, "fast": False,
             "interval": "95 %"}  # fmt: skip
    return {"about": about, "sets": {"dsb2018": scores_json(judged, draws=5)}}


def test_the_table_shows_scores_and_the_baseline_beside(judged):
    own, other = scores_of(judged, "ours"), scores_of(judged, "theirs")
    other["sets"]["dsb2018"]["measures"]["nuclei"]["scores"]["pq"]["value"] = 0.123
    text = markdown(own, other)
    pq = own["sets"]["dsb2018"]["measures"]["nuclei"]["scores"]["pq"]["value"]
    (line,) = [line for line in text.splitlines() if "| PQ |" in line and "dots" in line]
    assert f"| {pq:.3f} |" in line
    assert line.endswith("| 0.123 |")
    columns = {line.count("|") for line in text.splitlines() if line.startswith("| dots")}
    assert columns == {7}
    assert "theirs" not in markdown(own, None)


def test_a_set_that_was_learnt_from_is_marked(judged):
    learnt = replace(judged, set=replace(judged.set, standing="learnt from"))
    assert "**learnt from**" in markdown(scores_of(learnt, "ours"), None)
    assert "**" not in markdown(scores_of(judged, "ours"), None)


def test_pictures_are_drawn_only_of_what_may_be_shown(judged, tmp_path, monkeypatch):
    painter = Painter([as_maps(blobs(n)) for n in range(6)])
    monkeypatch.setattr("benchmarks.quality.pictures.ImagePredictor", lambda *_, **__: painter)
    monkeypatch.setattr("benchmarks.quality.pictures.MIN_OBJECTS", 2)
    bundle = find_bundle("stain-baseline")
    hidden = replace(judged, set=replace(judged.set, plan=replace(judged.set.plan, shown=None)))
    assert draw_cases(bundle, [hidden], tmp_path / "none", device="cpu") == []
    assert list((tmp_path / "none").iterdir()) == []
    (path,) = draw_cases(bundle, [judged], tmp_path, device="cpu")
    assert path.name == "dsb2018-nuclei.jpg"
    assert path.stat().st_size < 400_000


def test_monuseg_is_neither_shown_nor_tuned_on():
    (monuseg,) = [plan for plan in PLANS if plan.layout == "monuseg"]
    assert monuseg.shown is None
    own = ImageSet(plan=monuseg, images=source_of([blobs(0)]), standing="never seen")
    assert sweep(Painter([as_maps(blobs(0))]), [own], fast=True) == {}


RECIPE = """
[[source]]
layout = "ebhi"
path = "$WSI_DATA/glands_ebhi"
[[source]]
path = "tiles/tissue_kather"
split = false
"""


def test_a_recipe_tells_what_was_learnt_from(tmp_path):
    recipe = tmp_path / "train.toml"
    recipe.write_text(RECIPE)
    plans = {plan.name: plan for plan in PLANS}
    assert standing(plans["ebhi"], [recipe]) == "held out"
    assert standing(plans["kather"], [recipe]) == "learnt from"
    assert standing(plans["monuseg"], [recipe]) == "never seen"
    assert standing(plans["ebhi"], [tmp_path / "none.toml"]).startswith("not known")
    recipe.write_text(RECIPE + "[split]\nseed = 1\n")
    assert standing(plans["ebhi"], [recipe]).startswith("not known")
    recipe.write_text('[[source]]\nlayout = "monuseg"\npath = "there"\n')
    assert standing(plans["monuseg"], [recipe]) == "learnt from"


def test_what_an_earlier_stage_learnt_from_counts(tmp_path, monkeypatch):
    (tmp_path / "first").mkdir()
    first = tmp_path / "first" / "train.toml"
    second = tmp_path / "second.toml"
    second.write_text(
        '[start]\nbundle = "$STAGES/first"\n[[source]]\nlayout = "ebhi"\npath = "e"\n'
    )
    plans = {plan.name: plan for plan in PLANS}
    monkeypatch.setenv("STAGES", str(tmp_path))
    assert standing(plans["ebhi"], [second]).startswith("not known")  # the first is not there yet
    first.write_text(RECIPE)
    assert standing(plans["ebhi"], [second]) == "held out"
    assert standing(plans["kather"], [second]) == "learnt from"
    assert standing(plans["dsb2018"], [second]) == "never seen"
    monkeypatch.setenv("STAGES", "elsewhere")
    assert standing(plans["kather"], [second]).startswith("not known")
    assert standing(plans["kather"], [second, first]) == "learnt from"


OWN_CROPS = """
[[source]]
layout = "crops"
path = "../../annotations"
[[source]]
layout = "crops"
path = "$PSEUDO"
split = {}
"""


def test_crops_of_others_are_not_the_own_ones(tmp_path, monkeypatch):
    recipe = tmp_path / "train.toml"
    for pseudo in ("$PSEUDO", str(tmp_path / "pseudo")):
        monkeypatch.setenv("PSEUDO", pseudo)
        for split in ("false", "true"):
            recipe.write_text(OWN_CROPS.format(split))
            assert standing(CROPS_PLAN, [recipe]) == "held out"
    for own in ("annotations", "annotations/crops", "a/annotations/crops/one.geojson"):
        monkeypatch.setenv("PSEUDO", own)
        recipe.write_text(OWN_CROPS.format("false"))
        assert standing(CROPS_PLAN, [recipe]) == "learnt from"
        assert standing(replace(CROPS_PLAN, folder="copy"), [recipe]) == "learnt from"
    recipe.write_text('[[source]]\npath = "copy"\nsplit = false\n')  # the layout is recognised
    assert standing(replace(CROPS_PLAN, folder="copy"), [recipe]) == "learnt from"
    assert standing(CROPS_PLAN, [recipe]) == "never seen"


def test_the_wide_network_keeps_the_own_validation_crops_apart():
    recipe = Path(__file__).parent.parent / "workflows" / "weights" / "open.toml"
    assert standing(CROPS_PLAN, [recipe]) == "held out"


def test_what_is_missing_is_left_out(tmp_path, caplog):
    found = quality_sets.open_sets(SPEC, data=tmp_path, annotations=tmp_path, recipes=[], fast=True)
    assert found == []
    assert {record.args[0] for record in caplog.records} == {*(p.name for p in PLANS), "crops"}


def test_equal_maps_give_equal_objects():
    ids = blobs(3)
    painter = Painter([as_maps(ids), as_maps(np.roll(ids, 3, 0))])
    image = np.zeros((SIDE, SIDE, 3), np.uint8)
    first, second = painter.predict(image), painter.predict(image + 1)
    same = compare_maps(first, first)["nuclei"]
    assert (same["pq"], same["largest_difference"]) == (1.0, 0.0)
    other = compare_maps(first, second)["nuclei"]
    assert 0 < other["pq"] < 0.95
    assert other["largest_difference"] == pytest.approx(225 / 255, abs=1e-3)
    assert compare_maps(first, first)["gland"]["pq"] is None


def test_a_sweep_finds_the_threshold_that_parts_touching_nuclei():
    truths, maps = [], []
    for number in range(6):
        top = 10 + 3 * number
        truth = boxes((top, top + 20, 10, 28), (top, top + 20, 32, 50))
        inner = np.where(truth > 0, 240, 5)
        inner[top : top + 20, 28:32] = 140  # a bridge above the present threshold of 0.5
        truths.append(truth)
        maps.append((inner, np.zeros_like(inner)))
    plan = next(plan for plan in PLANS if plan.name == "dsb2018")
    own = ImageSet(plan=plan, images=source_of(truths), standing="held out")
    found = sweep(Painter(maps), [own], fast=True)["nuclei"]
    assert found["present"]["pq"]["dsb2018"] == 0
    best = found["best"]["rules"]
    assert max(best["inner_threshold"], best["foreground_threshold"]) > 140 / 255
    assert found["best"]["pq"]["dsb2018"] > 0.7
    assert found["gain"]["low"] > 0.7
    assert found["images"] == {"dsb2018": 6}


def copied(tmp_path):
    folder = tmp_path / "own"
    shutil.copytree(find_bundle("stain-baseline").path, folder)
    return open_bundle(folder)


def test_swept_rules_go_into_the_bundle_and_nothing_else_changes(tmp_path):
    bundle = copied(tmp_path)
    (bundle.path / "golden.json").unlink()
    before = {path.name: path.read_bytes() for path in bundle.path.iterdir()}
    present = bundle.spec.head("gland").rules
    best = replace(present, inner_threshold=0.61, grow_um=3.25)
    changed = write_rules(bundle, {"gland": {"best": {"rules": asdict(best)}}})
    assert changed.digest != bundle.digest
    assert changed.spec.head("gland").rules == best
    assert changed.spec.head("nuclei") == bundle.spec.head("nuclei")
    after = {path.name: path.read_bytes() for path in bundle.path.iterdir()}
    assert after.keys() == before.keys()
    assert {name for name in after if after[name] != before[name]} == {"spec.json"}
    again = write_rules(changed, {"gland": {"best": {"rules": asdict(present)}}})
    assert (again.path / "spec.json").read_bytes() == before["spec.json"]


def test_golden_tiles_follow_the_rules(tmp_path):
    bundle = copied(tmp_path)
    assert check_golden(bundle, device="cpu", precision="fp32") == []
    rules = asdict(replace(bundle.spec.head("nuclei").rules, min_area_um2=40.0))
    changed = write_rules(bundle, {"nuclei": {"best": {"rules": rules}}})
    assert check_golden(changed, device="cpu", precision="fp32") == []
    counts = [read_golden(own)["tiles"]["tissue"]["objects"] for own in
              (find_bundle("stain-baseline"), changed)]  # fmt: skip
    assert counts[0]["nucleus"] > counts[1]["nucleus"] > 0


def test_the_command_writes_what_it_swept(tmp_path, monkeypatch, capsys):
    bundle = copied(tmp_path)
    best = asdict(replace(bundle.spec.head("gland").rules, grow_um=3.25))
    monkeypatch.setattr(
        quality_command, "sweep", lambda *_, **__: {"gland": {"best": {"rules": best}}}
    )
    words = ["quality", str(bundle.path), "--data", str(tmp_path), "--out", str(tmp_path / "out")]
    monkeypatch.setattr(sys, "argv", [*words, "--sweep"])
    quality_command.main()
    assert open_bundle(bundle.path).digest == bundle.digest
    monkeypatch.setattr(sys, "argv", [*words, "--sweep", "--write"])
    quality_command.main()
    assert open_bundle(bundle.path).spec.head("gland").rules.grow_um == 3.25
    monkeypatch.setattr(sys, "argv", [*words, "--write"])
    with pytest.raises(SystemExit):
        quality_command.main()
    assert "--sweep" in capsys.readouterr().err


def test_the_present_rules_are_always_tried():
    for rules in (AnchorRules(grow_um=1.23), RunRules(inner_threshold=0.47, min_core_um2=99)):
        for stage in grids(rules):
            for name, values in stage.items():
                assert getattr(rules, name) in values
