"""Parts of a dataset: no patient in two, nobody moved by additions, nothing empty."""

from functools import partial

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from wsi_pipeline.errors import DatasetError, RecipeError
from wsi_pipeline.training.annotation import Item
from wsi_pipeline.training.split import k_folds, split_items


def item(name, patient=None, **facts):
    return Item(name=name, patient=patient or name, load=partial(int), **facts)


def cohort(sizes, prefix="p"):
    return [
        item(f"{prefix}{p}-{i}", f"{prefix}{p}", group="ab"[p % 2])
        for p, size in enumerate(sizes)
        for i in range(size)
    ]


def patients(items):
    return {item.patient for item in items}


sizes = st.lists(st.integers(1, 5), min_size=3, max_size=40)


@settings(deadline=None)
@given(sizes, st.floats(0.01, 0.45), st.floats(0.01, 0.45), st.integers(0, 9))
def test_parts_share_no_patient_and_lose_no_image(sizes, validation, test, seed):
    items = cohort(sizes)
    split = split_items(items, validation=validation, test=test, seed=seed)
    assert list(split) == ["train", "validation", "test"]
    assert all(split.values())
    assert sorted(i.name for part in split.values() for i in part) == sorted(i.name for i in items)
    assert sum(len(patients(part)) for part in split.values()) == len(sizes)


@settings(deadline=None)
@given(st.integers(0, 99), st.randoms())
def test_additions_move_nobody(seed, random):
    few = cohort([2] * 40)
    more = [*few, *cohort([1] * 30, "q"), item("late", "p3")]
    random.shuffle(more)
    before = split_items(few, validation=0.3, seed=seed)
    after = split_items(more, validation=0.3, seed=seed)
    for part in before:
        assert patients(before[part]) <= patients(after[part])
    assert "late" in {
        i.name for part in after if "p3" in patients(before[part]) for i in after[part]
    }


def test_shares_are_met_on_average_and_seeds_differ():
    items = cohort([1] * 2000)
    split = split_items(items, validation=0.2, test=0.1, seed=1)
    assert len(split["validation"]) == pytest.approx(400, abs=60)
    assert len(split["test"]) == pytest.approx(200, abs=45)
    other = split_items(items, validation=0.2, test=0.1, seed=2)
    assert patients(other["validation"]) != patients(split["validation"])


def test_the_draw_is_the_same_on_every_machine():
    # first six bytes of SHA-256 of "0/p<n>" over 2^48, by sha256sum: p0 0.024, p3 0.107,
    # p6 0.003, the others 0.17 and up
    split = split_items(cohort([1] * 10), validation=0.15)
    assert patients(split["validation"]) == {"p0", "p3", "p6"}


def test_published_parts_stay_and_the_rest_is_drawn_from_training():
    items = [item(f"t{i}", part="test") for i in range(5)]
    items += [item(f"a{i}", part="train") for i in range(50)] + [item("loose")]
    split = split_items(items, validation=0.2, test=0.5)
    assert {i.name for i in split["test"]} == {f"t{i}" for i in range(5)}
    assert len(split["train"]) + len(split["validation"]) == 51
    assert split["validation"]
    own = split_items(items, validation=0.2, published=False)
    assert "test" not in own
    assert sum(map(len, own.values())) == 56


def test_nothing_is_asked_nothing_is_split():
    assert list(split_items(cohort([1, 1]), validation=0)) == ["train"]


@pytest.mark.parametrize(("validation", "test"), [(-0.1, 0), (0.6, 0.4), (1.0, 0)])
def test_shares_that_leave_nothing(validation, test):
    with pytest.raises(RecipeError, match="leave some to train on"):
        split_items(cohort([1] * 9), validation=validation, test=test)


def test_too_few_patients_say_their_counts():
    with pytest.raises(DatasetError, match=r"train 3 images of 1 patients, validation 0 images"):
        split_items(cohort([3]), validation=0.5)
    with pytest.raises(DatasetError, match="parts must be"):
        split_items([item("a", part="val")], validation=0.5)


@settings(deadline=None)
@given(sizes, st.integers(2, 3), st.integers(0, 9))
def test_every_patient_is_tested_in_one_fold(sizes, folds, seed):
    items = cohort(sizes)
    parts = k_folds(items, folds=folds, seed=seed)
    tested = [patients(part["test"]) for part in parts]
    assert sum(map(len, tested)) == len(set().union(*tested)) == len(sizes)
    assert max(map(len, tested)) - min(map(len, tested)) <= 1
    for part in parts:
        assert not patients(part["train"]) & patients(part["test"])
        assert len(part["train"]) + len(part["test"]) == len(items)


def test_folds_have_each_group_alike():
    for part in k_folds(cohort([1] * 40), folds=4):
        assert [i.group for i in part["test"]].count("a") == 5


def test_folds_that_cannot_be():
    with pytest.raises(RecipeError, match="2 folds"):
        k_folds(cohort([1, 1]), folds=1)
    with pytest.raises(DatasetError, match=r"2 patients \(6 images\)"):
        k_folds(cohort([3, 3]), folds=3)
