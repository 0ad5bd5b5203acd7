"""Resampling against the sums it stands for, tile by tile and all at once."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from wsi_pipeline.geometry import Box
from wsi_pipeline.slide import kernels
from wsi_pipeline.slide.bands import read_bands
from wsi_pipeline.slide.planes import Plane, Sampling
from wsi_pipeline.slide.reader import RasterLevel
from wsi_pipeline.slide.resample import (
    axis_taps,
    flat,
    resample,
    resample_columns,
    resample_part,
)

SCALES = (0.3, 0.99, 1.0, 1.31, 1.9010105772228518, 2.0, 2.05, 3.7)


def picture(width, height, seed=0):
    rng = np.random.default_rng(seed)
    pixels = rng.integers(0, 256, (height, width, 3)).astype(np.uint8)
    pixels[: height // 2, : width // 2] = 255  # the largest sums there are
    return pixels


def taps_of(start, stop, scale, size, offset=0.37):
    return axis_taps(start, stop, scale=scale, offset=offset, size=size)


def blended(source, corner, taps):
    """The plain formula: weighted sums of whole numbers, rounded once; white outside."""
    matrices = []
    for axis, side in enumerate((source.shape[1], source.shape[0])):
        matrix = np.zeros((len(taps[axis].first), side + 64), np.int64)
        for k, first in enumerate(taps[axis].first):
            if first >= 0:
                at = first - corner[axis]
                matrix[k, at : at + taps[axis].weights.shape[1]] = taps[axis].weights[k]
        assert not matrix[:, side:].any()  # nothing weighs that is not there
        matrices.append(matrix[:, :side])
    sums = np.einsum("jy,yxc,ix->jic", matrices[1], source.astype(np.int64), matrices[0])
    pixels = ((sums + (1 << 21)) >> 22).astype(np.uint8)
    pixels[taps[1].first < 0] = 255
    pixels[:, taps[0].first < 0] = 255
    return pixels


@pytest.mark.parametrize("scale", SCALES)
def test_every_pixel_is_the_rounded_sum(scale):
    source = picture(61, 47)
    taps = tuple(taps_of(-3, int(side / scale) + 3, scale, side) for side in (61, 47))
    target = np.empty((len(taps[1].first), len(taps[0].first), 3), np.uint8)
    resample(source, (0, 0), taps, target)
    assert np.array_equal(target, blended(source, (0, 0), taps))


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("columns", [(2, 3), (2, 9)])
@pytest.mark.parametrize("lines", [(1, 2), (1, 5), (1, 6)])
def test_a_part_is_filled_from_what_weighs_in_it_and_no_other_byte_is_touched(
    scale, columns, lines
):
    whole = picture(90, 80)
    taps = taps_of(0, 10, scale, 90), taps_of(0, 7, scale, 80)
    box = [
        (int(each.first[slice(*part)].min()), int(each.ends[slice(*part)].max()))
        for each, part in zip(taps, (columns, lines), strict=True)
    ]
    source = whole[slice(*box[1]), slice(*box[0])]
    target = np.full((7, 10, 3), 77, np.uint8)
    resample_part(source, (box[0][0], box[1][0]), taps, columns, lines, target)
    expected = np.full_like(target, 77)
    part = slice(*lines), slice(*columns)
    expected[part] = blended(whole, (0, 0), taps)[part]
    assert np.array_equal(target, expected)


def test_columns_apart_are_filled_and_no_other_byte_is_touched():
    source = picture(90, 80)
    every = taps_of(0, 40, 1.9, 90), taps_of(0, 30, 1.9, 80)
    columns = np.array([3, 4, 17, 39], np.int32)
    own = type(every[0])(first=every[0].first[columns], weights=every[0].weights[columns])
    target = np.full((30, 40, 3), 77, np.uint8)
    resample_columns(source, (0, 0), (own, every[1]), (5, 28), target, columns)
    expected = np.full_like(target, 77)
    expected[5:28, columns] = blended(source, (0, 0), every)[5:28, columns]
    assert np.array_equal(target, expected)


@given(
    side=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    lattice=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    margin=st.integers(1, 4),
)
@settings(max_examples=40, deadline=None)
def test_what_is_kept_near_edges_is_what_lies_there(side, lattice, margin):
    (width, height), (columns, rows) = side, lattice
    whole = picture(columns * width, rows * height)
    below = np.full((rows, 2 * margin, columns * width * 3), 7, np.uint8)
    beside = np.full((rows * height, (columns - 1) * 2 * margin, 3), 7, np.uint8)
    for row, column in np.ndindex(rows, columns):
        x, y = column * width, row * height
        tile = whole[y : y + height, x : x + width]
        kernels.keep_edges(flat(tile), (x, y), side, margin, below, flat(beside))
    frame = np.pad(whole, ((margin, margin), (margin, margin), (0, 0)), constant_values=7)
    for row in range(rows):
        expected = frame[(row + 1) * height :, margin : margin + columns * width][: 2 * margin]
        assert np.array_equal(below[row], flat(expected))
    for edge in range(columns - 1):
        expected = frame[margin : margin + rows * height, (edge + 1) * width :, :][:, : 2 * margin]
        assert np.array_equal(beside[:, edge * 2 * margin :][:, : 2 * margin], expected)


@given(
    side=st.tuples(st.integers(1, 40), st.integers(1, 40)),
    scale=st.floats(0.4, 4.5),
    offset=st.floats(-9, 9),
    missing=st.integers(0, 3),
    threads=st.integers(1, 2),
    data=st.data(),
)
@settings(max_examples=60, deadline=None)
def test_bands_of_tiles_of_any_size_are_the_picture_resampled(
    side, scale, offset, missing, threads, data
):
    """Tiles so small that a pixel spans several, too; tiles that are not there are white."""
    width, height = 83, 71
    raster = RasterLevel(size=(width, height), tile_size=side)
    plane = Plane(level=0, reduction=1, raster=raster, spacing=(1.0, 1.0))
    sampling = Sampling(plane=plane, scale=(scale, scale * 1.1), offset=(offset, -offset))
    whole = picture(width, height)
    gone = {(index, index % 2) for index in range(missing)}
    for place in gone:
        whole[raster.tile_box(*place).slices] = 255

    def fetch(_, column, row):
        return None if (column, row) in gone else whole[raster.tile_box(column, row).slices]

    near, far = st.integers(-12, 60), st.integers(1, 70)
    box = st.builds(Box, x=near, y=near, width=far, height=far)
    boxes = data.draw(st.lists(box, min_size=1, max_size=5))
    if data.draw(st.booleans()):
        boxes = sorted(boxes, key=lambda box: box.y)  # rows of one panel, which share lines
    for box, window in zip(
        boxes,
        read_bands(sampling, boxes, fetch=fetch, threads=threads, stop=lambda: False),
        strict=True,
    ):
        taps = (
            sampling.axis_taps(0, box.x, box.x1),
            sampling.axis_taps(1, box.y, box.y1),
        )
        assert np.array_equal(window, blended(whole, (0, 0), taps))
