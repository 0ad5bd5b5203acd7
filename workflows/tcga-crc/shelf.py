"""What lies on the disk: slides that were downloaded, and what their reports say.

Whether a slide is done, wsi-run says: a report may be of results that are damaged since, or of
another model. A report alone is believed when wsi-run has written it meanwhile.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from manifest import Entry, damage

__all__ = ["Anew", "Book", "Shelf"]

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
    """What its report says; None without one that counts."""
    passed: str | None = None
    """A report that does not count, whatever it says, as long as there is no other."""
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

    After :meth:`look`, reports are read only of slides that are here: no others are at work.
    """

    def __init__(self, entries: Sequence[Entry], *, slides: Path, out: Path, disk: int) -> None:
        """Note what it is about.

        Args:
            entries: all slides.
            slides: the folder for downloads; every slide has a folder there.
            out: the results folder.
            disk: bytes of slides that may be here at a time.
        """
        self.slides, self._out, self._disk = slides, out, disk
        self.books = [Book(entry=entry) for entry in entries]

    def look(self, states: Mapping[str, str], anew: Anew | None) -> None:
        """Look at what is there.

        Args:
            states: how far wsi-run says that slides are, by slide_id.
            anew: the reports that were there before slides were to be done anew, if they are.
        """
        for book in self.books:
            book.here = book.entry.folder(self.slides).exists()
            report = self.report_of(book.entry)
            state = states.get(book.entry.slide_id)
            if anew is not None and anew.is_old(book.entry, report):
                state = None
            book.status = state if state in {"done", "failed"} else None
            book.passed = None if book.status else report

    def read_reports(self, *, believed: Iterable[Book] = ()) -> None:
        """Look what the reports say now.

        Args:
            believed: slides whose reports count even if they were there before: wsi-run has
                looked at them, and has said that all is done.
        """
        for book in believed:
            book.passed = None
        for book in self.books:
            if book.here:
                report = self.report_of(book.entry)
                book.status = None if report == book.passed else _status(report)

    def report_of(self, entry: Entry) -> str | None:
        """Return the text of a slide's report; None where there is none."""
        try:
            return (self._out / "reports" / f"{entry.slide_id}.json").read_text()
        except (OSError, ValueError):
            return None

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
        """Make room; what a network file system does not let go yet is removed the next time."""
        folder = book.entry.folder(self.slides)
        shutil.rmtree(folder, ignore_errors=True)
        book.here, book.whole = folder.exists(), False
        if not book.here:
            log.info("%s: %s, removed", book.entry.slide_id, why)

    def make_room(self, book: Book) -> Path:
        """Count a slide as here from now on; return the path of its file."""
        book.entry.folder(self.slides).mkdir(parents=True, exist_ok=True)
        book.here = True
        return book.entry.path(self.slides)


class Anew:
    """The reports that were there when all slides were to be done anew, once each.

    A slide whose report is another one by now has been done anew. They are noted in a file, so
    that the same call goes on after an interruption instead of beginning once more.
    """

    def __init__(self, path: Path, options: Sequence[str]) -> None:
        """Note where the file is; with other options another one is begun."""
        self._path, self._options = path, list(options)
        self._before: dict[str, str | None] = {}

    def begin(self, shelf: Shelf) -> None:
        """Go on from the file, or begin it with the reports of now; slides may be added."""
        try:
            noted = json.loads(self._path.read_text())
            before = noted["before"] if noted["options"] == self._options else {}
        except (OSError, ValueError, KeyError, TypeError):
            before = {}
        self._before = {
            book.entry.slide_id: before[book.entry.slide_id]
            if book.entry.slide_id in before
            else _digest(shelf.report_of(book.entry))
            for book in shelf.books
        }
        self._path.parent.mkdir(parents=True, exist_ok=True)
        beside = self._path.with_name(f".{self._path.name}.partial")
        with beside.open("w") as file:
            json.dump({"options": self._options, "before": self._before}, file, indent=1)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, self._path)

    def is_old(self, entry: Entry, report: str | None) -> bool:
        """Whether a report was there before."""
        return self._before.get(entry.slide_id) == _digest(report)

    def end(self) -> None:
        """Forget it: another call begins anew."""
        self._path.unlink(missing_ok=True)


def _status(report: str | None) -> str | None:
    try:
        status: str | None = json.loads(report or "")["status"]
    except (ValueError, KeyError, TypeError):
        return None
    return status


def _digest(report: str | None) -> str | None:
    return None if report is None else hashlib.sha256(report.encode()).hexdigest()
