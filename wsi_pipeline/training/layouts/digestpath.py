"""DigestPath 2019, signet-ring cells by their boxes.

::

    sig-train-pos/2018_64982_1-3_2019-02-25 21_57_36-lv0-33516-59515-2003-2010.jpeg
    sig-train-pos/2018_64982_1-3_2019-02-25 21_57_36-lv0-33516-59515-2003-2010.xml
    sig-train-neg/D20190481111_2019-06-10 09_22_49-lv0-61840-23896-2000-2000.jpeg

A name is slide, scan date and time, level, and place on the slide.
"""

from __future__ import annotations

import re
from functools import partial
from pathlib import Path
from xml.etree.ElementTree import Element

import numpy as np
from numpy.typing import NDArray

from wsi_pipeline.errors import DatasetError
from wsi_pipeline.training.annotation import AnnotatedImage, BoxLabel, Dataset, Item
from wsi_pipeline.training.layouts.reading import (
    about,
    files,
    image_files,
    pair,
    pixel_size,
    read_rgb,
    read_xml,
    require,
)

__all__ = ["read_digestpath"]

_MPP = 0.25
_SIDES = ("xmin", "ymin", "xmax", "ymax")


def read_digestpath(folder: Path, *, mpp: float | None = None, complete: bool = False) -> Dataset:
    """List DigestPath's signet-ring task: ``signet-ring`` boxes; group = positive, negative.

    Images of ``sig-train-neg`` hold no such cell. In ``sig-train-pos`` not every cell is boxed
    (Li et al. 2019, "Signet ring cell detection with a semi-supervised learning framework"),
    so what lies outside the boxes is unknown there. The patient is read off the name's case
    number.

    Args:
        folder: holds ``sig-train-pos``, ``sig-train-neg`` or both.
        mpp: micrometres per pixel; default 0.25, the nominal size of the 40x that the
            publishers state (Da et al. 2022).
        complete: take the boxes of positive images for complete.

    Raises:
        DatasetError: neither folder, or a positive image without its boxes.
    """
    require(folder)
    size = pixel_size(mpp, published=_MPP)
    positive, negative = folder / "sig-train-pos", folder / "sig-train-neg"
    if not (positive.is_dir() or negative.is_dir()):
        raise DatasetError(f"{folder} has neither sig-train-pos nor sig-train-neg")
    boxed = pair(image_files(positive), files(positive, "*.xml"), lambda path: path.stem)
    items = [
        Item(
            name=f"{image.parent.name}/{image.stem}",
            patient=_patient(image.stem),
            load=partial(_load, image, label, size, complete=complete),
            group="positive" if label else "negative",
        )
        for image, label in [*((image, None) for image in image_files(negative)), *boxed]
    ]
    return Dataset(name="digestpath", path=folder, labels={"signet-ring": ()}, items=tuple(items))


def _patient(stem: str) -> str:
    """Return the case: ``2018_64982`` of ``2018_64982_1-3_2019-02-25 ...``, or the slide."""
    slide = re.split(r"[_ ]\d{4}-\d{2}-\d{2}[_ ]", stem, maxsplit=1)[0]
    case = re.match(r"\d{4}[-_]\d+|[A-Za-z]+\d+", slide)
    return case[0] if case else slide


def _load(image: Path, label: Path | None, mpp: float, *, complete: bool) -> AnnotatedImage:
    pixels = read_rgb(image)
    with about(label or image):
        boxes = _boxes(read_xml(label)) if label else np.zeros((0, 4), np.float32)
        unknown = None if complete or not label else _outside(boxes, pixels.shape[:2])
        return AnnotatedImage(
            name=f"{image.parent.name}/{image.stem}",
            image=pixels,
            mpp=mpp,
            labels={"signet-ring": BoxLabel(boxes=boxes, ignore=unknown)},
        )


def _boxes(root: Element) -> NDArray[np.float32]:
    """Return (N, 4) left, top, right, bottom in pixels of the image."""
    found = list(root.iter("bndbox"))
    try:
        sides = [[float(box.findtext(side, "")) for side in _SIDES] for box in found]
    except ValueError as error:
        msg = f"a bndbox lacks one of {', '.join(_SIDES)} as a number: {error}"
        raise DatasetError(msg) from error
    return np.array(sides, np.float32).reshape(-1, 4)


def _outside(boxes: NDArray[np.float32], shape: tuple[int, ...]) -> NDArray[np.bool_]:
    outside = np.ones(shape, np.bool_)
    for left, top, right, bottom in boxes.clip(min=0):
        outside[int(top) : int(np.ceil(bottom)), int(left) : int(np.ceil(right))] = False
    return outside
