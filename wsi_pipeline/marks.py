"""The record of the blocks that outlive a power cut, and how a block comes into it.

::

    chunks, the folders that name them       all at once: nothing of it means
    and new rows of marks, hidden            anything yet
        |
    rows of marks get their names            now the blocks are marked
        |
    the folders that name them               now they stay marked

Each arrow waits for the disk, so a commit waits twice, however many blocks it is for.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Executor
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from wsi_pipeline.chunks import ChunkFiles
from wsi_pipeline.durable import sync_all

__all__ = ["Marks"]


class Marks:
    """What is committed of each block: 0 is nothing. For one thread at a time."""

    def __init__(self, files: ChunkFiles, root: Path) -> None:
        """Read what was committed before.

        Args:
            files: of the record, (rows, columns), a chunk a row.
            root: folder of the store; its own name is not looked after here.

        Raises:
            StoreError: the record is damaged.
        """
        none = np.zeros(files.chunks, np.uint8)
        rows = (files.read(row, 0) for row in range(files.shape[0]))
        self.committed: NDArray[np.uint8] = np.concatenate(
            [none if row is None else row for row in rows]
        )
        """(rows, columns)"""
        self._files = files
        self._root = root
        self._named: set[Path] = set()
        """Folders whose own names are on the disk, as far as is known."""

    def commit(
        self,
        marks: Mapping[tuple[int, int], int],
        chunks: Sequence[Path],
        threads: Executor | None = None,
    ) -> None:
        """Mark blocks once their chunks and names are on the disk, all blocks together.

        A crash at any point leaves some of them marked, rows at a time, or none; those that are
        marked are whole.

        Args:
            marks: by row and column of the block, 1-255.
            chunks: all files of these blocks.
            threads: that wait for the disk; None: new ones.

        Raises:
            OSError: the disk is full, or the store is away.
        """
        rows: dict[int, NDArray[np.uint8]] = {}
        for (row, column), mark in marks.items():
            rows.setdefault(row, self.committed[row : row + 1].copy())[0, column] = mark
        hidden: dict[Path, Path] = {}
        try:
            for row, values in rows.items():
                hidden[self._files.path(row, 0)] = self._files.write_hidden(row, 0, values)
            sync_all([*chunks, *self._folders(chunks), *hidden.values()], threads)
            for path, beside in hidden.items():
                os.replace(beside, path)
        finally:
            for beside in hidden.values():
                beside.unlink(missing_ok=True)
        sync_all(self._folders(hidden), threads)
        for path in (*chunks, *hidden):
            self._named.update(_above(path, self._root))
        for row, values in rows.items():
            self.committed[row] = values[0]

    def _folders(self, paths: Iterable[Path]) -> list[Path]:
        """Return the folders that name files, and those that name folders made for them."""
        folders: dict[Path, None] = {}
        for path in paths:
            folders[path.parent] = None
            for folder in _above(path, self._root):
                if folder not in self._named:
                    folders[folder.parent] = None
        return list(folders)


def _above(path: Path, root: Path) -> list[Path]:
    """Return the folders between a file and a folder far above it, without the latter."""
    parents = path.parents
    return list(parents[: parents.index(root)])
