"""MoNuSeg, nuclei of several organs, outlined in Aperio ImageScope.

::

    Tissue Images/TCGA-18-5592-01Z-00-DX1.tif   Annotations/TCGA-18-5592-01Z-00-DX1.xml     train
    TCGA-2Z-A9J9-01A-01-TS1.tif                 TCGA-2Z-A9J9-01A-01-TS1.xml                 test
    images/TCGA-18-5592-01Z-00-DX1.png          instances/TCGA-18-5592-01Z-00-DX1.png       ids

The first two are the publishers' archives, the third holds masks of nucleus numbers.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from skimage.draw import polygon

from wsi_pipeline.errors import DatasetError
from wsi_pipeline.training.annotation import AnnotatedImage, Dataset, InstanceLabel, Item
from wsi_pipeline.training.layouts.reading import (
    about,
    files,
    image_files,
    pair,
    pixel_size,
    read_ids,
    read_rgb,
    read_xml,
    require,
)

__all__ = ["load_nuclei", "read_monuseg"]

_MPP = 0.25


def read_monuseg(folder: Path, *, mpp: float | None = None) -> Dataset:
    """List MoNuSeg: ``nuclei`` instances; the patient is the first three fields of the barcode.

    Args:
        folder: in one of the three forms.
        mpp: micrometres per pixel; default 0.25 (40x, Kumar et al. 2017).

    Raises:
        DatasetError: none of the forms, or an image without its outlines.
    """
    require(folder)
    images, labels = _listed(folder)
    size = pixel_size(mpp, published=_MPP)
    items = [
        Item(
            name=image.stem,
            patient="-".join(image.stem.split("-")[:3]),
            load=partial(load_nuclei, image.stem, image, label, size),
        )
        for image, label in pair(images, labels, lambda path: path.stem)
    ]
    return Dataset(name="monuseg", path=folder, labels={"nuclei": ()}, items=tuple(items))


def _listed(folder: Path) -> tuple[list[Path], list[Path]]:
    if (folder / "Annotations").is_dir():
        require(folder, "Tissue Images")
        return image_files(folder / "Tissue Images"), files(folder / "Annotations", "*.xml")
    if (folder / "instances").is_dir():
        require(folder, "images")
        return image_files(folder / "images"), image_files(folder / "instances")
    require(folder, "*.xml", "*.tif")
    return image_files(folder), files(folder, "*.xml")


def load_nuclei(name: str, image: Path, label: Path, mpp: float) -> AnnotatedImage:
    """Read an image and its nuclei, from outlines (``.xml``) or from a mask of numbers.

    Raises:
        DatasetError: unreadable, or of two sizes.
    """
    with about(label):
        pixels = read_rgb(image)
        outlined = label.suffix.lower() == ".xml"
        ids = _filled(label, pixels.shape[:2]) if outlined else read_ids(label)
        nuclei = InstanceLabel(ids=ids)
        return AnnotatedImage(name=name, image=pixels, mpp=mpp, labels={"nuclei": nuclei})


def _filled(path: Path, shape: tuple[int, ...]) -> NDArray[np.int32]:
    """Fill the outlines of an ImageScope file: (H, W) numbers in the order of the file.

    A pixel belongs to an outline that contains its centre; outlines are in pixels from the
    image's corner, so the centres are at halves. Where outlines overlap, the first one keeps
    the pixel, as in the publishers' converter. Outlines that hold no centre are left out.
    """
    regions = list(read_xml(path).iter("Region"))
    if not regions:
        raise DatasetError(f"{path} holds no Region, the element of an ImageScope outline")
    ids = np.zeros(shape, np.int32)
    for number, region in enumerate(regions, start=1):
        vertices = [(vertex.get("X"), vertex.get("Y")) for vertex in region.iter("Vertex")]
        try:
            outline = np.array([(float(x or ""), float(y or "")) for x, y in vertices])
        except ValueError as error:
            msg = f"{path}: a Vertex of Region {number} lacks X or Y as a number: {error}"
            raise DatasetError(msg) from error
        if len(outline) < 3:
            continue
        rows, columns = outline[:, 1] - 0.5, outline[:, 0] - 0.5
        inside = polygon(rows, columns, shape)  # type: ignore[no-untyped-call]
        ids[inside] = np.where(ids[inside] == 0, number, ids[inside])
    return ids
