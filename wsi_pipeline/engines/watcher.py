"""Who is told what goes on in a run."""

from __future__ import annotations

from typing import Protocol

from wsi_pipeline.job import RunReport, SlideJob

__all__ = ["Silent", "Watcher"]


class Watcher(Protocol):
    """Told what goes on, from whichever thread it happens in."""

    def start(self, job: SlideJob) -> None:
        """A slide is begun."""

    def advance(self, job: SlideJob, stage: str, done: int, total: int) -> None:
        """A stage of a slide has come further; total 0 means unknown."""

    def finish(self, job: SlideJob, report: RunReport, *, skipped: bool) -> None:
        """A slide has ended, or was done before (skipped)."""


class Silent:
    """A watcher that keeps quiet."""

    def start(self, job: SlideJob) -> None:
        """Say nothing."""

    def advance(self, job: SlideJob, stage: str, done: int, total: int) -> None:
        """Say nothing."""

    def finish(self, job: SlideJob, report: RunReport, *, skipped: bool) -> None:
        """Say nothing."""
