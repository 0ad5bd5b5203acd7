"""Bootstrap intervals."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import bootstrap as scipy_bootstrap

from wsi_pipeline.metrics import PanopticCounts, bootstrap, pooled


def means(values):
    return lambda drawn: {"mean": float(values[drawn].mean())}


def test_agrees_with_scipy_within_the_noise_of_the_draws():
    values = np.random.default_rng(1).normal(0.7, 0.1, 40)
    own = bootstrap(means(values), 40, draws=4000)["mean"]
    other = scipy_bootstrap(
        (values,), np.mean, n_resamples=4000, method="percentile", rng=np.random.default_rng(2)
    ).confidence_interval
    assert own.value == pytest.approx(values.mean())
    # The standard error of the mean is 0.016; the ends are known to a twentieth of it.
    assert own.low == pytest.approx(other.low, abs=0.002)
    assert own.high == pytest.approx(other.high, abs=0.002)
    assert own.draws == 4000


def test_the_seed_decides():
    values = np.random.default_rng(0).random(9)
    assert bootstrap(means(values), 9, seed=3) == bootstrap(means(values), 9, seed=3)
    assert bootstrap(means(values), 9, seed=3) != bootstrap(means(values), 9, seed=4)


def test_sums_are_pooled_for_each_draw():
    # One large image with all matches, one small without any: pooled PQ is not the mean.
    counts = [PanopticCounts(tp=8, iou_sum=8.0), PanopticCounts(fp=2, fn=2)]
    drawn_scores = set()

    def statistic(drawn):
        score = pooled([counts[index] for index in drawn]).pq
        drawn_scores.add(round(score, 6))
        return {"pq": score}

    found = bootstrap(statistic, 2, draws=200)["pq"]
    assert found.value == pytest.approx(16 / 20)
    assert drawn_scores == {0.0, 0.8, 1.0}
    assert (found.low, found.high) == (0, 1)


@given(st.integers(1, 12), st.integers(0, 99))
@settings(max_examples=20, deadline=None)
def test_whole_patients_are_drawn(n_patients, seed):
    rng = np.random.default_rng(seed)
    owners = [f"p{i}" for i in rng.permutation(np.repeat(np.arange(n_patients), 3))]
    seen = []

    def statistic(drawn):
        seen.append([owners[index] for index in drawn])
        return {"n": float(len(drawn))}

    bootstrap(statistic, len(owners), clusters=owners, draws=20, seed=seed)
    for drawn in seen:
        assert len(drawn) == len(owners)
        assert all(drawn.count(name) % 3 == 0 for name in set(drawn))


def test_names_of_patients_do_not_decide():
    values = np.random.default_rng(5).random(10)
    first = bootstrap(means(values), 10, clusters=list("aabbccddee"), draws=99)
    assert first == bootstrap(means(values), 10, clusters=list("zzyyxxwwvv"), draws=99)
    assert first != bootstrap(means(values), 10, draws=99)


def test_alike_images_of_a_patient_widen_the_interval():
    values = np.repeat(np.random.default_rng(0).normal(size=10), 8)
    free = bootstrap(means(values), 80)["mean"]
    tied = bootstrap(means(values), 80, clusters=[str(i // 8) for i in range(80)])["mean"]
    assert tied.high - tied.low > 1.5 * (free.high - free.low)


def test_undefined_draws_are_left_out():
    values = np.array([math.nan, 2.0])

    def statistic(drawn):
        return {"first": float(values[drawn].max()), "never": math.nan}

    found = bootstrap(statistic, 2, draws=100)
    assert 0 < found["first"].draws < 100  # only draws without the NaN
    assert (found["first"].low, found["first"].high) == (2, 2)
    assert math.isnan(found["first"].value)
    assert math.isnan(found["never"].low)
    assert found["never"].draws == 0


def test_ends_are_draws_even_where_scores_are_infinite():
    values = np.array([1.0, math.inf])
    found = bootstrap(lambda drawn: {"worst": float(values[drawn].max())}, 2)["worst"]
    assert (found.low, found.high) == (1, math.inf)


def test_bad_input_is_refused():
    with pytest.raises(ValueError, match="0 images"):
        bootstrap(means(np.zeros(1)), 0)
    with pytest.raises(ValueError, match="level 1"):
        bootstrap(means(np.zeros(1)), 1, level=1)
    with pytest.raises(ValueError, match="clusters for 1"):
        bootstrap(means(np.zeros(2)), 2, clusters=["a"])
