"""What lies on the disk: slides that were downloaded, and what their reports say."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from manifest import Entry, damage

__all__ = ["Book", "Shelf"]

log = logging.getLogger("window")


@dataclass(kw_only=True)
class Book:
    """A slide, and how far it is."""

    entry: Entry
    """The slide as the manifest has it."""
    here: bool = False
    """Whether anything of it lies on the disk; then all of its size counts."""
    whole: bool = False
    """Whether its file is here and undamaged."""
    status: str | None = None
    """What its report says; None without one."""
    downloads: int = 0
    """Downloads by this call that failed, or whose file was damaged."""
    not_before: float = 0.0
    """When the next download may begin, by the monotonic clock."""
    runs: int = 0
    """Runs of wsi-run by this call after which its report said failed."""
    given_up: bool = False
    """Whether this call tries it no more."""

    @property
    def done(self) -> bool:
        """Whether its results are complete."""
        return self.status == "done"

    @property
    def open(self) -> bool:
        """Whether there is something to do."""
        return not (self.done or self.given_up)


class Shelf:
    """The slides of a manifest in a bounded number of bytes.

    Reports are read again only of slides that are here: no others are at work.
    """

    def __init__(self, entries: Sequence[Entry], *, slides: Path, out: Path, disk: int) -> None:
        """Look at what is there.

        Args:
            entries: all slides.
            slides: the folder for downloads; every slide has a folder there.
            out: the results folder.
            disk: bytes of slides that may be here at a time.
        """
        self.slides, self._out, self._disk = slides, out, disk
        self.books = [Book(entry=entry) for entry in entries]
        for book in self.books:
            book.here = book.entry.folder(slides).exists()
            book.status = self._report(book.entry)

    def read_reports(self) -> None:
        """Look what the reports say now."""
        for book in self.books:
            if book.here:
                book.status = self._report(book.entry)

    def fitting(self) -> list[Book]:
        """Return the slides that may be downloaded, what was begun first."""
        held = sum(book.entry.size for book in self.books if book.here)
        wanted = [book for book in self.books if book.open and not book.whole]
        fit = [book for book in wanted if book.here or held + book.entry.size <= self._disk]
        return sorted(fit, key=lambda book: not book.here)

    def ready(self) -> list[Book]:
        """Return the slides that can be processed."""
        return [book for book in self.books if book.open and book.whole]

    def check(self, book: Book, stop: Callable[[], bool]) -> str | None:
        """Look whether a slide is undamaged, remove it if not, and return what is wrong with it."""
        problem = damage(book.entry, self.slides, stop=stop)
        book.whole = problem is None
        if problem and book.entry.path(self.slides).exists() and not stop():
            self.remove(book, problem)
        return problem

    def remove(self, book: Book, why: str) -> None:
        """Make room."""
        log.info("%s: %s, removed", book.entry.slide_id, why)
        shutil.rmtree(book.entry.folder(self.slides))
        book.here = book.whole = False

    def make_room(self, book: Book) -> Path:
        """Count a slide as here from now on; return the path of its file."""
        book.entry.folder(self.slides).mkdir(parents=True, exist_ok=True)
        book.here = True
        return book.entry.path(self.slides)

    def _report(self, entry: Entry) -> str | None:
        try:
            text = (self._out / "reports" / f"{entry.slide_id}.json").read_text()
            status: str | None = json.loads(text)["status"]
        except (OSError, ValueError, KeyError, TypeError):
            return None
        return status
