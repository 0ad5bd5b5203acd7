"""Detect heads: peaks of heat become boxes, whatever the windows, up to a run's table."""

from dataclasses import replace

import numpy as np
import pyarrow as pa
import pytest
import shapely
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from object_maps import GLAND, TISSUE, MemoryStore, model, tissue_like
from scipy import ndimage as ndi
from torch import nn

import wsi_pipeline as wsi
from wsi_pipeline import results
from wsi_pipeline.bundle import save_bundle
from wsi_pipeline.inference import TorchPredictor
from wsi_pipeline.instances import extract_objects, places
from wsi_pipeline.network import build_network
from wsi_pipeline.spec import AnchorRules, HeadSpec, ModelSpec, PeakRules, RunRules
from wsi_pipeline.synth import write_slide
from wsi_pipeline.table import OBJECT_SCHEMA


def rings(*, stride=1, parent=None, **rules):
    return HeadSpec(
        name="ring",
        kind="detect",
        object_kind="signet-ring",
        stride=stride,
        parent=parent,
        rules=PeakRules(**rules),
    )


def store_of(head, maps, *more, pixel_size=(0.5, 0.5), spacing=(1.0, 1.0)):
    height, width = maps.shape[1:]
    return MemoryStore(
        spec=model(*more, head),
        size=(width * head.stride, height * head.stride),
        arrays={f"{head.name}/prob": maps.astype(np.uint8)},
        pixel_size=pixel_size,
        spacing=spacing,
    )


def rows_of(store, **options):
    extraction = extract_objects(store, slide_id="s", **options)
    table = pa.Table.from_batches(list(extraction.batches), OBJECT_SCHEMA)
    return table.combine_chunks(), extraction


def box_of(row):
    return tuple(row["bbox"].values())


def plain_peaks(heat, rules, mpp):
    """Every pixel against every other that may be near, by the rule's words."""
    width = heat.shape[1]
    yy, xx = np.indices(heat.shape)
    reach = int(rules.min_distance_um / min(mpp)) + 2
    found = []
    for y, x in np.argwhere(heat / 255 > rules.threshold):
        part = (slice(max(y - reach, 0), y + reach + 1), slice(max(x - reach, 0), x + reach + 1))
        down, right = yy[part] - y, xx[part] - x
        near = np.hypot(right * mpp[0], down * mpp[1]) <= rules.min_distance_um + 1e-6
        more = heat[part] > heat[y, x]
        more |= (heat[part] == heat[y, x]) & (down * width + right < 0)
        if not (near & more).any():
            found.append((x, y))
    return found


def noise_maps(seed, size=(61, 47), values=6):
    """Few values, so many equal ones, and plateaus."""
    rng = np.random.default_rng(seed)
    heat = rng.integers(0, values, (size[1] // 2 + 1, size[0] // 2 + 1)) * (255 // (values - 1))
    heat = np.kron(heat, np.ones((2, 2), int))[: size[1], : size[0]]
    return np.stack([heat, *rng.integers(0, 256, (2, size[1], size[0]))])


# ---- which pixels are peaks ---------------------------------------------------------


@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    distance=st.sampled_from([0.0, 0.5, 0.75, 1.5, 3.0, 7.3]),
    threshold=st.sampled_from([0.0, 0.3, 0.6]),
    pixel_size=st.sampled_from([(0.5, 0.5), (0.5, 0.8)]),
)
def test_peaks_are_those_of_the_rule(seed, distance, threshold, pixel_size):
    head = rings(min_distance_um=distance, threshold=threshold)
    maps = noise_maps(seed, size=(37, 29))
    table, _ = rows_of(store_of(head, maps, pixel_size=pixel_size), window_px=16)
    expected = plain_peaks(maps[0], head.rules, pixel_size)
    assert expected
    # One head, and one panel and cell: in raster order.
    assert table["object_id"].to_pylist() == [y * 37 + x for x, y in expected]
    heat = np.float32([maps[0][y, x] / 255 for x, y in expected])
    np.testing.assert_array_equal(table["score"].to_numpy(), heat)


def test_a_plateau_is_one_object_where_the_disc_spans_it_and_heat_must_exceed_the_threshold():
    maps = np.zeros((3, 40, 40), int)
    maps[0, 10:14, 20:25] = 200
    maps[0, 30, 5], maps[0, 35, 30] = 76, 77  # 0.298 and 0.302
    table, _ = rows_of(store_of(rings(threshold=0.3), maps))
    assert table["object_id"].to_pylist() == [10 * 40 + 20, 35 * 40 + 30]


def test_a_plateau_wider_than_the_disc_has_one_peak_however_it_is_cut():
    maps = np.zeros((3, 90, 90), int)
    maps[0, 20:70, 20:70] = 255
    store = store_of(rings(min_distance_um=2.0), maps)
    for window in (1000, 33, 16):
        assert rows_of(store, window_px=window)[0]["object_id"].to_pylist() == [20 * 90 + 20]


# ---- the same rows, whatever the windows --------------------------------------------


@pytest.mark.parametrize("stride", [1, 2])
def test_rows_do_not_depend_on_windows(monkeypatch, stride):
    monkeypatch.setattr(places, "PANEL_PX", 160)
    monkeypatch.setattr(places, "CELL_PX", 48)
    rng = np.random.default_rng(4)
    maps = rng.integers(0, 256, (3, 211, 333))
    maps[0] = ndi.gaussian_filter(rng.random((211, 333)), 2.5) * 460 // 16 * 16
    store = store_of(rings(stride=stride, min_distance_um=2.0 * stride), maps)
    first, extraction = rows_of(store)
    assert len(first) > 100
    assert shapely.is_valid(shapely.from_wkb(first["geometry"].to_numpy(False))).all()
    for window, halo in [(256, 32), (100, 8), (64, 0), (41, 5), (7, 0)]:
        table, again = rows_of(store, window_px=window, halo_px=halo, workers=2)
        assert table.equals(first), (window, halo)
        assert again.truncated == extraction.truncated
    assert extraction.oversized == 0


def test_boxes_stand_between_other_heads_in_the_model_s_order():
    store = tissue_like(2, (300, 260))
    head = rings(min_distance_um=2.0, parent="gland")
    heads = (store.spec.head("nuclei"), head, GLAND, TISSUE)
    store.spec = model(*heads)
    store.arrays["ring/prob"] = noise_maps(3, size=(300, 260))
    table, _ = rows_of(store, window_px=90)
    kinds = table["kind"].to_pylist()
    assert list(dict.fromkeys(kinds)) == ["nucleus", "signet-ring", "gland"]
    rows = table.to_pylist()
    glands = {row["object_id"]: row for row in rows if row["kind"] == "gland"}
    boxes = [row for row in rows if row["kind"] == "signet-ring"]
    assert {row["object_id"] >> 48 for row in boxes} == {1}
    for row in boxes:
        x, y = int(row["centroid_x"] // 4), int(row["centroid_y"] // 4)
        inside = [
            key
            for key, gland in glands.items()
            if shapely.contains_xy(shapely.from_wkb(gland["geometry"]), x * 4 + 2, y * 4 + 2)
        ]
        assert row["parent_id"] == (inside[0] if inside else None)
    assert any(row["parent_id"] for row in boxes)
    assert {row["tissue"] for row in boxes} - {None} <= set(TISSUE.classes)
    assert any(row["tissue"] for row in boxes)


# ---- the box ------------------------------------------------------------------------


def test_a_box_worked_by_hand():
    # 51 / 255 of 40 um is 8 um, 16 px of 0.5 um; 102 / 255 is 16 um, 32 px.
    maps = np.zeros((3, 100, 120), int)
    maps[:, 50, 30] = 204, 51, 102
    (row,) = rows_of(store_of(rings(max_size_um=40.0), maps))[0].to_pylist()
    assert box_of(row) == (22.5, 34.5, 38.5, 66.5)
    assert row["object_id"] == 50 * 120 + 30
    assert row["kind"] == "signet-ring"
    assert row["score"] == np.float32(0.8)
    assert row["area_um2"] == 128.0
    assert row["perimeter_um"] == 48.0
    assert row["solidity"] == 1.0
    assert (row["centroid_x"], row["centroid_y"]) == (30.5, 50.5)
    # The ellipse of a rectangle's moments: a side of w has a variance of w * w / 12.
    assert row["major_axis_um"] == pytest.approx(4 * 16 / np.sqrt(12))
    assert row["minor_axis_um"] == pytest.approx(4 * 8 / np.sqrt(12))
    assert (row["class"], row["class_prob"], row["parent_id"]) == (None, None, None)
    shape = shapely.from_wkb(row["geometry"])
    assert shape.equals(shapely.box(*box_of(row)))
    assert shape.exterior.is_ccw
    assert len(shape.exterior.coords) == 5


def test_a_box_is_at_least_a_pixel_and_odd_sides_lie_on_pixels():
    maps = np.zeros((3, 60, 60), int)
    maps[:, 10, 10] = 200, 0, 255  # 0 and 3 um: 1 and 6 px
    maps[:, 40, 40] = 200, 213, 0  # 2.506 um: 5 px
    rows = rows_of(store_of(rings(max_size_um=3.0), maps))[0].to_pylist()
    assert [box_of(row) for row in rows] == [(10, 7.5, 11, 13.5), (38, 40, 43, 41)]


def test_boxes_overlap_freely_and_are_clipped_to_the_slide():
    maps = np.zeros((3, 60, 80), int)
    maps[:, 30, 30] = maps[:, 30, 44] = 200, 128, 128  # 7 um apart, 16 um wide
    maps[:, 0, 79] = 255, 255, 64  # 32 um, 8 um
    table, extraction = rows_of(store_of(rings(max_size_um=32.0), maps))
    rows = {row["object_id"]: row for row in table.to_pylist()}
    assert box_of(rows[30 * 80 + 30]) == (14.5, 14.5, 46.5, 46.5)
    assert box_of(rows[30 * 80 + 44]) == (28.5, 14.5, 60.5, 46.5)
    cut = rows[79]
    assert box_of(cut) == (47.5, 0.0, 80.0, 8.5)
    assert cut["area_um2"] == np.float32(32.5 * 8.5 / 4)
    assert (cut["centroid_x"], cut["centroid_y"]) == (63.75, 4.25)
    assert cut["major_axis_um"] == pytest.approx(4 * 32.5 / 2 / np.sqrt(12))
    assert cut["minor_axis_um"] == pytest.approx(4 * 8.5 / 2 / np.sqrt(12))
    assert cut["solidity"] == 1.0
    assert extraction.truncated == 1


def test_pixels_that_are_not_square_and_a_coarser_head():
    # Head pixels of 2 x 2 working pixels: 1 um by 1.6 um.
    maps = np.zeros((3, 40, 40), int)
    maps[:, 20, 10] = 255, 127, 127  # 15.94 um: 16 px by 10 px
    head = rings(stride=2, max_size_um=32.0)
    store = store_of(head, maps, pixel_size=(0.5, 0.4), spacing=(1.0, 2.0))
    (row,) = rows_of(store)[0].to_pylist()
    # A head pixel spans 2 x 4 level-0 pixels; its centre is (10.5, 20.5) of them.
    assert box_of(row) == (21 - 16, 82 - 20, 21 + 16, 82 + 20)
    assert row["area_um2"] == np.float32(16 * 1.0 * 10 * 1.6)


def test_no_peak_no_row():
    table, extraction = rows_of(store_of(rings(), np.full((3, 50, 60), 76)))
    assert len(table) == 0
    assert extraction.truncated == 0


# ---- network, maps, table -----------------------------------------------------------

HEADS = (
    HeadSpec(name="nuclei", kind="instance", object_kind="nucleus", rules=AnchorRules()),
    rings(stride=2, parent="gland", min_distance_um=9.0, max_size_um=40.0),
    HeadSpec(
        name="gland",
        kind="instance",
        stride=2,
        object_kind="gland",
        rules=RunRules(min_core_um2=1.0),
    ),
)
SPEC = ModelSpec(
    name="tiny-rings",
    architecture="cerberus",
    mpp=0.5,
    halo_px=16,
    heads=HEADS,
    options={"widths": [4, 4, 4, 8], "blocks": [1, 1, 1, 1], "head_width": 4},
)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    torch.manual_seed(2)
    network = build_network(SPEC)
    with torch.no_grad():
        for module in network.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_(0, 0.2)
        logits = network.heads["ring"].output.logits
        logits.weight.normal_(0, 1.5)
        logits.bias.zero_()
    return save_bundle(tmp_path_factory.mktemp("zoo") / "tiny-rings", SPEC, network, card="")


@pytest.fixture(scope="module")
def slide(tmp_path_factory):
    path = tmp_path_factory.mktemp("slides") / "a.svs"
    write_slide(path, width=700, height=500, mpp=0.5, seed=3, truth=False)
    return path


def test_a_fresh_detect_head_expects_few_objects():
    torch.manual_seed(0)
    network = build_network(SPEC).eval()
    with torch.no_grad():
        logits = network(torch.rand(1, 3, 64, 64) * 255)["ring"]
    assert logits[:, 0].sigmoid().amax() < 0.03
    assert logits[:, 0].sigmoid().amin() > 0.002
    assert (logits[:, 1:].sigmoid() - 0.5).abs().amax() < 0.2


def test_maps_of_a_detect_head_are_sigmoids(bundle):
    predictor = TorchPredictor.load(bundle, device="cpu", precision="fp32", tile_size=64)
    predictor.margin_px = 0
    logits = torch.randn(2, 3, 96, 96) * 3
    (maps,) = predictor._maps(SPEC.head("ring"), logits, 96).values()
    p = 1 / (1 + np.exp(-logits.double().numpy()[..., 16:80, 16:80]))
    p = p.reshape(2, 3, 32, 2, 32, 2).mean((3, 5))
    assert maps.dtype == torch.uint8
    assert np.abs(maps.numpy() - p * 255).max() <= 0.5 + 1e-3


def run_with(bundle, slide, folder, heads):
    """Run the bundle's network with some of its heads; return report and results folder."""
    names = {head.name for head in heads}
    tensors = {
        name: tensor
        for name, tensor in bundle.load_network().state_dict().items()
        if not name.startswith("heads.") or name.split(".")[1] in names
    }
    tiny = save_bundle(folder / "tiny", replace(SPEC, heads=heads), tensors, card="")
    how = {"model": str(tiny.path), "device": "cpu", "precision": "fp32", "tile_size": 256}
    (report,) = wsi.run(slide, folder / "out", workers=2, **how)
    assert report.status == "done", report.error
    return report, folder / "out"


@pytest.mark.parametrize("alone", [False, True])
def test_a_run_writes_boxes_into_the_table(bundle, slide, tmp_path, monkeypatch, alone):
    heads = (replace(HEADS[1], parent=None),) if alone else HEADS
    drawn = {}
    draw = results.draw_preview
    monkeypatch.setattr(
        results, "draw_preview", lambda *a, **how: drawn.update(how) or draw(*a, **how)
    )
    report, out = run_with(bundle, slide, tmp_path, heads)
    assert set(report.counts) == {h.object_kind for h in heads}
    table = wsi.read_objects(out / "objects" / "a.parquet", kind="signet-ring")
    assert len(table) == report.counts["signet-ring"] > 20
    assert table.geometry.is_valid.all()
    maps = wsi.open_maps(out / "maps" / "a.zarr")["ring/prob"].compute()
    check_boxes(table, maps, 0 if alone else 1)
    # Alone, the boxes are the preview's density; beside nuclei they are outlined.
    if alone:
        assert set(drawn["polygons"]) == set()
        assert len(drawn["points"]) == len(table)
    else:
        assert set(drawn["polygons"]) == {"signet-ring", "gland"}
        assert len(drawn["polygons"]["signet-ring"]) == len(table)
    assert '"heat"' in (out / "maps" / "a.zarr" / "zarr.json").read_text()


def test_a_run_that_finds_nothing_says_so(bundle, slide, tmp_path):
    head = replace(HEADS[1], parent=None, rules=PeakRules(threshold=0.999))
    report, out = run_with(bundle, slide, tmp_path, (head,))
    assert report.counts == {"signet-ring": 0}
    assert len(wsi.read_objects(out / "objects")) == 0


def check_boxes(table, maps, place):
    """The rows are the peaks of the map of a 700 x 500 slide, each with the stated box."""
    heat, *sides = maps
    expected = plain_peaks(heat, HEADS[1].rules, (1.0, 1.0))
    assert sorted(table.object_id) == [(place << 48) + y * 350 + x for x, y in expected]
    for row in table.itertuples():
        y, x = divmod(row.object_id - (place << 48), 350)
        wide, high = (max(1, np.floor(side[y, x] / 255 * 40 + 0.5)) for side in sides)
        middle_x, middle_y = 2 * x + 1, 2 * y + 1
        box = shapely.box(middle_x - wide, middle_y - high, middle_x + wide, middle_y + high)
        assert row.geometry.equals(box.intersection(shapely.box(0, 0, 700, 500)))
