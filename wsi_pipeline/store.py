"""The stitched maps of one slide: an OME-Zarr 0.5 group, filled block by block, then sealed.

::

    <slide_id>.zarr
    ├── zarr.json            OME multiscales of every map; the model, grid and job it belongs to
    ├── blocks               (rows, columns) uint8: the share of each tile that is predicted
    └── <head>/
        ├── prob             (C, H, W) uint8, 255 = 1.0
        ├── class            (H, W) uint8 class ids
        └── prob_2x, ...     the same, 2, 4, 8 ... times coarser, for viewers

The template is made first; then only whole chunks are written, each by one tile, so
writers never meet and a block that is marked in ``blocks`` is complete. A block that is
written (:meth:`PredictionStore.put`) can be read; it is marked when it is committed,
together with others, and outlives a power cut from then on. An unfinished
store lies under a hidden name and goes on where it stopped; :meth:`PredictionStore.seal`
gives it its final name. A visible store is a finished one.
"""

from __future__ import annotations

import json
import logging
import threading
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Executor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import zarr
from numpy.typing import NDArray
from zarr.errors import ContainsGroupError, NodeNotFoundError

from wsi_pipeline.arrays import BLOCKS, ChunkCache, make_template, open_arrays
from wsi_pipeline.checked import fits
from wsi_pipeline.chunks import ChunkFiles
from wsi_pipeline.durable import (
    disk_errors,
    partial_path,
    publish_directory,
    remove_tree,
    sync,
    sync_tree,
)
from wsi_pipeline.errors import FolderGoneError, StoreError
from wsi_pipeline.geometry import Box, PixelGrid
from wsi_pipeline.marks import Marks
from wsi_pipeline.ome import multiscale, ome_attributes
from wsi_pipeline.pyramid import Pyramid
from wsi_pipeline.spec import ModelSpec
from wsi_pipeline.tiling import Tile, TileGrid

if TYPE_CHECKING:
    import dask.array as da

__all__ = ["PredictionBlock", "PredictionStore", "WrittenBlock", "open_maps"]

log = logging.getLogger(__name__)

Pixels = NDArray[np.uint8]

WHOLE = 255
"""Mark of a tile that was read and predicted wholly; 0 is a tile without tissue."""
CACHE_BYTES = 96 << 20
"""Decoded chunks that an open store keeps."""
_PAIR = tuple[float, float]
_META = {
    "spec": str,
    "grid": {"origin": _PAIR, "spacing": _PAIR, "size": tuple[int, int]},
    "mpp": _PAIR,
    "tile_px": int,
    "made": dict,
}
"""What a store says of itself, at least."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PredictionBlock:
    """What the network says about one tile."""

    tile: Tile
    """The tile whose write box the arrays fill."""
    arrays: Mapping[str, Pixels]
    """``<head>/prob``: (C, h, w) and ``<head>/class``: (h, w), where h, w is the write box
    coarsened by the head's stride."""


@dataclass(frozen=True, kw_only=True, slots=True)
class WrittenBlock:
    """A block that is written and not committed; its pixels are not kept."""

    tile: Tile
    """The tile."""
    mark: int
    """What the record of blocks will say of it, 1-255."""
    chunks: tuple[Path, ...]
    """Its files."""


class PredictionStore:
    """The maps of one slide, on disk.

    Use :meth:`create` to write and :meth:`open` to read. Reading is thread-safe, and so is
    writing different blocks.
    """

    def __init__(self, path: Path, group: zarr.Group) -> None:
        meta = group.attrs["wsi_pipeline"]
        if not isinstance(meta, Mapping) or not fits(meta, _META):
            raise StoreError(f"{path} is no store of this package")
        self.path = path
        self.meta: dict[str, Any] = dict(meta)
        self.spec = ModelSpec.from_json(self.meta["spec"])
        self.grid = PixelGrid(
            origin=tuple(self.meta["grid"]["origin"]),
            spacing=tuple(self.meta["grid"]["spacing"]),
            size=tuple(self.meta["grid"]["size"]),
        )
        self.pixel_size: tuple[float, float] = tuple(self.meta["mpp"])
        self.tile_px: int = self.meta["tile_px"]
        self._group = group
        self._groups = {head.name: _group(group, head.name) for head in self.spec.heads}
        self._maps = self.spec.maps
        self._arrays, marks = open_arrays(group, self.spec, self.grid, self.tile_px)
        self._files = {key: _files(path, array) for key, array in self._arrays.items()}
        self._marks = Marks(_files(path, marks), path)
        self._committing = threading.Lock()
        self._blocks = self._marks.committed.copy()
        """The same, and what is written but not committed: what can be read."""
        self._cache = ChunkCache(CACHE_BYTES)
        self._pyramids: dict[str, Pyramid] = {}

    @classmethod
    def create(
        cls,
        path: Path,
        *,
        spec: ModelSpec,
        tiles: TileGrid,
        pixel_size: tuple[float, float],
        made: Mapping[str, Any],
    ) -> PredictionStore:
        """Make the template of a store, or go on with the one the same job left unfinished.

        Args:
            path: final name; until :meth:`seal` the store lies beside it.
            spec: the model.
            tiles: the lattice of write boxes; a chunk never crosses one.
            pixel_size: micrometres per level-0 pixel, x and y.
            made: whatever decides the bytes of the maps, as plain values; unfinished work that
                was made otherwise is thrown away.
        """
        beside = partial_path(path)
        meta = {
            "spec": spec.to_json(),
            "grid": {
                "origin": list(tiles.grid.origin),
                "spacing": list(tiles.grid.spacing),
                "size": list(tiles.grid.size),
            },
            "mpp": list(pixel_size),
            "tile_px": tiles.tile_px,
            "halo_px": tiles.halo_px,
            "predicted_px": sum(tile.predicted.area for tile in tiles.tiles),
            "made": dict(made),
        }
        with disk_errors(path):
            if beside.exists():
                unfinished = _open(beside, "r+")
                if unfinished is not None and unfinished.meta == meta:
                    log.info("going on with %s", path.name)
                    return unfinished._expecting(tiles)
                log.warning("%s was begun with other options and starts again", path.name)
                remove_tree(beside)
            made_now = cls(beside, make_template(beside, spec, tiles, meta))._expecting(tiles)
            sync_tree(beside)  # or blocks that are marked would be of no use after a power cut
            sync(beside.parent)
            return made_now

    def _expecting(self, tiles: TileGrid) -> PredictionStore:
        """Prepare the pyramids for the blocks of these tiles."""
        missing = self.missing(tiles).tiles
        written = [tile for tile in tiles.tiles if self._blocks[tile.row, tile.column]]
        for key in self._maps:
            pyramid = Pyramid(self.path, self._group, key, average=key.endswith("/prob"))
            pyramid.expect(
                [self._box(key, tile) for tile in written],
                [self._box(key, tile) for tile in missing],
            )
            self._pyramids[key] = pyramid
        return self

    @classmethod
    def open(cls, path: Path) -> PredictionStore:
        """Open a sealed store for reading.

        Raises:
            StoreError: there is none, or it is not one of ours.
        """
        store = _open(path, "r") if path.is_dir() else None
        if store is None:
            unfinished = " An unfinished one lies beside it." if partial_path(path).exists() else ""
            raise StoreError(f"{path} is no finished store of maps.{unfinished}")
        return store

    @property
    def keys(self) -> tuple[str, ...]:
        """Names of the maps: ``<head>/prob`` and ``<head>/class``."""
        return tuple(self._arrays)

    def head_grid(self, head: str) -> PixelGrid:
        """Return the grid on which the maps of a head lie."""
        return self.grid.coarsen(self.spec.head(head).stride)

    def missing(self, tiles: TileGrid) -> TileGrid:
        """Return the tiles whose blocks are not committed yet."""
        committed = self._marks.committed
        return tiles.only(
            tuple(tile for tile in tiles.tiles if not committed[tile.row, tile.column])
        )

    def write(self, block: PredictionBlock, *, readable: float = 1.0) -> None:
        """Write a block and commit it alone."""
        self.commit([self.put(block, readable=readable)])

    def put(self, block: PredictionBlock, *, readable: float = 1.0) -> WrittenBlock:
        """Write the block of one tile, and make what is coarser from it, without the disk's word.

        It can be read from now on. Coarser chunks are made anew by whoever goes on with a store,
        so they may be there before what they are made of is committed.

        Args:
            block: the maps of the tile.
            readable: 0-1; less by the share of the tile's write box that was to be predicted and
                could not be read from the slide.

        Returns:
            What :meth:`commit` is to be given.

        Raises:
            StoreError: the arrays do not fill exactly the tile's chunks.
            DiskFullError: no space is left.
            FolderGoneError: the store is away.
        """
        if set(block.arrays) != set(self._arrays):
            msg = f"a block must hold {sorted(self._arrays)}, not {sorted(block.arrays)}"
            raise StoreError(msg)
        self.require_there()
        tile, mark = block.tile, max(1, int(WHOLE * readable))
        chunks: list[Path] = []
        with disk_errors(self.path), self._not_elsewhere():
            for key, pixels in block.arrays.items():
                chunks += self._write_chunks(key, self._box(key, tile), pixels)
            self._blocks[tile.row, tile.column] = mark
            for key, pyramid in self._pyramids.items():
                pyramid.update(self._box(key, tile), block.arrays[key])
        return WrittenBlock(tile=tile, mark=mark, chunks=tuple(chunks))

    def commit(self, written: Sequence[WrittenBlock], threads: Executor | None = None) -> None:
        """Mark blocks that are written, once they are on the disk: they outlive a power cut.

        Args:
            written: waits for the disk as long together as one of them would alone.
            threads: that wait, from :func:`~wsi_pipeline.durable.sync_threads`; None: new ones.

        Raises:
            DiskFullError: no space is left; the blocks stay unmarked.
            FolderGoneError: the store is away.
        """
        marks = {(each.tile.row, each.tile.column): each.mark for each in written}
        chunks = [path for each in written for path in each.chunks]
        with self._committing, disk_errors(self.path), self._not_elsewhere():
            self._marks.commit(marks, chunks, threads)

    def _box(self, key: str, tile: Tile) -> Box:
        """Return where the block of a tile lies on a map."""
        return tile.write.coarsen(self._maps[key].stride)

    def _write_chunks(self, key: str, box: Box, pixels: Pixels) -> list[Path]:
        array = self._files[key]
        expected = (*array.shape[:-2], box.height, box.width)
        whole = all(
            start % chunk == 0 and (stop % chunk == 0 or stop == side)
            for start, stop, chunk, side in (
                (box.y, box.y1, array.chunks[-2], array.shape[-2]),
                (box.x, box.x1, array.chunks[-1], array.shape[-1]),
            )
        )
        if pixels.shape != expected or pixels.dtype != np.uint8 or not whole:
            # Half a chunk would be read, merged and written back: a race between writers,
            # and a block that is there only in part after a kill.
            msg = (
                f"{key}: a block fills whole chunks {array.chunks} with uint8 {expected} at "
                f"({box.x}, {box.y}); got {pixels.dtype} {pixels.shape}"
            )
            raise StoreError(msg)
        high, wide = array.chunks[-2:]
        paths = [
            array.write(
                (box.y + y) // high, (box.x + x) // wide, pixels[..., y : y + high, x : x + wide]
            )
            for y in range(0, box.height, high)
            for x in range(0, box.width, wide)
        ]
        return [path for path in paths if path is not None]

    @contextmanager
    def _not_elsewhere(self) -> Iterator[None]:
        """Tell of a store that goes while it is written.

        Raises:
            FolderGoneError: a file of it, or a folder, is not there.
        """
        try:
            yield
        except FileNotFoundError as error:
            self.require_there()
            raise FolderGoneError(
                f"{error.filename} was away; run the same command again"
            ) from None

    def read(self, key: str, box: Box) -> Pixels:
        """Read a window of a map.

        Args:
            key: one of :attr:`keys`.
            box: on the head's grid; parts beyond it, or never predicted, are 0.

        Returns:
            ``(C, h, w)`` or ``(h, w)`` uint8, a fresh array.
        """
        array = self._files[key]
        out = np.zeros((*array.shape[:-2], box.height, box.width), np.uint8)
        grid_box = Box(x=0, y=0, width=array.shape[-1], height=array.shape[-2])
        inner = box.intersect(grid_box)
        if not inner.area:
            return out
        high, wide = array.chunks[-2:]
        for row in range(inner.y // high, -(-inner.y1 // high)):
            for column in range(inner.x // wide, -(-inner.x1 // wide)):
                chunk_box = Box(x=column * wide, y=row * high, width=wide, height=high)
                part = chunk_box.intersect(inner)
                chunk = self._chunk(key, chunk_box.intersect(grid_box))
                if chunk is not None:
                    source = part.relative_to(chunk_box).slices
                    out[(..., *part.relative_to(box).slices)] = chunk[(..., *source)]
        return out

    def _chunk(self, key: str, box: Box) -> Pixels | None:
        """Return the pixels of one chunk, or None where nothing was predicted."""
        tile = self.tile_px // self._maps[key].stride
        if not self._blocks[box.y // tile, box.x // tile]:
            return None
        return self._cache.get((key, box), lambda: self._decode(key, box))

    def _decode(self, key: str, box: Box) -> Pixels | None:
        array = self._files[key]
        with self._not_elsewhere():
            return array.read(box.y // array.chunks[-2], box.x // array.chunks[-1])

    def require_there(self) -> None:
        """Check that the store has not been taken away, as with a disk that is unmounted.

        What is written to a lost folder would make another one in its place.

        Raises:
            FolderGoneError: it has.
        """
        if not (self.path / "zarr.json").is_file():
            msg = (
                f"{self.path} is gone: was the results folder moved, or its disk unmounted? "
                "Bring it back and run the same command again: finished blocks are kept."
            )
            raise FolderGoneError(msg)

    def stored_chunks(self) -> Iterator[Pixels]:
        """Yield every chunk of the maps and their pyramids that takes a file, decoded."""
        for group in self._groups.values():
            for _, array in sorted(group.arrays()):
                for index in np.ndindex(*array.cdata_shape):
                    start = [at * side for at, side in zip(index, array.chunks, strict=True)]
                    inside = np.asarray(
                        array[tuple(map(slice, start, np.add(start, array.chunks)))], np.uint8
                    )
                    if inside.any():
                        # A chunk at the edge is kept whole.
                        chunk = np.zeros(array.chunks, np.uint8)
                        chunk[tuple(map(slice, inside.shape))] = inside
                        yield chunk

    def unreadable_fraction(self) -> float:
        """Return the share of the predicted area that could not be read from the slide."""
        lost, area = 0.0, 0
        for row, column in np.argwhere(self._blocks).tolist():
            x, y = column * self.tile_px, row * self.tile_px
            write = Box(x=x, y=y, width=self.tile_px, height=self.tile_px).intersect(self.grid.box)
            lost += (1 - float(self._blocks[row, column]) / WHOLE) * write.area
            area += write.area
        said = self.meta.get("predicted_px")  # of a store of an earlier version: all of its blocks
        predicted = said if isinstance(said, int) and said > 0 else max(1, area)
        return min(1.0, lost / predicted)

    def seal(self) -> PredictionStore:
        """Complete the pyramids, sync everything, and give the store its final name.

        Returns:
            The store under its final name; itself if it is sealed already.
        """
        final = self.path.with_name(self.path.name.removeprefix(".").removesuffix(".partial"))
        if final == self.path:
            return self
        self.require_there()
        with disk_errors(final), self._not_elsewhere():
            entries = []
            for key in self._arrays:
                head = self._maps[key]
                entries.append(
                    multiscale(
                        key,
                        self._pyramids[key].finish(),
                        grid=self.head_grid(head.name),
                        pixel_size=self.pixel_size,
                        channels=head.prob_channels if key.endswith("/prob") else (),
                        classes=head.classes,
                    )
                )
            self._describe(entries)
            for orphan in self.path.rglob("*.partial"):
                orphan.unlink()
            # Chunks and marks are on the disk since their blocks were committed.
            synced = [self.path / key / "c" for key in (*self._arrays, BLOCKS)]
            publish_directory(self.path, final, synced=synced)
        return PredictionStore.open(final)

    def _describe(self, entries: list[dict[str, Any]]) -> None:
        """Write what viewers ask for, and look whether it has come where it belongs.

        Raises:
            FolderGoneError: it has not; zarr makes folders that are gone anew, in another place.
        """
        names = {"": ome_attributes(entries)}
        for head in self.spec.heads:
            own = [m for m in entries if self._maps[m["name"]] is head]
            names[head.name] = ome_attributes(own, below=head.name)
        for name, attributes in names.items():
            self.require_there()
            group = self._groups[name] if name else self._group
            group.attrs["ome"] = attributes
        for name, attributes in names.items():
            said = json.loads((self.path / name / "zarr.json").read_text())["attributes"]
            if said.get("ome") != json.loads(json.dumps(attributes)):
                raise FolderGoneError(f"{self.path} was away while it was completed; run again")


def open_maps(path: Path | str) -> dict[str, da.Array]:
    """Open the maps of a slide as lazy dask arrays.

    Args:
        path: ``maps/<slide_id>.zarr`` of a results folder.

    Returns:
        ``<head>/prob``: (C, H, W) and ``<head>/class``: (H, W), uint8.

    Raises:
        StoreError: the store is absent or unfinished.
    """
    import dask.array as da  # slow to import, and the pipeline does without it

    store = PredictionStore.open(Path(path))
    return {
        key: da.from_zarr(store._arrays[key])  # type: ignore[no-untyped-call]
        for key in store.keys
    }


_NO_STORE = (NodeNotFoundError, ContainsGroupError, FileNotFoundError, KeyError, ValueError,
             TypeError, AttributeError, ZeroDivisionError)  # fmt: skip


def _open(path: Path, mode: Literal["r", "r+"]) -> PredictionStore | None:
    """Open whatever lies at a path; None where it is not, or no longer, a store to go on with.

    That is a template that was never completed, a store of another version of this package,
    or one whose record of blocks was torn.
    """
    try:
        # Of format 3 alone: the older one knows codecs that run what they read.
        return PredictionStore(path, zarr.open_group(path, mode=mode, zarr_format=3))
    except _NO_STORE:
        return None
    except (OSError, MemoryError):
        raise  # the disk or the machine: the store may be good
    except Exception as error:  # damaged words lead zarr into accidents of any kind
        log.warning("%s cannot be used: %s", path.name, error)
        return None


def _files(path: Path, array: zarr.Array[Any]) -> ChunkFiles:
    return ChunkFiles(path / array.path, shape=array.shape, chunks=array.chunks)


def _group(group: zarr.Group, key: str) -> zarr.Group:
    child = group[key]
    if not isinstance(child, zarr.Group):
        raise StoreError(f"{key} is not a group")
    return child
