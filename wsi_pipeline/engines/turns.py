"""In which order slides are begun where several are in work at a time."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from wsi_pipeline.history import suspected
from wsi_pipeline.job import SlideJob

__all__ = ["in_good_order"]


def in_good_order(jobs: Iterable[SlideJob]) -> tuple[list[SlideJob], list[SlideJob]]:
    """Sort slides: the largest first, and those that have killed a process apart.

    Who is free takes the next slide of one queue. So nobody has to know beforehand how long a
    slide takes, as a fixed division among the workers would; and because small slides come last,
    all end at nearly the same time.

    Returns:
        Innocent slides by size; then those that may have killed a process, to be done last.
    """
    ordered = sorted(jobs, key=_size_bytes, reverse=True)
    suspect = {job.slide_id for job in ordered if suspected(job)}
    return (
        [job for job in ordered if job.slide_id not in suspect],
        [job for job in ordered if job.slide_id in suspect],
    )


def _size_bytes(job: SlideJob) -> int:
    """Return the bytes of a slide on disk; 0 where it has none here, such as a URL."""
    if "://" in job.path:
        return 0
    path = Path(job.path)
    try:
        size = path.stat().st_size
        # Of some vendors the file is small, and its pixels lie in a folder of its name.
        folder = path.with_suffix("")
        beside = folder.iterdir() if path.suffix and folder.is_dir() else ()
        return size + sum(file.stat().st_size for file in beside)
    except OSError:
        return 0
