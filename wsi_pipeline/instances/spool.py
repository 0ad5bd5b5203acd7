"""Record batches that are put aside until their turn."""

from __future__ import annotations

from pathlib import Path
from tempfile import SpooledTemporaryFile

import pyarrow as pa

from wsi_pipeline.durable import disk_errors

__all__ = ["Spool"]

HELD_BYTES = 64 << 20
"""What is kept in memory; more goes into a file without a name, which no kill leaves behind."""


class Spool:
    """Batches of one schema, written in any order and then read in any other.

    All batches must hold the same dictionaries. For one thread at a time.
    """

    def __init__(self, schema: pa.Schema, folder: Path | None) -> None:
        """Begin with nothing.

        Args:
            schema: of all batches.
            folder: where the file may lie; None: where the system has temporary files.
        """
        self._folder = folder
        where = None
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
            where = str(folder)
        self._file = SpooledTemporaryFile(max_size=HELD_BYTES, dir=where)  # noqa: SIM115
        self._writer = pa.ipc.new_file(self._file, schema)
        self._reader: pa.ipc.RecordBatchFileReader | None = None
        self._count = 0

    def put(self, batch: pa.RecordBatch) -> int:
        """Put a batch aside; return the number to get it back by.

        Raises:
            DiskFullError: no space is left.
        """
        with disk_errors((self._folder or Path()) / "objects"):
            self._writer.write_batch(batch)
        self._count += 1
        return self._count - 1

    def get(self, number: int) -> pa.RecordBatch:
        """Return a batch; after the first call nothing more can be put."""
        if self._reader is None:
            with disk_errors((self._folder or Path()) / "objects"):
                self._writer.close()
                self._file.flush()
            self._reader = pa.ipc.open_file(self._file)
        return self._reader.get_batch(number)

    def close(self) -> None:
        """Give the memory and the file back."""
        self._file.close()
