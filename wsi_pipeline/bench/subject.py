"""What is measured: a slide, its tissue tiles, a network on a device, and finished maps."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image

from wsi_pipeline.api import plan_run
from wsi_pipeline.bundle import ModelBundle, find_bundle
from wsi_pipeline.device import choose_device
from wsi_pipeline.engines import Silent, run_slides
from wsi_pipeline.errors import Interrupted, JobError
from wsi_pipeline.filling import lay_tiles
from wsi_pipeline.inference import TorchPredictor
from wsi_pipeline.job import RunReport, SlideJob
from wsi_pipeline.machine import available_cpus
from wsi_pipeline.pipeline import TISSUE_MPP
from wsi_pipeline.slide import Slide
from wsi_pipeline.store import PredictionStore
from wsi_pipeline.synth import write_slide
from wsi_pipeline.tiling import TileGrid
from wsi_pipeline.tissue import TissueMask, detect_tissue, read_mask

__all__ = ["BenchOptions", "Subject", "prepared", "restricted", "run_job"]

SYNTHETIC_PX = {"cuda": 24576, "cpu": 8192}
"""Side of the synthetic slide: some 36 tiles of a GPU, 16 of a CPU."""
SYNTHETIC_MPP = 0.25
_SEED = 7


@dataclass(frozen=True, kw_only=True)
class BenchOptions:
    """What is asked; the options of ``wsi bench``."""

    slide: str | None = None
    """The slide; None: a synthetic one."""
    model: str | None = None
    """Name or folder of a bundle; None: the device's default."""
    mpp: float | None = None
    """Micrometres per level-0 pixel; overrides what the slide says."""
    size_px: int | None = None
    """Side of the synthetic slide; None: what suits the device."""
    tiles: int | None = None
    """Measure at most so many tiles; None: all that hold tissue."""
    device: str = "auto"
    """As of :func:`wsi_pipeline.run`, like the four below."""
    precision: str = "auto"
    batch_size: int | Literal["auto"] = "auto"
    tile_size: int | Literal["auto"] = "auto"
    workers: int | Literal["auto"] = "auto"
    repeat: int = 3
    """Rounds; results are their medians."""

    def __post_init__(self) -> None:
        for name, least in (("repeat", 1), ("tiles", 1), ("size_px", 512)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise JobError(f"{name} must be {least} or more, not {value}")
        if self.slide is not None and self.size_px is not None:
            raise JobError("a size is for the synthetic slide; leave it out, or the slide")


@dataclass(frozen=True, kw_only=True)
class Subject:
    """Everything that the stages need; nothing of it changes while they are measured."""

    slide: Slide
    """Open."""
    synthetic: bool
    """Whether the slide was made for this."""
    job: SlideJob
    """The slide as the pipeline is asked for it."""
    bundle: ModelBundle
    """The model."""
    predictor: TorchPredictor
    """The network, ready."""
    tissue: TissueMask
    """Where the tissue is that is measured."""
    tiles: TileGrid
    """The tiles that every stage works on."""
    maps: PredictionStore
    """Their finished maps."""
    workers: int
    """Threads that extract objects."""
    folder: Path
    """Scratch space on the disk that is measured."""

    @property
    def pixel_size(self) -> tuple[float, float]:
        """Micrometres per level-0 pixel, x and y."""
        return self.slide.pixel_size.x, self.slide.pixel_size.y

    @property
    def working_mpp(self) -> tuple[float, float]:
        """Micrometres per pixel of the tiles, x and y."""
        spacing, size = self.tiles.grid.spacing, self.pixel_size
        return spacing[0] * size[0], spacing[1] * size[1]

    @property
    def mpx(self) -> float:
        """Million pixels that the tiles predict: what every rate counts."""
        return sum(tile.predicted.area for tile in self.tiles.tiles) / 1e6

    @property
    def mm2(self) -> float:
        """Area of the tissue."""
        return self.tissue.area_mm2(self.pixel_size)


@contextmanager
def prepared(
    options: BenchOptions,
    folder: Path,
    *,
    stop: Callable[[], bool] = lambda: False,
    say: Callable[[str], None] = lambda _: None,
) -> Iterator[Subject]:
    """Open the slide, load the network, choose the tiles, and make their maps.

    Making them runs the whole pipeline once: what is compiled or cached at first use is
    ready afterwards.

    Raises:
        WsiPipelineError: the slide, the model or an option is not usable, or there is no
            tissue.
        Interrupted: ``stop`` said so.
    """
    device = choose_device(options.device)
    find_bundle(options.model, device=device)  # a wrong name is told before a slide is drawn
    path = _synthetic(options, device, folder, say) if options.slide is None else options.slide
    plan = plan_run(
        path, folder / "first", model=options.model, mpp=options.mpp, device=options.device
    )
    if len(plan.jobs) != 1:
        raise JobError(f"name one slide to measure, not {len(plan.jobs)}")
    predictor = TorchPredictor.load(
        plan.bundle,
        device=options.device,
        precision=options.precision,
        tile_size=options.tile_size,
        batch_size=options.batch_size,
        workers=options.workers,
    )
    (job,) = plan.jobs
    workers = available_cpus() if options.workers == "auto" else options.workers
    with Slide.open(job.path, mpp=job.mpp) as slide:
        tissue, tiles, job = _tissue_tiles(slide, job, predictor, options.tiles, folder)
        say(f"first run of the whole: {len(tiles.tiles)} tiles, {predictor.device}")
        run_job(job, predictor, workers=workers, stop=stop)
        yield Subject(
            slide=slide,
            synthetic=options.slide is None,
            job=job,
            bundle=plan.bundle,
            predictor=predictor,
            tissue=tissue,
            tiles=tiles,
            maps=PredictionStore.open(job.maps_path),
            workers=workers,
            folder=folder,
        )


def _synthetic(
    options: BenchOptions, device: str, folder: Path, say: Callable[[str], None]
) -> Path:
    side = options.size_px or SYNTHETIC_PX["cuda" if device.startswith("cuda") else "cpu"]
    mpp = SYNTHETIC_MPP if options.mpp is None else options.mpp
    say(f"drawing a synthetic slide of {side} x {side} pixels at {mpp} um")
    path = folder / "synthetic.svs"
    write_slide(path, width=side, height=side, mpp=mpp, seed=_SEED, truth=False)
    return path


def run_job(
    job: SlideJob, predictor: TorchPredictor, *, workers: int, stop: Callable[[], bool]
) -> RunReport:
    """Run the whole pipeline on a slide.

    Raises:
        JobError: the slide failed.
        Interrupted: ``stop`` said so.
    """
    reports = run_slides([job], predictor, watcher=Silent(), stop=stop, workers=workers)
    if stop():
        raise Interrupted("asked to stop; nothing was reported")
    (report,) = reports
    if not report.done:
        raise JobError(f"the slide cannot be measured, it failed: {report.reason}")
    return report


def restricted(tissue: TissueMask, tiles: TileGrid, most: int) -> TissueMask:
    """Return the tissue of at most ``most`` tiles from the middle of a slide.

    Only what lies well inside of those tiles is kept, so no other tile touches tissue.
    """
    insides = []
    for tile in tiles.tiles:
        # The outermost pixels may stick out, and a mask read from a file may be off by one.
        inside = tissue.grid.cover(tiles.grid, tile.write).pad(-2).intersect(tissue.grid.box)
        if tissue.mask[inside.slices].any():
            insides.append(inside)
    first = max(0, (len(insides) - most) // 2)
    mask = np.zeros_like(tissue.mask)
    for inside in insides[first : first + most]:
        mask[inside.slices] = tissue.mask[inside.slices]
    return replace(tissue, mask=mask)


def _tissue_tiles(
    slide: Slide, job: SlideJob, predictor: TorchPredictor, most: int | None, folder: Path
) -> tuple[TissueMask, TileGrid, SlideJob]:
    """Find the tiles as the pipeline does; a job of fewer tiles gets a mask of its own."""
    if job.mask is not None:
        tissue = read_mask(job.mask, slide.size)
    else:
        pixel_size = slide.pixel_size.x, slide.pixel_size.y
        tissue = detect_tissue(*slide.thumbnail(TISSUE_MPP), pixel_size).including(slide.holes)
    tiles = lay_tiles(slide, tissue, predictor)
    if most is not None and most < len(tiles.tiles):
        path = folder / f"{job.slide_id}.png"
        Image.fromarray(restricted(tissue, tiles, most).mask.astype(np.uint8) * 255).save(path)
        job = replace(job, mask=path)
        tissue = read_mask(path, slide.size)
        tiles = lay_tiles(slide, tissue, predictor)
    if not tiles.tiles:
        raise JobError(f"{slide.name} holds no tissue: there is nothing to measure")
    return tissue, tiles, job
