"""GlaS, the Warwick-QU glands of the 2015 challenge.

::

    train_1.bmp  train_1_anno.bmp  ...      85 images and their gland numbers
    testA_1.bmp  testA_1_anno.bmp  ...      60
    testB_1.bmp  testB_1_anno.bmp  ...      20
    Grade.csv                               name, patient ID, grade (GlaS), grade (...)
"""

from __future__ import annotations

import csv
from functools import partial
from pathlib import Path

from wsi_pipeline.errors import DatasetError
from wsi_pipeline.training.annotation import AnnotatedImage, Dataset, InstanceLabel, Item
from wsi_pipeline.training.layouts.reading import (
    about,
    files,
    pair,
    pixel_size,
    read_ids,
    read_rgb,
    require,
)

__all__ = ["load_glands", "read_glas"]

_MPP = 0.62005
_LABEL = "_anno"
_PARTS = {"train": "train", "testA": "test", "testB": "test"}


def read_glas(folder: Path, *, mpp: float | None = None) -> Dataset:
    """List GlaS: ``gland`` instances; patient and group (benign, malignant) from ``Grade.csv``.

    The publishers drew train and test by visual field, so a patient may be in both.

    Args:
        folder: what the archive unpacks to.
        mpp: micrometres per pixel; default 0.62005, the challenge's data page (slides scanned
            at 0.465 and rescaled to 20x, Sirinukunwattana et al. 2017).

    Raises:
        DatasetError: a file is missing, or an image is not in ``Grade.csv``.
    """
    require(folder, "*_anno.bmp", "Grade.csv")
    paths = files(folder, "*.bmp")
    labels = [path for path in paths if path.stem.endswith(_LABEL)]
    images = [path for path in paths if not path.stem.endswith(_LABEL)]
    size = pixel_size(mpp, published=_MPP)
    table = folder / "Grade.csv"
    grades = _read_grades(table)
    items = []
    for image, label in pair(images, labels, lambda path: path.stem.removesuffix(_LABEL)):
        name = image.stem
        part = _PARTS.get(name.partition("_")[0])
        if part is None or name not in grades:
            where = f"has no row in {table}" if part else f"is none of {', '.join(_PARTS)}_<n>.bmp"
            raise DatasetError(f"{image} {where}")
        patient, grade = grades[name]
        items.append(
            Item(
                name=name,
                patient=patient,
                load=partial(load_glands, name, image, label, size),
                part=part,
                group=grade,
            )
        )
    return Dataset(name="glas", path=folder, labels={"gland": ()}, items=tuple(items))


def load_glands(name: str, image: Path, label: Path, mpp: float) -> AnnotatedImage:
    """Read an image and its mask of gland numbers.

    Raises:
        DatasetError: unreadable, or of two sizes.
    """
    with about(label):
        glands = InstanceLabel(ids=read_ids(label))
        return AnnotatedImage(name=name, image=read_rgb(image), mpp=mpp, labels={"gland": glands})


def _read_grades(path: Path) -> dict[str, tuple[str, str]]:
    """Return patient and grade by image; the published header has stray spaces."""
    try:
        rows = list(csv.DictReader(path.read_text(encoding="utf-8-sig").splitlines()))
        plain = [{key.strip(): value.strip() for key, value in row.items()} for row in rows]
        return {row["name"]: (row["patient ID"], row["grade (GlaS)"]) for row in plain}
    except (KeyError, AttributeError, UnicodeDecodeError) as error:
        msg = f"{path}: columns 'name', 'patient ID' and 'grade (GlaS)' wanted in every row"
        raise DatasetError(msg) from error
