"""Readers of annotated data, one a published layout: a folder becomes a ``Dataset``.

A reader lists files and reads tables, not pixels; each item reads its own image when asked.
Class ids are the publishers'. A pixel size is the publishers', unless the user states another
one, and never guessed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from inspect import signature
from pathlib import Path

from wsi_pipeline.errors import DatasetError
from wsi_pipeline.training.annotation import Dataset
from wsi_pipeline.training.layouts.consep import read_consep
from wsi_pipeline.training.layouts.crag import read_crag
from wsi_pipeline.training.layouts.crops import read_crops_labels
from wsi_pipeline.training.layouts.digestpath import read_digestpath
from wsi_pipeline.training.layouts.dsb2018 import read_dsb2018
from wsi_pipeline.training.layouts.ebhi import read_ebhi
from wsi_pipeline.training.layouts.glas import read_glas
from wsi_pipeline.training.layouts.kather import read_kather
from wsi_pipeline.training.layouts.lizard import read_lizard
from wsi_pipeline.training.layouts.monuseg import read_monuseg
from wsi_pipeline.training.layouts.pannuke import read_pannuke
from wsi_pipeline.training.layouts.plain import read_plain
from wsi_pipeline.training.layouts.pt1 import read_pt1
from wsi_pipeline.training.layouts.tables import read_objects_labels

__all__ = ["LAYOUTS", "Layout", "read_dataset"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Layout:
    """How the data of one publication lie in a folder."""

    read: Callable[..., Dataset]
    """Takes the folder and ``mpp``."""
    marks: tuple[tuple[str, ...], ...]
    """Sets of patterns (as of ``Path.glob``); a folder in which all of a set match is such."""

    def fits(self, folder: Path) -> bool:
        """Tell whether the folder bears the marks of this layout."""
        return any(
            all(next(folder.glob(pattern), None) is not None for pattern in patterns)
            for patterns in self.marks
        )

    @property
    def looks_for(self) -> str:
        """The marks in words."""
        return ", or ".join(" and ".join(patterns) for patterns in self.marks)


LAYOUTS = {
    "glas": Layout(read=read_glas, marks=(("Grade.csv", "*_anno.bmp"),)),
    "crag": Layout(
        read=read_crag,
        marks=tuple(
            (f"{part}/Images", f"{part}/Annotation*") for part in ("train", "valid", "test")
        ),
    ),
    "lizard": Layout(read=read_lizard, marks=(("[Ll]izard_[Ii]mages*", "[Ll]izard_[Ll]abels*"),)),
    "consep": Layout(read=read_consep, marks=(("Train/Labels/*.mat",), ("Test/Labels/*.mat",))),
    "pannuke": Layout(
        read=read_pannuke,
        marks=(
            ("images.npy", "masks.npy"),
            ("*/images.npy", "*/masks.npy"),
            ("images/*/images.npy", "masks/*/masks.npy"),
            ("*/images/*/images.npy", "*/masks/*/masks.npy"),
        ),
    ),
    "monuseg": Layout(
        read=read_monuseg,
        marks=(("Tissue Images", "Annotations/*.xml"), ("TCGA-*.tif", "TCGA-*.xml")),
    ),
    "dsb2018": Layout(read=read_dsb2018, marks=(("*/images/*.png", "*/masks/*.png"),)),
    "digestpath": Layout(read=read_digestpath, marks=(("sig-train-pos",), ("sig-train-neg",))),
    "kather": Layout(
        read=read_kather,
        marks=(("ADI/*", "TUM/*"), ("ADI-*", "TUM-*"), ("NCT-CRC-HE-100K*",), ("CRC-VAL-HE-7K",)),
    ),
    "ebhi": Layout(read=read_ebhi, marks=(("*/image/*", "*/label/*"),)),
    "pt1": Layout(read=read_pt1, marks=(("img*/*-gt.png",),)),
    "plain": Layout(
        read=read_plain,
        marks=(("images", "instances"), ("images", "classes"), ("images", "patches.csv")),
    ),
    "crops": Layout(read=read_crops_labels, marks=(("crops/*.geojson",),)),
    "objects": Layout(read=read_objects_labels, marks=(("objects/*.parquet",), ("*.parquet",))),
}
"""The layouts by name."""


def read_dataset(
    folder: Path, layout: str | None = None, *, mpp: float | None = None, **options: object
) -> Dataset:
    """List a folder of annotated images.

    Args:
        folder: what the publishers' archive unpacks to, or one table of objects.
        layout: a key of ``LAYOUTS``; None: recognised by what the folder holds. Masks in
            ``images`` and ``instances`` are then ``plain``, whichever publication they are of.
        mpp: micrometres per pixel; None: the publishers'.
        **options: what else the layout's reader takes, such as ``complete`` of DigestPath's.

    Raises:
        DatasetError: no such folder, layout or option, none or several layouts recognised, or
            what the reader raises.
    """
    if not folder.exists():
        raise DatasetError(f"{folder} does not exist")
    if layout is None:
        layout = _recognised(folder)
    if layout not in LAYOUTS:
        raise DatasetError(f"there is no layout {layout!r}; there are {', '.join(LAYOUTS)}")
    read = LAYOUTS[layout].read
    known = [name for name in signature(read).parameters if name not in ("folder", "mpp")]
    unknown = sorted(set(options) - set(known))
    if unknown:
        have = f"options {', '.join(known)}" if known else "no options"
        raise DatasetError(f"the layout {layout!r} has no option {unknown}; it has {have}")
    return read(folder, mpp=mpp, **options)


def _recognised(folder: Path) -> str:
    if folder.suffix == ".parquet":
        return "objects"
    names = [name for name, layout in LAYOUTS.items() if layout.fits(folder)]
    if len(names) == 1:
        return names[0]
    what = f"could be any of {', '.join(names)}" if names else "is in no known layout"
    marks = "\n".join(f"  {name}: {layout.looks_for}" for name, layout in LAYOUTS.items())
    raise DatasetError(f"{folder} {what}; name the layout. Each looks for\n{marks}")
