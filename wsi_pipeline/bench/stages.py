"""The stages of the pipeline, each alone, and the least that each can cost.

=========  =====================================  ===========================================
stage      work                                   limit, on the same tiles
=========  =====================================  ===========================================
tissue     overview, and where the tissue is      decoding the overview's tiles of the file
read       windows of the tiles, into a batch     decoding the file's tiles under them, once
network    windows in memory to blocks of maps    the dense network's arithmetic at the rate of
                                                  a matrix product, or its pixels at the rate
                                                  of memory, whichever takes longer
maps       blocks to a sealed store on disk       compressing the store's chunks and writing
                                                  them, synced, one file each
objects    maps to the table                      listing the runs of pixels above a half
=========  =====================================  ===========================================

Works and limits use the same number of threads.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import cycle
from pathlib import Path
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from wsi_pipeline.bench.rates import dense_flops, matrix_rate, memory_rate
from wsi_pipeline.bench.subject import Subject
from wsi_pipeline.bench.timing import Clock, Limit, Stage, Stopwatch, in_threads
from wsi_pipeline.chunks import compress
from wsi_pipeline.committing import Writers
from wsi_pipeline.durable import publish_directory, remove_tree
from wsi_pipeline.filling import writers_beside
from wsi_pipeline.geometry import Box, PixelGrid
from wsi_pipeline.instances import extract_objects
from wsi_pipeline.instances.kernels import find_runs
from wsi_pipeline.pipeline import TISSUE_MPP
from wsi_pipeline.slide import Slide
from wsi_pipeline.store import PredictionBlock, PredictionStore
from wsi_pipeline.table import ObjectWriter
from wsi_pipeline.tissue import detect_tissue

__all__ = ["HeldWindows", "network_bytes", "stages_of"]

Pixels = NDArray[np.uint8]
Thing = TypeVar("Thing")

HELD_BYTES = 512 << 20
"""Windows in memory for the network; the tiles of a larger slide see them again."""
GROUP_BYTES = 64 << 20
"""Maps in memory at a time, where only what is done with them is timed."""
OVERVIEW_THREADS = 4
"""As a slide reads its overview."""
HALF = 128


def stages_of(subject: Subject) -> list[Stage]:
    """Return the stages in the order of the pipeline."""
    return [_tissue(subject), _read(subject), _network(subject), _maps(subject), _objects(subject)]


def _tissue(subject: Subject) -> Stage:
    slide = subject.slide
    grid = slide.working_grid(TISSUE_MPP)

    def work() -> None:
        detect_tissue(*slide.thumbnail(TISSUE_MPP), subject.pixel_size)

    def least() -> None:
        slide.decode(grid, [grid.box], threads=OVERVIEW_THREADS)

    return Stage(name="tissue", work=_seconds(work), limit=_least(_decoding(slide), least))


def _read(subject: Subject) -> Stage:
    slide, tiles = subject.slide, subject.tiles
    boxes = [tile.read for tile in tiles.tiles]
    threads = subject.predictor.workers
    batch = np.empty((tiles.read_px, tiles.read_px, 3), np.uint8)

    def work() -> None:
        for window in slide.read_windows(tiles.grid, boxes, threads=threads):
            batch[: window.shape[0], : window.shape[1]] = window

    def least() -> None:
        slide.decode(tiles.grid, boxes, threads=threads)

    return Stage(name="read", work=_seconds(work), limit=_least(_decoding(slide), least))


def _decoding(slide: Slide) -> str:
    how = "" if slide.reader == "tiff" else f" by {slide.reader}"
    return f"decoding each tile once{how}"


def _seconds(what: Callable[[], None]) -> Callable[[Clock], float]:
    """Time something of which every second counts."""

    def seconds(clock: Clock) -> float:
        begun = clock()
        what()
        return clock() - begun

    return seconds


def _least(name: str, what: Callable[[], None]) -> Callable[[Clock], Limit]:
    seconds = _seconds(what)
    return lambda clock: Limit(name=name, seconds=seconds(clock))


@dataclass(frozen=True)
class HeldWindows:
    """Windows of a slide in memory; reading costs nothing."""

    windows: tuple[Pixels, ...]
    """(S, S, 3), of the largest size that is asked for."""

    @classmethod
    def of(cls, subject: Subject) -> HeldWindows:
        """Read the windows of a subject's first tiles."""
        tiles = subject.tiles
        count = max(1, HELD_BYTES // (3 * tiles.read_px**2))
        side = tiles.read_px
        corners = [(tile.read.x, tile.read.y) for tile in tiles.tiles[:count]]
        boxes = [Box(x=x, y=y, width=side, height=side) for x, y in corners]
        windows = subject.slide.read_windows(tiles.grid, boxes, threads=subject.predictor.workers)
        return cls(tuple(window.copy() for window in windows))

    def read_windows(
        self,
        grid: PixelGrid,
        boxes: Sequence[Box],
        *,
        threads: int,
        stop: Callable[[], bool] = lambda: False,
    ) -> Iterator[Pixels]:
        """Yield a window for each box, in turn: as much of it as the box is large."""
        for box, window in zip(boxes, cycle(self.windows), strict=False):
            yield window[: box.height, : box.width]


def _network(subject: Subject) -> Stage:
    predictor, tiles = subject.predictor, subject.tiles
    held = HeldWindows.of(subject)
    sizes = [tile.read.size for tile in tiles.tiles]
    flops = dense_flops(predictor.spec, sizes, margin_px=predictor.margin_px)

    def work() -> None:
        for _ in predictor.predict(held, tiles):
            pass

    def limit(clock: Clock) -> Limit:
        memory = network_bytes(subject) / memory_rate(predictor.device, clock=clock)
        arithmetic = 0.0
        if flops:
            rate = matrix_rate(predictor.device, predictor.precision, clock=clock)
            arithmetic = flops / rate
        if memory > arithmetic:
            return Limit(name="copying pixels and maps in memory", seconds=memory)
        return Limit(name="dense FLOPs at the matrix rate", seconds=arithmetic)

    return Stage(name="network", work=_seconds(work), limit=limit)


def network_bytes(subject: Subject) -> int:
    """Return the bytes that must move once: windows in, maps of what is predicted out."""
    tiles, total = subject.tiles, 0
    for tile in tiles.tiles:
        total += 3 * tile.read.area
        for key, head in subject.predictor.spec.maps.items():
            channels = len(head.prob_channels) if key.endswith("/prob") else 1
            total += channels * tile.predicted.coarsen(head.stride).area
    return total


def _maps(subject: Subject) -> Stage:
    folder, threads = subject.folder / "maps", writers_beside(subject.predictor.device)

    def work(clock: Clock) -> float:
        remove_tree(folder)
        folder.mkdir()
        watch = Stopwatch(clock)
        with watch.running():
            store = PredictionStore.create(
                folder / "maps.zarr",
                spec=subject.maps.spec,
                tiles=subject.tiles,
                pixel_size=subject.pixel_size,
                made={"by": "bench"},
            )
        for group in _groups(_blocks(subject), _block_bytes):
            # As fill_store does; no block of a group is on its way when the watch stops.
            with watch.running(), Writers(store.put, store.commit, threads=threads) as writers:
                for block in group:
                    writers.hand(block)
        with watch.running():
            store.seal()
        remove_tree(folder)
        return watch.seconds

    return Stage(name="maps", work=work, limit=partial(_raw_writes, subject))


def _blocks(subject: Subject) -> Iterator[PredictionBlock]:
    """Yield the blocks of the finished maps again."""
    maps = subject.maps
    for tile in subject.tiles.tiles:
        arrays = {
            key: maps.read(key, tile.write.coarsen(head.stride))
            for key, head in maps.spec.maps.items()
        }
        yield PredictionBlock(tile=tile, arrays=arrays)


def _raw_writes(subject: Subject, clock: Clock) -> Limit:
    """Compress and write what the sealed store keeps, one file a chunk, and sync it."""
    beside, final = subject.folder / "raw.unsynced", subject.folder / "raw"
    remove_tree(beside)
    beside.mkdir()
    watch = Stopwatch(clock)
    count = 0
    for group in _groups(subject.maps.stored_chunks(), _bytes):
        files = [(beside / str(count + number), chunk) for number, chunk in enumerate(group)]
        count += len(files)
        with watch.running():
            in_threads(_write_compressed, files, writers_beside(subject.predictor.device))
    with watch.running():
        publish_directory(beside, final)
    remove_tree(final)
    return Limit(name="compressing and writing the chunks", seconds=watch.seconds)


def _write_compressed(file: tuple[Path, Pixels]) -> None:
    path, chunk = file
    path.write_bytes(compress(chunk))


def _objects(subject: Subject) -> Stage:
    path = subject.folder / "objects.parquet"

    def work() -> None:
        # Opened anew: chunks that were decoded before are not at hand.
        store = PredictionStore.open(subject.maps.path)
        extraction = extract_objects(store, slide_id=subject.job.slide_id, workers=subject.workers)
        with ObjectWriter(path, metadata={}, pixel_size=store.pixel_size) as writer:
            for batch in extraction.batches:
                writer.write(batch)

    return Stage(name="objects", work=_seconds(work), limit=partial(_bare_scan, subject))


def _bare_scan(subject: Subject, clock: Clock) -> Limit:
    """List the runs above a half in the first channel of each head that yields objects."""
    watch = Stopwatch(clock)
    for group in _groups(_object_maps(subject), _bytes):
        with watch.running():
            in_threads(_scan, group, subject.workers)
    return Limit(name="one scan of the maps", seconds=watch.seconds)


def _object_maps(subject: Subject) -> Iterator[Pixels]:
    maps = subject.maps
    for head in maps.spec.object_heads:
        for tile in subject.tiles.tiles:
            yield maps.read(f"{head.name}/prob", tile.write.coarsen(head.stride))[0].copy()


def _scan(pixels: Pixels) -> None:
    find_runs((pixels >= HALF).view(np.uint8))


def _groups(things: Iterator[Thing], size: Callable[[Thing], int]) -> Iterator[list[Thing]]:
    """Gather things until they fill the memory that a group may have."""
    group: list[Thing] = []
    for thing in things:
        group.append(thing)
        if sum(map(size, group)) >= GROUP_BYTES:
            yield group
            group = []
    if group:
        yield group


def _bytes(pixels: Pixels) -> int:
    return pixels.nbytes


def _block_bytes(block: PredictionBlock) -> int:
    return sum(map(_bytes, block.arrays.values()))
