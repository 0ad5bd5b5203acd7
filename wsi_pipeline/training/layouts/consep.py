"""CoNSeP, nuclei of colorectal adenocarcinoma in seven classes.

::

    Train/Images/train_1.png    Train/Labels/train_1.mat    ...     27 images
    Test/Images/test_1.png      Test/Labels/test_1.mat      ...     14

A ``.mat`` file holds ``inst_map`` (numbers) and ``type_map`` (classes).
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np

from wsi_pipeline.errors import DatasetError
from wsi_pipeline.training.annotation import (
    IGNORE_CLASS,
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
    image_files,
    pair,
    pixel_size,
    read_mat,
    read_rgb,
    require,
)

__all__ = ["CONSEP_CLASSES", "read_consep"]

CONSEP_CLASSES = (
    "none", "other", "inflammatory", "healthy epithelial", "malignant epithelial",
    "fibroblast", "muscle", "endothelial",
)  # fmt: skip
"""Names by the publishers' id; their fourth also covers dysplastic epithelium."""

_MPP = 0.25
_PARTS = {"Train": "train", "Test": "test"}


def read_consep(folder: Path, *, mpp: float | None = None) -> Dataset:
    """List CoNSeP: ``nuclei`` and ``nuclei-class``. Patients are not published.

    Args:
        folder: holds ``Train`` and ``Test``.
        mpp: micrometres per pixel; default 0.25, the nominal size of the 40x that the
            publishers state (Graham et al. 2019, HoVer-Net). The Omnyx scanner's 40x is
            elsewhere given as 0.275.

    Raises:
        DatasetError: no such folders, or an image without its labels.
    """
    require(folder)
    size = pixel_size(mpp, published=_MPP)
    items = []
    for name, part in _PARTS.items():
        if not (folder / name).is_dir():
            continue
        require(folder / name, "Images", "Labels/*.mat")
        images = image_files(folder / name / "Images")
        for image, label in pair(
            images, files(folder / name / "Labels", "*.mat"), lambda path: path.stem
        ):
            item = f"{name}/{image.stem}"
            load = partial(_load, item, image, label, size)
            items.append(Item(name=item, patient=item, load=load, part=part))
    if not items:
        raise DatasetError(f"{folder} has no images in {', '.join(_PARTS)} /Images")
    items.sort(key=lambda item: item.name)
    heads = {"nuclei": (), "nuclei-class": CONSEP_CLASSES}
    return Dataset(name="consep", path=folder, labels=heads, items=tuple(items))


def _load(name: str, image: Path, label: Path, mpp: float) -> AnnotatedImage:
    with about(label):
        instances, classes = (as_ids(array) for array in read_mat(label, "inst_map", "type_map"))
        # In a byte, 256 would pass for "none" and 255 for "unknown".
        classes = np.minimum(classes, IGNORE_CLASS - 1)
        return AnnotatedImage(
            name=name,
            image=read_rgb(image),
            mpp=mpp,
            labels={
                "nuclei": InstanceLabel(ids=instances),
                "nuclei-class": ClassLabel(ids=classes.astype(np.uint8), classes=CONSEP_CLASSES),
            },
        )
