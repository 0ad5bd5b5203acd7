"""Loops over pixels as machine code, compiled once a machine.

Compiled code is kept on disk, beside the sources or in the user's cache folder (numba's
``NUMBA_CACHE_DIR`` says where else). Cluster jobs that start at the same moment share that
folder, and numba's own files are not made for it: it numbers the variants of a function (one for
each combination of argument types), so two processes can give one number to two variants, and a
third then calls machine code with arguments of other types. Here a file is named by what it holds.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Any, TypeVar, cast

from numba import njit
from numba.core.caching import IndexDataCacheFile

__all__ = ["compiled"]

F = TypeVar("F", bound=Callable[..., Any])


def compiled(function: F) -> F:
    """Compile a function at its first call; it then releases the interpreter lock.

    Divisions by zero give what IEEE 754 says rather than an exception. A compiled function must
    not call those of other modules, unless nobody minds an old version of them: the file on disk
    does not see those change.
    """
    try:
        dispatcher = njit(nogil=True, cache=True, error_model="numpy")(function)
    except RuntimeError:  # no folder to write to: compiled anew in every process
        return cast(F, njit(nogil=True, error_model="numpy")(function))
    cache: Any = getattr(dispatcher, "_cache", None)  # none with NUMBA_DISABLE_JIT
    if cache is not None:
        cache._cache_file.__class__ = _NamedByContent
    return cast(F, dispatcher)


class _NamedByContent(IndexDataCacheFile):
    """numba's cache of one function, safe for processes that write at the same time."""

    def save(self, key: tuple[object, ...], data: object) -> None:
        """Write a variant, then the index that names it.

        Of two processes that write the index at once, one's entry is lost and compiled again.
        """
        digest = hashlib.sha256(repr((self._source_stamp, key)).encode()).hexdigest()
        name = self._data_name(int(digest[:12], 16))
        self._save_data(name, data)
        self._save_index({**self._load_index(), key: name})
