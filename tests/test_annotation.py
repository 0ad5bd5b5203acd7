"""What an annotated image may be: each thing that is wrong has its own words."""

import pickle
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from wsi_pipeline.errors import DatasetError
from wsi_pipeline.training.annotation import (
    IGNORE_CLASS,
    IGNORE_ID,
    AnnotatedImage,
    BoxLabel,
    ClassLabel,
    Dataset,
    InstanceLabel,
    Item,
    PatchLabel,
)

CLASSES = ("none", "fat", "muscle")


def ids(value=0, shape=(6, 8), dtype=np.int32):
    return np.full(shape, value, dtype)


def boxes(*rows):
    return np.array(rows, np.float32).reshape(-1, 4)


def image(labels=None, pixels=None):
    pixels = np.zeros((6, 8, 3), np.uint8) if pixels is None else pixels
    return AnnotatedImage(name="slide-7", image=pixels, mpp=0.5, labels=labels or {})


def load(name):
    return image({"nuclei": InstanceLabel(ids=ids())})


def item(name):
    return Item(name=name, patient="p", load=partial(load, name))


def test_everything_that_fits_is_taken():
    labels = {
        "nuclei": InstanceLabel(ids=ids(IGNORE_ID)),
        "gland": InstanceLabel(ids=ids(70_000)),
        "nuclei-class": ClassLabel(ids=ids(IGNORE_CLASS, dtype=np.uint8), classes=CLASSES),
        "kinds": ClassLabel(ids=ids(2, dtype=np.uint8), classes=CLASSES),
        "tissue": PatchLabel(id=2, classes=CLASSES),
        "cells": BoxLabel(boxes=boxes((-3, 0, 4, 99)), ignore=np.ones((6, 8), np.bool_)),
        "rings": BoxLabel(boxes=boxes()),
    }
    assert dict(image(labels).labels) == labels
    # an id for every name that fits into eight bits beside the unknown
    many = tuple(map(str, range(255)))
    assert ClassLabel(ids=ids(254, dtype=np.uint8), classes=many).ids.max() == 254


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: InstanceLabel(ids=ids(dtype=np.int64)), r"2 axes of int32 wanted.*int64"),
        (lambda: InstanceLabel(ids=ids(shape=(6, 8, 1))), r"2 axes.*\(6, 8, 1\)"),
        (lambda: InstanceLabel(ids=ids(-2)), "instance ids below -1: -2"),
        (
            lambda: ClassLabel(ids=ids(dtype=np.int32), classes=CLASSES),
            "class ids: 2 axes of uint",
        ),
        (
            lambda: ClassLabel(ids=ids(3, dtype=np.uint8), classes=CLASSES),
            r"class ids \[3\] are out of range: there are 0 none, 1 fat, 2 muscle",
        ),
        (
            lambda: ClassLabel(ids=ids(254, dtype=np.uint8), classes=CLASSES),
            r"class ids \[254\] are out of range",
        ),
        (lambda: PatchLabel(id=3, classes=CLASSES), "class id 3 is out of range: .*2 muscle"),
        (lambda: PatchLabel(id=-1, classes=CLASSES), "class id -1 is out of range"),
        (
            lambda: BoxLabel(boxes=boxes((0, 0, 1, 1)).astype(np.float64)),
            "boxes: 2 axes of float",
        ),
        (lambda: BoxLabel(boxes=np.zeros((2, 5), np.float32)), r"be \(N, 4\), not \(2, 5\)"),
        (
            lambda: BoxLabel(boxes=boxes((0, 0, 1, 1), (5, 0, 5, 1))),
            "left < right and top < bottom",
        ),
        (lambda: BoxLabel(boxes=boxes((0, 2, 3, 1))), "left < right and top < bottom"),
        (lambda: BoxLabel(boxes=boxes((0, 0, np.nan, 1))), "left < right and top < bottom"),
    ],
)
def test_a_label_that_contradicts_itself(make, words):
    with pytest.raises(DatasetError, match=words):
        make()


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: image(pixels=np.zeros((6, 8), np.uint8)), "slide-7: image: 3 axes of uint8"),
        (lambda: image(pixels=np.zeros((6, 8, 3), np.float32)), "slide-7: image.*float32"),
        (
            lambda: image(pixels=np.zeros((6, 8, 4), np.uint8)),
            r"slide-7: an RGB image wanted, not \(6, 8, 4\)",
        ),
        (
            lambda: image({"gland": InstanceLabel(ids=ids(shape=(8, 6)))}),
            "slide-7: the mask for 'gland' is 6 x 8 px, the image 8 x 6",
        ),
        (
            lambda: image(
                {"k": ClassLabel(ids=ids(shape=(6, 7), dtype=np.uint8), classes=CLASSES)}
            ),
            "the mask for 'k' is 7 x 6 px, the image 8 x 6",
        ),
        (
            lambda: image({"r": BoxLabel(boxes=boxes(), ignore=np.ones((6, 9), np.bool_))}),
            "the mask for 'r' is 9 x 6 px, the image 8 x 6",
        ),
    ],
)
def test_an_image_and_masks_that_do_not_fit_it(make, words):
    with pytest.raises(DatasetError, match=words):
        make()


def dataset(*names):
    return Dataset(
        name="plain", path=Path("some") / "folder", labels={}, items=tuple(map(item, names))
    )


def test_a_dataset_has_images_and_each_a_name_of_its_own():
    assert [own.name for own in dataset("a", "b").items] == ["a", "b"]
    with pytest.raises(DatasetError, match=r"folder holds no image in the layout 'plain'"):
        dataset()
    with pytest.raises(DatasetError, match=r"folder: images that bear one name: \['a', 'c'\]"):
        dataset("c", "a", "b", "a", "c", "a")


def test_items_and_what_they_load_can_be_pickled():
    # readers run in other processes
    again = pickle.loads(pickle.dumps(item("a"))).load()
    assert (again.labels["nuclei"].ids == load("a").labels["nuclei"].ids).all()
