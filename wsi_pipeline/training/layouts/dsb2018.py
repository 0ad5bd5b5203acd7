"""DSB 2018 (BBBC038), nuclei in many kinds of micrographs.

::

    <id>/images/<id>.png    <id>/masks/*.png        stage1_train: one mask a nucleus
    images/<id>.png         instances/<id>.png      masks of nucleus numbers

Most images of the archive are fluorescence; keep the folders of the stained ones.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from wsi_pipeline.errors import DatasetError
from wsi_pipeline.training.annotation import AnnotatedImage, Dataset, InstanceLabel, Item
from wsi_pipeline.training.layouts.monuseg import load_nuclei
from wsi_pipeline.training.layouts.reading import (
    about,
    image_files,
    pair,
    pixel_size,
    read_ids,
    read_rgb,
    require,
)

__all__ = ["read_dsb2018"]


def read_dsb2018(folder: Path, *, mpp: float | None = None) -> Dataset:
    """List DSB 2018: ``nuclei`` instances. Patients are not published.

    Args:
        folder: in one of the two forms.
        mpp: micrometres per pixel. Not published, and the images differ in it, so it must
            be given.

    Raises:
        DatasetError: no ``mpp``, neither form, or an image without its masks.
    """
    require(folder)
    if mpp is None:
        msg = (
            f"{folder}: DSB 2018 does not state how large a pixel is; say it with mpp "
            "(micrometres per pixel), for example from the size of the nuclei"
        )
        raise DatasetError(msg)
    size = pixel_size(mpp, published=mpp)
    if (folder / "instances").is_dir():
        require(folder, "images")
        images, labels = (image_files(folder / name) for name in ("images", "instances"))
        loads = {
            image.stem: partial(load_nuclei, image.stem, image, label, size)
            for image, label in pair(images, labels, lambda path: path.stem)
        }
        items = [Item(name=name, patient=name, load=load) for name, load in loads.items()]
    else:
        items = [_item(path.parent, size) for path in sorted(folder.glob("*/images"))]
        if not items:
            raise DatasetError(f"{folder} has neither <id>/images nor instances: not DSB 2018")
    return Dataset(name="dsb2018", path=folder, labels={"nuclei": ()}, items=tuple(items))


def _item(folder: Path, mpp: float) -> Item:
    images, masks = image_files(folder / "images"), image_files(folder / "masks")
    if len(images) != 1 or not masks:
        msg = f"{folder}: one image and its masks wanted, found {len(images)} and {len(masks)}"
        raise DatasetError(msg)
    load = partial(_load, folder.name, images[0], tuple(masks), mpp)
    return Item(name=folder.name, patient=folder.name, load=load)


def _load(name: str, image: Path, masks: tuple[Path, ...], mpp: float) -> AnnotatedImage:
    pixels = read_rgb(image)
    ids: NDArray[np.int32] = np.zeros(pixels.shape[:2], np.int32)
    for number, path in enumerate(masks, start=1):
        mask = read_ids(path)
        if mask.shape != ids.shape:
            msg = f"{path} is {mask.shape[::-1]} px (width, height), its image {ids.shape[::-1]}"
            raise DatasetError(msg)
        # The publishers' masks do not overlap; where edited ones do, the first counts.
        ids[(mask > 0) & (ids == 0)] = number
    with about(image):
        nuclei = InstanceLabel(ids=ids)
        return AnnotatedImage(name=name, image=pixels, mpp=mpp, labels={"nuclei": nuclei})
