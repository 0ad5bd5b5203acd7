from collections import Counter
from itertools import islice

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from wsi_pipeline.errors import RecipeError
from wsi_pipeline.training.sampler import BatchRules, Sampler, SourceSize, check_sources

SOURCES = [
    SourceSize(task="gland", images=10, weight=1.0, crop_px=64),
    SourceSize(task="gland", images=30, weight=3.0, crop_px=64),
    SourceSize(task="nuclei", images=7, weight=1.0, crop_px=64),
    SourceSize(task="tissue", images=5, weight=1.0, crop_px=16),
]


def tasks_of(batch):
    return [SOURCES[slot.source].task for slot in batch]


def take(sampler, count, first=0):
    return list(islice(sampler.batches(first), count))


def test_a_fixed_batch_has_one_task_and_tasks_come_by_their_probability():
    rules = BatchRules(
        mode="fixed", size=4, tasks={"gland": 0.5, "nuclei": 0.25, "tissue": 0.25}, epoch_steps=40
    )
    batches = take(Sampler(SOURCES, rules, seed=1), 80)
    assert all(len(set(tasks_of(batch))) == 1 for batch in batches)
    assert Counter(tasks_of(batch)[0] for batch in batches) == {
        "gland": 40, "nuclei": 20, "tissue": 20,
    }  # fmt: skip
    # and not in the same order every time
    assert (
        tasks_of(batches[0]) + tasks_of(batches[1]) != tasks_of(batches[2]) + tasks_of(batches[3])
        or len({tasks_of(b)[0] for b in batches[:8]}) > 1
    )


def test_a_mixed_batch_has_several_tasks_by_their_shares_and_crops_of_one_size():
    rules = BatchRules(
        size=10, tasks={"gland": 0.56, "nuclei": 0.24, "tissue": 0.2}, epoch_steps=50
    )
    batches = take(Sampler(SOURCES, rules, seed=3), 50)
    large = [batch for batch in batches if tasks_of(batch)[0] != "tissue"]
    assert len(large) == 40  # 0.8 of the batches are of the larger crops
    for batch in large:
        assert Counter(tasks_of(batch)) == {"gland": 7, "nuclei": 3}
    for batch in batches:
        sizes = {SOURCES[slot.source].crop_px for slot in batch}
        assert sizes == {Sampler(SOURCES, rules, seed=3).crop_px(batch)}


def test_sources_of_a_task_are_drawn_by_weight_and_every_image_before_any_again():
    rules = BatchRules(mode="fixed", size=8, tasks={}, epoch_steps=300)
    slots = [slot for batch in take(Sampler(SOURCES, rules, seed=0), 300) for slot in batch]
    drawn = Counter(slot.source for slot in slots)
    assert 2.5 < drawn[1] / drawn[0] < 3.5
    for source, size in enumerate(SOURCES):
        images = [slot.image for slot in slots if slot.source == source]
        whole = len(images) // size.images * size.images
        passes = np.array(images[:whole]).reshape(-1, size.images)
        assert (np.sort(passes, axis=1) == np.arange(size.images)).all()
    assert len({slot.seed for slot in slots}) == len(slots)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 60), st.integers(0, 5), st.sampled_from(["mixed", "fixed"]))
def test_going_on_from_a_step_gives_the_batches_that_would_have_come(first, seed, mode):
    rules = BatchRules(mode=mode, size=3, epoch_steps=13)
    whole = take(Sampler(SOURCES, rules, seed=seed), first + 5)
    assert take(Sampler(SOURCES, rules, seed=seed), 5, first) == whole[first:]
    assert take(Sampler(SOURCES, rules, seed=seed + 1), first + 5) != whole


def test_an_epoch_is_the_largest_source_times_the_number_of_tasks():
    assert Sampler(SOURCES, BatchRules(size=7), seed=0).steps_per_epoch == -(-30 * 3 // 7)
    only = BatchRules(size=7, tasks={"gland": 1, "nuclei": 1, "tissue": 0})
    assert Sampler(SOURCES, only, seed=0).steps_per_epoch == -(-30 * 2 // 7)
    assert not any(
        "tissue" in tasks_of(batch) for batch in take(Sampler(SOURCES, only, seed=0), 30)
    )


@pytest.mark.parametrize(
    ("tasks", "words"),
    [
        ({"gland": 1, "nuclei": 1}, "sources' tasks are"),
        ({"gland": 1, "nuclei": 1, "tissue": 1, "lumen": 1}, "sources' tasks are"),
        ({"gland": 0, "nuclei": 0, "tissue": 0}, "no task has a share"),
    ],
)
def test_shares_that_do_not_fit_the_tasks(tasks, words):
    with pytest.raises(RecipeError, match=words):
        Sampler(SOURCES, BatchRules(tasks=tasks), seed=0)


def test_rules_and_sources_that_make_no_sense():
    with pytest.raises(RecipeError, match="multiple of 16"):
        BatchRules(crop_px=100)
    with pytest.raises(RecipeError, match="negative"):
        BatchRules(tasks={"a": -1.0})
    check_sources(SOURCES)
    with pytest.raises(RecipeError, match=r"crops of \[64, 128\] px"):
        check_sources([*SOURCES, SourceSize(task="gland", images=1, weight=1, crop_px=128)])
    with pytest.raises(RecipeError, match="positive"):
        check_sources([SourceSize(task="a", images=1, weight=0, crop_px=16)])


def test_an_epoch_is_not_the_one_before_again():
    batches = take(Sampler(SOURCES, BatchRules(size=4, epoch_steps=20), seed=5), 60)
    slots = [[(slot.source, slot.image) for slot in batch] for batch in batches]
    first, second, third = slots[:20], slots[20:40], slots[40:]
    assert first != second != third != first
    assert len({slot.seed for batch in batches for slot in batch}) == 240
