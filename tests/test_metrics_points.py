"""Objects paired by their centres, and their classes."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from wsi_pipeline.metrics import DetectionCounts, TypedCounts, compare, match_points, typed_counts
from wsi_pipeline.metrics.points import neighbours

seeds = st.integers(0, 2**32 - 1)


def test_a_chain_worked_by_hand():
    # On a line: true at 0, 3, predicted at 2, 5.9, 20; radius 3. Nearest first would pair 3
    # with 2 and leave 0 and 5.9 alone; two pairs can be had: 0 with 2, 3 with 5.9.
    true = np.array([[0.0, 0], [3, 0]])
    pred = np.array([[2.0, 0], [5.9, 0], [20, 0]])
    matches = match_points(true, pred, radius=3)
    pairs = list(zip(matches.true_index.tolist(), matches.pred_index.tolist(), strict=True))
    assert pairs == [(0, 0), (1, 1)]
    counts = matches.counts()
    assert counts == DetectionCounts(tp=2, fp=1, fn=0)
    assert counts.precision == pytest.approx(2 / 3)
    assert counts.recall == 1
    assert counts.f1 == pytest.approx(4 / 5)


def test_the_radius_is_inclusive_and_distance_zero_is_a_pair():
    true = np.array([[5.0, 5.0], [90.0, 90.0]])
    moved = true + np.array([3, 4])
    assert match_points(true, moved, radius=5).counts().tp == 2
    assert match_points(true, moved, radius=4.999).counts().tp == 0
    assert match_points(true, true, radius=1).counts().f1 == 1


@given(seeds)
@settings(max_examples=60, deadline=None)
def test_most_pairs_then_the_shortest(seed):
    rng = np.random.default_rng(seed)
    true, pred = rng.random((rng.integers(0, 6), 2)) * 10, rng.random((rng.integers(0, 5), 2)) * 10
    distance = np.linalg.norm(true[:, None] - pred[None], axis=2)
    best = (0, 0.0)
    for count in range(1, min(len(true), len(pred)) + 1):
        for left in itertools.combinations(range(len(true)), count):
            for right in itertools.permutations(range(len(pred)), count):
                far = distance[left, right]
                if (far <= 3).all():
                    best = max(best, (count, -far.sum()))
    matches = match_points(true, pred, radius=3)
    found = distance[matches.true_index, matches.pred_index]
    assert len(set(matches.true_index)) == len(set(matches.pred_index)) == found.size
    assert (found <= 3).all()
    assert found.size == best[0]
    assert found.sum() == pytest.approx(-best[1])
    assert match_points(pred, true, radius=3).counts().tp == found.size


@given(seeds)
@settings(deadline=None)
def test_neighbours_are_all_pairs_within_reach(seed):
    rng = np.random.default_rng(seed)
    true, pred = rng.integers(0, 8, (6, 2)).astype(float), rng.integers(0, 8, (5, 2)).astype(float)
    distance = np.linalg.norm(true[:, None] - pred[None], axis=2)
    left, right, found = neighbours(true, pred, radius=2.5)
    assert set(zip(left, right, strict=True)) == set(zip(*np.nonzero(distance <= 2.5), strict=True))
    assert found == pytest.approx(distance[left, right])


def test_classes_of_paired_objects_worked_by_hand():
    # True classes 1 1 2 2 and one of unknown class; predicted 1 2 2 of the first three, the
    # fourth missed, 1 where the unknown one is, and 2 where nothing is.
    true = np.array([[0.0, 0], [10, 0], [20, 0], [30, 0], [40, 0]])
    pred = np.array([[0.0, 1], [10, 1], [20, 1], [40, 1], [50, 1]])
    matches = match_points(true, pred, radius=2)
    one, two = typed_counts(
        matches, np.array([1, 1, 2, 2, -1]), np.array([1, 2, 2, 1, 2]), classes=(1, 2)
    )
    assert one == TypedCounts(tp=1, fn_class=1)
    assert two == TypedCounts(tp=1, fp_class=1, fp=1, fn=1)
    assert one.f1 == pytest.approx(2 / 3)
    assert one.f1_hovernet == pytest.approx(2 / 4)
    assert two.f1 == pytest.approx(2 / (2 + 1 + 1 + 1))
    assert two.f1_hovernet == pytest.approx(2 / (2 + 2 + 1 + 1))
    assert (one + two).tp == 2


@given(seeds)
@settings(deadline=None)
def test_every_object_is_counted_once(seed):
    rng = np.random.default_rng(seed)
    true, pred = rng.random((20, 2)) * 10, rng.random((25, 2)) * 10
    true_classes, pred_classes = rng.integers(1, 4, 20), rng.integers(1, 4, 25)
    matches = match_points(true, pred, radius=1)
    counts = typed_counts(matches, true_classes, pred_classes, classes=(1, 2, 3))
    for label, own in zip((1, 2, 3), counts, strict=True):
        assert own.tp + own.fn_class + own.fn == (true_classes == label).sum()
        assert own.tp + own.fp_class + own.fp == (pred_classes == label).sum()
    total = matches.counts()
    assert sum(own.tp + own.fn_class for own in counts) == total.tp
    assert sum(own.fn for own in counts) == total.fn
    assert sum(own.fp for own in counts) == total.fp


def test_objects_paired_by_their_pixels_may_be_typed_too():
    labels = np.array([[1, 1, 0, 2, 2]])
    matches = compare(labels, labels).matches()
    counts = typed_counts(matches, np.array([1, 2]), np.array([1, 1]), classes=(1, 2))
    assert counts == (TypedCounts(tp=1, fp_class=1), TypedCounts(fn_class=1))


def test_none_and_bad_input():
    none, one = np.zeros((0, 2)), np.zeros((1, 2))
    assert match_points(none, one, radius=1).counts() == DetectionCounts(fp=1)
    assert match_points(one, none, radius=1).counts() == DetectionCounts(fn=1)
    assert np.isnan(match_points(none, none, radius=1).counts().f1)
    with pytest.raises(ValueError, match="radius"):
        match_points(one, one, radius=0)
    with pytest.raises(ValueError, match=r"\(N, 2\)"):
        match_points(np.zeros((1, 3)), one, radius=1)
    with pytest.raises(ValueError, match="classes"):
        typed_counts(match_points(one, one, radius=1), np.ones(2), np.ones(1), classes=(1,))
