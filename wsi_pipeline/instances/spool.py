"""Record batches that are put aside until their turn."""

from __future__ import annotations

from contextlib import AbstractContextManager
from pathlib import Path
from tempfile import TemporaryFile
from typing import IO

import pyarrow as pa

from wsi_pipeline.durable import disk_errors

__all__ = ["Spool"]

HELD_BYTES = 64 << 20
"""Of rows that are kept in memory; if there are more, all go into a file without a name, which
no kill leaves behind."""


class Spool:
    """Batches of one schema, put aside in any order and then got back in any other.

    All batches must hold the same dictionaries. For one thread at a time.
    """

    def __init__(self, schema: pa.Schema, folder: Path | None) -> None:
        """Begin with nothing.

        Args:
            schema: of all batches.
            folder: where the file may lie; None: where the system has temporary files.
        """
        self._schema = schema
        self._folder = folder
        self._held: list[pa.RecordBatch] = []
        self._held_bytes = 0
        self._count = 0
        self._file: IO[bytes] | None = None
        self._writer: pa.RecordBatchFileWriter | None = None
        self._reader: pa.RecordBatchFileReader | None = None

    def put(self, batch: pa.RecordBatch) -> int:
        """Put a batch aside; return the number to get it back by.

        Raises:
            DiskFullError: no space is left.
        """
        self._held.append(batch)
        self._held_bytes += batch.nbytes
        self._count += 1
        if self._writer is not None or self._held_bytes > HELD_BYTES:
            self._write()
        return self._count - 1

    def _write(self) -> None:
        with self._disk_errors():
            if self._writer is None:
                if self._folder is not None:
                    self._folder.mkdir(parents=True, exist_ok=True)
                self._file = TemporaryFile(dir=self._folder)  # noqa: SIM115
                self._writer = pa.ipc.new_file(self._file, self._schema)
            for batch in self._held:
                self._writer.write_batch(batch)
        self._held.clear()

    def _disk_errors(self) -> AbstractContextManager[None]:
        return disk_errors((self._folder or Path()) / "objects")

    def get(self, number: int) -> pa.RecordBatch:
        """Return a batch; after the first call nothing more can be put."""
        if self._writer is None or self._file is None:
            return self._held[number]
        if self._reader is None:
            with self._disk_errors():
                self._writer.close()
                self._file.flush()
            self._reader = pa.ipc.open_file(self._file)
        return self._reader.get_batch(number)

    def close(self) -> None:
        """Give the memory and the file back."""
        self._held.clear()
        if self._file is not None:
            self._file.close()
