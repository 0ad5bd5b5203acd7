"""The table of two label images, what is left out of it, and pairing one to one."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from label_images import drawn, masks, renamed, scene
from scipy.optimize import linear_sum_assignment

from wsi_pipeline.metrics import Matches, compare
from wsi_pipeline.metrics.matching import one_to_one

seeds = st.integers(0, 2**32 - 1)


def test_table_of_a_drawn_pair():
    # Raster order: the true object 9 comes before 2. Object 9 has 4 pixels and shares 3
    # with 5 (4 pixels, union 5); 2 has 2 pixels and shares 1 with 5 and 1 with 1.
    true = drawn("""99..
                    99..
                    .22.""")
    pred = drawn("""5...
                    55..
                    .51.""")
    table = compare(true, pred)
    assert table.true_ids.tolist() == [9, 2]
    assert table.pred_ids.tolist() == [5, 1]
    assert table.true_areas.tolist() == [4, 2]
    assert table.pred_areas.tolist() == [4, 1]
    assert table.true_index.tolist() == [0, 1, 1]
    assert table.pred_index.tolist() == [0, 0, 1]
    assert table.intersections.tolist() == [3, 1, 1]
    assert table.unions.tolist() == [5, 5, 2]
    assert table.pairs().tolist() == [0]  # 3/5; 1/2 is not above 0.5
    assert table.true_map.tolist() == [[1, 1, 0, 0], [1, 1, 0, 0], [0, 2, 2, 0]]


@given(seeds)
@settings(deadline=None)
def test_table_agrees_with_masks(seed):
    true, pred = scene(seed)
    table = compare(true, pred)
    for index, number in enumerate(table.true_ids):
        assert ((table.true_map == index + 1) == (true == number)).all()
    assert sorted(table.true_areas) == sorted(mask.sum() for mask in masks(true))
    assert sorted(table.pred_areas) == sorted(mask.sum() for mask in masks(pred))
    shared = {}
    for a, b in itertools.product(table.true_ids, table.pred_ids):
        both = int(((true == a) & (pred == b)).sum())
        if both:
            shared[int(a), int(b)] = (both, int(((true == a) | (pred == b)).sum()))
    found = zip(table.true_ids[table.true_index], table.pred_ids[table.pred_index], strict=True)
    values = zip(table.intersections, table.unions, strict=True)
    assert dict(zip(((int(a), int(b)) for a, b in found), values, strict=True)) == shared


@given(seeds, seeds)
@settings(deadline=None)
def test_numbers_of_objects_do_not_matter(seed, other):
    true, pred = scene(seed)
    ignore = np.random.default_rng(other).random(true.shape) < 0.3
    table = compare(true, pred, ignore=ignore)
    large = renamed(true, other)
    again = compare(large, renamed(pred, other + 1), ignore=ignore)
    assert (np.append(0, again.true_ids)[again.true_map] == large * (again.true_map > 0)).all()
    for name in ("true_areas", "true_index", "pred_index", "intersections", "pred_map"):
        assert (getattr(table, name) == getattr(again, name)).all()


@given(seeds)
@settings(deadline=None)
def test_swapping_is_comparing_the_other_way(seed):
    true, pred = scene(seed)
    swapped, other = compare(true, pred).swapped(), compare(pred, true)
    for name in ("true_ids", "pred_areas", "true_index", "pred_index", "intersections"):
        assert (getattr(swapped, name) == getattr(other, name)).all()


def test_ignored_pixels_count_for_nothing():
    true = drawn("1111....")
    pred = drawn("..111111")
    ignore = drawn("......11") > 0
    table = compare(true, pred, ignore=ignore)
    # Of the predicted six pixels two are ignored: four are left.
    assert table.pred_areas.tolist() == [4]
    assert table.unions.tolist() == [6]
    assert table.pred_map.tolist() == [[0, 0, 1, 1, 1, 1, 0, 0]]


def test_objects_mostly_ignored_are_left_out():
    true = drawn("11111.22222.")
    pred = drawn("333334444444")
    # Of true object 1 three of five pixels are ignored: it is left out, and its other two
    # are not judged either, so predicted object 3 lies in unjudged pixels entirely.
    # Of predicted object 4 two of seven are ignored: it stays.
    ignore = drawn("111.......11") > 0
    table = compare(true, pred, ignore=ignore)
    assert table.true_ids.tolist() == [2]
    assert table.pred_ids.tolist() == [4]
    assert table.pred_areas.tolist() == [5]
    half = compare(drawn("11"), drawn("11"), ignore=drawn("1.") > 0)
    assert half.true_areas.tolist() == half.pred_areas.tolist() == [1]  # half is not more


def test_a_mostly_ignored_prediction_stays_where_it_matches():
    true = drawn("..11....")
    pred = drawn("11111...")
    ignore = drawn("11..1...") > 0
    assert compare(true, pred, ignore=ignore).pred_ids.tolist() == [1]
    # One pixel of two: IoU 1/2 is no match.
    pred = drawn("111.....")
    assert compare(true, pred, ignore=ignore).pred_ids.tolist() == []


def test_negative_truth_is_ignored():
    true = drawn("11......")
    true[0, 4:] = -1
    table = compare(true, drawn("22..3333"))
    assert table.pred_ids.tolist() == [2]
    assert table.true_ids.tolist() == [1]


@given(seeds)
@settings(deadline=None)
def test_outside_of_what_is_judged_anything_may_be(seed):
    true, pred = scene(seed)
    ignore = np.zeros(true.shape, bool)
    ignore[:, 20:] = True
    for labels in (true, pred):  # no object on both sides of the line
        labels[:, 20:][labels[:, 20:] > 0] += 1000
    noise = np.random.default_rng(seed).integers(100, 200, true.shape)
    table = compare(true, pred, ignore=ignore)
    other = compare(np.where(ignore, noise, true), np.where(ignore, noise.T, pred), ignore=ignore)
    assert (table.intersections == other.intersections).all()
    assert (table.true_ids == other.true_ids).all()
    assert (table.pred_areas == other.pred_areas).all()
    alone = compare(true[:, :20], pred[:, :20])
    assert (table.true_areas == alone.true_areas).all()


@given(seeds)
@settings(max_examples=50, deadline=None)
def test_pairing_has_the_greatest_total_weight(seed):
    rng = np.random.default_rng(seed)
    n, m = rng.integers(1, 9, 2)
    weights = rng.random((n, m)) * (rng.random((n, m)) < 0.4)
    left, right = np.nonzero(weights)
    chosen = one_to_one(left, right, weights[left, right])
    assert len(set(left[chosen])) == len(set(right[chosen])) == chosen.size
    best = weights[linear_sum_assignment(weights, maximize=True)].sum()
    assert weights[left, right][chosen].sum() == pytest.approx(best)


def test_low_thresholds_pair_one_to_one():
    # Object 1 shares two pixels with 5 (IoU 1/3) and four with 6 (IoU 2/3): at 0.1 it could
    # match both, but only one may have it.
    true = drawn("111111.")
    pred = drawn("556666.")
    table = compare(true, pred)
    assert table.pairs(0.1).tolist() == [1]
    assert table.matches(0.1).counts().fp == 1


def test_excused_predictions_are_no_false_positives():
    matches = Matches(n_true=3, n_pred=5, true_index=np.array([1, 0]), pred_index=np.array([2, 4]))
    assert (matches.counts().tp, matches.counts().fp, matches.counts().fn) == (2, 3, 1)
    # Of 0, 1, 3 without a true object 0 is excused; 2 and 4 have one, excused or not.
    excused = np.array([True, False, True, False, False])
    assert matches.counts(excused=excused).fp == 2


@pytest.mark.parametrize(
    ("true", "pred", "ignore"),
    [
        (np.zeros((2, 2)), np.zeros((2, 2), int), None),
        (np.zeros((2, 2), int), np.zeros((2, 3), int), None),
        (np.zeros((2, 2), int), np.full((2, 2), -1), None),
        (np.zeros((2, 2), int), np.zeros((2, 2), int), np.zeros((2, 2), int)),
        (np.zeros((2, 2), int), np.zeros((2, 2), int), np.zeros((1, 2), bool)),
        (np.zeros(4, int), np.zeros(4, int), None),
    ],
)
def test_what_is_no_pair_of_label_images_is_refused(true, pred, ignore):
    with pytest.raises(ValueError, match=r"true|pred|ignore"):
        compare(true, pred, ignore=ignore)


@pytest.mark.parametrize("shape", [(0, 0), (0, 5), (3, 3)])
def test_empty_images_have_an_empty_table(shape):
    nothing = np.zeros(shape, np.int32)
    table = compare(nothing, nothing, ignore=np.ones(shape, bool))
    assert table.true_ids.size == table.pred_ids.size == table.intersections.size == 0
    assert table.pairs(0.1).size == 0
