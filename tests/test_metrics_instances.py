"""Scores of objects: hand-worked, against slow transcriptions of the formulas, and torchmetrics."""

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from label_images import drawn, masks, renamed, scene
from torchmetrics.functional.detection import panoptic_quality

from wsi_pipeline.metrics import (
    EnsembleDiceSums,
    JaccardSums,
    ObjectDiceSums,
    PanopticCounts,
    aggregated_jaccard,
    aggregated_jaccard_plus,
    class_panoptic_counts,
    compare,
    ensemble_dice,
    glas_detection,
    majority_classes,
    mean_defined,
    mean_pq,
    mpq,
    mpq_plus,
    object_dice,
    panoptic_counts,
    pooled,
    pooled_classes,
)

seeds = st.integers(0, 2**32 - 1)

# True 1 (6 pixels), 2 (4), 3 (2); predicted 1 (8) covers 1 and two pixels of 2, predicted 2
# (2) the rest of 2, predicted 3 (3) nothing true.
#   pair   shared  union  IoU
#   1, 1      6      8    3/4
#   2, 1      2     10    1/5
#   2, 2      2      4    1/2
TRUE = drawn("""111222.33
                1112.....
                .........""")
PRED = drawn("""111112...
                1112.....
                ......333""")


def scores(true, pred):
    table = compare(true, pred)
    return {
        "pq": panoptic_counts(table).pq,
        "aji": aggregated_jaccard(table).aji,
        "aji+": aggregated_jaccard_plus(table).aji,
        "object dice": object_dice(table).dice,
        "ensemble dice": ensemble_dice(table).dice,
        "glas f1": glas_detection(table).f1,
    }


def test_a_case_worked_by_hand():
    table = compare(TRUE, PRED)
    assert table.iou.tolist() == [3 / 4, 1 / 5, 1 / 2]
    panoptic = panoptic_counts(table)
    assert panoptic == PanopticCounts(tp=1, fp=2, fn=2, iou_sum=0.75)
    assert panoptic.dq == pytest.approx(1 / 3)  # 2 / (2 + 2 + 2)
    assert panoptic.sq == 0.75
    assert panoptic.pq == pytest.approx(0.25)
    # True 1 takes 1 (6 of 8), true 2 takes 2 (2 of 4), 3 is alone (2), predicted 3 too (3).
    assert aggregated_jaccard(table) == JaccardSums(intersection=8, union=8 + 4 + 2 + 3)
    assert aggregated_jaccard_plus(table) == JaccardSums(intersection=8, union=17)
    # By area: true 1 with 1: Dice 12/14; true 2 shares 2 with each, takes predicted 1, the
    # first in raster order: 4/12; true 3: 0. Predicted 1 with 1: 12/14; 2 with 2: 4/6; 3: 0.
    dice = object_dice(table)
    assert dice.true_dice == pytest.approx(6 * 12 / 14 + 4 * 4 / 12)
    assert dice.pred_dice == pytest.approx(8 * 12 / 14 + 2 * 4 / 6)
    assert (dice.true_area, dice.pred_area) == (12, 13)
    expected = (dice.true_dice / 12 + dice.pred_dice / 13) / 2
    assert dice.dice == pytest.approx(expected)
    # Pairs (6+8), (4+8), (4+2): 2 x 10 / 32.
    assert ensemble_dice(table) == EnsembleDiceSums(intersection=10, area=32, objects=6)
    # Predicted 1 covers all of 1; predicted 2 covers half of 2, which is not more than half.
    found = glas_detection(table)
    assert (found.tp, found.fp, found.fn) == (1, 2, 2)


def test_two_true_objects_may_take_one_prediction_in_aji_but_not_in_aji_plus():
    # One predicted object over two true ones of 3: shares 3 of 7 with each.
    true, pred = drawn("111.222"), drawn("1111111")
    table = compare(true, pred)
    assert aggregated_jaccard(table) == JaccardSums(intersection=6, union=14)
    # One pair of union 7, the other true object alone.
    assert aggregated_jaccard_plus(table) == JaccardSums(intersection=3, union=10)


def test_of_equal_iou_the_pair_that_shares_more_counts():
    # 2 of 6 pixels with the first, 3 of 9 with the second: both 1/3. Union 9, 2 alone.
    table = compare(drawn("111111..."), drawn("22.333333"))
    assert aggregated_jaccard(table) == JaccardSums(intersection=3, union=11)
    assert aggregated_jaccard_plus(table) == JaccardSums(intersection=3, union=11)


@given(seeds)
@settings(deadline=None)
def test_perfect_is_one(seed):
    true, _ = scene(seed)
    for name, value in scores(true, renamed(true, seed)).items():
        assert value == pytest.approx(1) if true.any() else math.isnan(value), name


@given(seeds)
@settings(deadline=None)
def test_symmetric_scores_are(seed):
    true, pred = scene(seed)
    one, other = scores(true, pred), scores(pred, true)
    for name in ("pq", "aji+", "object dice", "ensemble dice"):
        assert one[name] == pytest.approx(other[name], nan_ok=True), name


@given(seeds)
@settings(deadline=None)
def test_all_scores_lie_between_none_and_all(seed):
    for value in scores(*scene(seed)).values():
        assert math.isnan(value) or 0 <= value <= 1


@given(seeds)
@settings(deadline=None)
def test_numbers_of_objects_change_nothing(seed):
    true, pred = scene(seed)
    one, other = scores(true, pred), scores(renamed(true, seed), renamed(pred, seed + 1))
    assert np.array_equal(list(one.values()), list(other.values()), equal_nan=True)


def test_empty_sides():
    nothing, something = np.zeros((3, 9), int), TRUE
    assert all(math.isnan(value) for value in scores(nothing, nothing).values())
    assert all(value == 0 for value in scores(nothing, something).values())
    assert all(value == 0 for value in scores(something, nothing).values())
    assert math.isnan(panoptic_counts(compare(nothing, something)).sq)
    apart = scores(drawn("1.."), drawn("..1"))
    assert all(value == 0 for value in apart.values())


@given(seeds)
@settings(deadline=None)
def test_aggregated_jaccard_as_published(seed):
    true, pred = (masks(labels) for labels in scene(seed))
    intersection = union = 0
    used = set()
    for g in true:
        ious = [(g & s).sum() / (g | s).sum() for s in pred]
        if not ious or max(ious) == 0:
            union += g.sum()
            continue
        # Equal IoU: more shared pixels, then raster order.
        best = max(
            range(len(pred)),
            key=lambda j: (ious[j], (g & pred[j]).sum(), -int(pred[j].argmax())),
        )
        intersection += (g & pred[best]).sum()
        union += (g | pred[best]).sum()
        used.add(best)
    union += sum(s.sum() for j, s in enumerate(pred) if j not in used)
    sums = aggregated_jaccard(compare(*scene(seed)))
    assert (sums.intersection, sums.union) == (intersection, union)


@given(seeds)
@settings(max_examples=40, deadline=None)
def test_aji_plus_by_trying_all_pairings(seed):
    labels = scene(seed, objects=4)
    true, pred = (masks(image) for image in labels)
    iou = np.array([[(g & s).sum() / (g | s).sum() for s in pred] for g in true])
    iou = iou.reshape(len(true), len(pred))
    wide = np.zeros((len(true), len(pred) + len(true)))  # the rest: partners of nobody
    wide[:, : len(pred)] = iou
    best = max(
        sum(wide[i, j] for i, j in enumerate(choice))
        for choice in itertools.permutations(range(wide.shape[1]), len(true))
    )
    table = compare(*labels)
    sums = aggregated_jaccard_plus(table)
    # The greatest total may be reached in several ways: the one with most shared pixels.
    candidates = []
    for choice in itertools.permutations(range(wide.shape[1]), len(true)):
        if sum(wide[i, j] for i, j in enumerate(choice)) < best - 1e-9:
            continue
        pairs = [(i, j) for i, j in enumerate(choice) if wide[i, j] > 0]
        shared = sum((true[i] & pred[j]).sum() for i, j in pairs)
        union = sum((true[i] | pred[j]).sum() for i, j in pairs)
        union += sum(g.sum() for i, g in enumerate(true) if i not in {p[0] for p in pairs})
        union += sum(s.sum() for j, s in enumerate(pred) if j not in {p[1] for p in pairs})
        candidates.append((shared, union))
    assert (sums.intersection, sums.union) == max(candidates)


@given(seeds)
@settings(deadline=None)
def test_object_dice_as_published(seed):
    labels = scene(seed)

    def weighted(own, other):
        total = sum(mask.sum() for mask in own)
        result = 0.0
        for mask in own:
            # Most shared pixels; of equals the first in raster order.
            best = max(other, key=lambda m: ((mask & m).sum(), -int(m.argmax())), default=None)
            if best is not None and (mask & best).any():
                dice = 2 * (mask & best).sum() / (mask.sum() + best.sum())
                result += mask.sum() / total * dice
        return result

    true, pred = (masks(image) for image in labels)
    value = object_dice(compare(*labels)).dice
    if true or pred:
        assert value == pytest.approx((weighted(true, pred) + weighted(pred, true)) / 2)


@given(seeds)
@settings(deadline=None)
def test_ensemble_dice_and_glas_f1_as_published(seed):
    labels = scene(seed)
    true, pred = (masks(image) for image in labels)
    pairs = [(g, s) for g in true for s in pred if (g & s).any()]
    sums = ensemble_dice(compare(*labels))
    assert sums.intersection == sum((g & s).sum() for g, s in pairs)
    assert sums.area == sum(g.sum() + s.sum() for g, s in pairs)
    right = 0
    for s in pred:
        best = max(true, key=lambda g: ((g & s).sum(), -int(g.argmax())), default=None)
        right += best is not None and (best & s).sum() / best.sum() > 0.5
    counts = glas_detection(compare(*labels))
    assert (counts.tp, counts.fp, counts.fn) == (right, len(pred) - right, len(true) - right)


def classed(seed):
    true, pred = scene(seed)
    rng = np.random.default_rng(seed)
    table = compare(true, pred)
    true_classes = rng.integers(1, 4, table.true_ids.size)
    pred_classes = rng.integers(1, 4, table.pred_ids.size)
    pairs = table.pairs()
    keep = rng.random(pairs.size) < 0.7  # mostly the right class
    pred_classes[table.pred_index[pairs[keep]]] = true_classes[table.true_index[pairs[keep]]]
    return table, true_classes, pred_classes


@given(seeds)
@settings(max_examples=30, deadline=None)
def test_panoptic_quality_as_torchmetrics(seed):
    table, true_classes, pred_classes = classed(seed)
    counts = class_panoptic_counts(table, true_classes, pred_classes, classes=(1, 2, 3))

    def stacked(numbers, classes):
        categories = np.concatenate([[0], classes])[numbers]
        return torch.from_numpy(np.stack([categories, numbers], axis=-1)[None].astype(np.int64))

    expected = panoptic_quality(
        stacked(table.pred_map, pred_classes),
        stacked(table.true_map, true_classes),
        things={1, 2, 3},
        stuffs={0},
        return_sq_and_rq=True,
        return_per_class=True,
    )
    for own, (pq, sq, rq) in zip(counts, expected.tolist()[:3], strict=True):
        assert np.nan_to_num(own.pq) == pytest.approx(pq)
        assert np.nan_to_num(own.sq) == pytest.approx(sq)
        assert np.nan_to_num(own.dq) == pytest.approx(rq)


@given(seeds)
@settings(deadline=None)
def test_classes_are_scored_as_if_each_had_its_own_images(seed):
    table, true_classes, pred_classes = classed(seed)
    counts = class_panoptic_counts(table, true_classes, pred_classes, classes=(1, 2, 3))
    for label, own in zip((1, 2, 3), counts, strict=True):
        true = np.where(np.concatenate([[0], true_classes])[table.true_map] == label, 1, 0)
        pred = np.where(np.concatenate([[0], pred_classes])[table.pred_map] == label, 1, 0)
        alone = panoptic_counts(compare(true * table.true_map, pred * table.pred_map))
        assert (own.tp, own.fp, own.fn) == (alone.tp, alone.fp, alone.fn)
        assert own.iou_sum == pytest.approx(alone.iou_sum)


def test_objects_of_unknown_class_count_in_no_class():
    # Both predicted objects match; the first one's true class nobody knows.
    table = compare(drawn("11.22"), drawn("11.22"))
    counts = class_panoptic_counts(table, np.array([-1, 1]), np.array([1, 2]), classes=(1, 2))
    assert counts == (PanopticCounts(fn=1), PanopticCounts(fp=1))
    with pytest.raises(ValueError, match="one class an object"):
        class_panoptic_counts(table, np.array([1]), np.array([1, 2]), classes=(1,))


def test_means_over_classes_and_images():
    # Image 1: class 1 PQ 2 x 0.8 / (2 + 0 + 2) = 0.4, class 2 absent but predicted once.
    # Image 2: class 1 PQ 0.6, class 2 PQ 2 x 1.6 / (4 + 0 + 0) = 0.8.
    first = (PanopticCounts(tp=1, fn=2, iou_sum=0.8), PanopticCounts(fp=1))
    second = (PanopticCounts(tp=1, iou_sum=0.6), PanopticCounts(tp=2, iou_sum=1.6))
    empty = (PanopticCounts(), PanopticCounts())
    assert mean_pq(first) == pytest.approx(0.4)
    assert mean_pq(second) == pytest.approx(0.7)
    assert mpq([first, second, empty]) == pytest.approx(0.55)
    # Pooled: class 1 2 x 1.4 / (4 + 0 + 2) = 7/15, class 2 2 x 1.6 / (4 + 1 + 0) = 0.64.
    assert mpq_plus([first, second, empty]) == pytest.approx((7 / 15 + 0.64) / 2)
    assert pooled_classes([first, second])[1] == PanopticCounts(tp=2, fp=1, iou_sum=1.6)
    assert math.isnan(mpq([empty]))


def test_counts_of_images_add_up():
    one = ObjectDiceSums(true_dice=1.0, true_area=2, pred_dice=3.0, pred_area=4)
    assert pooled([one, one, one]) == ObjectDiceSums(
        true_dice=3.0, true_area=6, pred_dice=9.0, pred_area=12
    )
    assert pooled([one]) == one
    with pytest.raises(ValueError, match="at least one"):
        pooled([])
    assert math.isnan(mean_defined([math.nan]))
    assert mean_defined([1.0, math.nan, 2.0]) == 1.5


def test_an_object_has_the_class_of_most_of_its_pixels():
    numbers = drawn("1111222233445").astype(np.int32)
    classes = np.array([[1, 1, 2, 2, 0, 0, 0, 3, 0, 0, 9, 9, 2]])
    found = majority_classes(numbers, classes, n_objects=6, n_classes=4, unknown=9)
    # 1: a tie, the lower; 2: one pixel of class 3 beats three of none; 3: none; 4: only
    # unknown pixels; 6: no pixels.
    assert found.tolist() == [1, 3, 0, -1, 2, -1]
    with pytest.raises(ValueError, match=r"0\.\.3"):
        majority_classes(numbers, classes, n_objects=6, n_classes=2, unknown=9)
    with pytest.raises(ValueError, match="class map"):
        majority_classes(numbers, classes[:, 1:], n_objects=6, n_classes=4)
