"""DSB 2018 (BBBC038), nuclei in many kinds of micrographs.

::

    <id>/images/<id>.png    <id>/masks/*.png        stage1_train: one mask a nucleus
    images/<id>.png         instances/<id>.png      masks of nucleus numbers

Most images of the archive are fluorescence; keep the folders of the stained ones.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
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

_USUAL_MPP = 0.25
_FINEST_MPP, _COARSEST_MPP = 0.05, 1.0


def read_dsb2018(
    folder: Path, *, mpp: float | None = None, nucleus_um: float | None = None
) -> Dataset:
    """List DSB 2018: ``nuclei`` instances. Patients are not published.

    Args:
        folder: in one of the two forms.
        mpp: micrometres per pixel. Not published, and the images differ in it, so it or
            ``nucleus_um`` must be given.
        nucleus_um: give each image the pixel size at which its median nucleus is as large as a
            disk of this diameter; an image without nuclei has ``mpp``, else 0.25.

    Raises:
        DatasetError: no ``mpp``, neither form, or an image without its masks.
    """
    require(folder)
    if nucleus_um is not None:
        with_size = read_dsb2018(folder, mpp=mpp or _USUAL_MPP)
        items = [replace(i, load=partial(_sized, i.load, nucleus_um)) for i in with_size.items]
        return replace(with_size, items=tuple(items))
    if mpp is None:
        msg = (
            f"{folder}: DSB 2018 does not state how large a pixel is; say it with mpp "
            "(micrometres per pixel), or say how large a nucleus is with nucleus_um"
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


def _sized(load: Callable[[], AnnotatedImage], nucleus_um: float) -> AnnotatedImage:
    """Load an image and derive its pixel size from its median nucleus."""
    image = load()
    nuclei = image.labels["nuclei"]
    assert isinstance(nuclei, InstanceLabel)
    areas_px = np.bincount(nuclei.ids.ravel())[1:]
    areas_px = areas_px[areas_px > 0]
    if not areas_px.size:
        return image
    diameter_px = math.sqrt(4 * float(np.median(areas_px)) / math.pi)
    mpp = min(max(nucleus_um / diameter_px, _FINEST_MPP), _COARSEST_MPP)
    return replace(image, mpp=mpp)


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
