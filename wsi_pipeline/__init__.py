"""Whole-slide histology images into tables of nuclei, glands, lumina and tissue.

>>> import wsi_pipeline as wsi
>>> wsi.run(["a.svs"], out="results")                      # doctest: +SKIP
>>> wsi.read_objects("results/objects", kind="gland")      # doctest: +SKIP
>>> wsi.open_maps("results/maps/a.zarr")                   # doctest: +SKIP
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from wsi_pipeline.api import run as run
    from wsi_pipeline.errors import WsiPipelineError as WsiPipelineError
    from wsi_pipeline.slide import Slide as Slide
    from wsi_pipeline.store import open_maps as open_maps
    from wsi_pipeline.table import read_metadata as read_metadata
    from wsi_pipeline.table import read_objects as read_objects

__all__ = ["Slide", "WsiPipelineError", "open_maps", "read_metadata", "read_objects", "run"]

_HOMES = {
    "Slide": "slide",
    "WsiPipelineError": "errors",
    "open_maps": "store",
    "read_metadata": "table",
    "read_objects": "table",
    "run": "api",
}


def __getattr__(name: str) -> object:
    # Late, so that `wsi-run --help` and a worker that only reads tables start at once.
    if name in _HOMES:
        return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
