"""Lizard, nuclei of the colon in six classes.

::

    Lizard_Images1/Lizard_Images1/consep_1.png      also lizard_images1/..., any depth to 3
    Lizard_Images2/Lizard_Images2/dpath_1.png
    Lizard_Labels/Labels/consep_1.mat               inst_map, id, class
    Lizard_Labels/info.csv                          Filename, Source, Split (1, 2 or 3)
"""

from __future__ import annotations

import csv
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from wsi_pipeline.errors import DatasetError
from wsi_pipeline.training.annotation import (
    AnnotatedImage,
    ClassLabel,
    Dataset,
    InstanceLabel,
    Item,
)
from wsi_pipeline.training.layouts.reading import (
    about,
    as_ids,
    files,
    pair,
    pixel_size,
    read_mat,
    read_rgb,
    require,
)

__all__ = ["LIZARD_CLASSES", "read_lizard"]

LIZARD_CLASSES = (
    "none", "neutrophil", "epithelial", "lymphocyte", "plasma", "eosinophil", "connective",
)  # fmt: skip
"""Names by the publishers' id."""

_MPP = 0.5
_PARTS = {"1": "train", "2": "validation", "3": "test"}


def read_lizard(folder: Path, *, mpp: float | None = None) -> Dataset:
    """List Lizard: ``nuclei`` and ``nuclei-class``; group = where the image was taken from.

    The three published folds become train, validation and test, the first of the three runs
    of Graham et al. 2023 (Cerberus). Patients are not published; each image is its own.

    Args:
        folder: where the three archives were unpacked.
        mpp: micrometres per pixel; default 0.5 (20x, Graham et al. 2021).

    Raises:
        DatasetError: a part of the layout is missing, an image lacks its labels, or
            ``info.csv`` lacks an image.
    """
    require(folder)
    images = [path for path in _within(folder, ".png") if "images" in path.parent.name.lower()]
    labels = [path for path in _within(folder, ".mat") if path.parent.name == "Labels"]
    tables = [path for path in _within(folder, ".csv") if path.name == "info.csv"]
    if not images or not labels or len(tables) != 1:
        msg = (
            f"{folder} is not Lizard: Lizard_Images<n>/*.png, Labels/*.mat and one info.csv "
            f"wanted, found {len(images)}, {len(labels)} and {len(tables)} of them"
        )
        raise DatasetError(msg)
    size = pixel_size(mpp, published=_MPP)
    info = _read_info(tables[0])
    items = []
    for image, label in pair(images, labels, lambda path: path.stem):
        name = image.stem
        if name not in info:
            raise DatasetError(f"{image} has no row in {tables[0]}")
        source, fold = info[name]
        load = partial(_load, name, image, label, size)
        items.append(Item(name=name, patient=name, load=load, part=_PARTS[fold], group=source))
    items.sort(key=lambda item: item.name)
    heads = {"nuclei": (), "nuclei-class": LIZARD_CLASSES}
    return Dataset(name="lizard", path=folder, labels=heads, items=tuple(items))


def _within(folder: Path, suffix: str) -> list[Path]:
    """Return the files of one kind up to three folders deep, as the archives nest."""
    return files(folder, *(f"{'*/' * depth}*{suffix}" for depth in range(4)))


def _read_info(path: Path) -> dict[str, tuple[str, str]]:
    rows = list(csv.DictReader(path.read_text(encoding="utf-8-sig").splitlines()))
    try:
        info = {row["Filename"].strip(): (row["Source"], row["Split"].strip()) for row in rows}
    except (KeyError, AttributeError) as error:
        msg = f"{path}: columns 'Filename', 'Source' and 'Split' wanted in every row"
        raise DatasetError(msg) from error
    strange = sorted({fold for _, fold in info.values()} - set(_PARTS))
    if strange:
        raise DatasetError(f"{path}: 'Split' must be 1, 2 or 3, found {strange[:5]}")
    return info


def _load(name: str, image: Path, label: Path, mpp: float) -> AnnotatedImage:
    with about(label):
        instances, numbers, classes = (
            as_ids(array) for array in read_mat(label, "inst_map", "id", "class")
        )
        return AnnotatedImage(
            name=name,
            image=read_rgb(image),
            mpp=mpp,
            labels={
                "nuclei": InstanceLabel(ids=instances),
                "nuclei-class": ClassLabel(
                    ids=_painted(instances, numbers.ravel(), classes.ravel()),
                    classes=LIZARD_CLASSES,
                ),
            },
        )


def _painted(
    instances: NDArray[np.int32], numbers: NDArray[np.int32], classes: NDArray[np.int32]
) -> NDArray[np.uint8]:
    """Return each pixel's class: that of the nucleus it belongs to."""
    if numbers.shape != classes.shape:
        raise DatasetError(f"{numbers.size} values in 'id' but {classes.size} in 'class'")
    found = np.unique(instances)
    lost = np.setdiff1d(found, np.append(numbers, 0))
    if lost.size:
        raise DatasetError(f"nuclei of 'inst_map' that 'id' does not list: {lost[:5].tolist()}")
    wrong = classes[(classes < 1) | (classes >= len(LIZARD_CLASSES))]
    if wrong.size:
        last = len(LIZARD_CLASSES) - 1
        raise DatasetError(f"class ids out of range 1..{last}: {np.unique(wrong)[:5].tolist()}")
    by_number = np.zeros(int(max(found.max(initial=0), numbers.max(initial=0))) + 1, np.uint8)
    by_number[numbers] = classes
    by_number[0] = 0
    return by_number[instances]
