"""Folders that a run needs and that may go away for a while, as when a file server restarts."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from wsi_pipeline.errors import FolderGoneError
from wsi_pipeline.job import SlideJob
from wsi_pipeline.machine import pause

__all__ = ["Folders"]

PATIENCE_S = 120.0
"""How long a run waits for folders that were there."""
ASK_AGAIN_S = 1.0
"""How often to look whether a folder is back."""


class Folders:
    """The folders of a run, each of which is waited for once it has been seen.

    Else all slides that are left would fail within a second, and results would be written below
    a mount point.
    """

    def __init__(
        self, *, waiting: Callable[[SlideJob, str], None], stop: Callable[[], bool]
    ) -> None:
        """Begin.

        Args:
            waiting: told of a slide which folder it waits for.
            stop: once it is true, nothing is waited for.
        """
        self._waiting = waiting
        self._stop = stop
        self._seen: set[Path] = set()
        self._patience_s = PATIENCE_S  # for all times together

    def require(self, job: SlideJob) -> None:
        """Wait until the folders of a slide are there.

        Raises:
            FolderGoneError: the results folder does not come back.
        """
        if job.out not in self._seen:
            job.out.mkdir(parents=True, exist_ok=True)
            self._seen.add(job.out)
        record = job.out / "run.json"
        self._wait_for(record, job, "the results folder")
        if record in self._seen and not record.exists():
            msg = (
                f"the results folder {job.out} is gone, or its run.json; when it is back, run the "
                "same command again"
            )
            raise FolderGoneError(msg)
        if "://" not in job.path:
            self._wait_for(Path(job.path).parent, job, "the folder of slides")

    def are_there(self, job: SlideJob) -> bool:
        """Tell whether the folders of a slide, seen before, are there now; waits for nothing."""
        record = job.out / "run.json"
        slides = "://" in job.path or Path(job.path).parent.exists()
        return slides and job.out in self._seen and (record not in self._seen or record.exists())

    def _wait_for(self, path: Path, job: SlideJob, what: str) -> None:
        while not path.exists():
            if path not in self._seen or self._patience_s <= 0 or self._stop():
                return
            self._waiting(job, what)
            pause(ASK_AGAIN_S)
            self._patience_s -= ASK_AGAIN_S
        self._seen.add(path)
