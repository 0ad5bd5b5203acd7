"""How large a pixel is, and who says so.

Looked for in this order; the first that is there decides, and must be plausible:

1. the caller's own value
2. ``aperio.MPP``: the scanner's note in the image description
3. ``openslide.mpp-x``, ``openslide.mpp-y``: other vendors' notes
4. ``tiff.XResolution``, ``tiff.YResolution`` with a ``tiff.ResolutionUnit``
5. the objective: 40x, 20x and 10x have one customary pixel size each
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from wsi_pipeline.errors import ImplausiblePixelSizeError, MissingPixelSizeError

__all__ = ["PixelSize", "find_pixel_size", "objective_power", "scan_date"]

_PLAUSIBLE_MPP = (0.05, 5.0)
"""Oil immersion at 100x to a macro scan."""
_NOTES = (
    ("aperio.MPP", "aperio.MPP"),
    ("openslide.mpp-x", "openslide.mpp-y"),
    ("tiffslide.mpp-x", "tiffslide.mpp-y"),
)
_UNIT_UM = {"inch": 25400.0, "centimeter": 10000.0}
_OBJECTIVE_MPP = {40.0: 0.25, 20.0: 0.5, 10.0: 1.0}
_OBJECTIVE_NOTES = ("aperio.AppMag", "openslide.objective-power", "tiffslide.objective-power")
_DATE_NOTES = (
    "aperio.Date", "leica.creation-date", "mirax.GENERAL.SLIDE_CREATIONDATETIME",
    "hamamatsu.Created", "philips.DICOM_ACQUISITION_DATETIME", "tiff.DateTime",
)  # fmt: skip
_LOOKED_FOR = (
    "aperio.MPP, openslide.mpp-x, tiff.XResolution with a unit, objective power 10, 20 or 40"
)


@dataclass(frozen=True, kw_only=True, slots=True)
class PixelSize:
    """What one level-0 pixel spans on the glass."""

    x: float
    """Micrometres."""
    y: float
    """Micrometres."""
    source: str
    """Who said so: ``argument``, or the name of the property."""


def find_pixel_size(
    properties: Mapping[str, str], *, name: str, argument: float | None = None
) -> PixelSize:
    """Decide on the pixel size of level 0.

    Args:
        properties: what the file says, under the names that openslide uses.
        name: of the slide, for messages.
        argument: the caller's own value in micrometres, which overrides the file.

    Raises:
        MissingPixelSizeError: nobody says how large a pixel is.
        ImplausiblePixelSizeError: the first to say so says something absurd.
    """
    if argument is not None:
        found: PixelSize | None = PixelSize(x=argument, y=argument, source="argument")
    else:
        found = _noted(properties) or _resolution(properties) or _customary(properties)
    if found is None:
        msg = (
            f"{name} does not say how large a pixel is. Looked for: {_LOOKED_FOR}. "
            "To proceed: give the micrometres per level-0 pixel with --mpp, or in an mpp "
            "column of the slide list."
        )
        raise MissingPixelSizeError(msg)
    low, high = _PLAUSIBLE_MPP
    if not (low <= found.x <= high and low <= found.y <= high):
        msg = (
            f"{name} has a pixel size of {found.x:g} x {found.y:g} micrometres according to "
            f"{found.source}; plausible are {low:g} to {high:g}. To proceed: give the true "
            "micrometres per level-0 pixel with --mpp, or in an mpp column of the slide list."
        )
        raise ImplausiblePixelSizeError(msg)
    return found


def objective_power(properties: Mapping[str, str]) -> float | None:
    """Return the magnification of the objective, where the file names one."""
    powers = (_number(properties.get(key)) for key in _OBJECTIVE_NOTES)
    return next((power for power in powers if power is not None and power > 0), None)


def scan_date(properties: Mapping[str, str]) -> str | None:
    """Return when the slide was scanned, in the scanner's words; None where it does not say."""
    return next((properties[key] for key in _DATE_NOTES if properties.get(key)), None)


def _noted(properties: Mapping[str, str]) -> PixelSize | None:
    for key_x, key_y in _NOTES:
        x, y = _number(properties.get(key_x)), _number(properties.get(key_y))
        if x is not None and y is not None:
            return PixelSize(x=x, y=y, source=key_x)
    return None


def _resolution(properties: Mapping[str, str]) -> PixelSize | None:
    unit_um = _UNIT_UM.get(properties.get("tiff.ResolutionUnit", ""))
    x = _number(properties.get("tiff.XResolution"))
    y = _number(properties.get("tiff.YResolution"))
    if not (unit_um and x and y):
        return None  # a resolution without a unit is an aspect ratio, not a size
    return PixelSize(x=unit_um / x, y=unit_um / y, source="tiff.XResolution")


def _customary(properties: Mapping[str, str]) -> PixelSize | None:
    mpp = _OBJECTIVE_MPP.get(objective_power(properties) or 0.0)
    return PixelSize(x=mpp, y=mpp, source="objective-power") if mpp else None


def _number(text: str | None) -> float | None:
    try:
        value = float(text) if text is not None else math.nan
    except ValueError:
        return None
    return value if math.isfinite(value) else None
