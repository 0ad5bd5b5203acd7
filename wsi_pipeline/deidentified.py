"""What may be said of a file where nobody must learn whose it is, or where it is from.

Numbers, and words from lists that are kept here. A text out of a file is never shown, whatever it
claims to be: names, paths, dates, labels and remarks of a scanner may all name a patient, a
hospital or a day. So this does not leave out what is secret, it lets pass what cannot be.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

__all__ = ["maps_lines", "slide_lines", "table_lines"]

_VENDORS = frozenset(
    {
        *("aperio", "dicom", "generic-tiff", "hamamatsu", "leica", "mirax", "olympus", "philips"),
        *("sakura", "trestle", "ventana", "zeiss"),
    }
)
_READERS = frozenset({"tiff", "openslide", "tiffslide"})
_SOURCES = frozenset(
    {
        *("argument", "objective-power", "aperio.MPP", "openslide.mpp-x", "tiffslide.mpp-x"),
        "tiff.XResolution",
    }
)
_PICTURES = frozenset({"label", "macro", "thumbnail", "overview", "map"})
_HEADS = frozenset({"nuclei", "nuclei-class", "gland", "gland-class", "lumen", "tissue"})
_DEVICES = frozenset({"cpu", "cuda", "mps"})
_PRECISIONS = frozenset({"fp32", "bf16", "fp16", "int8"})
_MASKS = frozenset({"detected", "file"})
_SOFTWARE = frozenset(
    {"python", "wsi-pipeline", "torch", "numpy", "openslide-python", "zarr", "pyarrow", "numba"}
)
_DIGEST = re.compile(r"[0-9a-f]{64}")
_VERSION = re.compile(r"\d{1,4}(\.\d{1,4}){1,3}(\+(cpu|cu\d{2,3}))?")
_OTHER = "other"


def slide_lines(name: str, mpp: float | None) -> Iterator[str]:
    """Describe a slide without its name, and without any text of the file.

    Raises:
        SlideError: as of ``Slide.open``; its message names the file.
    """
    from wsi_pipeline.slide import Slide

    with Slide.open(name, mpp=mpp) as slide:
        size = slide.pixel_size
        width, height = slide.size
        vendor, reader = _word(slide.vendor, _VENDORS), _word(slide.reader, _READERS)
        yield f"slide      {vendor}, read by {reader}"
        yield f"size       {width} x {height} px, {width * size.x / 1e3:.2f} x " + (
            f"{height * size.y / 1e3:.2f} mm"
        )
        yield f"mpp        {size.x:.5g} x {size.y:.5g} um, from {_word(size.source, _SOURCES)}"
        power = slide.objective_power
        # A number may be anything, too, such as a day.
        yield f"objective  {_OTHER if power is None or not 1 <= power <= 150 else f'{power:.4g}'}"
        for level in slide.levels:
            yield f"level {level.index}    {level.size[0]} x {level.size[1]}, " + (
                f"downsample {level.downsample[0]:.4g}"
            )
        beside = sorted(
            f"{_word(other, _PICTURES)} {w} x {h}" for other, (w, h) in slide.associated.items()
        )
        yield f"beside it  {', '.join(beside) or 'no pictures'}" + (
            " (label and macro may show names; nothing here copies them)" * bool(beside)
        )


def table_lines(path: Path) -> Iterator[str]:
    """Describe a table by its size, the slide's size, the model's digest and the software.

    Raises:
        TableError: no table of this package; the message names the file.
    """
    from wsi_pipeline.table import count_rows, read_metadata

    said = read_metadata(path)
    yield f"table      {count_rows(path):,} rows"
    slide, mpp = _part(said, "slide"), _part(_part(said, "slide"), "mpp")
    yield f"slide      {_number(slide.get('width'))} x {_number(slide.get('height'))} px"
    yield f"mpp        {_number(mpp.get('x'))} x {_number(mpp.get('y'))} um, from " + (
        _word(mpp.get("source"), _SOURCES)
    )
    yield f"model      {_matching(_DIGEST, _part(said, 'model').get('sha256'))}"
    options = _part(said, "options")
    device = str(options.get("device")).partition(":")[0]
    yield (
        f"options    {_word(device, _DEVICES)}, {_word(options.get('precision'), _PRECISIONS)}, "
        + (f"tile {_number(options.get('tile_px'))} px, mask {_word(options.get('mask'), _MASKS)}")
    )
    versions = _part(said, "versions")
    known = [f"{n} {_matching(_VERSION, versions[n])}" for n in sorted(_SOFTWARE & set(versions))]
    yield f"versions   {', '.join(known)}"


def maps_lines(path: Path) -> Iterator[str]:
    """Describe a store of maps by its grids.

    Raises:
        StoreError: no store of this package; the message names the folder.
    """
    from wsi_pipeline.store import PredictionStore

    store = PredictionStore.open(path)
    yield f"maps       {len(store.keys)}"
    for key in store.keys:
        head = store.spec.maps[key].name
        grid = store.head_grid(head)
        mpp = grid.spacing[0] * store.pixel_size[0]
        shown = f"{_word(head, _HEADS)}/{key.rpartition('/')[2]}"
        yield f"           {shown}: {grid.size[0]} x {grid.size[1]} at {mpp:.4g} um"
    yield f"unreadable {store.unreadable_fraction():.2%}"


def _part(values: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    found = values.get(key)
    return found if isinstance(found, dict) else {}


def _word(value: object, known: frozenset[str]) -> str:
    return value if isinstance(value, str) and value in known else _OTHER


def _number(value: object) -> str:
    return f"{value:.8g}" if isinstance(value, int | float) and abs(value) < 1e12 else _OTHER


def _matching(pattern: re.Pattern[str], value: object) -> str:
    return value if isinstance(value, str) and pattern.fullmatch(value) else _OTHER
