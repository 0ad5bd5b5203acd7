"""What the network is fed: pixels at its mpp, labels under its names, windows of both."""

import threading
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst
from skimage.transform import downscale_local_mean, resize

from wsi_pipeline.errors import DatasetError, RecipeError
from wsi_pipeline.spec import AnchorRules, HeadSpec, ModelSpec, PeakRules, RunRules
from wsi_pipeline.training.annotation import (
    IGNORE_CLASS,
    AnnotatedImage,
    BoxLabel,
    ClassLabel,
    Dataset,
    InstanceLabel,
    Item,
    PatchLabel,
)
from wsi_pipeline.training.conform import resampled
from wsi_pipeline.training.sources import ImageCache, Source, collate

SPEC = ModelSpec(
    name="m",
    architecture="a",
    mpp=0.5,
    halo_px=160,
    options={},
    heads=(
        HeadSpec(name="nuclei", kind="instance", object_kind="nucleus", rules=AnchorRules()),
        HeadSpec(
            name="nuclei-class", kind="class", classes=("none", "a", "b"), classifies="nuclei"
        ),
        HeadSpec(name="gland", kind="instance", object_kind="gland", rules=RunRules()),
        HeadSpec(name="tissue", kind="patch", classes=("stroma", "tumour"), stride=16),
        HeadSpec(name="ring", kind="detect", object_kind="ring", rules=PeakRules()),
    ),
)


def rgb(shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (*shape, 3), np.uint8)


def annotated(labels, shape=(80, 100), mpp=0.5, image=None):
    image = rgb(shape) if image is None else image
    return AnnotatedImage(name="x", image=image, mpp=mpp, labels=labels)


def instances(shape, *boxes):
    ids = np.zeros(shape, np.int32)
    for number, (left, top, right, bottom) in enumerate(boxes, 1):
        ids[top:bottom, left:right] = number
    return InstanceLabel(ids=ids)


def names_of(label):
    return () if isinstance(label, InstanceLabel | BoxLabel) else label.classes


def source(*images, labels=None, **how):
    items = [
        Item(name=str(i), patient=str(i), load=partial(lambda image: image, image))
        for i, image in enumerate(images)
    ]
    if labels is None:
        labels = {head: names_of(label) for im in images for head, label in im.labels.items()}
    dataset = Dataset(name="d", path=Path("d"), labels=labels, items=tuple(items))
    return Source(dataset, items, how.pop("spec", SPEC), **how)


# -- pixel size ------------------------------------------------------------------------------


def test_halving_is_the_mean_of_four():
    image = annotated({}, mpp=0.25)
    wanted = downscale_local_mean(image.image.astype(float), (2, 2, 1))
    result = resampled(image, 0.5)
    assert result.mpp == 0.5
    assert np.abs(result.image - wanted).max() <= 1


def test_a_fraction_is_the_area_mean():
    image = annotated({}, shape=(60, 90), mpp=0.5 / 1.5)  # 3 pixels become 2
    fine = image.image.repeat(2, axis=0).repeat(2, axis=1).astype(float)  # 6 halves: 3 and 3
    wanted = downscale_local_mean(fine, (3, 3, 1))
    assert np.abs(resampled(image, 0.5).image - wanted).max() <= 1


def test_enlarging_interpolates_corner_on_corner():
    image = annotated({}, shape=(40, 60), mpp=1.05)
    result = resampled(image, 0.5)
    assert result.image.shape == (84, 126, 3)
    wanted = resize(image.image.astype(float), (84, 126), order=1, mode="edge")
    assert np.abs(result.image - wanted).max() <= 1


@pytest.mark.parametrize(("mpp", "reached"), [(0.49, 0.49), (0.2535, 0.507), (0.27, 0.5), (1, 0.5)])
def test_near_powers_of_two_are_used_as_they_are(mpp, reached):
    assert resampled(annotated({}, mpp=mpp), 0.5).mpp == pytest.approx(reached)


@pytest.mark.parametrize("mpp", [0.25, 1.05, 0.3, 0.0621, 1.6])
def test_a_square_stays_where_it_is(mpp):
    um = np.array([12.6, 16.8, 37.8, 33.6])  # left, top, right, bottom
    left, top, right, bottom = edges = np.round(um / mpp).astype(int)
    shape = round(50.4 / mpp), round(63 / mpp)
    pixels = np.full((*shape, 3), 250, np.uint8)
    pixels[top:bottom, left:right] = 20
    labels = {
        "nuclei": instances(shape, edges),
        "nuclei-class": ClassLabel(
            ids=instances(shape, edges).ids.astype(np.uint8), classes=("none", "a")
        ),
        "ring": BoxLabel(
            boxes=edges[None].astype(np.float32), ignore=instances(shape, edges).ids > 0
        ),
    }
    result = resampled(annotated(labels, mpp=mpp, image=pixels), 0.5)
    assert result.mpp == pytest.approx(0.5, rel=0.03)
    wanted = edges * mpp / result.mpp
    masks = [
        result.image.mean(axis=2) < 135,
        result.labels["nuclei"].ids == 1,
        result.labels["nuclei-class"].ids == 1,
        result.labels["ring"].ignore,
    ]
    for mask in masks:
        y, x = np.nonzero(mask)
        found = np.array([x.min(), y.min(), x.max() + 1, y.max() + 1])
        assert np.abs(found - wanted).max() <= 0.5 + 1e-6
    assert result.labels["ring"].boxes[0] == pytest.approx(wanted, rel=1e-5)


@settings(deadline=None, max_examples=60)
@given(
    npst.arrays(np.int32, st.tuples(st.integers(1, 24), st.integers(1, 24)),
                elements=st.integers(-1, 4)),
    st.sampled_from([0.5, 0.25, 0.21, 0.3, 1.05, 0.77]),
)  # fmt: skip
def test_ids_are_those_under_the_centres(ids, mpp):
    image = annotated({"nuclei": InstanceLabel(ids=ids)}, mpp=mpp, image=rgb(ids.shape))
    result = resampled(image, 0.5)
    out = result.labels["nuclei"].ids
    ratio = result.mpp / mpp
    assert out.shape == tuple(max(1, round(side / ratio)) for side in ids.shape)
    lost = set()
    for y, x in np.ndindex(out.shape):
        at = ids[
            min(int((y + 0.5) * ratio), ids.shape[0] - 1),
            min(int((x + 0.5) * ratio), ids.shape[1] - 1),
        ]
        lost |= {(at, out[y, x])} if at != out[y, x] else set()
    nearest = {
        ids[
            min(int((y + 0.5) * ratio), ids.shape[0] - 1),
            min(int((x + 0.5) * ratio), ids.shape[1] - 1),
        ]
        for y, x in np.ndindex(out.shape)
    }
    # only objects that nearest sampling loses are painted over others
    assert all(new > 0 and new not in nearest for _, new in lost)


def test_objects_smaller_than_a_pixel_survive():
    image = annotated(
        {"nuclei": instances((8, 8), (0, 0, 1, 1), (6, 4, 7, 5))}, mpp=0.125, image=rgb((8, 8))
    )
    out = resampled(image, 0.5).labels["nuclei"].ids
    assert out.tolist() == [[1, 0], [0, 2]]


# -- names -----------------------------------------------------------------------------------

CELLS = {
    "cells": instances((40, 40), (5, 5, 15, 15)),
    "kinds": ClassLabel(
        ids=np.arange(1600).reshape(40, 40).astype(np.uint8) % 4,
        classes=("nothing", "b", "odd", "third"),
    ),
    "other": PatchLabel(id=0, classes=("x",)),
}
AS = {"cells": "nuclei", "kinds": "nuclei-class"}
NAMES = {"kinds": {"odd": "a", "third": "ignore"}}


def test_labels_take_the_models_names_and_ids():
    s = source(annotated(CELLS, (40, 40)), heads=AS, class_map=NAMES)
    assert s.heads == ("nuclei", "nuclei-class")
    assert s.task == "nuclei+nuclei-class"
    image = s.image(0)
    assert set(image.labels) == {"nuclei", "nuclei-class"}
    wanted = np.array([0, 2, 1, IGNORE_CLASS], np.uint8)[CELLS["kinds"].ids]
    assert (image.labels["nuclei-class"].ids == wanted).all()
    assert image.labels["nuclei-class"].classes == ("none", "a", "b")


def test_a_label_can_be_left_out():
    s = source(annotated(CELLS, (40, 40)), heads={"cells": "nuclei", "kinds": ""})
    assert s.heads == ("nuclei",)


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"heads": AS}, r"\['odd', 'third'\] are none of .*'nuclei-class'.*'a', 'b'.* of a recipe"),
        ({"heads": AS, "class_map": {"kinds": {"odd": "c", "third": ""}}}, r"odd \(to be c\)"),
        ({"heads": AS, "class_map": {"kinds": {"ode": "a"}}}, r"no classes \['ode'\]"),
        ({"heads": {"cell": "nuclei"}}, r"no labels \['cell'\].*'cells', 'kinds'"),
        ({"heads": {"cells": "nucleus"}}, r"no head 'nucleus'; there are \['nuclei', "),
        ({"heads": {"cells": "nuclei-class"}}, "has objects, no classes.*of kind 'class'"),
        ({"heads": {"kinds": "gland"}}, "has the classes .*of kind 'instance'"),
        ({}, r"the model has the heads .*the images labels for \['cells', 'kinds', 'other'\]"),
        ({"heads": AS, "class_map": NAMES, "object_share": 2}, "0 to 1"),
    ],
)
def test_what_does_not_fit_is_refused(how, message):
    with pytest.raises(RecipeError, match=message):
        source(annotated(CELLS, (40, 40)), **how)


def test_two_labels_for_one_head():
    labels = {"nuclei": CELLS["cells"], "cells": CELLS["cells"]}
    with pytest.raises(RecipeError, match="'nuclei' and 'cells' are both for head 'nuclei'"):
        source(annotated(labels, (40, 40)), heads={"cells": "nuclei"})


def test_another_kind_of_label_is_found_when_it_is_read():
    s = source(annotated(CELLS, (40, 40)), heads={"cells": "ring"})
    with pytest.raises(RecipeError, match=r"d, 0: .*by their pixels.*'ring'.*by their boxes"):
        s.image(0)
    s = source(annotated(CELLS, (40, 40)), heads={"kinds": "tissue"},
               class_map={"kinds": dict.fromkeys(CELLS["kinds"].classes, "stroma")})  # fmt: skip
    with pytest.raises(RecipeError, match=r"a class for every pixel.*one class for the whole"):
        s.image(0)


def test_patches_are_mapped_or_unlabelled():
    images = [
        annotated({"tissue": PatchLabel(id=i, classes=("TUM", "MUC", "stroma"))}) for i in range(3)
    ]
    s = source(*images, class_map={"tissue": {"TUM": "tumour", "MUC": ""}})
    assert [s.image(i).labels.get("tissue") for i in range(3)] == [
        PatchLabel(id=1, classes=("stroma", "tumour")),
        None,
        PatchLabel(id=0, classes=("stroma", "tumour")),
    ]


def test_no_image_is_an_error():
    dataset = Dataset(
        name="d",
        path=Path("d"),
        labels={"nuclei": ()},
        items=(Item(name="a", patient="a", load=partial(int)),),
    )
    with pytest.raises(DatasetError, match="no image"):
        Source(dataset, [], SPEC)


# -- windows ---------------------------------------------------------------------------------


def coded(shape):
    """An image whose pixels say where they are."""
    y, x = np.mgrid[: shape[0], : shape[1]]
    return np.stack([x, y, np.zeros_like(x)], axis=2).astype(np.uint8)


def everything(shape):
    return {
        "nuclei": instances(shape, (3, 4, 9, 9), (20, 20, 30, 28)),
        "nuclei-class": ClassLabel(ids=np.ones(shape, np.uint8), classes=("none", "a")),
        "tissue": PatchLabel(id=1, classes=("stroma", "tumour")),
        "ring": BoxLabel(boxes=np.array([[2, 3, 12, 9], [30, 30, 34, 37]], np.float32)),
    }


@settings(deadline=None, max_examples=60)
@given(
    st.integers(10, 60), st.integers(10, 60), st.sampled_from([8, 31, 64, 200]),
    st.integers(0, 2**31), st.sampled_from([0.0, 1.0]),
)  # fmt: skip
def test_pixels_and_labels_of_a_window_are_those_of_the_image(height, width, side, seed, share):
    shape = max(height, 40), max(width, 40)
    image = annotated(everything(shape), image=coded(shape))
    window = source(image, object_share=share).window(0, np.random.default_rng(seed), side)
    assert window.pixels.shape == (side, side, 3)
    ids, classes = window.labels["nuclei"], window.labels["nuclei-class"]
    assert ids.dtype == np.int32
    assert classes.dtype == np.uint8
    known = ids >= 0
    assert known.any()
    assert (known == (classes != IGNORE_CLASS)).all()
    assert (known == ~window.unknown["ring"]).all()
    at = window.pixels[known].astype(int)
    assert (image.labels["nuclei"].ids[at[:, 1], at[:, 0]] == ids[known]).all()
    # pixel steps are one to the right inside the image, and mirrored beyond it
    y, x = np.nonzero(known)
    corner = at[0, 0] - x[0], at[0, 1] - y[0]
    reach = [np.pad(np.arange(n), 400, mode="symmetric")[400 + c : 400 + c + side]
             for n, c in zip(shape[::-1], corner, strict=True)]  # fmt: skip
    assert (window.pixels[0, :, 0] == reach[0]).all()
    assert (window.pixels[:, 0, 1] == reach[1]).all()
    assert window.labels["tissue"] == 1
    boxes = image.labels["ring"].boxes - [*corner, *corner]
    meets = [b for b in boxes if b[0] < side and b[1] < side and b[2] > 0 and b[3] > 0]
    assert window.labels["ring"].tolist() == [b.tolist() for b in meets]


def test_every_pixel_can_come_into_the_crop_and_crops_are_mostly_image():
    image = annotated({"tissue": PatchLabel(id=0, classes=("stroma",))}, image=coded((50, 90)))
    s = source(image)
    seen = np.zeros((50, 90), int)
    shares = []
    for seed in range(600):
        pixels = s.window(0, np.random.default_rng(seed), 64).pixels[16:48, 16:48]
        np.add.at(seen, (pixels[..., 1], pixels[..., 0]), 1)
        steps = np.diff(pixels[0, :, 0].astype(int)), np.diff(pixels[:, 0, 1].astype(int))
        shares.append(min((step == 1).mean() for step in steps))
    assert seen.min() > 0
    assert min(shares) >= 0.7


def test_rare_classes_are_shown_as_often_as_common_ones():
    shape = (400, 400)
    squares = [(x, y, x + 4, y + 4) for x in range(0, 300, 10) for y in range(0, 400, 10)]
    nuclei = instances(shape, *squares, (380, 380, 386, 386))
    classes = np.where(nuclei.ids == 1201, 2, nuclei.ids > 0).astype(np.uint8)
    labels = {"nuclei": nuclei, "nuclei-class": ClassLabel(ids=classes, classes=("none", "a", "b"))}
    s = source(annotated(labels, shape), object_share=1.0)
    rare = sum(
        bool((s.window(0, np.random.default_rng(i), 64).labels["nuclei-class"] == 2).any())
        for i in range(200)
    )
    assert 70 < rare < 130


def test_an_object_comes_into_the_crop():
    labels = {"ring": BoxLabel(boxes=np.array([[350, 20, 356, 26]], np.float32))}
    s = source(annotated(labels, (400, 400)), object_share=1.0)
    for i in range(50):
        box = s.window(0, np.random.default_rng(i), 64).labels["ring"][0]
        middle = (box[:2] + box[2:]) / 2
        assert (np.abs(middle - 32) <= 8.51).all()


def test_boxes_of_a_window_are_those_that_meet_it():
    x, y = np.meshgrid(np.arange(80), np.arange(80))
    boxes = np.stack([x, y, x + 1, y + 1], axis=2).reshape(-1, 4).astype(np.float32)
    s = source(annotated({"ring": BoxLabel(boxes=boxes)}, (80, 80)), object_share=0.0)
    for seed in range(20):
        window = s.window(0, np.random.default_rng(seed), 24)
        known = ~window.unknown["ring"]
        y, x = np.nonzero(known)
        found = {tuple(box) for box in window.labels["ring"].astype(int).tolist()}
        assert found == {(a, b, a + 1, b + 1) for a, b in zip(x, y, strict=True)}


def test_the_same_seed_cuts_the_same_window():
    s = source(annotated(everything((60, 60)), (60, 60)), cache=ImageCache(0))
    one, two = (s.window(0, np.random.default_rng(7), 32) for _ in range(2))
    assert (one.pixels == two.pixels).all()
    assert not (one.pixels == s.window(0, np.random.default_rng(8), 32).pixels).all()


def test_images_are_decoded_once_while_there_is_room_and_the_oldest_leaves():
    image = annotated({"nuclei": instances((50, 50), (1, 1, 9, 9))}, (50, 50))
    read = []

    def load(index):
        read.append(index)
        return image

    items = [Item(name=str(i), patient="p", load=partial(load, i)) for i in range(3)]
    dataset = Dataset(name="d", path=Path("d"), labels={"nuclei": ()}, items=tuple(items))
    each = 50 * 50 * (3 + 4) + 8  # pixels, ids, one place
    s = Source(dataset, items, SPEC, cache=ImageCache(2 * each))
    for index in (0, 1, 0, 1, 0, 2, 0, 1):
        s.window(index, np.random.default_rng(0), 16)
    assert read == [0, 1, 2, 1]
    read.clear()
    s = Source(dataset, items, SPEC, cache=ImageCache(each - 1))
    for _ in range(3):
        s.window(0, np.random.default_rng(0), 16)
    assert read == [0, 0, 0]


def test_sources_share_one_cache_and_take_no_image_for_another_s():
    image, other = (annotated(everything((60, 60)), image=rgb((60, 60), seed)) for seed in (1, 2))
    cache = ImageCache()
    one, two = source(image, cache=cache), source(other, cache=cache)
    alone = [source(each).window(0, np.random.default_rng(3), 32).pixels for each in (image, other)]
    for _ in range(2):
        together = [s.window(0, np.random.default_rng(3), 32).pixels for s in (one, two)]
        assert all((a == b).all() for a, b in zip(together, alone, strict=True))
    assert not (alone[0] == alone[1]).all()


def test_threads_get_what_one_alone_gets():
    images = [annotated(everything((60, 60)), image=rgb((60, 60), seed)) for seed in range(6)]
    s = source(*images, cache=ImageCache(60_000))
    wanted = [s.window(i % 6, np.random.default_rng(i), 32).pixels for i in range(60)]
    found = {}

    def work(start):
        for i in range(start, 60, 4):
            found[i] = s.window(i % 6, np.random.default_rng(i), 32).pixels

    threads = [threading.Thread(target=work, args=(start,)) for start in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all((found[i] == wanted[i]).all() for i in range(60))


# -- batches ---------------------------------------------------------------------------------


def test_a_batch_has_the_rows_that_are_labelled():
    shape = (60, 60)
    whole = everything(shape)
    images = [
        annotated({"tissue": whole["tissue"]}, shape),
        annotated({"nuclei": whole["nuclei"], "ring": whole["ring"]}, shape),
        annotated({"ring": BoxLabel(boxes=np.zeros((0, 4), np.float32))}, shape),
        annotated({"nuclei": whole["nuclei"], "tissue": whole["tissue"]}, shape),
    ]
    s = source(*images, object_share=0.0)
    windows = [s.window(i, np.random.default_rng(3), 128) for i in range(4)]
    batch = collate(windows, SPEC)
    assert batch.pixels.shape == (4, 128, 128, 3)
    assert batch.pixels.dtype == torch.uint8
    assert {head: rows.tolist() for head, rows in batch.rows.items()} == {
        "nuclei": [1, 3],
        "tissue": [0, 3],
        "ring": [1, 2],
    }
    assert list(batch.labels) == ["nuclei", "tissue", "ring"]
    assert (batch.labels["nuclei"][1].numpy() == windows[3].labels["nuclei"]).all()
    assert batch.labels["nuclei"].dtype == torch.int32
    assert batch.labels["tissue"].tolist() == [1, 1]
    assert batch.labels["ring"].shape == (2, 2, 4)
    assert batch.labels["ring"][1].isnan().all()
    assert (batch.labels["ring"][0].numpy() == windows[1].labels["ring"]).all()
    assert batch.unknown["ring"].dtype == torch.bool
    assert set(batch.unknown) == {"ring"}


def test_no_box_at_all_still_has_a_place():
    empty = annotated({"ring": BoxLabel(boxes=np.zeros((0, 4), np.float32))})
    batch = collate([source(empty).window(0, np.random.default_rng(0), 16)], SPEC)
    assert batch.labels["ring"].shape == (1, 1, 4)
    assert batch.labels["ring"].isnan().all()
