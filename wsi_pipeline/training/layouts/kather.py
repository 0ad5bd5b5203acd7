"""Kather's colorectal tissue: small tiles, each of one of nine tissues.

::

    ADI/ADI-AAAFLCLY.tif  ...  TUM/TUM-AAAEINGD.tif       a set: a folder for each class
    NCT-CRC-HE-100K/ADI/...  CRC-VAL-HE-7K/ADI/...        both sets: train and test
    ADI-AAAFLCLY.tif  ...  TUM-AAAEINGD.tif               a selection: the name's first part
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np

from wsi_pipeline.errors import DatasetError
from wsi_pipeline.training.annotation import (
    AnnotatedImage,
    Dataset,
    InstanceLabel,
    Item,
    Label,
    PatchLabel,
)
from wsi_pipeline.training.layouts.reading import image_files, pixel_size, read_rgb, require

__all__ = ["KATHER_CLASSES", "read_kather"]

_MPP = 0.5
_NAMES = {
    "ADI": "adipose",
    "BACK": "background",
    "DEB": "debris",
    "LYM": "lymphocytes",
    "MUC": "mucus",
    "MUS": "smooth muscle",
    "NORM": "normal mucosa",
    "STR": "stroma",
    "TUM": "tumour epithelium",
}
KATHER_CLASSES = tuple(_NAMES.values())
"""Names by id, in the order of the publishers' abbreviations."""
_WITH_GLANDS = ("DEB", "NORM", "TUM")
"""Classes whose tiles show glands, or may."""
_SETS = {"NCT-CRC-HE-100K": "train", "NCT-CRC-HE-100K-NONORM": "train", "CRC-VAL-HE-7K": "test"}
_CASE = re.compile(r"TCGA(?:-[A-Z0-9]+)+", re.IGNORECASE)


def read_kather(folder: Path, *, mpp: float | None = None, gland_free: bool = False) -> Dataset:
    """List Kather's tiles: ``tissue``, one class for the whole image.

    The publishers do not say which patient a tile is from. A tile's patient is the ``TCGA-...``
    part of its name where there is one (an arbitrary code in the published sets), else its
    name, so only the two sets are known to share no patient. Its group is its class.

    Args:
        folder: one set, a folder that holds both, or a flat selection.
        mpp: micrometres per pixel; default 0.5 (Kather et al. 2019, doi 10.5281/zenodo.1214456).
        gland_free: list the tiles of the classes that hold no gland (all but normal mucosa,
            tumour epithelium and debris), with empty ``gland`` and ``lumen`` labels beside
            ``tissue``: negatives for a network that finds glands.

    Raises:
        DatasetError: no class folders and no class names, or both forms of the large set.
    """
    require(folder)
    size = pixel_size(mpp, published=_MPP)
    sets = {name: part for name, part in _SETS.items() if (folder / name).is_dir()}
    if len(sets) > len(set(sets.values())):
        raise DatasetError(f"{folder} holds one set twice: {', '.join(sets)}; keep one of them")
    found: list[tuple[str, Path, str, str | None]]
    found = [
        (f"{name}/{path.stem}", path, code, part)
        for name, part in sets.items()
        for path, code in _tiles(folder / name)
    ]
    if not sets:
        found = [(path.stem, path, code, None) for path, code in _tiles(folder)]
    if not found:
        msg = f"{folder} has neither folders nor images named after the classes"
        raise DatasetError(f"{msg} {', '.join(_NAMES)}")
    items = tuple(
        Item(
            name=name,
            patient=_patient(path.stem),
            load=partial(_load, name, path, code, size, gland_free),
            part=part,
            group=_NAMES[code],
        )
        for name, path, code, part in sorted(found)
        if not (gland_free and code in _WITH_GLANDS)
    )
    labels: dict[str, tuple[str, ...]] = {"tissue": KATHER_CLASSES}
    if gland_free:
        labels |= {"gland": (), "lumen": ()}
    return Dataset(name="kather", path=folder, labels=labels, items=items)


def _tiles(folder: Path) -> Iterator[tuple[Path, str]]:
    """Yield the images of a set and their class's abbreviation."""
    for code in _NAMES:
        for path in image_files(folder / code):
            yield path, code
    for path in image_files(folder):
        code = path.stem.partition("-")[0].upper()
        if code not in _NAMES:
            raise DatasetError(f"{path}: the name begins with none of {', '.join(_NAMES)}")
        yield path, code


def _patient(stem: str) -> str:
    case = _CASE.search(stem)
    return case.group().upper() if case else stem


def _load(name: str, path: Path, code: str, mpp: float, gland_free: bool) -> AnnotatedImage:
    image = read_rgb(path)
    labels: dict[str, Label] = {
        "tissue": PatchLabel(id=list(_NAMES).index(code), classes=KATHER_CLASSES)
    }
    if gland_free:
        empty = InstanceLabel(ids=np.zeros(image.shape[:2], np.int32))
        labels |= {"gland": empty, "lumen": empty}
    return AnnotatedImage(name=name, image=image, mpp=mpp, labels=labels)
