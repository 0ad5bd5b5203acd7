"""CRAG, colorectal adenocarcinoma glands.

::

    train/Images/train_1.png    train/Annotation/train_1.png    ...     173 and gland numbers
    valid/Images/test_1.png     valid/Annotation/test_1.png     ...     40

The publishers call the second part test in their description and ``valid`` in the archive.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

from wsi_pipeline.errors import DatasetError
from wsi_pipeline.training.annotation import Dataset, Item
from wsi_pipeline.training.layouts.glas import load_glands
from wsi_pipeline.training.layouts.reading import image_files, pair, pixel_size, require

__all__ = ["read_crag"]

_MPP = 0.55
_PARTS = {"train": "train", "valid": "test", "test": "test"}
_LABELS = ("Annotation", "Annotations")


def read_crag(folder: Path, *, mpp: float | None = None) -> Dataset:
    """List CRAG: ``gland`` instances. Patients are not published; each image is its own.

    Args:
        folder: holds ``train`` and ``valid`` (or ``test``).
        mpp: micrometres per pixel; default 0.55, an Omnyx VL120's 20x (Graham et al. 2019,
            MILD-Net).

    Raises:
        DatasetError: no such folders, or an image without its annotation.
    """
    require(folder)
    size = pixel_size(mpp, published=_MPP)
    items = []
    for name, part in _PARTS.items():
        if not (folder / name).is_dir():
            continue
        require(folder / name, "Images")
        labels = [path for label in _LABELS for path in image_files(folder / name / label)]
        for image, label in pair(
            image_files(folder / name / "Images"), labels, lambda path: path.stem
        ):
            item = f"{name}/{image.stem}"
            load = partial(load_glands, item, image, label, size)
            items.append(Item(name=item, patient=item, load=load, part=part))
    if not items:
        raise DatasetError(f"{folder} has no images in {', '.join(_PARTS)} /Images")
    items.sort(key=lambda item: item.name)
    return Dataset(name="crag", path=folder, labels={"gland": ()}, items=tuple(items))
