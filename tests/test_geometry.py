"""Boxes and grids: the algebra everything else stands on."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from wsi_pipeline.geometry import Box, PixelGrid

boxes = st.builds(
    Box,
    x=st.integers(-500, 500),
    y=st.integers(-500, 500),
    width=st.integers(0, 300),
    height=st.integers(0, 300),
)
grids = st.builds(
    PixelGrid,
    origin=st.tuples(st.floats(-100, 100), st.floats(-100, 100)),
    spacing=st.tuples(st.floats(0.1, 40), st.floats(0.1, 40)),
    size=st.tuples(st.integers(0, 2000), st.integers(0, 2000)),
)


def pixels(box: Box) -> set[tuple[int, int]]:
    return {(x, y) for y in range(box.y, box.y1) for x in range(box.x, box.x1)}


small = st.builds(
    Box,
    x=st.integers(-6, 6),
    y=st.integers(-6, 6),
    width=st.integers(0, 8),
    height=st.integers(0, 8),
)


@given(small, small)
def test_boxes_behave_like_sets_of_pixels(a, b):
    assert pixels(a.intersect(b)) == pixels(a) & pixels(b)
    assert a.area == len(pixels(a))
    if b.area:
        assert a.contains(b) == (pixels(b) <= pixels(a))
    assert pixels(a.relative_to(b).shift(b.x, b.y)) == pixels(a)


@given(boxes, st.integers(0, 50))
def test_padding_is_undone_by_negative_padding(box, margin):
    assert box.pad(margin).pad(-margin) == box


@given(small, st.integers(1, 5))
def test_coarse_box_covers_and_is_smallest(box, stride):
    coarse = pixels(box.coarsen(stride))
    assert coarse >= {(x // stride, y // stride) for x, y in pixels(box)}
    if box.area:
        assert coarse == {(x // stride, y // stride) for x, y in pixels(box)}


@given(boxes)
def test_slices_cut_the_box_out(box):
    box = box.shift(500, 500)
    canvas = np.zeros((1400, 1400), bool)
    canvas[box.slices] = True
    assert canvas.sum() == box.area


def test_negative_sizes_are_refused():
    with pytest.raises(ValueError, match="negative"):
        Box(x=0, y=0, width=-1, height=3)
    with pytest.raises(ValueError, match="positive"):
        PixelGrid(origin=(0, 0), spacing=(0.0, 1.0), size=(1, 1))


@given(grids, st.lists(st.tuples(st.floats(-1e4, 1e4), st.floats(-1e4, 1e4)), min_size=1))
def test_level0_and_back(grid, points):
    xy = np.array(points)
    np.testing.assert_allclose(grid.from_level0(grid.to_level0(xy)), xy, atol=1e-6)


@given(grids, st.integers(1, 16))
def test_coarse_grid_covers_the_same_ground(grid, stride):
    coarse = grid.coarsen(stride)
    assert coarse.origin == grid.origin
    for side, full, fine in zip(coarse.size, grid.size, (0, 1), strict=True):
        assert (side - 1) * stride < full <= side * stride or full == side == 0
        assert coarse.spacing[fine] == grid.spacing[fine] * stride


@given(grids, boxes)
def test_window_of_a_grid_has_its_corner_there(grid, box):
    corner = grid.to_level0(np.array([[box.x, box.y]], float))
    np.testing.assert_allclose(
        grid.window(box).to_level0(np.zeros((1, 2))), corner, rtol=1e-9, atol=1e-9
    )


@given(grids, boxes)
def test_a_grid_covers_its_own_box_by_the_same_box(grid, box):
    if box.area:
        assert grid.cover(grid, box) == box


@given(boxes, st.sampled_from([1, 2, 4, 16]))
def test_cover_by_a_coarser_grid_equals_integer_coarsening(box, stride):
    fine = PixelGrid(origin=(0.0, 0.0), spacing=(1.0, 1.0), size=(1000, 1000))
    if box.area:
        assert fine.coarsen(stride).cover(fine, box) == box.coarsen(stride)
