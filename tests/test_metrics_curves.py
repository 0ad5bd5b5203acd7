"""Scored detections: FROC and average precision."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import average_precision_score, precision_recall_curve

from wsi_pipeline.metrics import (
    DIGESTPATH_RATES,
    ScoredDetections,
    average_precision,
    froc,
    score_boxes,
    score_points,
)

seeds = st.integers(0, 2**32 - 1)


def image(n_true, hits, false):
    scores = np.array([*hits, *false], float)
    return ScoredDetections(n_true=n_true, scores=scores, hits=np.arange(scores.size) < len(hits))


# Two images, four true objects. By score: .9 hit, .8 false, .7 hit, .7 false, .5 hit.
IMAGES = [image(3, [0.9, 0.5], [0.8]), image(1, [0.7], [0.7])]


def test_froc_worked_by_hand():
    curve = froc(IMAGES)
    assert curve.thresholds.tolist() == [0.9, 0.8, 0.7, 0.5]
    assert curve.false_positives.tolist() == [0, 0.5, 1, 1]
    assert curve.sensitivity.tolist() == [0.25, 0.25, 0.5, 0.75]
    assert curve.sensitivity_at(0) == 0.25
    assert curve.sensitivity_at(0.99) == 0.25
    assert curve.sensitivity_at(1) == 0.75
    assert curve.mean_sensitivity((0.25, 1.0, 8.0)) == pytest.approx((0.25 + 0.75 * 2) / 3)
    # Steps: 0.25 from 0 to 1, 0.75 from 1 to 4.
    assert curve.area(4) == pytest.approx((0.25 + 3 * 0.75) / 4)
    assert curve.area(0.5) == pytest.approx(0.25)


def test_false_positives_may_be_counted_in_other_images():
    negative = image(0, [], [0.6, 0.85])
    curve = froc(IMAGES, fp_images=[negative])
    assert curve.sensitivity_at(0) == 0.25  # 0.9
    assert curve.sensitivity_at(1) == 0.5  # down to 0.7, above 0.6
    assert curve.mean_sensitivity(DIGESTPATH_RATES) == pytest.approx((0.5 + 5 * 0.75) / 6)


def test_average_precision_worked_by_hand():
    # Recall 1/4 at precision 1; 2/4 at 2/4, but 3/4 at 3/5, which is better and holds for
    # both. 1/4 x 1 + 2/4 x 3/5.
    assert average_precision(IMAGES) == pytest.approx(0.25 + 0.5 * 0.6)


@given(seeds)
@settings(deadline=None)
def test_average_precision_as_scikit_learn_with_the_envelope(seed):
    rng = np.random.default_rng(seed)
    images = []
    for _ in range(3):
        hits, false = rng.integers(0, 6, 2)
        missed = rng.integers(0, 3)
        images.append(image(hits + missed, rng.random(hits).round(1), rng.random(false).round(1)))
    labels = np.concatenate([one.hits for one in images])
    scores = np.concatenate([one.scores for one in images])
    n_true = sum(one.n_true for one in images)
    if not labels.any():
        expected = 0.0 if n_true else math.nan
        assert average_precision(images) == pytest.approx(expected, nan_ok=True)
        return
    precision, recall, _ = precision_recall_curve(labels, scores)
    precision, recall = precision[::-1], recall[::-1] * labels.sum() / n_true
    envelope = [precision[i:].max() for i in range(precision.size)]
    expected = sum((recall[i] - recall[i - 1]) * envelope[i] for i in range(1, recall.size))
    assert average_precision(images) == pytest.approx(expected)
    stepwise = average_precision_score(labels, scores) * labels.sum() / n_true
    assert average_precision(images) >= stepwise - 1e-12


@given(seeds)
@settings(max_examples=60, deadline=None)
def test_froc_by_counting_at_each_threshold(seed):
    rng = np.random.default_rng(seed)
    true = [rng.random((rng.integers(0, 5), 2)) * 10 for _ in range(3)]
    pred = [rng.random((rng.integers(0, 7), 2)) * 10 for _ in range(3)]
    scores = [rng.random(len(points)).round(1) for points in pred]
    judged = [score_points(*one, radius=2) for one in zip(true, pred, scores, strict=True)]
    curve = froc(judged)
    assert curve.thresholds.tolist() == sorted(set(np.concatenate(scores)), reverse=True)
    n_true = sum(len(points) for points in true)
    for step, threshold in enumerate(curve.thresholds):
        # Judged again from what is above the threshold alone.
        above = [s >= threshold for s in scores]
        again = [
            score_points(t, p[a], s[a], radius=2)
            for t, p, s, a in zip(true, pred, scores, above, strict=True)
        ]
        hits = sum(one.hits.sum() for one in again)
        assert curve.false_positives[step] == pytest.approx(
            sum((~one.hits).sum() for one in again) / 3
        )
        if n_true:
            assert curve.sensitivity[step] == pytest.approx(hits / n_true)


def test_higher_scores_choose_first_and_each_object_is_found_once():
    true = np.array([[0.0, 0], [4, 0]])
    # The first takes the nearer object, 0; the second wants 0 too and is left with nothing
    # in reach; the third finds 4.
    pred = np.array([[1.0, 0], [0, 0], [4, 1]])
    judged = score_points(true, pred, np.array([0.9, 0.8, 0.1]), radius=3)
    assert judged.hits.tolist() == [True, False, True]
    # Equal scores: the closer pair first.
    judged = score_points(true, pred, np.array([0.8, 0.8, 0.1]), radius=3)
    assert judged.hits.tolist() == [True, True, False]


def test_boxes_match_by_overlap():
    true = np.array([[0.0, 0, 10, 10]])
    # Shares 50 of 100 + 100 - 50; shares 80 of 100 + 80 - 80.
    pred = np.array([[5.0, 0, 15, 10], [0, 0, 10, 8], [20, 20, 30, 30]])
    scores = np.array([0.9, 0.8, 0.7])
    assert score_boxes(true, pred, scores, iou=0.5).hits.tolist() == [False, True, False]
    assert score_boxes(true, pred, scores, iou=0.3).hits.tolist() == [True, False, False]
    assert score_boxes(true, pred, scores, iou=0.8).hits.tolist() == [False, True, False]
    twice = np.array([[0.0, 0, 10, 10], [0, 0, 10, 8]])
    assert score_boxes(twice, pred, scores, iou=0.3).hits.tolist() == [True, True, False]
    # The best box first takes the true object it overlaps most, not the other one in reach:
    # that is left for the second, which reaches no other.
    true = np.array([[0.0, 0, 10, 10], [4, 0, 14, 10]])
    pred = np.array([[4.0, 0, 14, 10], [0, 0, 6, 10]])
    assert score_boxes(true, pred, scores[:2], iou=0.4).hits.tolist() == [True, True]


def test_excused_detections_are_left_out_unless_they_hit():
    true, pred = np.array([[0.0, 0]]), np.array([[0.0, 0], [9, 9], [5, 5]])
    excused = np.array([True, True, False])
    judged = score_points(true, pred, np.array([0.3, 0.2, 0.1]), radius=1, excused=excused)
    assert judged.scores.tolist() == [0.3, 0.1]
    assert judged.hits.tolist() == [True, False]


def test_nothing_true_nothing_found():
    nothing = froc([image(0, [], [0.5])])
    assert math.isnan(nothing.sensitivity_at(1))
    assert math.isnan(nothing.area(1))
    unfound = froc([image(2, [], [])])
    assert unfound.mean_sensitivity() == unfound.area(8) == 0
    assert average_precision([image(2, [], [])]) == 0
    assert math.isnan(average_precision([image(0, [], [])]))
    assert math.isnan(average_precision([image(0, [], [0.4])]))


def test_bad_input_is_refused():
    point, box = np.zeros((1, 2)), np.array([[0.0, 0, 1, 1]])
    with pytest.raises(ValueError, match="no image"):
        froc([])
    with pytest.raises(ValueError, match="scores: 1 values"):
        score_points(point, point, np.zeros(2), radius=1)
    with pytest.raises(ValueError, match="NaN"):
        score_points(point, point, np.array([np.nan]), radius=1)
    with pytest.raises(ValueError, match=r"boxes \(N, 4\)"):
        score_boxes(point, box, np.zeros(1))
    with pytest.raises(ValueError, match="iou"):
        score_boxes(box, box, np.zeros(1), iou=0)
