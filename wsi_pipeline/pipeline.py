"""The method: from a slide to its maps, and from the maps to its tables.

::

    SlideJob -> Slide -> TissueMask -> TileGrid -> PredictionBlock* -> PredictionStore
                                                                            |
                       RunReport <- preview <- tissue table <- objects table

:func:`prepare` opens a slide and begins to decode it, :func:`predict` hands it to the network,
:func:`polygonize` needs no network and imports none. Between the last two lies the store. On a
device of its own the network leaves the processor free: objects are drafted from the blocks as
they come, and the next slide is prepared meanwhile.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, closing, contextmanager, nullcontext
from dataclasses import dataclass
from types import TracebackType
from typing import TypeVar

from wsi_pipeline.attempt import Attempt
from wsi_pipeline.drafting import ArrivingMaps, Draft
from wsi_pipeline.durable import remove_tree
from wsi_pipeline.filling import (
    Feed,
    Predictor,
    fill_store,
    lay_tiles,
    open_store,
    sealed_store,
)
from wsi_pipeline.instances import extract_objects
from wsi_pipeline.results import Picture, Predicted, provenance, save_preview, save_tissue
from wsi_pipeline.slide import Slide
from wsi_pipeline.store import PredictionStore
from wsi_pipeline.table import ObjectWriter
from wsi_pipeline.tiling import TileGrid
from wsi_pipeline.tissue import TissueMask, detect_tissue, read_mask
from wsi_pipeline.unchanged import unchanged

__all__ = ["Predicted", "Predictor", "Prepared", "polygonize", "predict", "prepare", "reopen"]

TISSUE_MPP = 8.0
"""Pixel size of the thumbnail on which tissue is found, in micrometres."""
PREVIEW_PX = 1600
"""Long side of the picture in the preview."""
Advance = Callable[[str, int, int], None]
"""Told the stage, what is done of it, and how much there is."""
T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """A slide that is open, whose tissue is found, and whose first windows are being decoded.

    A context manager: leaving it ends its threads and closes the slide.

    Raises:
        SlideError, MaskError: on leaving it, the slide or its mask was changed meanwhile.
    """

    slide: Slide
    """Open."""
    tissue: TissueMask
    """Where the tissue is."""
    picture: Picture
    """The whole slide, for the preview."""
    tiles: TileGrid
    """What the network is to see."""
    missing: TileGrid
    """Those of them that have no block yet: what is decoded."""
    store: PredictionStore | None
    """Their maps; None: they are opened when the slide is predicted."""
    feed: Feed | None
    """Their batches, as they are decoded; None where the predictor reads by itself."""
    held: ExitStack
    """What is open."""

    def __enter__(self) -> Prepared:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> bool | None:
        return self.held.__exit__(kind, error, trace)


def prepare(attempt: Attempt, predictor: Predictor, *, anew: bool = False) -> Prepared:
    """Open a slide, find its tissue, lay its tiles, and begin to decode their windows.

    A store that the same job left unfinished goes on from its missing blocks; one that
    is sealed already is used as it is.

    Args:
        attempt: the try at the slide.
        predictor: the network, which is not used yet.
        anew: whether the maps that there are will be removed before the slide is predicted;
            they are not looked at then.

    Raises:
        WsiPipelineError: the slide, its mask or the disk is not usable.
    """
    job, report = attempt.job, attempt.report
    report.device, report.precision = predictor.device, predictor.precision
    with ExitStack() as held:
        slide, tissue = held.enter_context(_opened(attempt))
        with attempt.stage("predict"):
            tiles = lay_tiles(slide, tissue, predictor)
            store = None if anew else open_store(job, slide, tissue, tiles, predictor)
            missing = tiles if store is None else store.missing(tiles)
            feed = predictor.begin(slide, missing)
            if feed is not None:
                held.enter_context(closing(feed))
        with attempt.stage("write"):
            picture = _take_picture(slide)
        return Prepared(
            slide=slide,
            tissue=tissue,
            picture=picture,
            tiles=tiles,
            missing=missing,
            store=store,
            feed=feed,
            held=held.pop_all(),
        )


def predict(
    attempt: Attempt,
    prepared: Prepared,
    predictor: Predictor,
    *,
    workers: int,
    beside: bool,
    stop: Callable[[], bool],
    advance: Advance,
) -> Predicted:
    """Fill the store of a slide with what the network makes of its tiles.

    Args:
        attempt: the try at the slide.
        prepared: the slide; stays open.
        predictor: the network.
        workers: threads that extract objects.
        beside: whether they begin while the network works.
        stop: asked before each batch.
        advance: told how far it is.

    Raises:
        WsiPipelineError: the slide, its mask or the disk is not usable.
        Interrupted: ``stop`` said so; finished blocks are kept.
    """
    slide, tissue, tiles = prepared.slide, prepared.tissue, prepared.tiles
    with attempt.stage("predict"):
        store = prepared.store or open_store(attempt.job, slide, tissue, tiles, predictor)
        missing = store.missing(tiles)
        feed = prepared.feed
        if feed is not None and missing != prepared.missing:
            feed.close()  # it reads other windows
            feed = None
        maps = ArrivingMaps(store, missing)
        draft = _draft(attempt, maps, workers=workers, stop=stop)
        done, total = len(tiles.tiles) - len(missing.tiles), len(tiles.tiles)
        attempt.log("blocks", done=done, total=total)
        advance("predict", done, total)
        filling = fill_store(
            store,
            missing,
            slide=slide,
            tissue=tissue,
            predictor=predictor,
            feed=feed,
            stop=stop,
            allowed=attempt.require_ours,
            wrote=maps.arrived,
            warn=attempt.warn,
        )
        with draft.beside() if beside else nullcontext():
            with closing(filling), _measured(attempt, predictor):
                for number, tile in enumerate(filling, start=done + 1):
                    attempt.predicted_px += tile.predicted.area
                    advance("predict", number, total)
            _report_holes(attempt, store)
        return _predicted(slide, tissue, prepared.picture, store, draft)


def reopen(attempt: Attempt, *, workers: int, stop: Callable[[], bool]) -> Predicted:
    """Open a slide whose maps another run has completed, by whatever device; needs no network.

    Args:
        attempt: the try at the slide.
        workers: threads that extract objects.
        stop: asked now and then.

    Raises:
        StoreError: there are no complete maps of this very job.
        WsiPipelineError: the slide or its mask is not usable.
    """
    report = attempt.report
    with _opened(attempt) as (slide, tissue), attempt.stage("predict"):
        store = sealed_store(attempt.job, tissue)
        made = store.meta["made"]
        report.device, report.precision = made["device"], made["precision"]
        none = TileGrid(
            grid=store.grid, tile_px=store.tile_px, halo_px=store.meta["halo_px"], tiles=()
        )
        draft = _draft(attempt, ArrivingMaps(store, none), workers=workers, stop=stop)
        _report_holes(attempt, store)
        with attempt.stage("write"):
            picture = _take_picture(slide)
        return _predicted(slide, tissue, picture, store, draft)


def polygonize(attempt: Attempt, predicted: Predicted, *, advance: Advance) -> None:
    """Turn complete maps into the slide's tables and preview, and seal them.

    Raises:
        WsiPipelineError: the maps are not usable or the disk is full.
        Interrupted: ``stop`` said so.
    """
    job, report, objects = attempt.job, attempt.report, predicted.draft.extraction
    with attempt.stage("write"), closing(predicted.draft), ExitStack() as stack:
        predicted.store.require_there()
        metadata = provenance(attempt, predicted)
        pixel_size = predicted.store.pixel_size
        table = ObjectWriter(job.objects_path, metadata=metadata, pixel_size=pixel_size)
        stack.enter_context(table)
        with attempt.stage("polygonize"):
            attempt.add_seconds("polygonize", predicted.draft.finish())
            for batch in _timed(objects.batches, attempt, advance):
                table.write(batch)
        metadata["truncated"] = report.truncated = objects.truncated
        metadata["oversized"] = objects.oversized
        report.counts = {h.object_kind or h.name: 0 for h in predicted.store.spec.object_heads}
        report.counts.update(table.counts)
        attempt.require_ours()
        # The table appears when this block ends: after the maps, so that it never stands alone.
        store = predicted.store.seal()
    if objects.oversized:
        attempt.log("oversized", level="warning", objects=objects.oversized)
    with attempt.stage("write"):
        save_tissue(attempt, predicted, store, metadata)
        save_preview(attempt, predicted)
        for path in (job.objects_path, job.tissue_path, job.preview_path):
            attempt.add_output(path)
        if job.keep_maps:
            attempt.add_output(job.maps_path)
        else:
            remove_tree(job.maps_path)


@contextmanager
def _opened(attempt: Attempt) -> Iterator[tuple[Slide, TissueMask]]:
    """Open the slide of an attempt and find its tissue."""
    job = attempt.job
    with unchanged(job) as opened, ExitStack() as stack:
        with attempt.stage("open"):
            slide = stack.enter_context(Slide.open(job.path, mpp=job.mpp))
            opened()
        size = slide.pixel_size
        attempt.report.mpp = {"x": size.x, "y": size.y, "source": size.source}
        with attempt.stage("tissue"):
            tissue = _find_tissue(attempt, slide)
        yield slide, tissue


@contextmanager
def _measured(attempt: Attempt, predictor: Predictor) -> Iterator[None]:
    """Note how long the network runs, however that ends."""
    # What stands in for a network need not measure itself.
    before: float | None = getattr(predictor, "busy_s", None)
    try:
        yield
    finally:
        if before is not None:
            busy_s = getattr(predictor, "busy_s", before) - before
            attempt.report.device_busy_s = round(busy_s, 3)


def _draft(
    attempt: Attempt, maps: ArrivingMaps, *, workers: int, stop: Callable[[], bool]
) -> Draft:
    objects = extract_objects(
        maps,
        slide_id=attempt.job.slide_id,
        workers=workers,
        stop=lambda: stop() or maps.given_up,
        scratch=attempt.job.objects_path.parent,
    )
    return Draft(objects, maps, workers=workers)


def _predicted(
    slide: Slide, tissue: TissueMask, picture: Picture, store: PredictionStore, draft: Draft
) -> Predicted:
    return Predicted(
        store=store,
        draft=draft,
        tissue=tissue,
        picture=picture,
        size=slide.size,
        pixel_size=slide.pixel_size,
    )


def _take_picture(slide: Slide) -> Picture:
    size = slide.pixel_size
    extent_um = max(slide.size[0] * size.x, slide.size[1] * size.y)
    return slide.thumbnail(max(extent_um / PREVIEW_PX, size.x, size.y))


def _find_tissue(attempt: Attempt, slide: Slide) -> TissueMask:
    size = (slide.pixel_size.x, slide.pixel_size.y)
    if attempt.job.mask is not None:
        tissue = read_mask(attempt.job.mask, slide.size)
    else:
        tissue = detect_tissue(*slide.thumbnail(TISSUE_MPP), size)
        if slide.holes:
            message = "part of the overview cannot be decoded; its place counts as tissue"
            attempt.warn("corrupt_region", message)
            tissue = tissue.including(slide.holes)
    attempt.report.tissue_mm2 = round(tissue.area_mm2(size), 6)
    if attempt.report.tissue_mm2 == 0:
        attempt.warn("no_tissue", "no tissue was found; the tables are empty")
    return tissue


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
