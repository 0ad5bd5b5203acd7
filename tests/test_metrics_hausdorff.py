"""Object Hausdorff distance: hand-worked, and by scipy from every pixel of every pair."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from label_images import drawn, masks, renamed, scene
from scipy.spatial.distance import directed_hausdorff

from wsi_pipeline.metrics import compare, object_hausdorff, pooled

seeds = st.integers(0, 2**32 - 1)


def between(a, b):
    one, two = np.argwhere(a), np.argwhere(b)
    return max(directed_hausdorff(one, two)[0], directed_hausdorff(two, one)[0])


def by_definition(true, pred):
    def weighted(own, other):
        total = sum(mask.sum() for mask in own)
        result = 0.0
        for mask in own:
            best = max(other, key=lambda m: ((mask & m).sum(), -int(m.argmax())))
            if (mask & best).any():
                distance = between(mask, best)
            else:
                distance = min(between(mask, m) for m in other)
            result += mask.sum() / total * distance
        return result

    true, pred = masks(true), masks(pred)
    return (weighted(true, pred) + weighted(pred, true)) / 2


@given(seeds)
@settings(max_examples=60, deadline=None)
def test_as_defined(seed):
    true, pred = scene(seed)
    sums = object_hausdorff(compare(true, pred))
    if true.any() and pred.any():
        assert sums.distance_px == pytest.approx(by_definition(true, pred))
        assert sums.found_distance_px == sums.distance_px


@given(seeds)
@settings(max_examples=30, deadline=None)
def test_odd_shapes(seed):
    rng = np.random.default_rng(seed)
    true, pred = (rng.integers(0, 4, (12, 14)) * (rng.random((12, 14)) < 0.15) for _ in "ab")
    if true.any() and pred.any():
        found = object_hausdorff(compare(true, pred)).distance_px
        assert found == pytest.approx(by_definition(true, pred))


def test_a_case_worked_by_hand():
    # Predicted 1 lacks the two right pixels of true 1 (distance 2). True 2 meets nothing:
    # the nearest is predicted 1: its left pixel is 7 from true 2 (2, 7 columns 7, 8).
    # Predicted 1's counterpart is true 1.
    true = drawn("1111...22")
    pred = drawn("11.......")
    sums = object_hausdorff(compare(true, pred))
    assert sums.true_distance == 4 * 2 + 2 * 7
    assert (sums.true_area, sums.pred_area) == (6, 2)
    assert sums.pred_distance == 2 * 2
    assert sums.distance_px == pytest.approx((22 / 6 + 4 / 2) / 2)


def test_the_hole_of_a_ring_counts():
    # A disc against its rim: the centre of the 5 x 5 square is 2 from the rim.
    square = np.zeros((7, 7), int)
    square[1:6, 1:6] = 1
    ring = square.copy()
    ring[2:5, 2:5] = 0
    assert object_hausdorff(compare(square, ring)).distance_px == 2


def test_of_two_far_objects_the_nearer_by_hausdorff_is_taken():
    # 2 starts nearer to the true object but reaches far away; 3 is small and closer overall.
    true = drawn("11............")
    pred = drawn("...22222222.3.")
    sums = object_hausdorff(compare(true, pred))
    # To 2: its far end (column 10) is 9 from column 1. To 3: column 12 to column 1 is 11,
    # column 0 to 12 is 12. So 9.
    assert sums.true_distance == 2 * 9


def test_no_counterpart():
    nothing, something = np.zeros((3, 3), int), drawn("11. ... ...")
    assert math.isnan(object_hausdorff(compare(nothing, nothing)).distance_px)
    alone = object_hausdorff(compare(something, nothing))
    assert alone.distance_px == math.inf
    assert math.isnan(alone.found_distance_px)
    moved = object_hausdorff(compare(something, drawn(".11 ... ...")))
    assert moved.distance_px == 1
    both = pooled([alone, moved])
    assert both.distance_px == math.inf
    assert both.found_distance_px == 1
    assert both.lone_area == 2


@given(seeds)
@settings(max_examples=20, deadline=None)
def test_symmetric_zero_for_the_same_and_blind_to_numbers(seed):
    true, pred = scene(seed)
    one = object_hausdorff(compare(true, pred)).distance_px
    other = object_hausdorff(compare(renamed(pred, seed), renamed(true, seed))).distance_px
    assert one == pytest.approx(other, nan_ok=True)
    if true.any():
        assert object_hausdorff(compare(true, true)).distance_px == 0
