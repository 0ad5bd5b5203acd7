"""Scores of classified images, against scikit-learn and by hand."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn import metrics as sk

from wsi_pipeline.metrics import confusion, macro_auc, one_vs_rest_auc

seeds = st.integers(0, 2**32 - 1)


def patches(seed, classes=4):
    rng = np.random.default_rng(seed)
    true = rng.integers(0, classes, rng.integers(2, 40))
    scores = rng.random((true.size, classes)).round(1)  # ties
    scores[np.arange(true.size), true] += rng.random(true.size).round(1)
    return true, scores


def test_a_case_worked_by_hand():
    # True 0 0 0 1 1 2, called 0 0 1 1 0 3.
    table = confusion(np.array([0, 0, 0, 1, 1, 2]), np.array([0, 0, 1, 1, 0, 3]), n_classes=5)
    assert table.table.tolist()[:2] == [[2, 1, 0, 0, 0], [1, 1, 0, 0, 0]]
    assert table.table[2, 3] == 1
    assert table.accuracy == 0.5
    assert table.recall[:3].tolist() == [2 / 3, 1 / 2, 0]
    assert np.isnan(table.recall[3:]).all()
    assert table.balanced_accuracy == pytest.approx((2 / 3 + 1 / 2 + 0) / 3)
    # F1: 4/6, 2/4, 0/1, 0/1; class 4 neither occurs nor is called.
    assert table.macro_f1 == pytest.approx((4 / 6 + 2 / 4) / 4)
    assert (table + table).table.sum() == 12
    # Class 1 among scores: members 0.8, 0.3; others 0.3, 0.1, 0.1, 0.9. Of 8 pairs the
    # members win 3 + 2.5 (a tie with 0.3 counts half).
    auc = one_vs_rest_auc(
        np.array([1, 1, 0, 0, 0, 0]),
        np.array([[0.2, 0.8], [0.7, 0.3], [0.7, 0.3], [0.9, 0.1], [0.9, 0.1], [0.1, 0.9]]),
    )
    assert auc[1] == pytest.approx(5.5 / 8)


@given(seeds)
@settings(max_examples=50, deadline=None)
@pytest.mark.filterwarnings("ignore")
def test_as_scikit_learn(seed):
    true, scores = patches(seed)
    pred = scores.argmax(axis=1)
    own = confusion(true, pred, n_classes=4)
    assert (own.table == sk.confusion_matrix(true, pred, labels=range(4))).all()
    assert own.accuracy == pytest.approx(sk.accuracy_score(true, pred))
    assert own.balanced_accuracy == pytest.approx(sk.balanced_accuracy_score(true, pred))
    assert own.macro_f1 == pytest.approx(sk.f1_score(true, pred, average="macro"))
    precision = sk.precision_score(true, pred, labels=range(4), average=None, zero_division=np.nan)
    assert own.precision == pytest.approx(precision, nan_ok=True)
    aucs = one_vs_rest_auc(true, scores)
    for label in range(4):
        if 0 < (true == label).sum() < true.size:
            expected = sk.roc_auc_score(true == label, scores[:, label])
            assert aucs[label] == pytest.approx(expected)
        else:
            assert math.isnan(aucs[label])
    if len(set(true)) == 4:
        shares = scores / scores.sum(axis=1, keepdims=True)
        expected = sk.roc_auc_score(true, shares, multi_class="ovr")
        assert macro_auc(true, shares) == pytest.approx(expected)


@given(seeds)
@settings(deadline=None)
def test_only_the_order_of_scores_matters(seed):
    true, scores = patches(seed)
    assert macro_auc(true, scores) == pytest.approx(macro_auc(true, scores**3), nan_ok=True)


def test_empty_and_bad_input():
    none = np.zeros(0, int)
    assert math.isnan(confusion(none, none, n_classes=2).accuracy)
    assert math.isnan(macro_auc(none, np.zeros((0, 2))))
    with pytest.raises(ValueError, match=r"pred: class ids 2\.\.2"):
        confusion(np.array([0]), np.array([2]), n_classes=2)
    with pytest.raises(ValueError, match="one length"):
        confusion(np.array([0]), np.array([0, 1]), n_classes=2)
    with pytest.raises(ValueError, match=r"wanted 0\.\.1"):
        one_vs_rest_auc(np.array([2]), np.zeros((1, 2)))
    with pytest.raises(ValueError, match="NaN"):
        one_vs_rest_auc(np.array([0]), np.full((1, 2), np.nan))
    with pytest.raises(ValueError, match=r"\(N, C\)"):
        one_vs_rest_auc(np.array([0]), np.zeros(1))
