"""What is done with a hostile input: what the pipeline and the commands would do with it."""

from __future__ import annotations

import os
import tempfile
import zlib
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from itertools import islice
from pathlib import Path

import numpy as np

from benchmarks.fuzz import inputs, models, results, slides
from benchmarks.fuzz.executor import Case
from benchmarks.fuzz.job import use_job
from benchmarks.fuzz.mutate import Rng, pick
from wsi_pipeline.attempt import Attempt
from wsi_pipeline.batch import collect_slides, read_run
from wsi_pipeline.bundle import find_bundle
from wsi_pipeline.checkpoint import load_pickled, read_cerberus, read_torchvision
from wsi_pipeline.cohort import slide_states
from wsi_pipeline.describe import describe_file
from wsi_pipeline.errors import ModelBundleError
from wsi_pipeline.geometry import Box
from wsi_pipeline.job import SlideJob, finished_report, read_report
from wsi_pipeline.pipeline import PREVIEW_PX, TISSUE_MPP
from wsi_pipeline.slide import Slide
from wsi_pipeline.store import PredictionStore, open_maps
from wsi_pipeline.table import count_rows, read_centroids, read_metadata, read_objects
from wsi_pipeline.tiling import TileGrid
from wsi_pipeline.tissue import detect_tissue, read_mask

__all__ = ["TARGETS", "cases", "prepare"]

_WINDOWS = 6
"""Windows of a slide that a case reads."""
_BLOCK_PX = 1024
"""Pixels of maps that a case reads at once."""


@dataclass(frozen=True, kw_only=True)
class Target:
    """A kind of input."""

    make: Callable[[Path, Rng], str]
    """Writes a hostile input into a folder; returns what was done to it."""
    use: Callable[[Path], None]
    """Uses it; what is not one of our errors is a fault."""
    share: float
    """Of all cases."""


def cases(names: list[str], total: int, seed: int) -> list[Case]:
    """Return the cases of a campaign, shared out over targets.

    A case is a function of its target, its number and the seed alone.
    """
    weight = sum(TARGETS[name].share for name in names)
    found = []
    for name in names:
        found += [case(name, n, seed) for n in range(round(total * TARGETS[name].share / weight))]
    rest = total - len(found)
    found += [case(names[0], len(found) + n, seed) for n in range(rest)]
    return found[:total]


def case(name: str, number: int, seed: int) -> Case:
    """Return one case."""
    target = TARGETS[name]

    def make(folder: Path) -> str:
        rng = np.random.default_rng([seed, zlib.crc32(name.encode()), number])
        return target.make(folder, rng)

    return Case(target=name, number=number, make=make, use=target.use)


@cache
def prepare(kit: Path | None = None) -> None:
    """Make all good inputs, and run what is compiled when it is first used.

    Args:
        kit: folder of small damaged slides to start from, too.
    """
    global _kit
    inputs.masks()
    models.bundles()
    models.checkpoints()
    results.tables()
    results.maps()
    results.records()
    slides.prepare()
    _kit = slides.broken_seeds(kit) if kit is not None else ()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a.svs"
        path.write_bytes(slides.seeds()[0])
        _use_slide(Path(folder))
        _use_url(Path(folder))
        use_job(Path(folder))


_kit: tuple[bytes, ...] = ()


def _make_slide(folder: Path, rng: Rng) -> str:
    data, done = slides.break_slide(rng, _kit)
    name = pick(rng, ("a.svs", "a.svs", "a.tif", "a.ndpi", "a.scn", "a.bif", "a.dcm", "a.mrxs"))
    (folder / name).write_bytes(data)
    return f"{name}, {done}"


def _use_slide(folder: Path) -> None:
    path = next(folder.glob("a.*"))
    describe_file(str(path), mpp=0.5)
    _see(str(path), None)


def _use_url(folder: Path) -> None:
    _see(next(folder.glob("a.*")).as_uri(), 0.5)


def _see(name: str, mpp: float | None) -> None:
    """Open a slide, find its tissue and read windows as the pipeline does."""
    with Slide.open(name, mpp=mpp) as slide:
        size = slide.pixel_size.x, slide.pixel_size.y
        tissue = detect_tissue(*slide.thumbnail(TISSUE_MPP), size).including(slide.holes)
        grid = slide.working_grid(0.5)
        tiles = TileGrid.cover(grid, tile_px=64, halo_px=16, panel_px=256,
                               wanted=lambda box: tissue.touches(grid, box))  # fmt: skip
        boxes = [tile.read for tile in tiles.tiles[:_WINDOWS]]
        for window in islice(slide.read_windows(grid, boxes, threads=2), _WINDOWS):
            window.sum()
        for tile in tiles.tiles[:_WINDOWS]:
            slide.unreadable_share(grid, tile.write)
        extent_um = max(slide.size[0] * size[0], slide.size[1] * size[1])
        slide.thumbnail(max(extent_um / PREVIEW_PX, *size))


def _use_mask(folder: Path) -> None:
    mask = read_mask(folder / "mask.png", inputs.MASKED_SIZE)
    mask.area_mm2((0.5, 0.5))
    mask.digest  # noqa: B018 - computed when it is asked for


def _use_list(folder: Path) -> None:
    path = next(folder.glob("list.*"))
    for entry in collect_slides([str(path)], mask_dir=None):
        job = SlideJob(path=entry.path, slide_id=entry.slide_id, out=folder / "out",
                       model_name="m", model_digest="0",
                       mask=Path(entry.mask) if entry.mask else None)  # fmt: skip
        job.job_id  # noqa: B018
        # the rule that keeps results in their folder
        for inside in (job.objects_path, job.report_path, job.log_path, job.preview_path):
            if Path(os.path.normpath(inside)).parent.parent != folder / "out":
                raise AssertionError(f"{inside} lies elsewhere")


def _use_bundle(folder: Path) -> None:
    describe_file(str(folder / "bundle"))
    find_bundle(folder / "bundle").load_network()


def _use_checkpoint(folder: Path) -> None:
    path = folder / "weights.tar"
    load_pickled(path)
    with suppress(ModelBundleError):  # of the two kinds, it is one at most
        read_torchvision(path)
    read_cerberus(path, name="x")


def _use_table(folder: Path) -> None:
    path = folder / "a.parquet"
    describe_file(str(path))
    read_metadata(path)
    count_rows(path)
    read_centroids(path, kind="n")
    read_objects(path, kind="n", bbox=(0, 0, 10, 10))
    read_objects(folder)


def _use_maps(folder: Path) -> None:
    path = folder / "a.zarr"
    describe_file(str(path))
    store = PredictionStore.open(path)
    for key in store.keys:
        grid = store.head_grid(key.partition("/")[0])
        width, height = (min(side, _BLOCK_PX) for side in grid.size)
        store.read(key, Box(x=0, y=0, width=width, height=height))
    for array in open_maps(path).values():
        array[..., :_BLOCK_PX, :_BLOCK_PX].sum()  # what reads them later is dask, not we


def _use_records(folder: Path) -> None:
    out = folder / "out"
    for slide_id in ("a", "b"):
        job = SlideJob(path="", slide_id=slide_id, out=out, model_name="m", model_digest="0" * 64)
        report = read_report(job.report_path)
        if report is not None:
            report.reason, report.done  # noqa: B018
        finished_report(job)
        Attempt(job).close("interrupted")
    slide_states(out)
    read_run(out)


TARGETS = {
    "slide": Target(make=_make_slide, use=_use_slide, share=0.45),
    "job": Target(make=_make_slide, use=use_job, share=0.01),
    "url": Target(make=_make_slide, use=_use_url, share=0.06),
    "mask": Target(make=inputs.break_mask, use=_use_mask, share=0.08),
    "list": Target(make=inputs.break_list, use=_use_list, share=0.06),
    "bundle": Target(make=models.break_bundle, use=_use_bundle, share=0.08),
    "checkpoint": Target(make=models.break_checkpoint, use=_use_checkpoint, share=0.06),
    "table": Target(make=results.break_table, use=_use_table, share=0.08),
    "maps": Target(make=results.break_maps, use=_use_maps, share=0.06),
    "records": Target(make=results.break_records, use=_use_records, share=0.06),
}
"""By name, in the order in which they run."""
