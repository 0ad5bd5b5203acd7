"""PanNuke, nuclei of 19 tissues in five classes.

::

    Fold 1/images/fold1/images.npy      (N, 256, 256, 3) pixels, 0 to 255 in any number type
    Fold 1/images/fold1/types.npy       (N,) names of tissues
    Fold 1/masks/fold1/masks.npy        (N, 256, 256, 6) nucleus numbers, one class a channel
    Fold 2/...

Flatter forms (``fold1/images.npy``, or one fold alone) are read as well.
"""

from __future__ import annotations

import re
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
    read_npy,
    require,
)

__all__ = ["PANNUKE_CLASSES", "read_pannuke"]

PANNUKE_CLASSES = ("none", "neoplastic", "inflammatory", "connective", "dead", "epithelial")
"""Names by id, which is the number of the mask's channel plus one; its sixth is background."""

_MPP = 0.25
_PARTS = {"1": "train", "2": "validation", "3": "test"}


def read_pannuke(folder: Path, *, mpp: float | None = None) -> Dataset:
    """List PanNuke: ``nuclei`` and ``nuclei-class``; group = tissue.

    Patients are not published, and tiles of one slide may lie beside each other in a fold.
    The fold therefore stands for the patient and is never split; folds 1, 2 and 3 are train,
    validation and test, the first of the publishers' three splits. Arrays are mapped into
    memory, never read whole.

    Args:
        folder: holds the folds, or one fold.
        mpp: micrometres per pixel; default 0.25 (40x, Gamper et al. 2020).

    Raises:
        DatasetError: an array is missing, or has another shape than the layout promises.
    """
    require(folder)
    size = pixel_size(mpp, published=_MPP)
    images, masks, types = (_arrays(folder, f"{name}.npy") for name in ("images", "masks", "types"))
    if not images:
        raise DatasetError(f"{folder} has no images.npy, directly or up to 3 folders deep")
    fold_of = partial(_fold, folder)
    tissues = dict(pair(images, types, fold_of))
    items = []
    for image, mask in pair(images, masks, fold_of):
        names = _open(tissues[image], (-1,))
        count = len(_open(image, (-1, -1, -1, 3)))
        if not count == len(_open(mask, (-1, -1, -1, 6))) == len(names):
            raise DatasetError(f"{image}, its masks.npy and its types.npy differ in length")
        fold = fold_of(image)
        items += [
            Item(
                name=f"fold{fold}/{index:05d}",
                patient=f"fold{fold}",
                load=partial(_load, f"fold{fold}/{index:05d}", image, mask, index, size),
                part=_PARTS.get(fold),
                group=str(names[index]),
            )
            for index in range(count)
        ]
    items.sort(key=lambda item: item.name)
    heads = {"nuclei": (), "nuclei-class": PANNUKE_CLASSES}
    return Dataset(name="pannuke", path=folder, labels=heads, items=tuple(items))


def _arrays(folder: Path, name: str) -> list[Path]:
    return files(folder, *(f"{'*/' * depth}{name}" for depth in range(4)))


def _fold(folder: Path, path: Path) -> str:
    """Return the fold's number, from the innermost folder that states one; '' if none does."""
    for part in reversed((folder.name, *path.parent.relative_to(folder).parts)):
        found = re.fullmatch(r"fold[ _-]*(\d+)", part, re.IGNORECASE)
        if found:
            return found[1]
    return ""


def _open(path: Path, shape: tuple[int, ...]) -> NDArray[np.generic]:
    """Map an array whose axes are of these lengths, -1 for any."""
    array = read_npy(path)
    fits = array.ndim == len(shape) and all(
        wanted in (-1, found) for wanted, found in zip(shape, array.shape, strict=True)
    )
    if not fits:
        wanted = ", ".join("n" if length == -1 else str(length) for length in shape)
        raise DatasetError(f"{path}: shape ({wanted}) wanted, found {array.shape}")
    return array


def _load(name: str, images: Path, masks: Path, index: int, mpp: float) -> AnnotatedImage:
    with about(images):
        pixels = as_ids(_open(images, (-1, -1, -1, 3))[index])
        if pixels.max(initial=0) > 255:
            raise DatasetError(f"{name}: pixels from 0 to 255 wanted, found {pixels.max()}")
    with about(masks):
        numbers = as_ids(_open(masks, (-1, -1, -1, 6))[index])
        instances, classes = _flattened(numbers[:, :, :5])
        return AnnotatedImage(
            name=name,
            image=pixels.astype(np.uint8),
            mpp=mpp,
            labels={
                "nuclei": InstanceLabel(ids=instances),
                "nuclei-class": ClassLabel(ids=classes, classes=PANNUKE_CLASSES),
            },
        )


def _flattened(numbers: NDArray[np.int32]) -> tuple[NDArray[np.int32], NDArray[np.uint8]]:
    """Return nucleus numbers, new ones by channel, and classes, both (H, W).

    Where channels overlap, which a few pixels do, the first one counts.
    """
    instances = np.zeros(numbers.shape[:2], np.int32)
    classes = np.zeros(numbers.shape[:2], np.uint8)
    count = 0
    for channel in range(numbers.shape[2]):
        plane = numbers[:, :, channel]
        known, index = np.unique(plane, return_inverse=True)
        free = (plane > 0) & (instances == 0)
        instances[free] = count + 1 + index.reshape(plane.shape)[free]
        classes[free] = channel + 1
        count += len(known)
    return instances, classes
