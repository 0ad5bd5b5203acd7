"""What works on this machine, tried and not only looked up."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

__all__ = ["Check", "examine"]

LEAST_FREE_GB = 5
"""A slide's maps and tables rarely need more."""


@dataclass(frozen=True, kw_only=True)
class Check:
    """One thing that was tried."""

    name: str
    """What."""
    ok: bool
    """Whether it works."""
    detail: str
    """What was found."""


def examine(model: str | None = None) -> Iterator[Check]:
    """Try the readers, the device, the kernels, the model, the disk, and the main job.

    Args:
        model: name or folder of the bundle to try; None is the default of this machine.
    """
    yield _try("readers", _readers)
    yield _try("device", _device)
    yield _try("kernels", _kernels)
    yield _try("model", lambda: _model(model))
    yield _try("disk", _disk)
    yield _try("main job", lambda: _main_job(model))


def _try(name: str, work: Callable[[], str]) -> Check:
    # A broken installation fails in ways nobody foresaw; each must become a line here.
    try:
        return Check(name=name, ok=True, detail=work())
    except Exception as error:
        return Check(name=name, ok=False, detail=f"{type(error).__name__}: {error}")


def _readers() -> str:
    import openslide

    names = ("openslide-python", "tiffslide", "tifffile", "simplejpeg", "imagecodecs")
    found = ", ".join(f"{name} {metadata.version(name)}" for name in names)
    return f"{found}, libopenslide {openslide.__library_version__}"


def _device() -> str:
    import torch

    from wsi_pipeline.device import choose_device, choose_precision

    device = choose_device("auto")
    precision = choose_precision("auto", device, architecture="cerberus")
    return f"{device} ({precision} for large networks), torch {torch.__version__}"


def _kernels() -> str:
    import numba
    import numpy as np

    from wsi_pipeline.geometry import PixelGrid
    from wsi_pipeline.instances import outline_polygons

    mask = np.zeros((8, 8), bool)
    mask[2:6, 3:7] = True
    ((_, _, pixels),) = outline_polygons(mask, PixelGrid.level0((8, 8)))
    if pixels != 16:
        raise RuntimeError(f"a square of 16 pixels was measured as {pixels}")
    return f"numba {numba.__version__}"


def _model(model: str | None) -> str:
    from wsi_pipeline.bundle import find_bundle
    from wsi_pipeline.golden import check_golden, read_golden

    bundle = find_bundle(model)
    name = f"{bundle.spec.name} ({bundle.digest[:12]})"
    if read_golden(bundle) is None:
        bundle.load_network()
        return f"{name}, which has no golden tiles to compare with"
    if faults := check_golden(bundle):
        raise RuntimeError(f"{name} does not compute what it did when it was made: {faults[0]}")
    return f"{name}, golden tiles as expected"


def _disk() -> str:
    free = shutil.disk_usage(Path.cwd()).free / 1e9
    if free < LEAST_FREE_GB:
        raise RuntimeError(f"{free:.1f} GB free here; a slide may need {LEAST_FREE_GB}")
    return f"{free:.0f} GB free in this folder"


def _main_job(model: str | None) -> str:
    from wsi_pipeline.api import run
    from wsi_pipeline.synth import write_slide

    with tempfile.TemporaryDirectory() as folder:
        slide = Path(folder) / "synthetic.svs"
        write_slide(slide, width=2048, height=2048, mpp=0.5, seed=1)
        # Of a pixel size that has to be resampled: other compiled loops than those of the first.
        beside = Path(folder) / "resampled.svs"
        write_slide(beside, width=1024, height=1024, mpp=0.27, seed=1)
        reports = run([slide, beside], Path(folder) / "results", model=model)
    for report in reports:
        if not report.done:
            raise RuntimeError(report.reason)
    report = reports[0]
    counts = ", ".join(f"{number} {kind}" for kind, number in report.counts.items())
    return f"a synthetic slide gave {counts} in {report.seconds['total']:.1f} s"
