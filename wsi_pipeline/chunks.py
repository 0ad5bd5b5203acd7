"""The files in which a zarr array keeps its chunks, written and read straight.

Our arrays are packed in one way alone (:func:`wsi_pipeline.ome.create_arrays`): a chunk is one
Zstandard frame in the file ``c/<index>/<index>/...``, and a chunk of zeros has none. zarr reads
these files and writes the same bytes; on its way through an event loop, another thread and
several copies, a chunk takes it many times the work of the compression.
"""

from __future__ import annotations

import math
import os
import uuid
from pathlib import Path

import numpy as np
from numcodecs.zstd import Zstd
from numpy.typing import NDArray

from wsi_pipeline.errors import StoreError

__all__ = ["ZSTD_LEVEL", "ChunkFiles", "compress"]

ZSTD_LEVEL = 1

Pixels = NDArray[np.uint8]


def compress(chunk: Pixels) -> bytes:
    """Return the bytes of a chunk's file."""
    return bytes(Zstd(level=ZSTD_LEVEL).encode(np.ascontiguousarray(chunk)))


class ChunkFiles:
    """The files of one uint8 array whose last two axes are cut into chunks. Safe in threads."""

    def __init__(self, folder: Path, *, shape: tuple[int, ...], chunks: tuple[int, ...]) -> None:
        """Name the array; touches nothing.

        Args:
            folder: of the array.
            shape: ``(C, H, W)`` or ``(H, W)``.
            chunks: shape of a chunk, of the same length, with all channels.
        """
        self.shape = shape
        self.chunks = chunks
        self._folder = folder
        self._above = ("c", *["0"] * (len(shape) - 2))

    def path(self, row: int, column: int) -> Path:
        """Return where a chunk lies."""
        return self._folder.joinpath(*self._above, str(row), str(column))

    def write(self, row: int, column: int, pixels: Pixels) -> Path | None:
        """Write a chunk; its file is the old one or the new one, at every moment.

        Args:
            row: of the chunk.
            column: of the chunk.
            pixels: the chunk, or the part of it that lies inside the array.

        Returns:
            The file, which is not synced yet; None for zeros, which have none.

        Raises:
            FileNotFoundError: the array is gone; nothing is made in its place.
        """
        path = self.path(row, column)
        if not pixels.any():
            self._require_there()
            path.unlink(missing_ok=True)
            return None
        beside = self.write_hidden(row, column, pixels)
        try:
            os.replace(beside, path)
        except BaseException:
            beside.unlink(missing_ok=True)
            raise
        return path

    def write_hidden(self, row: int, column: int, pixels: Pixels) -> Path:
        """Write a chunk, zeros too, beside its place; return the file, for the caller to rename.

        Raises:
            FileNotFoundError: the array is gone; nothing is made in its place.
        """
        path = self.path(row, column)
        if pixels.shape != self.chunks:
            whole = np.zeros(self.chunks, np.uint8)
            whole[tuple(map(slice, pixels.shape))] = pixels
            pixels = whole
        self._make_folders(path.parent)
        beside = path.with_name(f".{path.name}~{uuid.uuid4().hex}.partial")
        try:
            beside.write_bytes(compress(pixels))
        except BaseException:
            beside.unlink(missing_ok=True)
            raise
        return beside

    def read(self, row: int, column: int) -> Pixels | None:
        """Read the part of a chunk that lies inside the array; None where it has no file.

        Raises:
            FileNotFoundError: the array is gone, as with a disk that is unmounted.
            StoreError: the file is damaged, or holds another number of bytes than a chunk has
                pixels.
        """
        most = math.prod(self.chunks)
        data = self._read(row, column, 2 * most + 1024)
        if data is None:
            # It may have gone and come back: what is there now has a file if it ever had one.
            self._require_there()
            data = self._read(row, column, 2 * most + 1024)
        if data is None:
            return None
        said = _zstd_size(data)
        try:
            if said != most:  # asked first: a few bytes may claim to be many
                raise ValueError(f"{said} bytes in place of {most}")
            chunk: Pixels = np.frombuffer(Zstd().decode(data), np.uint8).reshape(self.chunks)
        except (RuntimeError, ValueError) as error:
            msg = (
                f"the chunk {self.path(row, column)} is damaged ({error}); "
                "run the slide again with --overwrite"
            )
            raise StoreError(msg) from error
        (high, wide), (height, width) = self.chunks[-2:], self.shape[-2:]
        return chunk[..., : height - row * high, : width - column * wide]

    def _read(self, row: int, column: int, most_bytes: int) -> bytes | None:
        try:
            with self.path(row, column).open("rb") as file:
                return file.read(most_bytes)
        except FileNotFoundError:
            return None

    def _require_there(self) -> None:
        (self._folder / "zarr.json").stat()

    def _make_folders(self, folder: Path) -> None:
        if folder.is_dir():
            return
        names = folder.relative_to(self._folder).parts
        for count in range(1, len(names) + 1):
            self._folder.joinpath(*names[:count]).mkdir(exist_ok=True)


def _zstd_size(frame: bytes) -> int | None:
    """Return the bytes that a Zstandard frame says to hold; RFC 8878, section 3.1.1.1."""
    if frame[:4] != b"\x28\xb5\x2f\xfd" or len(frame) < 5:
        return None
    flags = frame[4]
    is_single = flags >> 5 & 1
    width = (1, 2, 4, 8)[flags >> 6] if flags >> 6 or is_single else 0
    at = 5 + (not is_single) + (0, 1, 2, 4)[flags & 3]
    raw = frame[at : at + width]
    if not width or len(raw) < width:
        return None
    return int.from_bytes(raw, "little") + (256 if width == 2 else 0)
