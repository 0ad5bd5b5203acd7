from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy import ndimage as ndi

from wsi_pipeline.instances import kernels

settings.register_profile("compiled", deadline=None)  # the first call compiles
settings.load_profile("compiled")

CROSS = ndi.generate_binary_structure(2, 1)
SQUARE = ndi.generate_binary_structure(2, 2)
images = hnp.arrays(
    np.uint8,
    hnp.array_shapes(min_dims=2, max_dims=2, min_side=1, max_side=14),
    elements=st.integers(0, 2),
)
maps = st.integers(0, 2**32 - 1).map(lambda seed: np.random.default_rng(seed))


def runs_of(image):
    y, x0, x1, value = kernels.find_runs(image)
    return np.stack([y, x0, x1]), value


@given(images)
def test_runs_repaint_the_image_and_are_maximal(image):
    (y, x0, x1), value = runs_of(image)
    again = np.zeros(image.shape, np.int32)
    kernels.paint(again, y, x0, x1, value, 0, 0)
    assert np.array_equal(again, image)
    for row, start, stop, v in zip(y, x0, x1, value, strict=True):
        assert start == 0 or image[row, start - 1] != v
        assert stop == image.shape[1] or image[row, stop] != v


@given(images, st.sampled_from([(0, CROSS), (1, SQUARE)]))
def test_labels_equal_scipy_numbering_included(image, rule):
    reach, structure = rule
    mask = (image > 0).astype(np.uint8)
    (y, x0, x1), value = runs_of(mask)
    labels, count = kernels.label_runs(y, x0, x1, value, reach)
    painted = np.zeros(image.shape, np.int32)
    kernels.paint(painted, y, x0, x1, labels, 0, 0)
    expected, n = ndi.label(mask, structure)
    assert count == n
    assert np.array_equal(painted, expected)


@given(images)
def test_unequal_values_are_never_joined(image):
    (y, x0, x1), value = runs_of(image)
    labels, count = kernels.label_runs(y, x0, x1, value, 0)
    assert count == sum(ndi.label(image == v, CROSS)[1] for v in (1, 2))
    for label in range(1, count + 1):
        assert len(set(value[labels == label])) == 1


@given(images)
def test_description_of_components(image):
    mask = (image > 0).astype(np.uint8)
    (y, x0, x1), value = runs_of(mask)
    labels, count = kernels.label_runs(y, x0, x1, value, 0)
    expected, _ = ndi.label(mask, CROSS)
    for i, row in enumerate(kernels.describe(y, x0, x1, labels, count), 1):
        yy, xx = np.nonzero(expected == i)
        box = [yy.size, xx.min(), yy.min(), xx.max() + 1, yy.max() + 1]
        assert list(row) == [*box, xx[0], yy[0]]


def plain_growth(labels, inner, ground, steps, allowed=None):
    """The definition, on whole arrays: the one the kernel is judged by."""
    labels = labels.copy()
    yy, xx = np.indices(labels.shape)
    for _ in range(steps):
        best = np.zeros_like(labels)
        value = np.full(labels.shape, -1)
        for dy, dx in ((-1, 0), (0, -1), (0, 1), (1, 0)):  # N, W, E, S
            near = np.zeros_like(labels)
            q = np.full(labels.shape, -1)
            to = (
                slice(max(0, -dy), labels.shape[0] - max(0, dy)),
                slice(max(0, -dx), labels.shape[1] - max(0, dx)),
            )
            source = (
                slice(max(0, dy), labels.shape[0] - max(0, -dy)),
                slice(max(0, dx), labels.shape[1] - max(0, -dx)),
            )
            near[to], q[to] = labels[source], inner[source]
            wins = (labels == 0) & (near > 0) & ground & (q > value)
            if allowed is not None:
                wins &= allowed[near, yy, xx]
            best[wins], value[wins] = near[wins], q[wins]
        labels += best
    return labels


@settings(max_examples=60)
@given(maps, st.integers(0, 4))
def test_growth_is_synchronous_and_ties_go_north_west_east_south(rng, steps):
    shape = (14, 17)
    ground = np.pad(rng.random((12, 15)) < 0.8, 1)
    labels = np.zeros(shape, np.int32)
    for label in range(1, 6):
        labels[rng.integers(1, 13), rng.integers(1, 16)] = label
    inner = rng.integers(0, 3, shape).astype(np.uint8)
    expected = plain_growth(labels, inner, ground, steps)
    free = np.zeros(6, np.int32)
    offsets = np.empty(0, np.int64)
    places = runs_of(labels)[0]
    kernels.grow(labels, inner, ground.astype(np.uint8), free, offsets, steps, places)
    assert np.array_equal(labels, expected)


@settings(max_examples=40)
@given(maps)
def test_growth_keeps_to_the_owner_and_the_element(rng):
    shape = (16, 18)
    ground = np.zeros(shape, np.int32)
    ground[3:-3, 3:-3] = rng.integers(0, 3, (10, 12))
    labels = np.zeros(shape, np.int32)
    owner = np.array([0, 1, 2, 0, 1], np.int32)
    for label in range(1, 5):
        labels[rng.integers(3, 13), rng.integers(3, 15)] = label
    inner = rng.integers(0, 3, shape).astype(np.uint8)
    element = [(-1, 0), (0, 0), (0, -1), (1, -1), (2, -1)]  # dx, dy: lopsided on purpose
    allowed = np.zeros((5, *shape), bool)
    for label in range(1, 5):
        for dx, dy in element:
            allowed[label] |= np.roll(labels == label, (-dy, -dx), (0, 1))
        if owner[label]:
            allowed[label] &= ground == owner[label]
    expected = plain_growth(labels, inner, ground > 0, 3, allowed)
    offsets = np.array([dy * shape[1] + dx for dx, dy in element], np.int64)
    kernels.grow(labels, inner, ground, owner, offsets, 3, runs_of(labels)[0])
    assert np.array_equal(labels, expected)


def test_tally_counts_the_pixels_of_runs():
    labels = np.array([[0, 1, 1, 0], [2, 2, 0, 1]], np.int32)
    inner = np.array([[9, 1, 2, 9], [4, 8, 9, 16]], np.uint8)
    classes = np.array([[0, 1, 1, 0], [2, 7, 0, 2]], np.uint8)
    sums, votes = kernels.tally(labels, inner, classes, runs_of(labels)[0], 2, 3)
    assert sums[1:].tolist() == [[3, 19], [2, 12]]
    assert votes[1:].tolist() == [[0, 2, 1], [0, 0, 1]]  # id 7 is no class


@given(images, images)
def test_overlap_of_runs(a, b):
    height, width = min(a.shape[0], b.shape[0]), min(a.shape[1], b.shape[1])
    a = (a[:height, :width] > 0).astype(np.uint8)
    b = np.ascontiguousarray(b[:height, :width])
    places, values = runs_of(b)
    common, which = kernels.overlap_runs(runs_of(a)[0], places, width)
    painted = np.zeros((height, width), np.int32)
    y, x0, x1 = common
    kernels.paint(painted, y, x0, x1, values[which], 0, 0)
    assert np.array_equal(painted, np.where(a, b, 0))


@pytest.mark.parametrize("dtype", [np.uint8, np.int32])
def test_nothing_in_nothing_out(dtype):
    y, x0, x1, value = kernels.find_runs(np.zeros((3, 4), dtype))
    labels, count = kernels.label_runs(y, x0, x1, value, 0)
    assert y.size == labels.size == count == 0
    assert kernels.describe(y, x0, x1, labels, count).shape == (0, 7)
