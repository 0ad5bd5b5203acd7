"""The plain layout: images beside masks of the same name, for annotations of your own.

::

    folder/
      images/            a.png  b.tif ...      RGB, 8 bit
      instances/         a.png  b.npy ...      0 background, 1 and up an object each: nuclei
        gland/           a.png ...             the same for the head of that name
      classes/           a.png ...             class ids, 0 none of them: nuclei-class
        classes.txt                            the names, one a line, id 0 first
        gland-class/     a.png ...  classes.txt
      patches.csv                              image, and a class for each head: a,stroma
      ignore/            a.png ...             above 0: nobody annotated this, for any head
        lumen/           a.png ...             ... for the head of that name
      images.csv                               image,patient,part,group,mpp: all but image optional
      dataset.toml                             mpp = 0.5

Of ``instances``, ``classes`` and ``patches.csv`` one is enough. Masks are PNG or TIFF of 8, 16
or 32 bit, or NPY, and have their image's size. A mask without its image is an error; an
image without its mask is not labelled for that head, and an image with no label at all is an
error. ``dataset.toml`` may also name the heads of masks that lie directly in ``instances`` and
``classes``, and the names of classes instead of ``classes.txt``::

    mpp = 0.5
    instances = "nuclei"
    classes = "nuclei-class"
    [names]
    nuclei-class = ["none", "lymphocyte", "other"]
    tissue = ["stroma", "tumour"]
"""

from __future__ import annotations

import csv
import io
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from wsi_pipeline.errors import DatasetError
from wsi_pipeline.training.annotation import (
    IGNORE_CLASS,
    IGNORE_ID,
    AnnotatedImage,
    ClassLabel,
    Dataset,
    InstanceLabel,
    Item,
    Label,
    PatchLabel,
)
from wsi_pipeline.training.layouts.reading import (
    IMAGE_SUFFIXES,
    about,
    as_ids,
    files,
    image_files,
    pixel_size,
    read_ids,
    read_npy,
    read_rgb,
    require,
)

__all__ = ["read_plain"]

_FACTS = ("image", "patient", "part", "group", "mpp")


@dataclass(frozen=True, kw_only=True, slots=True)
class _Settings:
    """``dataset.toml``."""

    mpp: float | None = None
    """Micrometres per pixel of all images."""
    instances: str = "nuclei"
    """Head of the masks directly in ``instances``."""
    classes: str = "nuclei-class"
    """Head of the masks directly in ``classes``."""
    names: Mapping[str, Sequence[str]] = field(default_factory=dict)
    """Class names by head."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Files:
    """Where the labels of one image are; picklable."""

    name: str
    image: Path
    mpp: float
    instances: Mapping[str, Path]
    classes: Mapping[str, Path]
    patches: Mapping[str, str]
    ignore: Mapping[str, Path]
    """By head; the empty name is for all heads."""
    names: Mapping[str, tuple[str, ...]]
    """Classes by head."""


def read_plain(folder: Path, *, mpp: float | None = None) -> Dataset:
    """List a folder in the plain layout; see this module's text for its form.

    The patient is the column of ``images.csv``, else the image's name.

    Args:
        folder: holds ``images``.
        mpp: micrometres per pixel of all images, over what the files say. Without it, each
            image has that of ``images.csv``, else that of ``dataset.toml``.

    Raises:
        DatasetError: no ``mpp``, a mask without its image, an image without any label,
            classes without names, or a table that does not fit.
    """
    require(folder, "images")
    settings = _settings(folder / "dataset.toml")
    images = {path.stem: path for path in _unique(image_files(folder / "images"))}
    facts = _facts(folder / "images.csv", images)
    instances = _by_head(folder / "instances", settings.instances, images)
    classes = _by_head(folder / "classes", settings.classes, images)
    ignore = _by_head(folder / "ignore", "", images)
    patches = _patches(folder / "patches.csv", images)
    names = {head: _names(folder / "classes", head, settings) for head in classes}
    names |= {head: _patch_names(head, patches[head], settings) for head in patches}
    items = []
    for name, image in sorted(images.items()):
        row = facts.get(name, {})
        where = _Files(
            name=name,
            image=image,
            mpp=_mpp(mpp, row, settings, image),
            instances=_of(instances, name),
            classes=_of(classes, name),
            patches={head: of[name] for head, of in patches.items() if name in of},
            ignore=_of(ignore, name),
            names=names,
        )
        if not (where.instances or where.classes or where.patches):
            raise DatasetError(f"{image} has no mask and no class: label it or take it away")
        items.append(
            Item(
                name=name,
                patient=row.get("patient") or name,
                load=partial(_load, where),
                part=row.get("part") or None,
                group=row.get("group") or None,
            )
        )
    labels = {**dict.fromkeys(instances, ()), **names}
    return Dataset(name="plain", path=folder, labels=labels, items=tuple(items))


def _load(where: _Files) -> AnnotatedImage:
    image = read_rgb(where.image)
    size = image.shape[:2]
    unknown = {
        head: _sized(path, _read_mask(path), size) > 0 for head, path in where.ignore.items()
    }
    nowhere = np.zeros(size, np.bool_)

    def ignored(head: str) -> NDArray[np.bool_]:
        return unknown.get("", nowhere) | unknown.get(head, nowhere)

    labels: dict[str, Label] = {}
    for head, path in where.instances.items():
        ids = _sized(path, _read_mask(path), size)
        with about(path):
            labels[head] = InstanceLabel(ids=np.where(ignored(head), np.int32(IGNORE_ID), ids))
    for head, path in where.classes.items():
        ids = _sized(path, _read_mask(path), size)
        names = where.names[head]
        strange = np.setdiff1d(ids, [*range(len(names)), IGNORE_CLASS])
        if strange.size:
            found = ", ".join(map(str, strange[:5]))
            msg = f"{path}: class ids {found} are out of range: {len(names)} classes are named"
            raise DatasetError(f"{msg} ({', '.join(names)}); {IGNORE_CLASS} is for unknown")
        ids = np.where(ignored(head), IGNORE_CLASS, ids)
        labels[head] = ClassLabel(ids=ids.astype(np.uint8), classes=names)
    for head, name in where.patches.items():
        names = where.names[head]
        labels[head] = PatchLabel(id=names.index(name), classes=names)
    return AnnotatedImage(name=where.name, image=image, mpp=where.mpp, labels=labels)


def _read_mask(path: Path) -> NDArray[np.int32]:
    if path.suffix.lower() != ".npy":
        return read_ids(path)
    array = read_npy(path)
    with about(path):
        return as_ids(array)


def _sized(path: Path, mask: NDArray[np.int32], size: tuple[int, ...]) -> NDArray[np.int32]:
    if mask.shape != size:
        have = " x ".join(map(str, mask.shape[::-1]))
        raise DatasetError(f"{path}: the mask is {have} px, its image {size[1]} x {size[0]}")
    return mask


def _settings(path: Path) -> _Settings:
    if not path.is_file():
        return _Settings()
    try:
        data = tomllib.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DatasetError(f"{path} is no TOML: {error}") from error
    kinds: dict[str, tuple[type, ...]] = {
        "mpp": (float, int),
        "instances": (str,),
        "classes": (str,),
        "names": (dict,),
    }
    for key, value in data.items():
        if key not in kinds:
            raise DatasetError(f"{path}: unknown key {key!r}; known are {', '.join(kinds)}")
        if not isinstance(value, kinds[key]):
            raise DatasetError(f"{path}: {key} = {value!r} is not of the right type")
    return _Settings(**data)


def _facts(path: Path, images: Mapping[str, Path]) -> dict[str, dict[str, str]]:
    rows = _rows(path, images)
    strange = sorted({key for row in rows.values() for key in row} - set(_FACTS))
    if strange:
        raise DatasetError(f"{path}: unknown columns {strange}; known are {', '.join(_FACTS)}")
    return rows


def _patches(path: Path, images: Mapping[str, Path]) -> dict[str, dict[str, str]]:
    """Return, by head and image, the class; an empty field is no label."""
    by_head: dict[str, dict[str, str]] = {}
    for image, row in _rows(path, images).items():
        for head, value in row.items():
            if head != "image" and value:
                by_head.setdefault(head, {})[image] = value
    return by_head


def _rows(path: Path, images: Mapping[str, Path]) -> dict[str, dict[str, str]]:
    """Read a CSV file by its column ``image``; none where there is no such file."""
    if not path.is_file():
        return {}
    rows: dict[str, dict[str, str]] = {}
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise DatasetError(f"{path} is not UTF-8 text: {error}; save it as CSV UTF-8") from error
    with io.StringIO(text, newline="") as lines:
        for line, row in enumerate(csv.DictReader(lines), start=2):
            if None in row or None in row.values() or "image" not in row:
                msg = (
                    f"{path}, line {line}: as many fields as the header has, separated by commas, "
                    "wanted, one of them named image"
                )
                raise DatasetError(msg)
            plain = {str(key).strip(): str(value).strip() for key, value in row.items()}
            name = _stem(plain["image"])
            if name not in images or name in rows:
                why = "stands there twice" if name in rows else "is not in images/"
                raise DatasetError(f"{path}, line {line}: {plain['image']!r} {why}")
            rows[name] = plain
    return rows


def _stem(name: str) -> str:
    path = Path(name)
    return path.stem if path.suffix.lower() in IMAGE_SUFFIXES else name


def _by_head(folder: Path, default: str, images: Mapping[str, Path]) -> dict[str, dict[str, Path]]:
    """Return masks by head and image: those directly in a folder, and in a folder a head."""
    if not folder.is_dir():
        return {}
    homes = {path.name: path for path in sorted(folder.iterdir()) if path.is_dir()}
    if default in homes:
        homes[default] = homes.pop(default)
    by_head: dict[str, dict[str, Path]] = {}
    for head, home in [(default, folder), *homes.items()]:
        masks = _unique([*image_files(home), *files(home, "*.npy")])
        for path in masks:
            if path.stem not in images:
                raise DatasetError(f"{path} has no image of that name in images/")
            if path.stem in by_head.get(head, {}):
                raise DatasetError(f"{path} and {by_head[head][path.stem]} are for one head")
            by_head.setdefault(head, {})[path.stem] = path
    return by_head


def _unique(paths: Sequence[Path]) -> Sequence[Path]:
    first: dict[str, Path] = {}
    for path in paths:
        if first.setdefault(path.stem, path) is not path:
            raise DatasetError(f"{first[path.stem]} and {path} bear one name: keep one")
    return paths


def _of(masks: Mapping[str, Mapping[str, Path]], name: str) -> dict[str, Path]:
    return {head: by_name[name] for head, by_name in masks.items() if name in by_name}


def _names(folder: Path, head: str, settings: _Settings) -> tuple[str, ...]:
    """Return the class names of a head: from ``dataset.toml``, or ``classes.txt`` by its masks."""
    if head in settings.names:
        return tuple(settings.names[head])
    homes = [folder / head] + ([folder] if head == settings.classes else [])
    for home in homes:
        path = home / "classes.txt"
        if path.is_file():
            lines = path.read_text(encoding="utf-8").splitlines()
            return tuple(line.strip() for line in lines if line.strip())
    msg = f"{homes[-1]}: the classes have no names; write them into {homes[-1] / 'classes.txt'}"
    raise DatasetError(f"{msg}, one a line, id 0 (none of them) first")


def _patch_names(head: str, classes: Mapping[str, str], settings: _Settings) -> tuple[str, ...]:
    found = set(classes.values())
    names = tuple(settings.names.get(head, sorted(found)))
    strange = sorted(found - set(names))
    if strange:
        msg = f"patches.csv: classes {strange} of {head!r} are not among those of dataset.toml"
        raise DatasetError(f"{msg}: {', '.join(names)}")
    return names


def _mpp(given: float | None, row: Mapping[str, str], settings: _Settings, image: Path) -> float:
    stated = given if given is not None else row.get("mpp") or settings.mpp
    if stated is None:
        msg = f"{image}: how large is a pixel? Say it with mpp, in images.csv or in dataset.toml"
        raise DatasetError(msg)
    try:
        return pixel_size(float(stated), published=0.0)
    except ValueError as error:
        raise DatasetError(f"{image}: {stated!r} is no number of micrometres per pixel") from error
