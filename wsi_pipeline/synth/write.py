"""A synthetic slide on disk: blocks drawn by threads, written in order by one.

A block is 1024 x 1024 pixels: sixteen tiles of level 0, exactly one tile of level 1 and a
sixteenth of a side of a tile of level 2. Only a few blocks, and one row of tiles of level
2, are held in memory whatever the slide's size.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, cast

import imagecodecs
import numpy as np
from numpy.typing import NDArray

from wsi_pipeline.compiled import compiled
from wsi_pipeline.durable import durable_file
from wsi_pipeline.geometry import Box
from wsi_pipeline.synth.tiff import BigTiff, Page
from wsi_pipeline.synth.truth import TruthPart, TruthWriter, make_truth
from wsi_pipeline.synth.world import World

__all__ = ["write_slide"]

Compression = Literal["jpeg", "jpeg2000"]

_TILE = 256
_BLOCK = 1024
_QUALITY = 85
_TAGS = {"jpeg": 7, "jpeg2000": 33005}


@dataclass(frozen=True, kw_only=True, slots=True)
class _Block:
    """One finished block."""

    box: Box
    tiles: dict[tuple[int, int], bytes]
    """Encoded tiles of level 0 by (column, row)."""
    reduced: bytes
    """The encoded tile of level 1."""
    small: NDArray[np.uint8]
    """The block at level 2, ``(64, 64, 3)``."""
    truth: TruthPart | None


def write_slide(
    path: Path,
    *,
    width: int,
    height: int,
    mpp: float = 0.25,
    seed: int = 0,
    compression: Compression = "jpeg",
    truth: bool = True,
    threads: int | None = None,
) -> Path | None:
    """Write a synthetic H&E slide of colorectal mucosa that opens as an Aperio SVS.

    The tissue is defined in micrometres: another ``mpp`` shows the same world at another
    sampling. The files' bytes are a function of the arguments, ``threads`` excepted.

    Args:
        path: The slide to write.
        width: Pixels of level 0.
        height: Pixels of level 0.
        mpp: Micrometres per pixel of level 0, 0.05-5.
        seed: Which world, not negative.
        compression: Of the tiles: JPEG (RGB, 4:4:4) or JPEG 2000 (Aperio 33005, RGB).
        truth: Also write ``<stem>.truth.parquet`` beside: the polygon, in level-0 pixels,
            of every nucleus, gland and lumen, clipped to the slide.
        threads: Threads that draw; by default as many as the machine has, at most 8.

    Returns:
        The path of the truth, None where it was not asked for.

    Raises:
        ValueError: An argument is out of range.
        DiskFullError: No space is left.
    """
    _check(width, height, mpp, seed, compression, threads)
    path = Path(path)
    beside = path.with_suffix(".truth.parquet")
    world = World.make(seed=seed, mpp=mpp, size=(width, height))
    painter = _Painter(world, (width, height), compression, truth=truth)
    with ExitStack() as stack:
        parquet = None
        if truth:
            place = stack.enter_context(durable_file(beside))
            parquet = stack.enter_context(TruthWriter(place))
        stream = stack.enter_context(open(stack.enter_context(durable_file(path)), "wb"))
        file = BigTiff(stream)
        pages = painter.pages()
        workers = threads or min(8, os.cpu_count() or 1)
        _assemble(painter, file, pages, parquet, workers)
        file.finish(pages)
    return beside if truth else None


def _check(
    width: int, height: int, mpp: float, seed: int, compression: str, threads: int | None
) -> None:
    if width < _TILE or height < _TILE:
        msg = f"a synthetic slide has at least {_TILE} pixels a side, not {width} x {height}"
        raise ValueError(msg)
    if not 0.05 <= mpp <= 5.0:
        msg = f"the pixel size must be 0.05-5 micrometres, not {mpp}"
        raise ValueError(msg)
    if not 0 <= seed < 2**31:
        msg = f"the seed must be a whole number from 0 to {2**31 - 1}, not {seed}"
        raise ValueError(msg)
    if compression not in _TAGS:
        msg = f"the compression must be one of {', '.join(_TAGS)}, not {compression!r}"
        raise ValueError(msg)
    if threads is not None and threads < 1:
        msg = f"at least one thread is needed, not {threads}"
        raise ValueError(msg)


class _Painter:
    """Draws and encodes the blocks of one slide."""

    def __init__(
        self, world: World, size: tuple[int, int], compression: Compression, *, truth: bool
    ) -> None:
        self.size = size
        self._world = world
        self._compression = compression
        self._truth = truth
        # Bare glass repeats with the period of a tile, so it is drawn and encoded once;
        # far above the slide there is neither tissue nor ink.
        glass = world.draw(Box(x=0, y=-1000 * _TILE, width=_TILE, height=_TILE), None)
        pale = _shrink(np.tile(glass, (4, 4, 1)))
        self._glass = self.encode(glass), self.encode(pale), _shrink(pale)

    @property
    def boxes(self) -> Iterator[Box]:
        """The blocks, row by row, cut at the last row and column of tiles."""
        right, bottom = (-(-side // _TILE) * _TILE for side in self.size)
        for y in range(0, bottom, _BLOCK):
            for x in range(0, right, _BLOCK):
                yield Box.from_edges(x, y, min(x + _BLOCK, right), min(y + _BLOCK, bottom))

    def pages(self) -> list[Page]:
        """Return the directories: base, thumbnail, and the two lower levels."""
        width, height = self.size
        mpp = self._world.mpp
        head = "Aperio Image Library (synthetic)\r\n"
        name = "JPEG/RGB" if self._compression == "jpeg" else "J2K/RGB"
        power = f"{10.0 / mpp:.4g}"
        facts = f"|AppMag = {power}|MPP = {mpp:.6g}|Seed = {self._world.seed}"
        tag = _TAGS[self._compression]
        tiled = f"{width}x{height} [0,0 {width}x{height}] ({_TILE}x{_TILE})"
        pages = []
        for factor in (1, 4, 64, 16):
            size = (max(width // factor, 1), max(height // factor, 1))
            thumbnail = factor == 64
            smaller = "" if factor == 1 else f" -> {size[0]}x{size[1]}"
            text = f"{head}{tiled}{smaller} {name} Q={_QUALITY}{facts}"
            if thumbnail:
                text = f"{head}{width}x{height}{smaller} - {facts}"
            pages.append(
                Page(
                    size=size,
                    tile_px=None if thumbnail else _TILE,
                    compression=_TAGS["jpeg"] if thumbnail else tag,
                    description=text,
                )
            )
        return [pages[0], pages[2], pages[1], pages[3]]

    def encode(self, image: NDArray[np.uint8]) -> bytes:
        """Encode a tile."""
        if self._compression == "jpeg":
            return encode_jpeg(image)
        return cast(
            bytes,
            imagecodecs.jpeg2k_encode(
                image,
                level=45,
                codecformat="j2k",
                colorspace=imagecodecs.JPEG2K.CLRSPC.SRGB,
                mct=True,
                reversible=False,
            ),
        )

    def paint(self, box: Box) -> _Block:
        """Draw one block and everything made from it."""
        scene = self._world.scene(box)
        columns = range(box.x // _TILE, box.x1 // _TILE)
        rows = range(box.y // _TILE, box.y1 // _TILE)
        truth = None
        if self._truth and scene is not None:
            truth = make_truth(self._world, scene, box, self.size)
        if self._world.is_bare(box, scene):
            tile, reduced, small = self._glass
            tiles = {(i, j): tile for j in rows for i in columns}
            small = small[: box.height // 16, : box.width // 16]
            return _Block(box=box, tiles=tiles, reduced=reduced, small=small, truth=truth)
        image = self._world.draw(box, scene)
        tiles = {}
        for j in rows:
            for i in columns:
                cut = Box(x=i * _TILE, y=j * _TILE, width=_TILE, height=_TILE).relative_to(box)
                tiles[i, j] = self.encode(np.ascontiguousarray(image[cut.slices]))
        quarter = _shrink(image)
        whole = np.full((_TILE, _TILE, 3), 255, np.uint8)
        whole[: quarter.shape[0], : quarter.shape[1]] = quarter
        return _Block(
            box=box, tiles=tiles, reduced=self.encode(whole), small=_shrink(quarter), truth=truth
        )


def encode_jpeg(image: NDArray[np.uint8]) -> bytes:
    """Encode as JPEG whose components are R, G, B, none of them subsampled."""
    return cast(
        bytes,
        imagecodecs.jpeg8_encode(
            image, level=_QUALITY, colorspace="RGB", outcolorspace="RGB", subsampling="444"
        ),
    )


def _shrink(image: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Average squares of 4 x 4 pixels."""
    small = np.empty((image.shape[0] // 4, image.shape[1] // 4, 3), np.uint8)
    _average(image, small)
    return small


@compiled
def _average(image: NDArray[np.uint8], small: NDArray[np.uint8]) -> None:
    for r in range(small.shape[0]):
        for c in range(small.shape[1]):
            for k in range(3):
                total = 8
                for i in range(4):
                    for j in range(4):
                        total += image[4 * r + i, 4 * c + j, k]
                small[r, c, k] = total >> 4


def _in_order(painter: _Painter, threads: int) -> Iterator[_Block]:
    """Paint in threads, a few blocks ahead, and yield in order."""
    waiting: deque[Future[_Block]] = deque()
    with ThreadPoolExecutor(threads, thread_name_prefix="synth") as pool:
        try:
            for box in painter.boxes:
                waiting.append(pool.submit(painter.paint, box))
                if len(waiting) > 2 * threads:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()


def _assemble(
    painter: _Painter,
    file: BigTiff,
    pages: list[Page],
    parquet: TruthWriter | None,
    threads: int,
) -> None:
    """Append every block's tiles, and build level 2 and the thumbnail on the way."""
    base, thumbnail, middle, lowest = pages
    columns = lowest.tiles[0]
    band = np.full((_TILE, columns * _TILE, 3), 255, np.uint8)
    strips: list[NDArray[np.uint8]] = []
    last_row = 0

    def flush(row: int) -> None:
        for i in range(columns):
            tile = np.ascontiguousarray(band[:, i * _TILE : (i + 1) * _TILE])
            file.append(lowest, row * columns + i, painter.encode(tile))
        strips.append(_shrink(band))
        band[:] = 255

    for block in _in_order(painter, threads):
        row = block.box.y // (16 * _TILE)
        if row != last_row:
            flush(last_row)
            last_row = row
        for (i, j), data in block.tiles.items():
            file.append(base, j * base.tiles[0] + i, data)
        i, j = block.box.x // _BLOCK, block.box.y // _BLOCK
        if i < middle.tiles[0] and j < middle.tiles[1]:
            file.append(middle, j * middle.tiles[0] + i, block.reduced)
        top, left = (j * 64) % _TILE, i * 64
        small = block.small[:, : band.shape[1] - left]
        band[top : top + small.shape[0], left : left + small.shape[1]] = small
        if parquet is not None and block.truth is not None:
            parquet.write(block.truth)
    if last_row < lowest.tiles[1]:
        flush(last_row)
    view = np.concatenate(strips)[: thumbnail.size[1], : thumbnail.size[0]]
    file.append(thumbnail, 0, encode_jpeg(np.ascontiguousarray(view)))
