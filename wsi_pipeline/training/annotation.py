"""What a training set says about an image: its pixels, their size, and labels for some heads.

A label is for one head of a network and bears its name; :mod:`wsi_pipeline.training.layouts`
use the names of the standard heads::

    nuclei, gland, lumen           InstanceLabel
    nuclei-class, gland-class      ClassLabel
    tissue                         PatchLabel
    signet-ring                    BoxLabel

What an image has no label for is unknown, never background. Within a label, pixels may be
unknown too: ``IGNORE_ID`` and ``IGNORE_CLASS``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from wsi_pipeline.errors import DatasetError

__all__ = [
    "IGNORE_CLASS",
    "IGNORE_ID",
    "AnnotatedImage",
    "BoxLabel",
    "ClassLabel",
    "Dataset",
    "InstanceLabel",
    "Item",
    "Label",
    "PatchLabel",
]

IGNORE_ID = -1
"""An instance label's pixel that nobody annotated."""
IGNORE_CLASS = 255
"""A class label's pixel that nobody annotated."""


@dataclass(frozen=True, kw_only=True, slots=True)
class InstanceLabel:
    """Objects by their pixels."""

    ids: NDArray[np.int32]
    """(H, W): 0 background, 1 and up an object each, ``IGNORE_ID`` unknown."""

    def __post_init__(self) -> None:
        _check_array("instance ids", self.ids, np.int32, 2)
        if self.ids.size and int(self.ids.min()) < IGNORE_ID:
            raise DatasetError(f"instance ids below {IGNORE_ID}: {int(self.ids.min())}")


@dataclass(frozen=True, kw_only=True, slots=True)
class ClassLabel:
    """A class for every pixel."""

    ids: NDArray[np.uint8]
    """(H, W): index into ``classes``, ``IGNORE_CLASS`` unknown."""
    classes: tuple[str, ...]
    """Names by id; id 0 is none of them."""

    def __post_init__(self) -> None:
        _check_array("class ids", self.ids, np.uint8, 2)
        found = np.unique(self.ids)
        beyond = [int(i) for i in found if len(self.classes) <= i < IGNORE_CLASS]
        if beyond:
            msg = f"class ids {beyond} are out of range: there are {_numbered(self.classes)}"
            raise DatasetError(msg)


@dataclass(frozen=True, kw_only=True, slots=True)
class PatchLabel:
    """One class for the whole image."""

    id: int
    """Index into ``classes``."""
    classes: tuple[str, ...]
    """Names by id."""

    def __post_init__(self) -> None:
        if not 0 <= self.id < len(self.classes):
            msg = f"class id {self.id} is out of range: there are {_numbered(self.classes)}"
            raise DatasetError(msg)


@dataclass(frozen=True, kw_only=True, slots=True)
class BoxLabel:
    """Objects by their boxes."""

    boxes: NDArray[np.float32]
    """(N, 4): left, top, right, bottom in pixels of the image."""
    ignore: NDArray[np.bool_] | None = None
    """(H, W): True where nobody annotated; None: everything was."""

    def __post_init__(self) -> None:
        _check_array("boxes", self.boxes, np.float32, 2)
        if self.boxes.shape[1] != 4:
            raise DatasetError(f"boxes must be (N, 4), not {self.boxes.shape}")
        if not (self.boxes[:, 2:] > self.boxes[:, :2]).all():
            raise DatasetError("boxes must have left < right and top < bottom")


Label = InstanceLabel | ClassLabel | PatchLabel | BoxLabel


@dataclass(frozen=True, kw_only=True, slots=True)
class AnnotatedImage:
    """An image and its labels, all of one size."""

    name: str
    """For messages and tables."""
    image: NDArray[np.uint8]
    """(H, W, 3) RGB."""
    mpp: float
    """Micrometres per pixel."""
    labels: Mapping[str, Label]
    """By head name; a head that is absent is unlabelled."""

    def __post_init__(self) -> None:
        if not 0.05 <= self.mpp <= 5:
            raise DatasetError(f"{self.name}: mpp must be from 0.05 to 5, not {self.mpp}")
        _check_array(f"{self.name}: image", self.image, np.uint8, 3)
        if self.image.shape[2] != 3:
            raise DatasetError(f"{self.name}: an RGB image wanted, not {self.image.shape}")
        for head, label in self.labels.items():
            for shape in _shapes(label):
                if shape != self.image.shape[:2]:
                    msg = (
                        f"{self.name}: the mask for {head!r} is {shape[1]} x {shape[0]} px, "
                        f"the image {self.image.shape[1]} x {self.image.shape[0]}"
                    )
                    raise DatasetError(msg)


@dataclass(frozen=True, kw_only=True, slots=True)
class Item:
    """One image of a dataset, not yet read."""

    name: str
    """Unique in the dataset."""
    patient: str
    """Whoever the tissue is from; a patient is never split. The item's name where unknown."""
    load: Callable[[], AnnotatedImage]
    """Read it; picklable. Raises ``DatasetError``."""
    part: str | None = None
    """``train``, ``validation`` or ``test`` where the publishers split the images."""
    group: str | None = None
    """A category that scores are also given for (a diagnosis, an organ)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Dataset:
    """The images of one folder."""

    name: str
    """Of the layout."""
    path: Path
    """The folder."""
    labels: Mapping[str, tuple[str, ...]]
    """Heads that some image is labelled for, and their class names (none for objects)."""
    items: tuple[Item, ...]
    """By name."""

    def __post_init__(self) -> None:
        if not self.items:
            raise DatasetError(f"{self.path} holds no image in the layout {self.name!r}")
        names = [item.name for item in self.items]
        if len(set(names)) < len(names):
            twice = sorted({name for name in names if names.count(name) > 1})
            raise DatasetError(f"{self.path}: images that bear one name: {twice[:5]}")


def _shapes(label: Label) -> list[tuple[int, ...]]:
    if isinstance(label, InstanceLabel | ClassLabel):
        return [label.ids.shape]
    if isinstance(label, BoxLabel) and label.ignore is not None:
        return [label.ignore.shape]
    return []


def _check_array(what: str, array: NDArray[np.generic], dtype: type, ndim: int) -> None:
    if array.dtype != dtype or array.ndim != ndim:
        msg = f"{what}: {ndim} axes of {np.dtype(dtype)} wanted, not {array.shape} {array.dtype}"
        raise DatasetError(msg)


def _numbered(classes: tuple[str, ...]) -> str:
    return ", ".join(f"{i} {name}" for i, name in enumerate(classes))
