"""Notices that a slide or its mask is changed while it is read: what was read is worth nothing."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from wsi_pipeline.durable import partial_path, remove_tree
from wsi_pipeline.errors import MaskError, SlideError
from wsi_pipeline.job import SlideJob

__all__ = ["unchanged"]


@contextmanager
def unchanged(job: SlideJob) -> Iterator[Callable[[], None]]:
    """Fail, whatever else happens meanwhile, if a file of a job is changed while it is read inside.

    Blocks that were predicted are thrown away: nobody knows of which content they are. If the
    slide is merely out of reach, they are kept.

    Yields:
        To be called when the slide has been opened: whether it is still the file that is watched.

    Raises:
        SlideError, MaskError: it was changed.
    """
    problem: Exception | None = None
    # The very file that is read: another may take its name, and give it back.
    file = _handle(job.path)
    begun = _stamp(file)

    def opened() -> None:
        changed = job.changed_input()
        if changed is not None and changed.exists():
            raise _Otherwise(changed)  # since the job was named
        if file is not None and _is_another(job.path, file):
            raise _Otherwise(Path(job.path))  # since the handle was opened

    try:
        yield opened
    except Exception as error:
        problem = error
    finally:
        ended = _stamp(file)
        if file is not None:
            os.close(file)
    if isinstance(problem, _Otherwise):
        changed: Path | None = problem.path
    else:
        changed = Path(job.path) if ended != begun else job.changed_input()
    if changed is not None:
        if ended != begun or changed.exists():
            remove_tree(partial_path(job.maps_path))
        msg = (
            f"{changed} changed while it was read. Run the same command again when it is "
            "complete: the slide then begins anew."
        )
        raise (MaskError if changed == job.mask else SlideError)(msg) from problem
    if problem is not None:
        raise problem


class _Otherwise(Exception):  # noqa: N818 - a state, not a fault
    """A file is not the one that the job was named after."""

    def __init__(self, path: Path) -> None:
        super().__init__(str(path))
        self.path = path


def _is_another(path: str, file: int) -> bool:
    with suppress(OSError):  # out of reach, which reading will tell
        return not os.path.samestat(Path(path).stat(), os.fstat(file))
    return False


def _handle(path: str) -> int | None:
    with suppress(OSError):
        return os.open(path, os.O_RDONLY)
    return None  # a URL, or no such file: opening the slide will tell


def _stamp(file: int | None) -> tuple[int, int] | None:
    if file is None:
        return None
    status = os.fstat(file)
    return status.st_size, status.st_mtime_ns
