"""Pixel scores: hand-worked, and against torchmetrics and scikit-learn."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import precision_recall_fscore_support
from torchmetrics.functional import jaccard_index

from wsi_pipeline.metrics import (
    PixelCounts,
    class_pixel_counts,
    mean_dice,
    mean_jaccard,
    pixel_counts,
    pooled,
)

seeds = st.integers(0, 2**32 - 1)


def maps(seed, classes=4):
    rng = np.random.default_rng(seed)
    true = rng.integers(0, classes, (9, 11))
    pred = np.where(rng.random(true.shape) < 0.6, true, rng.integers(0, classes, true.shape))
    return true.astype(np.uint8), pred.astype(np.uint8), rng.random(true.shape) < 0.2


def test_a_case_worked_by_hand():
    true = np.array([[1, 1, 1, 0, 0, 0]], bool)
    pred = np.array([[1, 1, 0, 1, 1, 0]], bool)
    counts = pixel_counts(true, pred)
    assert counts == PixelCounts(tp=2, fp=2, fn=1, tn=1)
    assert counts.dice == pytest.approx(4 / 7)
    assert counts.jaccard == pytest.approx(2 / 5)
    assert counts.precision == 0.5
    assert counts.recall == pytest.approx(2 / 3)
    assert counts.specificity == pytest.approx(1 / 3)
    assert counts.accuracy == 0.5
    ignore = np.array([[0, 0, 1, 1, 0, 0]], bool)
    assert pixel_counts(true, pred, ignore=ignore) == PixelCounts(tp=2, fp=1, fn=0, tn=1)


@given(seeds)
@settings(max_examples=30, deadline=None)
def test_classes_as_scikit_learn_and_torchmetrics(seed):
    true, pred, ignore = maps(seed)
    counts = class_pixel_counts(true, pred, n_classes=4, ignore=ignore)
    flat = true[~ignore], pred[~ignore]
    precision, recall, f1, _ = precision_recall_fscore_support(
        *flat, labels=range(4), zero_division=np.nan
    )
    tensors = [torch.from_numpy(ids.astype(np.int64)) for ids in flat]
    jaccard = jaccard_index(*tensors, task="multiclass", num_classes=4, average="none")
    for i, own in enumerate(counts):
        assert own.precision == pytest.approx(precision[i], nan_ok=True)
        assert own.recall == pytest.approx(recall[i], nan_ok=True)
        assert own.tp + own.fp + own.fn + own.tn == flat[0].size
        if own.tp + own.fp + own.fn:
            assert own.dice == pytest.approx(f1[i])
            assert own.jaccard == pytest.approx(float(jaccard[i]))
    assert pooled(counts).accuracy == pytest.approx(
        (2 * (flat[0] == flat[1]).sum() + 2 * flat[0].size) / (4 * flat[0].size)
    )


@given(seeds)
@settings(deadline=None)
def test_parts_of_an_image_add_up_to_it(seed):
    true, pred, ignore = maps(seed)
    whole = class_pixel_counts(true, pred, n_classes=4, ignore=ignore)
    halves = [
        class_pixel_counts(true[part], pred[part], n_classes=4, ignore=ignore[part])
        for part in (np.s_[:4], np.s_[4:])
    ]
    assert whole == tuple(a + b for a, b in zip(*halves, strict=True))


def test_nothing_true_and_nothing_predicted():
    nothing, all_of_it = np.zeros((2, 2), bool), np.ones((2, 2), bool)
    empty = pixel_counts(nothing, nothing)
    assert empty.dice == empty.jaccard == 1
    assert math.isnan(empty.precision)
    assert math.isnan(empty.recall)
    assert pixel_counts(nothing, all_of_it).dice == 0
    assert pixel_counts(all_of_it, nothing).jaccard == 0
    assert math.isnan(pixel_counts(nothing, nothing, ignore=all_of_it).accuracy)


def test_means_leave_out_classes_that_do_not_occur():
    absent, half = PixelCounts(tn=9), PixelCounts(tp=1, fp=1, fn=1)
    invented = PixelCounts(fp=3)
    assert mean_dice([absent, half]) == 0.5
    assert mean_dice([absent, half, invented]) == 0.25
    assert mean_jaccard([absent, half]) == pytest.approx(1 / 3)
    assert math.isnan(mean_jaccard([absent]))


def test_bad_input_is_refused():
    ids = np.zeros((2, 2), np.uint8)
    with pytest.raises(ValueError, match="pred is"):
        class_pixel_counts(ids, ids[:1], n_classes=2)
    with pytest.raises(ValueError, match=r"true: class ids 0\.\.255, wanted 0\.\.1"):
        class_pixel_counts(np.array([[0, 255]], np.uint8), ids[:1], n_classes=2)
    with pytest.raises(ValueError, match="bool"):
        pixel_counts(ids, ids)
    unknown = np.array([[0, 255]], np.uint8)
    counts = class_pixel_counts(unknown, ids[:1], n_classes=2, ignore=unknown == 255)
    assert counts[0].tp == 1
