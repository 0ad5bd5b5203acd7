"""The loops of small objects against their definitions on whole arrays."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage as ndi
from test_kernels import CROSS, maps, plain_growth, runs_of

from wsi_pipeline.instances import anchoring, kernels


@given(maps, st.integers(3, 300), st.integers(3, 12), st.integers(0, 256), st.integers(0, 256))
def test_eroded_cores(rng, width, height, core_from, ground_from):
    inner = rng.integers(60, 256, (height, width)).astype(np.uint8)
    inner[rng.random(height) < 0.3] = 199  # rows with long runs, across words of eight pixels
    contour = rng.integers(0, 200, (height, width)).astype(np.uint8)
    y, x0, x1, ground = anchoring.eroded_cores(inner, contour, core_from, ground_from)
    above = inner.astype(int) + contour >= ground_from
    eroded = ndi.binary_erosion(above, CROSS, border_value=1)
    eroded[[0, -1]] = eroded[:, [0, -1]] = False
    assert np.array_equal(ground, eroded)
    expected = runs_of((eroded & (inner >= core_from)).astype(np.uint8))[0]
    assert np.array_equal(np.stack([y, x0, x1]), expected)


def test_as_many_runs_as_there_can_be():
    inner = np.tile(np.array([0, 255], np.uint8), (9, 150))
    none = np.zeros_like(inner)
    found = anchoring.eroded_cores(inner, 255 - none, 128, 90)[:3]
    within = inner.copy()
    within[[0, -1]] = within[:, [0, -1]] = 0
    assert np.array_equal(np.stack(found), runs_of(within)[0])
    assert np.array_equal(np.stack(kernels.threshold_runs(inner, none, 1, 1)), runs_of(inner)[0])


def plain_judgement(table, own, window, whole, margin, min_core, most):
    """The rules of ``judge`` on whole arrays."""
    area, box, anchor = table[:, 0], table[:, 1:5], table[:, 5:7]
    room = np.where(window == whole, np.iinfo(np.int64).max, np.abs(box - window))
    cut = (room == 0).any(axis=1)
    small = area < min_core
    mine = (anchor >= own[:2]).all(axis=1) & (anchor < own[2:]).all(axis=1) & (cut | ~small)
    large = np.maximum(box[:, 2] - box[:, 0], box[:, 3] - box[:, 1]) > most
    listed = mine & ~(large & ~small)
    closed = listed & (room >= margin).all(axis=1)
    for other in box[cut & small]:
        closed &= np.maximum(box[:, :2] - other[2:], other[:2] - box[:, 2:]).max(axis=1) > margin
    return cut | ~small, closed, listed & ~closed, bool((mine & large & ~small).any())


@given(maps, st.booleans(), st.integers(1, 6), st.integers(1, 9), st.integers(1, 12))
def test_judgement(rng, ends_with_the_map, margin, min_core, most):
    image = (ndi.uniform_filter(rng.random((26, 30)), 3) > 0.55).astype(np.uint8)
    (y, x0, x1), value = runs_of(image)
    labels, count = kernels.label_runs(y, x0, x1, value, 0)
    table = kernels.describe(y, x0, x1, labels, count)
    window = np.array([0, 0, 30, 26])
    whole = window + ([0, -5, 7, 0] if ends_with_the_map else [-9, -9, 9, 9])
    arguments = table, np.array([4, 5, 24, 20]), window, whole, margin, min_core, most
    found, expected = anchoring.judge(*arguments), plain_judgement(*arguments)
    for a, b in zip(found, expected, strict=True):
        assert np.array_equal(a, b)


@settings(max_examples=60)
@given(maps, st.integers(0, 4), st.sampled_from([(22, np.int32), (40, np.int64)]), st.booleans())
def test_spread_grows_the_same_way_and_counts(rng, steps, cell, has_classes):
    bits, dtype = cell
    shape, count, n_classes = (14, 17), 5, 3 if has_classes else 0
    ground = np.pad(rng.random((12, 15)) < 0.8, 1)
    cores = np.zeros(shape, np.int32)
    for label in range(1, count + 1):
        y, x = rng.integers(1, 13), rng.integers(1, 13)
        cores[y, x : x + rng.integers(1, 5)] = label
    runs, values = runs_of(cores)
    values = np.where(values == 3, 0, values)  # left out: ground that others may take
    labels = np.where(cores == 3, 0, cores)
    inner = rng.choice([0, 1, 2, 255], shape).astype(np.uint8)
    classes = rng.integers(0, 5, shape).astype(np.uint8)
    cells = np.zeros(shape, dtype)
    sums, votes, first = anchoring.spread(
        cells, bits, inner, ground.astype(np.uint8), steps, runs, values,
        classes if has_classes else np.zeros((1, 1), np.uint8), count, n_classes,
    )  # fmt: skip
    expected = plain_growth(labels, inner, ground, steps)
    assert np.array_equal(cells & ((1 << bits) - 1), expected)
    assert np.array_equal(cells >> bits, np.where(expected > 0, inner + np.int64(1), 0))
    for label in range(1, count + 1):
        where = np.flatnonzero(expected == label)
        assert sums[label].tolist() == [where.size, inner.flat[where].sum()]
        assert first[label] == (where[0] if where.size else expected.size)
        wanted = np.bincount(classes.flat[where], minlength=5)[:n_classes]
        assert votes[label].tolist() == wanted.tolist()
