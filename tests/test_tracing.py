from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import shapely
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage as ndi

from wsi_pipeline.geometry import PixelGrid
from wsi_pipeline.instances.kernels import describe, find_runs, label_runs
from wsi_pipeline.instances.outlines import MEASURES, Outlines
from wsi_pipeline.instances.runs import Runs
from wsi_pipeline.instances.tracing import trace_labels, trace_runs

settings.register_profile("compiled", deadline=None)  # the first call compiles
settings.load_profile("compiled")

GRID = PixelGrid(origin=(0.0, 0.0), spacing=(1.0, 1.0), size=(99, 99))


def drawn(mask, grid=GRID):
    """Trace all components of a mask with their holes; return outlines, polygons, labels."""
    runs = Runs.of_image(np.ascontiguousarray(mask, np.uint8))
    labels, count = runs.components()
    anchors = np.ascontiguousarray(runs.describe(labels, count)[:, 5:7])
    outlines = trace_runs(*runs.relabel(labels).by_value(), anchors)
    return outlines, polygons(outlines, grid), ndi.label(mask)[0]


def polygons(outlines, grid=GRID):
    offsets, data = outlines.wkb(grid)
    text = data.tobytes()
    return [shapely.from_wkb(text[a:b]) for a, b in pairwise(offsets)]


@settings(max_examples=60)
@given(st.integers(0, 2**32 - 1), st.floats(0.3, 0.9))
def test_polygons_of_noise_are_valid_and_hold_exactly_their_pixels(seed, level):
    mask = np.random.default_rng(seed).random((24, 27)) < level
    outlines, shapes, labels = drawn(mask)
    yy, xx = np.indices(mask.shape)
    assert shapely.is_valid(shapes).all()
    for i, shape in enumerate(shapes):
        own = labels == i + 1
        assert np.array_equal(shapely.contains_xy(shape, xx + 0.5, yy + 0.5), own)
        assert shape.exterior.is_ccw
        assert not any(ring.is_ccw for ring in shape.interiors)
        assert shape.area == own.sum() - 0.5 + 0.5 * len(shape.interiors)
        assert outlines.column("hull")[i] / 8 == shape.convex_hull.area
        assert shape.bounds == tuple(outlines.bounds(GRID)[i])
        steps = [outlines.column(f"steps_{n}")[i] for n in ("x", "y", "diagonal")]
        assert steps[0] + steps[1] + steps[2] * np.sqrt(0.5) == pytest.approx(shape.length)
        y, x = yy[own], xx[own]
        x, y = x - x[0], y - y[0]
        sums = [own.sum(), x.sum(), y.sum(), (x * x).sum(), (x * y).sum(), (y * y).sum()]
        assert outlines.measures[i, :6].tolist() == sums
    union = sum(shape.area for shape in shapes)
    assert shapely.unary_union(shapes).area == pytest.approx(union) if shapes else not mask.any()


@settings(max_examples=30)
@given(st.integers(0, 2**32 - 1))
def test_outer_rings_of_a_label_image(seed):
    mask = np.pad(np.random.default_rng(seed).random((20, 21)) < 0.62, 1)
    y, x0, x1, value = find_runs(mask.view(np.uint8))
    labels, count = label_runs(y, x0, x1, value, 0)
    table = describe(y, x0, x1, labels, count)
    image = ndi.label(mask)[0]
    first = table[:, 6] * mask.shape[1] + table[:, 5]
    bits, dtype = ((22, np.int32), (40, np.int64))[seed % 2]
    beside = np.random.default_rng(seed).integers(0, 256, mask.shape) << bits
    kept, outlines = trace_labels(
        (image | np.where(image, beside, 0)).astype(dtype),
        np.arange(1, count + 1),
        first,
        table[:, 0],
        table[:, 5:7] + [7, 11],
        label_bits=bits,
        origin=(7, 11),
        min_area_px=3,
    )
    filled = [ndi.binary_fill_holes(image == i) for i in range(1, count + 1)]
    areas = np.array([f.sum() for f in filled])
    assert kept.tolist() == (areas >= 3).tolist()
    assert outlines.column("area").tolist() == areas[kept].tolist()
    yy, xx = np.indices(mask.shape)
    for shape, i in zip(polygons(outlines), np.flatnonzero(kept), strict=True):
        assert shape.is_valid
        assert np.array_equal(shapely.contains_xy(shape, xx + 7.5, yy + 11.5), filled[i])


def test_one_pixel_is_a_diamond_on_the_grid():
    grid = PixelGrid(origin=(100.0, 200.0), spacing=(2.0, 4.0), size=(9, 9))
    outlines, (shape,), _ = drawn(np.pad([[True]], ((2, 0), (3, 0))), grid)
    assert set(shape.exterior.coords) == {
        (107.0, 208.0),
        (108.0, 210.0),
        (107.0, 212.0),
        (106.0, 210.0),
    }
    assert dict(zip(MEASURES, outlines.measures[0], strict=True))["steps_diagonal"] == 4


def worst_cases():
    """Objects with as many vertices a pixel, or a run, as there can be."""
    comb = np.zeros((900, 3), bool)
    comb[:, 0] = True
    comb[::2, 1:] = True
    stairs = np.eye(300, dtype=bool) | np.eye(300, k=1, dtype=bool)
    sieve = np.ones((201, 201), bool)
    sieve[1::2, 1::2] = False
    return {
        "comb": comb,
        "across": comb.T,
        "stairs": stairs,
        "mirrored": stairs[:, ::-1],
        "sieve": sieve,
        "line": np.ones((1, 5000), bool),
        "dot": np.ones((1, 1), bool),
    }


@pytest.mark.parametrize("name", worst_cases())
def test_room_for_the_longest_rings(name):
    mask = worst_cases()[name]
    outlines, (shape,), _ = drawn(mask)
    n_runs = find_runs(np.ascontiguousarray(mask, np.uint8))[0].size
    assert shape.is_valid
    assert len(outlines.vertices) <= 6 * n_runs
    holes = len(shape.interiors)
    assert shape.area == mask.sum() - 0.5 + 0.5 * holes
    cells = np.pad(mask, 1).astype(np.int32, order="C")
    first = np.flatnonzero(cells)[:1]
    _, outer = trace_labels(
        cells, np.ones(1, np.int64), first, np.array([mask.sum()]), np.zeros((1, 2), np.int64),
        label_bits=22, origin=(0, 0), min_area_px=0,
    )  # fmt: skip
    assert len(outer.vertices) <= 2 * mask.sum() + 2
    assert polygons(outer)[0].area == shapely.Polygon(shape.exterior).area


def test_concatenation_keeps_objects_apart():
    one, shapes, _ = drawn(np.array([[1, 1, 1], [1, 0, 1], [1, 1, 1]], bool))
    two, more, _ = drawn(np.array([[1, 0, 1]], bool))
    both = Outlines.concatenate([one, two, one])
    assert polygons(both) == [*shapes, *more, *shapes]
    assert both.ring_counts.tolist() == [2, 1, 1, 2]
