from __future__ import annotations

from dataclasses import replace

import numpy as np
import pyarrow as pa
import pytest
import shapely
from object_maps import (
    GLAND,
    LUMEN,
    NUCLEI,
    TISSUE,
    TYPE,
    MemoryStore,
    model,
    noise,
    tissue_like,
)
from scipy import ndimage as ndi
from test_kernels import plain_growth

from wsi_pipeline.errors import Interrupted, ModelBundleError
from wsi_pipeline.geometry import PixelGrid
from wsi_pipeline.instances import extract, extract_objects, outline_polygons, places
from wsi_pipeline.instances.regions import element_offsets
from wsi_pipeline.spec import AnchorRules, HeadSpec, RunRules
from wsi_pipeline.table import OBJECT_SCHEMA

WINDOWS = [(4096, 0), (256, 32), (100, 8), (333, 24), (64, 0), (128, 64), (41, 5)]
SQUARE = np.ones((3, 3), bool)


def objects_of(store, **options):
    extraction = extract_objects(store, slide_id="s", **options)
    table = pa.Table.from_batches(list(extraction.batches), OBJECT_SCHEMA)
    return table.combine_chunks(), extraction


def shapes_of(table):
    return shapely.from_wkb(table["geometry"].to_numpy(zero_copy_only=False))


def one_head(head, inner, contour=None, **more):
    """A store of one head at one level-0 pixel of 0.5 micrometres a map pixel."""
    inner = np.asarray(inner, float)
    contour = np.zeros_like(inner) if contour is None else contour
    prob = (np.stack([inner, contour]) * 255 + 0.5).astype(np.uint8)
    height, width = inner.shape
    options = {"spacing": (1.0, 1.0), "pixel_size": (0.5, 0.5), **more}
    return MemoryStore(
        spec=model(head), size=(width, height), arrays={f"{head.name}/prob": prob}, **options
    )


def square(*boxes, size=200, value=0.9):
    image = np.zeros((size, size))
    for (y0, y1), (x0, x1) in boxes:
        image[y0:y1, x0:x1] = value
    return image


def nuclei(**rules):
    return HeadSpec(name="n", kind="instance", object_kind="nucleus", rules=AnchorRules(**rules))


def glands(**rules):
    return HeadSpec(name="g", kind="instance", object_kind="gland", rules=RunRules(**rules))


def extents(table):
    """The pixel boxes (x0, y0, x1, y1) of the objects."""
    return [tuple(b.values()) for b in table["bbox"].to_pylist()]


# ---- the same rows, whatever the windows -------------------------------------------


@pytest.mark.parametrize(
    "store",
    [
        pytest.param(tissue_like(0), id="tissue"),
        pytest.param(tissue_like(7, (411, 505)), id="tissue-odd-size"),
        *(
            pytest.param(noise(seed, level=level), id=f"noise-{seed}")
            for seed, level in [(1, 0.6), (2, 0.8), (3, 0.3), (4, 0.7), (5, 0.75), (6, 0.92)]
        ),
    ],
)
def test_rows_do_not_depend_on_windows(store, monkeypatch):
    monkeypatch.setattr(places, "PANEL_PX", 160)
    monkeypatch.setattr(places, "CELL_PX", 48)
    monkeypatch.setattr(extract, "_CHUNK", 7)
    first, extraction = objects_of(store)
    assert len(first) > 20
    assert shapely.is_valid(shapes_of(first)).all()
    counts = extraction.truncated, extraction.oversized
    for window, halo in WINDOWS:
        table, extraction = objects_of(store, window_px=window, halo_px=halo, workers=2)
        assert table.equals(first), (window, halo)
        assert (extraction.truncated, extraction.oversized) == counts


def test_rows_are_ordered_by_head_panel_cell_and_id(monkeypatch):
    store = tissue_like(1)
    monkeypatch.setattr(places, "PANEL_PX", 200)
    monkeypatch.setattr(places, "CELL_PX", 64)
    table, _ = objects_of(store, window_px=90)
    keys = []
    for row in table.select(["object_id"]).to_pylist():
        head = store.spec.heads[row["object_id"] >> 48]
        width = store.head_grid(head.name).size[0]
        y, x = divmod(row["object_id"] & (2**48 - 1), width)
        panel, cell = 200 // head.stride, 64 // head.stride
        keys.append((row["object_id"] >> 48, x // panel, y // cell, x // cell, y, x))
    assert keys == sorted(keys)
    assert len(set(keys)) == len(keys)
    assert len({key[:4] for key in keys}) > 40


def test_oversized_cores_are_dropped_counted_and_still_block():
    inner = np.zeros((300, 400))
    inner[100:104, 20:380] = 0.9  # far longer than allowed
    inner[106:116, 30:42] = 0.8  # grows towards it
    contour = np.zeros_like(inner)
    contour[90:130, 10:390] = np.where(inner[90:130, 10:390] > 0, 0, 0.7)
    tables = []
    for window, halo in [(4096, 0), (64, 8), (100, 0), (37, 30)]:
        table, extraction = objects_of(
            one_head(nuclei(max_diameter_um=40), inner, contour), window_px=window, halo_px=halo
        )
        assert extraction.oversized == 1
        tables.append(table)
    assert all(table.equals(tables[0]) for table in tables)
    (box,) = extents(tables[0])
    # Rows 104 and 105 lie between the two: one step for each, and no overlap.
    assert box == (27, 105, 45, 119)


def test_a_cut_core_that_may_be_too_small_to_count_is_waited_for():
    # A thin core below the limit crosses the window's side, close to an object: seen in
    # part it cannot be told from a large one, which would keep its pixels for itself.
    inner = np.zeros((80, 130))
    inner[33:40, 58:70] = 0.9
    inner[31, 60:90] = 0.9
    store = one_head(nuclei(min_core_um2=10), inner, np.where(inner > 0, 0, 0.7))
    whole, _ = objects_of(store)
    assert extents(whole) == [(55, 30, 73, 43)]
    assert objects_of(store, window_px=64, halo_px=20)[0].equals(whole)


# ---- agreement with a plain implementation on the whole map ------------------------


def plain_anchored(store, head):
    rules, (mx, my) = head.rules, (0.5, 0.5)
    inner, contour = (p.astype(int) for p in store.arrays[f"{head.name}/prob"])
    above = (inner + contour) / 255 > rules.foreground_threshold
    ground = ndi.binary_erosion(above, border_value=1)
    cores = ground & (inner / 255 > rules.inner_threshold)
    labels, n = ndi.label(cores)
    boxes = ndi.find_objects(labels)
    area = np.bincount(labels.ravel(), minlength=n + 1)
    too_small = np.isin(labels, np.flatnonzero(area * mx * my < rules.min_core_um2))
    labels[too_small] = 0
    grown = plain_growth(
        np.pad(labels, 1), np.pad(inner, 1), np.pad(ground, 1), round(rules.grow_um / 0.5)
    )[1:-1, 1:-1]
    limit = round(rules.max_diameter_um / 0.5)
    for i in np.unique(labels[labels > 0]):
        if max(s.stop - s.start for s in boxes[i - 1]) <= limit:
            own = grown == i
            region = ndi.binary_fill_holes(own)
            if region.sum() * mx * my >= rules.min_area_um2:
                yield np.argwhere(labels == i)[0], own, region


def plain_regions(store, head, parents=None):
    rules, mpp = head.rules, 1.0
    inner, contour = (p.astype(int) for p in store.arrays[f"{head.name}/prob"])
    core = (inner / 255 > rules.inner_threshold) & ~(contour / 255 > rules.contour_threshold)
    pieces = [core] if parents is None else [core & region for _, _, region in parents]
    labels, owner, n = np.zeros(core.shape, int), [None], 0
    for parent, piece in enumerate(pieces):
        found, m = ndi.label(piece)
        area = np.bincount(found.ravel(), minlength=m + 1)
        for i in range(1, m + 1):
            if area[i] * mpp * mpp >= rules.min_core_um2:
                n += 1
                labels[found == i] = n
                owner.append(parent)
    element = element_offsets(round(rules.grow_um / mpp))
    allowed = np.zeros((n + 1, *core.shape), bool)
    for dx, dy in element:
        shifted = np.roll(np.pad(labels, 9), (-dy, -dx), (0, 1))[9:-9, 9:-9]
        for i in range(1, n + 1):
            allowed[i] |= shifted == i
    if parents is not None:
        for i in range(1, n + 1):
            allowed[i] &= parents[owner[i]][2]
    steps = max((abs(dx) + abs(dy) for dx, dy in element), default=0)
    pad = ((1, 1), (1, 1))
    grown = plain_growth(
        np.pad(labels, pad),
        np.pad(inner, pad),
        np.pad(np.ones_like(core), pad),
        steps,
        np.pad(allowed, ((0, 0), *pad)),
    )[1:-1, 1:-1]
    for i in range(1, n + 1):
        own = grown == i
        region = own.copy()
        outside, m = ndi.label(np.pad(~own, 1, constant_values=True), SQUARE)
        for k in range(2, m + 1):
            hole = (outside == k)[1:-1, 1:-1]
            small = rules.fill_holes_um2 is None or hole.sum() * mpp * mpp < rules.fill_holes_um2
            inside = parents is None or (parents[owner[i]][2] | ~hole).all()
            if small and inside and not (grown[hole] > 0).any():
                region |= hole
        yield np.argwhere(labels == i)[0], own, region, owner[i]


def judge(store, head, rows, expected):
    """Compare table rows with ``(anchor, label mask, region mask)`` of a whole map."""
    inner = store.arrays[f"{head.name}/prob"][0].astype(int)
    width = inner.shape[1]
    yy, xx = np.indices(inner.shape)
    by_id = {row["object_id"] & (2**48 - 1): row for row in rows}
    assert len(by_id) == len(rows) == len(expected)
    for (y, x), own, region, *_ in expected:
        row = by_id[int(y) * width + int(x)]
        shape = shapely.from_wkb(row["geometry"])
        assert shape.is_valid
        step = 2.0 * head.stride
        inside = shapely.contains_xy(shape, (xx + 0.5) * step, (yy + 0.5) * step)
        assert np.array_equal(inside, region)
        um = 0.25 * step
        assert row["area_um2"] == np.float32(region.sum() * um * um)
        assert row["score"] == pytest.approx(inner[own].mean() / 255)
        cy, cx = (v.mean() + 0.5 for v in np.nonzero(region))
        assert (row["centroid_x"], row["centroid_y"]) == pytest.approx((cx * step, cy * step))
        assert row["perimeter_um"] == pytest.approx(shape.length * 0.25)
        assert row["solidity"] == pytest.approx(shape.area / shape.convex_hull.area)
        assert row["solidity"] <= 1
        covariance = np.cov(np.nonzero(region), bias=True) + np.eye(2) / 12
        axes = 4 * np.sqrt(np.linalg.eigvalsh(covariance)) * um
        found = [row["minor_axis_um"], row["major_axis_um"]]
        assert found == pytest.approx(axes, abs=1e-5)
        assert tuple(row["bbox"].values()) == shape.bounds


@pytest.mark.parametrize(
    "store",
    [
        pytest.param(tissue_like(11, (330, 290)), id="tissue"),
        pytest.param(noise(12, (90, 70), level=0.7), id="noise"),
        pytest.param(noise(13, (90, 70), level=0.5), id="noise-sparse"),
    ],
)
def test_agreement_with_a_plain_whole_map_implementation(store):
    rows = objects_of(store, window_px=64, halo_px=8)[0].to_pylist()
    by_kind = {
        kind: [r for r in rows if r["kind"] == kind] for kind in ("nucleus", "gland", "lumen")
    }
    spec = store.spec
    anchored = list(plain_anchored(store, spec.head("nuclei")))
    parents = list(plain_regions(store, spec.head("gland")))
    lumina = list(plain_regions(store, spec.head("lumen"), [p[:3] for p in parents]))
    assert anchored
    assert parents
    assert lumina
    judge(store, spec.head("nuclei"), by_kind["nucleus"], anchored)
    judge(store, spec.head("gland"), by_kind["gland"], parents)
    judge(store, spec.head("lumen"), by_kind["lumen"], lumina)

    width = store.head_grid("gland").size[0]
    gland_ids = [(2 << 48) + int(y) * width + int(x) for (y, x), *_ in parents]
    lumen_parent = {int(y) * width + int(x): gland_ids[p] for (y, x), _, _, p in lumina}
    for row in by_kind["lumen"]:
        assert row["parent_id"] == lumen_parent[row["object_id"] & (2**48 - 1)]
    tissue = store.arrays["tissue/class"]
    for row in by_kind["nucleus"]:
        x, y = int(row["centroid_x"] // 4), int(row["centroid_y"] // 4)
        inside = [
            g for g, (_, _, region, _) in zip(gland_ids, parents, strict=True) if region[y, x]
        ]
        assert row["parent_id"] == (inside[0] if inside else None)
        known = store.arrays["tissue/prob"][:, y // 8, x // 8].any()
        assert row["tissue"] == (TISSUE.classes[tissue[y // 8, x // 8]] if known else None)


# ---- the rules one by one -----------------------------------------------------------


@pytest.mark.parametrize(
    ("boxes", "min_core", "diameter", "threshold", "expected"),
    [
        # Upstream Cerberus at 0.5 micrometres a pixel: half-open pixel extents.
        ([((60, 110), (60, 110))], 1000, 10, 0.55, (56, 56, 115, 115)),
        ([((60, 110), (60, 110))], 250, 5, 0.55, (58, 58, 112, 112)),
        ([((60, 77), (60, 77))], 150, 2, 0.5, (60, 60, 78, 78)),
        ([((60, 77), (60, 77))], 37, 1, 0.5, (60, 60, 77, 77)),
        # At the border upstream forgets to pad and does not widen; here it does.
        ([((10, 60), (10, 60))], 1000, 10, 0.55, (6, 6, 65, 65)),
    ],
)
def test_golden_regions(boxes, min_core, diameter, threshold, expected):
    head = glands(inner_threshold=threshold, min_core_um2=min_core / 4, grow_um=diameter / 2)
    table, _ = objects_of(one_head(head, square(*boxes)))
    assert extents(table) == [expected]


def test_golden_nuclei():
    inner = square(((6, 18), (6, 18)), ((30, 42), (30, 42)))
    contour = np.zeros_like(inner)
    contour[18:20, 6:18] = 0.9
    table, _ = objects_of(one_head(nuclei(), inner, contour))
    assert extents(table) == [(7, 7, 17, 19), (31, 31, 41, 41)]
    table, _ = objects_of(one_head(nuclei(), np.full((50, 50), 0.3), np.full((50, 50), 0.4)))
    assert len(table) == 0


@pytest.mark.parametrize(
    ("diameter", "rows"),
    [
        (1, []),
        (2, [1, 2]),
        (3, [1, 3, 1]),
        (5, [1, 5, 5, 5, 1]),
        (10, [1, 7, 9, 10, 10, 10, 10, 10, 9, 7]),
        (11, [1, 7, 9, 11, 11, 11, 11, 11, 9, 7, 1]),
    ],
)
def test_structuring_elements(diameter, rows):
    offsets = element_offsets(diameter)
    assert [sum(dy == row - diameter // 2 for _, dy in offsets) for row in range(len(rows))] == rows


def test_a_small_core_is_no_seed_and_a_small_object_no_object():
    inner = square(((20, 22), (20, 22)), ((40, 43), (40, 43)), size=64)
    contour = np.where(inner > 0, 0, 0.9)
    contour[:, 32:] = 0
    contour[39:44, 39:44] = np.where(inner[39:44, 39:44] > 0, 0, 0.9)
    kept = objects_of(
        one_head(nuclei(min_core_um2=1.0, min_area_um2=0, grow_um=0), inner, contour)
    )[0]
    assert kept["area_um2"].to_pylist() == [1.0, 2.25]
    kept = objects_of(
        one_head(nuclei(min_core_um2=1.01, min_area_um2=0, grow_um=0), inner, contour)
    )[0]
    assert kept["area_um2"].to_pylist() == [1.0, 2.25]  # 1.01 um2 is 4.04 px: 4 is not smaller
    kept = objects_of(
        one_head(nuclei(min_core_um2=1.25, min_area_um2=0, grow_um=0), inner, contour)
    )[0]
    assert kept["area_um2"].to_pylist() == [2.25]
    kept = objects_of(
        one_head(nuclei(min_core_um2=1.0, min_area_um2=2.5, grow_um=0), inner, contour)
    )[0]
    assert len(kept) == 0


def test_holes_of_regions():
    ring = square(((20, 60), (20, 60)), ((20, 60), (80, 120)), ((20, 60), (140, 180)))
    ring[35:45, 35:45] = 0  # 100 px
    ring[25:55, 85:115] = 0  # 900 px
    ring[36:44, 96:104] = 0.9  # an object inside the hole
    ring[25:55, 145:175] = 0
    head = glands(min_core_um2=1, grow_um=0)
    shapes = shapes_of(objects_of(one_head(head, ring))[0])
    assert sorted(len(s.interiors) for s in shapes) == [0, 0, 0, 1]
    with_limit = glands(min_core_um2=1, grow_um=0, fill_holes_um2=100)
    table, _ = objects_of(one_head(with_limit, ring))
    assert [len(s.interiors) for s in shapes_of(table)] == [0, 1, 1, 0]
    assert table["area_um2"].to_pylist() == [1600 / 4, 700 / 4, 700 / 4, 64 / 4]


def lumen_store(lumen_boxes, gland_boxes):
    size = 200
    arrays = {}
    for name, boxes in (("gland", gland_boxes), ("lumen", lumen_boxes)):
        prob = np.zeros((2, size, size), np.uint8)
        prob[0] = square(*boxes, size=size) * 255
        arrays[f"{name}/prob"] = prob
    return MemoryStore(spec=model(GLAND, LUMEN), size=(2 * size, 2 * size), arrays=arrays)


def test_lumen_outside_every_gland_is_none_and_one_across_two_is_two():
    store = lumen_store(
        [((50, 60), (20, 110)), ((150, 160), (150, 160))],
        [((40, 80), (30, 60)), ((40, 80), (70, 100))],
    )
    rows = objects_of(store)[0].to_pylist()
    glands_, lumina = rows[:2], rows[2:]
    assert [r["kind"] for r in rows] == ["gland", "gland", "lumen", "lumen"]
    assert [r["parent_id"] for r in lumina] == [r["object_id"] for r in glands_]
    for lumen, gland in zip(lumina, glands_, strict=True):
        inner, outer = (shapely.from_wkb(r["geometry"]) for r in (lumen, gland))
        assert outer.covers(inner)


def test_a_hole_is_not_filled_beyond_the_parent():
    # A gland with an island gland in its hole; the lumen's hole is just there.
    gland = square(((20, 100), (20, 100)))
    gland[50:70, 50:70] = 0
    gland[55:65, 55:65] = 0.9
    store = lumen_store([((30, 90), (30, 90))], [])
    store.arrays["gland/prob"][0] = gland * 255
    store.arrays["lumen/prob"][0, 48:72, 48:72] = 0
    rows = objects_of(store)[0].to_pylist()
    (lumen,) = (r for r in rows if r["kind"] == "lumen")
    shape = shapely.from_wkb(lumen["geometry"])
    assert len(shape.interiors) == 1


def test_votes():
    # pixel votes of three squares of 100: majority; runner-up behind "none"; only "none"
    inner = np.zeros((40, 120), np.uint8)
    type_ = np.zeros((40, 120), np.uint8)
    for i in range(3):
        inner[10:20, 10 + 40 * i : 20 + 40 * i] = 255
    type_[10:20, 10:16], type_[10:20, 16:20] = 2, 1
    type_[10:20, 50:53], type_[10:20, 53:55] = 3, 1
    head = HeadSpec(
        name="nuclei", kind="instance", object_kind="nucleus", rules=AnchorRules(grow_um=0)
    )
    prob = np.stack([inner, np.where(inner > 0, 0, 200).astype(np.uint8)])
    store = MemoryStore(
        spec=model(head, TYPE), size=(120, 40), arrays={"nuclei/prob": prob, "type/class": type_}
    )
    table, _ = objects_of(store)
    assert table["class"].to_pylist() == ["immune", "stromal", None]
    assert table["class_prob"].to_pylist() == [np.float32(0.6), np.float32(0.3), None]
    assert table["tissue"].to_pylist() == [None] * 3
    assert table["parent_id"].to_pylist() == [None] * 3


@pytest.mark.parametrize("window", [7, 16, 33, 1000])
def test_votes_of_regions_whatever_the_window(window):
    rng = np.random.default_rng(4)
    inner = np.zeros((60, 90))
    inner[20:44, 13:50], inner[8:30, 60:84] = 0.9, 0.9
    head = glands(grow_um=0, min_core_um2=10)
    store = one_head(head, inner)
    type_ = rng.integers(0, 4, inner.shape).astype(np.uint8)
    classes = replace(TYPE, classifies=head.name, stride=head.stride)
    arrays = {**store.arrays, f"{classes.name}/class": type_}
    store = replace(store, spec=model(head, classes), arrays=arrays)
    table, _ = objects_of(store, window_px=window)
    shares = []
    for box in (np.s_[8:30, 60:84], np.s_[20:44, 13:50]):
        counts = np.bincount(type_[box].ravel(), minlength=4)
        best = counts.argmax() or 1 + counts[1:].argmax()
        shares.append((TYPE.classes[best], np.float32(counts[best] / counts.sum())))
    found = zip(table["class"].to_pylist(), table["class_prob"].to_pylist(), strict=True)
    assert sorted(found) == sorted(shares)


def test_an_object_larger_than_the_window_across_corners_and_at_the_border():
    yy, xx = np.mgrid[:260, :260]
    disc = np.hypot(xx - 130, yy - 130) < 110
    bar = (yy < 6) & (xx > 20)
    inner = np.where(disc | bar, 0.9, 0.0)
    for head in (nuclei(max_diameter_um=200, grow_um=0), glands(grow_um=0)):
        store = one_head(head, inner)
        for window, halo in [(65, 0), (130, 16), (1000, 0)]:
            table, extraction = objects_of(store, window_px=window, halo_px=halo)
            assert len(table) == 2
            assert extraction.truncated == 1
            # The cross erodes nuclei by a pixel, but not along the slide's border.
            assert extents(table)[0] in {(21, 0, 260, 6), (22, 0, 260, 5)}


def test_zero_objects():
    table, extraction = objects_of(one_head(nuclei(), np.zeros((50, 70))))
    assert len(table) == 0
    assert (extraction.truncated, extraction.oversized) == (0, 0)
    assert len(objects_of(one_head(glands(), np.zeros((50, 70))))[0]) == 0


def test_anisotropic_pixels():
    store = one_head(
        glands(grow_um=0),
        square(((10, 50), (20, 60)), size=90),
        pixel_size=(0.5, 0.25),
        spacing=(1.0, 3.0),
    )
    row = objects_of(store)[0].to_pylist()[0]
    assert row["area_um2"] == 1600 * 0.5 * 0.75
    assert (row["centroid_x"], row["centroid_y"]) == (40.0, 90.0)
    assert tuple(row["bbox"].values()) == (20.0, 30.0, 60.0, 150.0)
    assert row["major_axis_um"] == pytest.approx(4 * np.sqrt(1600 / 12) * 0.75)
    assert row["minor_axis_um"] == pytest.approx(4 * np.sqrt(1600 / 12) * 0.5)
    corner = 39 * 2 * (0.5 + 0.75) + 4 * np.hypot(0.25, 0.375)
    assert row["perimeter_um"] == pytest.approx(corner)


# ---- stops, wrong use, masks ---------------------------------------------------------


@pytest.mark.parametrize("workers", [1, 2])
def test_stop(workers):
    asked = iter([False] * 5 + [True] * 10**6)
    extraction = extract_objects(
        tissue_like(0), slide_id="s", window_px=64, workers=workers, stop=lambda: next(asked)
    )
    with pytest.raises(Interrupted):
        list(extraction.batches)


def test_rules_that_contradict_each_other():
    circle = model(
        HeadSpec(name="a", kind="instance", object_kind="a", rules=RunRules(), parent="b"),
        HeadSpec(name="b", kind="instance", object_kind="b", rules=RunRules(), parent="a"),
    )
    confined = model(
        GLAND,
        HeadSpec(
            name="n",
            kind="instance",
            object_kind="n",
            stride=2,
            rules=AnchorRules(),
            parent="gland",
            inside_parent=True,
        ),
    )
    for spec, message in ((circle, "each other's parents"), (confined, "inside_parent")):
        store = MemoryStore(spec=spec, size=(10, 10), arrays={})
        with pytest.raises(ModelBundleError, match=message):
            extract_objects(store, slide_id="s")
    with pytest.raises(ValueError, match="window"):
        extract_objects(tissue_like(0, (64, 64)), slide_id="s", window_px=0)


def test_children_may_stand_before_their_parents():
    assert objects_of(tissue_like(3, (300, 200)))[0]["kind"].to_pylist()[0] == "nucleus"
    assert NUCLEI.parent == "gland"


def test_outlines_of_a_label_image():
    image = np.zeros((8, 9), np.uint8)
    image[1:6, 1:6] = 2
    image[3, 3] = 0
    image[0, 8] = image[2:4, 6] = 5
    grid = PixelGrid(origin=(10.0, 20.0), spacing=(4.0, 8.0), size=(9, 8))
    found = outline_polygons(image, grid)
    assert [(value, area) for value, _, area in found] == [(5, 1), (2, 24), (5, 2)]
    ring = shapely.from_wkb(found[1][1])
    assert ring.is_valid
    assert len(ring.interiors) == 1
    assert ring.bounds == (14.0, 28.0, 34.0, 68.0)
    assert ring.exterior.is_ccw
    assert outline_polygons(np.zeros((4, 4), bool), grid) == []
