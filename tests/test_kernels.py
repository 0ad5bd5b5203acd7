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


@given(maps, st.integers(0, 3))
def test_tally_lists_and_sums_the_labels_of_a_part(rng, n_classes):
    labels = rng.integers(0, 4, (9, 11)).astype(np.int32)
    labels = np.repeat(labels, 2, axis=1)  # so that there are longer runs
    inner = rng.integers(0, 256, labels.shape).astype(np.uint8)
    (left, right), (top, bottom) = (np.sort(rng.integers(0, side, 2)) for side in (23, 10))
    part = np.s_[top:bottom, left:right]
    classes = rng.integers(0, 5, labels[part].shape).astype(np.uint8)  # some are no class
    where = int(left), int(top), int(right), int(bottom)
    places, values, sums, votes = kernels.tally(labels, inner, classes, where, 3, n_classes)
    expected, expected_values = runs_of(np.ascontiguousarray(labels[part]))
    assert np.array_equal(places, expected + np.array([[top], [left], [left]]))
    assert np.array_equal(values, expected_values)
    for label in range(1, 4):
        own = labels[part] == label
        assert sums[label].tolist() == [own.sum(), inner[part][own].sum()]
        counts = np.bincount(classes[own], minlength=5)[:n_classes]
        assert votes[label].tolist() == counts.tolist()


@given(maps, st.integers(0, 256), st.integers(0, 256), st.integers(1, 300))
def test_runs_of_thresholds(rng, inner_from, contour_below, width):
    inner, contour = rng.integers(0, 256, (2, 5, width)).astype(np.uint8)
    inner = np.where(rng.random(inner.shape) < 0.5, np.roll(inner, 1, axis=1), inner)
    core = (inner >= inner_from) & (contour < contour_below)
    found = kernels.threshold_runs(inner, contour, inner_from, contour_below)
    assert np.array_equal(np.stack(found), runs_of(core.view(np.uint8))[0])


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
