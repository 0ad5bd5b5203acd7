"""GG-pT1, crops of early colorectal cancer around one gland each.

::

    img0/img0_3_normal-image.jpg      crop
    img0/img0_3_normal-gt.png         above 0: the gland
    img0/img0_4_abnormal-image.jpg    a dysplastic gland
    img1/...
"""

from __future__ import annotations

import re
from functools import partial
from pathlib import Path

import numpy as np

from wsi_pipeline.errors import DatasetError
from wsi_pipeline.training.annotation import (
    IGNORE_CLASS,
    IGNORE_ID,
    AnnotatedImage,
    ClassLabel,
    Dataset,
    InstanceLabel,
    Item,
    Label,
)
from wsi_pipeline.training.layouts.reading import (
    about,
    files,
    pair,
    pixel_size,
    read_rgb,
    require,
)

__all__ = ["PT1_CLASSES", "read_pt1"]

PT1_CLASSES = ("none", "normal", "dysplastic")
"""Names by id."""
_IMAGE = re.compile(r"(img\d+)_\d+_(normal|abnormal)-(?:image|gt)")
_GROUPS = {"normal": "normal", "abnormal": "dysplastic"}


def read_pt1(folder: Path, *, mpp: float | None = None) -> Dataset:
    """List GG-pT1: ``gland`` instances and ``gland-class`` pixels, one gland a crop.

    Its neighbours are not annotated, so every pixel outside the gland is unknown, right from
    its outline on. Of a contour, a network therefore learns the inner half alone, and no
    background: use it beside a set that has both. The patient is ``img<N>``.

    Args:
        folder: what the archive unpacks to.
        mpp: micrometres per pixel. Not published, so it must be given.

    Raises:
        DatasetError: no ``mpp``, no such crops, or a crop without its mask.
    """
    require(folder, "img*/*-image.*", "img*/*-gt.*")
    if mpp is None:
        msg = (
            f"{folder}: GG-pT1 does not state how large a pixel is; say it with mpp. "
            "About 0.5 micrometres is an estimate from the size of nuclei"
        )
        raise DatasetError(msg)
    size = pixel_size(mpp, published=mpp)
    images, masks = files(folder, "img*/*-image.*"), files(folder, "img*/*-gt.*")
    items = []
    for image, mask in pair(images, masks, lambda path: path.stem.rpartition("-")[0]):
        match = _IMAGE.fullmatch(image.stem)
        if match is None:
            raise DatasetError(f"{image} is not named img<N>_<k>_<normal|abnormal>-image")
        patient, finding = match.groups()
        name, group = image.stem.removesuffix("-image"), _GROUPS[finding]
        load = partial(_load, name, image, mask, group, size)
        items.append(Item(name=name, patient=patient, load=load, group=group))
    items.sort(key=lambda item: item.name)
    labels: dict[str, tuple[str, ...]] = {"gland": (), "gland-class": PT1_CLASSES}
    return Dataset(name="pt1", path=folder, labels=labels, items=tuple(items))


def _load(name: str, image: Path, mask: Path, group: str, mpp: float) -> AnnotatedImage:
    with about(mask):
        inside = read_rgb(mask).max(axis=2) > 0
        ids = np.where(inside, 1, IGNORE_ID).astype(np.int32)
        classes = np.where(inside, PT1_CLASSES.index(group), IGNORE_CLASS).astype(np.uint8)
        labels: dict[str, Label] = {
            "gland": InstanceLabel(ids=ids),
            "gland-class": ClassLabel(ids=classes, classes=PT1_CLASSES),
        }
        return AnnotatedImage(name=name, image=read_rgb(image), mpp=mpp, labels=labels)
