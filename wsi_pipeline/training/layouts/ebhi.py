"""EBHI-Seg, colorectal biopsies with gland outlines, by diagnosis.

::

    Adenocarcinoma/image/GTXC2013450-1-400-002.png    tile, 224 x 224
    Adenocarcinoma/label/GTXC2013450-1-400-002.png    above 0: gland
    High-grade IN/...  Low-grade IN/...  Normal/...  Polyp/...  Serrated adenoma/...

The annotators drew areas, not glands, and no lumen. Instances are the connected parts of the
areas. The lumen label is *derived*: bright space within a gland. It is a rule's opinion and
teaches a network to find what the rule finds, also where the rule is wrong.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from wsi_pipeline.errors import DatasetError
from wsi_pipeline.training.annotation import (
    IGNORE_ID,
    AnnotatedImage,
    ClassLabel,
    Dataset,
    InstanceLabel,
    Item,
    Label,
)
from wsi_pipeline.training.layouts.reading import (
    about,
    image_files,
    pair,
    pixel_size,
    read_rgb,
    require,
)

__all__ = ["EBHI_CLASSES", "derive_lumina", "read_ebhi"]

EBHI_CLASSES = (
    "none",
    "normal",
    "polyp",
    "low-grade IN",
    "high-grade IN",
    "adenocarcinoma",
    "serrated adenoma",
)
"""Names by id; IN is intraepithelial neoplasia."""
_BY_LETTERS = {"".join(filter(str.isalpha, name)).lower(): name for name in EBHI_CLASSES[1:]}

_MAX_HOLE_UM2 = 5000.0
_MIN_GLAND_UM2 = 60.0

# The derived lumen; found on these tiles at 0.5 micrometres a pixel, kept in micrometres.
_BLUR_UM = 0.6
_BRIGHT = 0.80
_DOUBTFUL = 0.70
_MEAN_BRIGHT = 0.86
_WALL_UM = 2.0
_MIN_DEPTH_UM = 6.0
_MIN_LUMEN_UM2 = 37.5
_DEEP = 0.6
_MIN_WHITE = 185.0


def read_ebhi(folder: Path, *, mpp: float | None = None, lumen: bool = True) -> Dataset:
    """List EBHI-Seg: ``gland`` instances, ``gland-class`` pixels, derived ``lumen`` instances.

    Many outlines leave the lumen out, so holes below 5,000 square micrometres are filled.
    4-connected parts are instances; parts below 60 square micrometres are dropped. The patient
    is the name up to the first hyphen, in capitals since the publishers vary them; the group
    is the diagnosis.

    Args:
        folder: what the archive unpacks to.
        mpp: micrometres per pixel. Not published, so it must be given.
        lumen: whether to derive lumina; see :func:`derive_lumina`.

    Raises:
        DatasetError: no ``mpp``, no class folder, or an image without its label.
    """
    require(folder)
    if mpp is None:
        msg = (
            f"{folder}: EBHI-Seg does not state how large a pixel is; say it with mpp. "
            "About 1.05 micrometres is an estimate from the size of crypts and nuclei"
        )
        raise DatasetError(msg)
    size = pixel_size(mpp, published=mpp)
    items: list[Item] = []
    for part in sorted(folder.iterdir()):
        diagnosis = _BY_LETTERS.get("".join(filter(str.isalpha, part.name)).lower())
        if diagnosis is None or not part.is_dir():
            continue
        require(part, "image", "label")
        images, labels = image_files(part / "image"), image_files(part / "label")
        for image, label in pair(images, labels, lambda path: path.stem):
            name = f"{diagnosis}/{image.stem}"
            load = partial(_load, name, image, label, diagnosis, size, lumen)
            patient = image.stem.partition("-")[0].upper()
            items.append(Item(name=name, patient=patient, load=load, group=diagnosis))
    if not items:
        wanted = ", ".join(EBHI_CLASSES[1:])
        raise DatasetError(f"{folder} holds no images in folders named {wanted}")
    items.sort(key=lambda item: item.name)
    heads: dict[str, tuple[str, ...]] = {"gland": (), "gland-class": EBHI_CLASSES}
    if lumen:
        heads["lumen"] = ()
    return Dataset(name="ebhi", path=folder, labels=heads, items=tuple(items))


def derive_lumina(
    image: NDArray[np.uint8], glands: NDArray[np.int32], mpp: float
) -> NDArray[np.int32]:
    """Derive lumina from brightness within gland outlines.

    Brightness is the smallest of R, G and B, as a share of the tile's white (its 99.7
    percentile), blurred. A lumen is a 4-connected area brighter than 0.80, 0.86 on average,
    more than 2 micrometres inside its gland, of 37.5 square micrometres or more, that reaches
    deeper than 6 micrometres. Tiles whose white is below 185 have none. Other pixels brighter
    than 0.70, within glands or not, are unknown, except for patches within a gland that stay
    within the outer 0.6 of its depth: those are goblet cells' mucin, and background.

    Args:
        image: (H, W, 3) RGB.
        glands: (H, W) gland numbers, 0 outside.
        mpp: micrometres per pixel.

    Returns:
        (H, W) lumen numbers, 0 background, ``IGNORE_ID`` unknown. Derived, not annotated.
    """
    darkest = image.min(axis=2).astype(np.float32)
    white = float(np.percentile(darkest, 99.7))
    bright = ndimage.gaussian_filter(darkest / max(white, 1.0), _BLUR_UM / mpp)
    inside = glands > 0
    depth_um = _depth_px(inside) * mpp
    lumina, count = ndimage.label((bright > _BRIGHT) & (depth_um > _WALL_UM))
    numbers = np.arange(1, count + 1)
    area_um2 = np.bincount(lumina.ravel(), minlength=count + 1)[1:] * mpp**2
    kept = (
        (area_um2 >= _MIN_LUMEN_UM2)
        & (ndimage.mean(bright, lumina, numbers) > _MEAN_BRIGHT)
        & (ndimage.maximum(depth_um, lumina, numbers) > _MIN_DEPTH_UM)
        & (white >= _MIN_WHITE)
    )
    ids = _renumbered(lumina, kept)
    doubtful = (bright > _DOUBTFUL) & (ids == 0)
    doubtful &= ~_shallow(doubtful & inside, glands, depth_um)
    ids[doubtful] = IGNORE_ID
    return ids


def _load(
    name: str, image: Path, label: Path, diagnosis: str, mpp: float, lumen: bool
) -> AnnotatedImage:
    pixels = read_rgb(image)
    with about(label):
        mask: NDArray[np.bool_] = read_rgb(label).max(axis=2) > 0
        glands = _glands(mask, mpp)
        classes = np.where(glands > 0, EBHI_CLASSES.index(diagnosis), 0).astype(np.uint8)
        labels: dict[str, Label] = {
            "gland": InstanceLabel(ids=glands),
            "gland-class": ClassLabel(ids=classes, classes=EBHI_CLASSES),
        }
        annotated = AnnotatedImage(name=name, image=pixels, mpp=mpp, labels=labels)
        if not lumen:
            return annotated
        derived = InstanceLabel(ids=derive_lumina(pixels, glands, mpp))
        return replace(annotated, labels={**labels, "lumen": derived})


def _glands(mask: NDArray[np.bool_], mpp: float) -> NDArray[np.int32]:
    holes, count = ndimage.label(~mask)
    edge = np.concatenate([holes[0], holes[-1], holes[:, 0], holes[:, -1]])
    small = np.bincount(holes.ravel(), minlength=count + 1) * mpp**2 < _MAX_HOLE_UM2
    small[edge] = False  # open towards what the tile does not show, so no hole
    small[0] = False
    glands, count = ndimage.label(mask | small[holes])
    area_um2 = np.bincount(glands.ravel(), minlength=count + 1)[1:] * mpp**2
    return _renumbered(glands, area_um2 >= _MIN_GLAND_UM2)


def _renumbered(labels: NDArray[np.int32], kept: NDArray[np.bool_]) -> NDArray[np.int32]:
    """Keep some of the objects 1, 2, ..., and number them without gaps."""
    numbers = np.concatenate([[0], np.where(kept, np.cumsum(kept), 0)])
    ids: NDArray[np.int32] = numbers.astype(np.int32)[labels]
    return ids


def _depth_px(inside: NDArray[np.bool_]) -> NDArray[np.float64]:
    """Return the distance to the nearest pixel outside; the edge of the tile is not outside."""
    if inside.all():
        return np.full(inside.shape, np.inf)
    depth: NDArray[np.float64] = ndimage.distance_transform_edt(inside)
    return depth


def _shallow(
    patches: NDArray[np.bool_], glands: NDArray[np.int32], depth_um: NDArray[np.float64]
) -> NDArray[np.bool_]:
    """Tell which patches do not come near the middle of the gland they are in."""
    labels, count = ndimage.label(patches)
    numbers = np.arange(1, count + 1)
    deepest = np.asarray(ndimage.maximum(depth_um, labels, numbers))
    owner = np.asarray(ndimage.maximum(glands, labels, numbers), np.intp)
    gland_depth = np.zeros(int(glands.max(initial=0)) + 1)
    np.maximum.at(gland_depth, glands.ravel(), depth_um.ravel())
    shallow = np.concatenate([[False], deepest < _DEEP * gland_depth[owner]])
    chosen: NDArray[np.bool_] = shallow[labels]
    return chosen
