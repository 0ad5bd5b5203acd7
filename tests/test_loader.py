"""Windows ahead of the network: the same whoever cuts them, and no thread outlives the run."""

import threading
from functools import partial
from itertools import islice, pairwise
from pathlib import Path

import numpy as np
import pytest
import torch

from wsi_pipeline.errors import DatasetError
from wsi_pipeline.spec import AnchorRules, HeadSpec, ModelSpec, PeakRules
from wsi_pipeline.training.annotation import (
    AnnotatedImage,
    BoxLabel,
    Dataset,
    InstanceLabel,
    Item,
    PatchLabel,
)
from wsi_pipeline.training.batch import Batch
from wsi_pipeline.training.loader import WINDOW_SCALE, load_batches
from wsi_pipeline.training.sampler import BatchRules, Sampler, SourceSize
from wsi_pipeline.training.sources import Source

SPEC = ModelSpec(
    name="m",
    architecture="a",
    mpp=0.5,
    halo_px=32,
    options={},
    heads=(
        HeadSpec(name="nuclei", kind="instance", object_kind="nucleus", rules=AnchorRules()),
        HeadSpec(name="tissue", kind="patch", classes=("fat", "muscle"), stride=16),
        HeadSpec(name="ring", kind="detect", object_kind="ring", rules=PeakRules()),
    ),
)
PATH = Path("folder")


def load(number, head):
    rng = np.random.default_rng(number)
    pixels = rng.integers(0, 256, (70, 90, 3), np.uint8)
    labels = {
        "nuclei": InstanceLabel(ids=(rng.random((70, 90)) < 0.2).astype(np.int32)),
        "tissue": PatchLabel(id=number % 2, classes=("fat", "muscle")),
        "ring": BoxLabel(boxes=np.array([[10, 10, 30 + number, 40]], np.float32)),
    }
    return AnnotatedImage(name=f"n{number}", image=pixels, mpp=0.5, labels={head: labels[head]})


def refuse(number):
    raise DatasetError(f"image {number} of the folder cannot be read")


def source(head, count, broken=(), scales=None):
    items = tuple(
        Item(
            name=f"n{i}",
            patient=f"p{i}",
            load=partial(refuse, i) if i in broken else partial(load, i, head),
        )
        for i in range(count)
    )
    classes = {"tissue": ("fat", "muscle")}.get(head, ())
    dataset = Dataset(name=head, path=PATH, labels={head: classes}, items=items)
    return Source(dataset, items, SPEC, scales=scales)


@pytest.fixture(scope="module")
def sources():
    return [source("nuclei", 5), source("tissue", 4), source("ring", 3)]


def sampler(sources, *, size=6, crop_px=16, crops=None):
    sizes = [
        SourceSize(
            task=own.task, images=len(own), weight=1.0, crop_px=(crops or {}).get(i, crop_px)
        )
        for i, own in enumerate(sources)
    ]
    return Sampler(sizes, BatchRules(size=size, epoch_steps=7), seed=2)


def take(sources, count, **how):
    batches = load_batches(sources, sampler(sources), SPEC, **{"workers": 1, **how})
    found = list(islice(batches, count))
    batches.close()
    return found


def same(a, b):
    return (
        a.seeds == b.seeds
        and a.scales == b.scales
        and a.crop_px == b.crop_px
        and torch.equal(a.windows.pixels, b.windows.pixels)
        and all(
            list(x) == list(y)
            and all(torch.allclose(x[k].float(), y[k].float(), equal_nan=True) for k in x)
            for x, y in (
                (a.windows.rows, b.windows.rows),
                (a.windows.labels, b.windows.labels),
                (a.windows.unknown, b.windows.unknown),
            )
        )
    )


def threads():
    return [t for t in threading.enumerate() if t.name.startswith(("windows", "batches"))]


def test_windows_depend_on_their_slots_and_not_on_threads(sources):
    one = take(sources, 9)
    many = take(sources, 9, workers=5)
    assert len(one) == len(many) == 9
    assert all(map(same, one, many))
    # and they do differ from one another
    assert not any(same(a, b) for a, b in pairwise(one))
    assert {batch.windows.pixels.shape for batch in one} == {(6, 16 * WINDOW_SCALE, 32, 3)}


def test_a_run_that_goes_on_has_the_batches_it_would_have_had(sources):
    assert all(map(same, take(sources, 9)[4:], take(sources, 5, first_step=4)))


def test_ranks_take_slots_apart_that_together_are_the_batch(sources):
    whole = take(sources, 3)
    parts = [take(sources, 3, rank=rank, world=4) for rank in range(4)]
    for step, batch in enumerate(whole):
        own = [part[step] for part in parts]
        assert sorted(seed for one in own for seed in one.seeds) == sorted(batch.seeds)
        assert [len(one.seeds) for one in own] == [2, 2, 1, 1]
        for one in own:
            places = [batch.seeds.index(seed) for seed in one.seeds]
            assert torch.equal(one.windows.pixels, batch.windows.pixels[places])


def test_no_rank_is_tied_to_a_task(sources):
    # a mixed batch lies in the order of its tasks, and the ranks must not
    for rank in range(3):
        heads = [frozenset(own.windows.rows) for own in take(sources, 12, rank=rank, world=3)]
        assert frozenset.union(*heads) == {"nuclei", "tissue", "ring"}
        assert len(set(heads)) > 1


def test_each_sample_has_the_labels_of_its_image_and_no_others(sources):
    plan = sampler(sources)
    for slots, loaded in zip(plan.batches(), take(sources, 3), strict=False):
        tasks = ["nuclei", "tissue", "ring"]
        for head in tasks:
            rows = [i for i, slot in enumerate(slots) if tasks[slot.source] == head]
            assert loaded.windows.rows[head].tolist() == rows
        ids = [slot.image % 2 for slot in slots if slot.source == 1]
        assert loaded.windows.labels["tissue"].tolist() == ids


@pytest.mark.parametrize("world", [1, 2])
def test_each_window_has_the_scales_of_its_source(world):
    own = [source("nuclei", 4, scales=(0.7, 1.4)), source("tissue", 4), source("ring", 3)]
    for rank in range(world):
        for loaded in take(own, 4, rank=rank, world=world):
            nuclei = set(loaded.windows.rows.get("nuclei", torch.tensor([])).tolist())
            wanted = [(0.7, 1.4) if i in nuclei else None for i in range(len(loaded.seeds))]
            assert list(loaded.scales) == wanted


def test_an_image_is_cut_elsewhere_each_time():
    alone = [source("nuclei", 1)]
    batches = load_batches(alone, sampler(alone, size=8), SPEC, workers=1)
    cut = [window.numpy().tobytes() for b in islice(batches, 2) for window in b.windows.pixels]
    batches.close()
    assert len(set(cut)) == 16


def test_crops_of_another_size_come_in_batches_of_their_own(sources):
    plan = sampler(sources, crops={1: 32})
    batches = load_batches(sources, plan, SPEC, workers=1)
    sides = {(b.crop_px, b.windows.pixels.shape[1]) for b in islice(batches, 7)}
    batches.close()
    assert sides == {(16, 32), (32, 64)}


def test_closing_ends_the_threads(sources):
    batches = load_batches(sources, sampler(sources), SPEC, workers=3)
    next(batches)
    assert len(threads()) >= 2  # or the test would not show that they end
    batches.close()
    assert threads() == []


def test_an_unreadable_image_is_said_when_its_batch_is_asked_for():
    broken = [source("nuclei", 12, broken={3})]
    plan = sampler(broken, size=2)
    slots = plan.batches()
    good = 0
    while all(slot.image != 3 for slot in next(slots)):
        good += 1
    assert good >= 1  # or the test would not show that earlier batches come
    batches = load_batches(broken, sampler(broken, size=2), SPEC, workers=2)
    for _ in range(good):
        next(batches)
    with pytest.raises(DatasetError, match="image 3 of the folder cannot be read"):
        next(batches)
    assert threads() == []


def test_a_batch_moves_with_all_it_has():
    batch = Batch(
        pixels=torch.zeros(2, 4, 4, 3),
        rows={"a": torch.tensor([1])},
        labels={"a": torch.tensor([3])},
        unknown={"r": torch.zeros(1, 4, 4, dtype=torch.bool)},
    )
    moved = batch.to("meta")
    found = [moved.pixels, moved.rows["a"], moved.labels["a"], moved.unknown["r"]]
    assert [tensor.device.type for tensor in found] == ["meta"] * 4
    assert [tensor.shape for tensor in found] == [(2, 4, 4, 3), (1,), (1,), (1, 4, 4)]
    assert (list(moved.rows), list(moved.labels), list(moved.unknown)) == (["a"], ["a"], ["r"])
