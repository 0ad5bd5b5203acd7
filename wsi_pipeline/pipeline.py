"""The method: from a slide to its maps, and from the maps to its tables.

::

    SlideJob -> Slide -> TissueMask -> TileGrid -> PredictionBlock* -> PredictionStore
                                                                            |
                       RunReport <- preview <- tissue table <- objects table

:func:`predict` needs the slide and a predictor; :func:`polygonize` needs no network and
imports none. Between them lies the sealed store.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from wsi_pipeline.attempt import Attempt
from wsi_pipeline.durable import remove_tree
from wsi_pipeline.errors import Interrupted, StoreError
from wsi_pipeline.geometry import PixelGrid
from wsi_pipeline.instances import extract_objects, outline_polygons
from wsi_pipeline.job import SlideJob, versions
from wsi_pipeline.preview import draw_preview, write_preview
from wsi_pipeline.slide import PixelSize, Slide
from wsi_pipeline.spec import AnchorRules, ModelSpec, PeakRules
from wsi_pipeline.store import PredictionBlock, PredictionStore
from wsi_pipeline.table import ObjectWriter, read_centroids, read_objects, write_tissue
from wsi_pipeline.tiling import PANEL_PX, TileGrid
from wsi_pipeline.tissue import TissueMask, detect_tissue, read_mask

__all__ = ["Predicted", "Predictor", "polygonize", "predict"]

TISSUE_MPP = 8.0
"""Pixel size of the thumbnail on which tissue is found, in micrometres."""
PREVIEW_PX = 1600
"""Long side of the picture in the preview."""
WRITES_PENDING = 2
"""Blocks that may wait for the disk before the network has to wait too."""

Advance = Callable[[str, int, int], None]
"""Told the stage, what is done of it, and how much there is."""
T = TypeVar("T")


class Predictor(Protocol):
    """Whatever turns the tiles of a slide into blocks of maps."""

    spec: ModelSpec
    device: str
    precision: str
    tile_px: int
    halo_px: int
    canvas_bytes: int
    extractors: int

    def predict(
        self,
        slide: Slide,
        tiles: TileGrid,
        *,
        stop: Callable[[], bool],
        warn: Callable[[str, str], None],
    ) -> Iterator[PredictionBlock]:
        """Yield one block a tile, in order; a block keeps its arrays. End when asked to stop.

        ``warn`` is told the code and the message of what the user should know.
        """
        ...


@dataclass(frozen=True, kw_only=True)
class Predicted:
    """A slide whose maps are sealed, and what the tables need to know of it."""

    store: PredictionStore
    """The maps."""
    tissue: TissueMask
    """Where the tissue is."""
    picture: NDArray[np.uint8]
    """(H, W, 3) the whole slide, for the preview."""
    picture_grid: PixelGrid
    """Where its pixels lie."""
    size: tuple[int, int]
    """Width and height of level 0."""
    pixel_size: PixelSize
    """Micrometres per level-0 pixel."""


def predict(
    attempt: Attempt, predictor: Predictor, *, stop: Callable[[], bool], advance: Advance
) -> Predicted:
    """Open a slide, find its tissue, and fill and seal its store of maps.

    A store that the same job left unfinished goes on from its missing blocks; one that
    is sealed already is used as it is.

    Raises:
        WsiPipelineError: the slide, its mask or the disk is not usable.
        Interrupted: ``stop`` said so; finished blocks are kept.
    """
    job, report = attempt.job, attempt.report
    report.device, report.precision = predictor.device, predictor.precision
    with attempt.stage("open"):
        slide = Slide.open(job.path, mpp=job.mpp)
    with slide:
        size = slide.pixel_size
        report.mpp = {"x": size.x, "y": size.y, "source": size.source}
        with attempt.stage("tissue"):
            if job.mask is not None:
                tissue = read_mask(job.mask, slide.size)
            else:
                tissue = detect_tissue(*slide.thumbnail(TISSUE_MPP), (size.x, size.y))
                if slide.holes:
                    message = "part of the overview cannot be decoded; its place counts as tissue"
                    attempt.warn("corrupt_region", message)
                    tissue = tissue.including(slide.holes)
            report.tissue_mm2 = round(tissue.area_mm2((size.x, size.y)), 6)
            if report.tissue_mm2 == 0:
                attempt.warn("no_tissue", "no tissue was found; the tables are empty")
        with attempt.stage("predict"):
            store = _fill_store(attempt, slide, tissue, predictor, stop, advance)
        _report_holes(attempt, store)
        with attempt.stage("write"):
            extent_um = max(slide.size[0] * size.x, slide.size[1] * size.y)
            picture, picture_grid = slide.thumbnail(max(extent_um / PREVIEW_PX, size.x, size.y))
        return Predicted(
            store=store,
            tissue=tissue,
            picture=picture,
            picture_grid=picture_grid,
            size=slide.size,
            pixel_size=size,
        )


def polygonize(
    attempt: Attempt,
    predicted: Predicted,
    *,
    workers: int,
    stop: Callable[[], bool],
    advance: Advance,
) -> None:
    """Turn sealed maps into the slide's tables and preview.

    Raises:
        WsiPipelineError: the maps are not usable or the disk is full.
        Interrupted: ``stop`` said so.
    """
    job, report, store = attempt.job, attempt.report, predicted.store
    metadata = _metadata(attempt, predicted)
    with attempt.stage("polygonize"):
        extraction = extract_objects(store, slide_id=job.slide_id, workers=workers, stop=stop)
        with ObjectWriter(
            job.objects_path, metadata=metadata, pixel_size=store.pixel_size
        ) as writer:
            for batch in _timed(extraction.batches, attempt, advance):
                writer.write(batch)
            metadata["truncated"] = report.truncated = extraction.truncated
            metadata["oversized"] = extraction.oversized
            report.counts = {h.object_kind or h.name: 0 for h in store.spec.object_heads}
            report.counts.update(writer.counts)
    if extraction.oversized:
        attempt.log("oversized", level="warning", objects=extraction.oversized)
    with attempt.stage("write"):
        _write_tissue(attempt, predicted, metadata)
        _write_preview(attempt, predicted)
        for path in (job.objects_path, job.tissue_path, job.preview_path):
            attempt.add_output(path)
        if job.keep_maps:
            attempt.add_output(job.maps_path)
        else:
            remove_tree(job.maps_path)


def _fill_store(
    attempt: Attempt,
    slide: Slide,
    tissue: TissueMask,
    predictor: Predictor,
    stop: Callable[[], bool],
    advance: Advance,
) -> PredictionStore:
    grid = slide.working_grid(predictor.spec.mpp)
    tiles = TileGrid.cover(
        grid,
        tile_px=predictor.tile_px,
        halo_px=predictor.halo_px,
        panel_px=_panel_px(slide, grid, predictor),
        wanted=lambda box: tissue.touches(grid, box),
    )
    job = attempt.job
    identity = _maps_identity(job, tissue, predictor)
    sealed = _sealed_store(job.maps_path, identity)
    if sealed is not None:
        return sealed
    store = PredictionStore.create(
        job.maps_path,
        spec=predictor.spec,
        tiles=tiles,
        pixel_size=(slide.pixel_size.x, slide.pixel_size.y),
        identity=identity,
    )
    missing = store.missing(tiles)
    total = len(tiles.tiles)
    written = total - len(missing.tiles)
    advance("predict", written, total)

    def write(block: PredictionBlock) -> None:
        readable = 1 - slide.unreadable_share(grid, block.tile.write)
        store.write(_clip(block, grid, tissue, predictor.spec), readable=readable)

    # One writer, one block at a time: it works while the network does.
    with ThreadPoolExecutor(1, thread_name_prefix="writer") as writer:
        pending: deque[Future[None]] = deque()
        try:
            for block in predictor.predict(slide, missing, stop=stop, warn=attempt.warn):
                pending.append(writer.submit(write, block))
                while len(pending) > WRITES_PENDING:
                    pending.popleft().result()
                written += 1
                attempt.predicted_px += block.tile.write.area
                advance("predict", written, total)
        finally:
            for future in pending:
                future.result()
    if stop():
        raise Interrupted(f"stopped after {written} of {total} blocks")
    return store.seal(workers=predictor.extractors)


def _panel_px(slide: Slide, grid: PixelGrid, predictor: Predictor) -> int:
    """Return the width of columns of tiles whose canvases fit into the predictor's bytes."""
    margin, panel = 2 * predictor.halo_px, PANEL_PX
    side = predictor.tile_px + margin
    while panel > predictor.tile_px:
        if slide.band_bytes(grid, (panel + margin, side)) <= predictor.canvas_bytes:
            break
        panel -= predictor.tile_px
    return panel


def _maps_identity(job: SlideJob, tissue: TissueMask, predictor: Predictor) -> str:
    """Name everything that decides the bytes of the maps."""
    known = versions()
    parts = [
        job.job_id,
        predictor.device.partition(":")[0],
        predictor.precision,
        f"tile {predictor.tile_px}",
        f"tissue {tissue.digest[:16]}",
        *(f"{name} {known[name]}" for name in ("wsi-pipeline", "torch") if name in known),
    ]
    return ", ".join(parts)


def _sealed_store(path: Path, identity: str) -> PredictionStore | None:
    try:
        store = PredictionStore.open(path)
    except StoreError:
        return None
    return store if store.meta["identity"] == identity else None


def _clip(
    block: PredictionBlock, grid: PixelGrid, tissue: TissueMask, spec: ModelSpec
) -> PredictionBlock:
    """Blank what lies beyond the tissue, so that results do not depend on the tile size."""
    keep = {
        head.stride: tissue.window(grid.coarsen(head.stride), block.tile.write.coarsen(head.stride))
        for head in spec.heads
    }
    maps = spec.maps
    arrays = {key: pixels * keep[maps[key].stride] for key, pixels in block.arrays.items()}
    return PredictionBlock(tile=block.tile, arrays=arrays)


def _report_holes(attempt: Attempt, store: PredictionStore) -> None:
    fraction = store.unreadable_fraction()
    attempt.report.unreadable_fraction = round(fraction, 6)
    if fraction > 0:
        attempt.warn(
            "corrupt_region",
            f"{fraction:.2%} of the predicted area cannot be decoded and counts as glass",
        )


def _timed(batches: Iterable[T], attempt: Attempt, advance: Advance) -> Iterator[T]:
    """Pass batches on; book the time the consumer takes for them on "write"."""
    for number, batch in enumerate(batches, start=1):
        advance("polygonize", number, 0)
        begun = time.perf_counter()
        yield batch
        spent = time.perf_counter() - begun
        attempt.add_seconds("write", spent)
        attempt.add_seconds("polygonize", -spent)


def _metadata(attempt: Attempt, predicted: Predicted) -> dict[str, Any]:
    """Return the provenance kept inside the tables: no times, no hosts, no folders."""
    job, store = attempt.job, predicted.store
    size = predicted.pixel_size
    return {
        "slide": {
            "name": Path(job.path).name,
            "slide_id": job.slide_id,
            "width": predicted.size[0],
            "height": predicted.size[1],
            "mpp": {"x": size.x, "y": size.y, "source": size.source},
        },
        "model": {
            "name": job.model_name,
            "sha256": job.model_digest,
            "classes": {head.name: list(head.classes) for head in store.spec.heads if head.classes},
        },
        "options": {
            "device": attempt.report.device,
            "precision": attempt.report.precision,
            "tile_px": store.tile_px,
            "working_mpp": [
                spacing * mpp
                for spacing, mpp in zip(store.grid.spacing, store.pixel_size, strict=True)
            ],
            "mask": predicted.tissue.source,
        },
        "versions": versions(),
    }


def _write_tissue(attempt: Attempt, predicted: Predicted, metadata: dict[str, Any]) -> None:
    job, store, tissue = attempt.job, predicted.store, predicted.tissue
    regions: list[tuple[str, bytes, float]] = []
    head = store.spec.patch_head
    if head is not None:
        grid = store.head_grid(head.name)
        classes = store.read(f"{head.name}/class", grid.box)
        inside = tissue.window(grid, grid.box)
        labels = np.where(inside, classes.astype(np.int32) + 1, 0)
        regions = [
            (head.classes[value - 1], wkb, pixels * _pixel_um2(grid, store))
            for value, wkb, pixels in outline_polygons(labels, grid)
        ]
    write_tissue(
        job.tissue_path,
        slide_id=job.slide_id,
        outline=[
            (wkb, pixels * _pixel_um2(tissue.grid, store))
            for _, wkb, pixels in outline_polygons(tissue.mask, tissue.grid)
        ],
        regions=regions,
        pixel_size=store.pixel_size,
        metadata=metadata,
    )


def _pixel_um2(grid: PixelGrid, store: PredictionStore) -> float:
    return grid.spacing[0] * grid.spacing[1] * store.pixel_size[0] * store.pixel_size[1]


def _write_preview(attempt: Attempt, predicted: Predicted) -> None:
    """Draw large objects as outlines and the small ones as a density, from the table."""
    job, heads = attempt.job, predicted.store.spec.object_heads
    # Boxes are few beside nuclei, and better drawn one by one; alone they are the density.
    by_rules = {type(h.rules): h.object_kind for h in reversed(heads)}
    small = by_rules.get(AnchorRules) or by_rules.get(PeakRules)
    large = [h.object_kind for h in heads if h.object_kind and h.object_kind != small]
    points = np.zeros((0, 2))
    if small is not None:
        points = read_centroids(job.objects_path, kind=small)
    image = draw_preview(
        predicted.picture,
        predicted.picture_grid,
        tissue=predicted.tissue,
        polygons={kind: _rings(job.objects_path, kind) for kind in large},
        points=points,
        pixel_size=predicted.store.pixel_size,
        title=job.slide_id,
        counts=attempt.report.counts,
    )
    write_preview(job.preview_path, image)


def _rings(path: Path, kind: str) -> list[NDArray[np.float64]]:
    geometries = read_objects(path, kind=kind, columns=["geometry"]).geometry
    return [np.asarray(polygon.exterior.coords) for polygon in geometries]
