"""Keep the file libraries' complaints off the screen.

They are still told, at debug level and under our own name: an error that matters is
raised by us, with the slide's name and what to do about it.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["quiet"]

logger = logging.getLogger(__name__)


@contextmanager
def quiet() -> Iterator[None]:
    """Turn tifffile's log records into debug records, for the time of the block."""
    source = logging.getLogger("tifffile")

    def demote(record: logging.LogRecord) -> bool:
        logger.debug("tifffile: %s", record.getMessage())
        return False

    source.addFilter(demote)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        source.removeFilter(demote)
