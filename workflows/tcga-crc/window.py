"""Download, process and remove the slides of a manifest, a bounded number of bytes at a time.

    python window.py MANIFEST --slides DIR --out RESULTS --disk 200G [-- options of wsi-run]

While wsi-run works on the slides that are here, the next ones are downloaded, as far as the
manifest's sizes say that they fit. A slide is removed when its report says that it is done. What
has happened is read from the disk alone, so this may be stopped or killed at any moment, and the
same line goes on. As a job array: a manifest a task (`prepare.py split`), one RESULTS for all, and
--disk is what each task may hold.

SIGTERM, SIGUSR1 and Ctrl-C are passed on to wsi-run and the download.

Exit codes: 0 all slides are done; 1 some failed or could not be downloaded, all others are done;
2 wrong use; 75 interrupted, run the same line again; 130 Ctrl-C.
"""

from __future__ import annotations

import argparse
import csv
import fcntl
import logging
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from manifest import Entry, ManifestError, parse_bytes, read_manifest, select
from shelf import Book, Shelf

log = logging.getLogger("window")

POLL_S = 0.2
LONGEST_WAIT_S = 900.0
STOPPING = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What the command line says."""

    name: str
    """Of the manifest: tells tasks in one folder apart."""
    download: Sequence[str]
    """The command that fetches a slide; ``{id}``, ``{dir}`` and ``{path}`` are filled in."""
    run: Sequence[str]
    """The command that processes a list, before its arguments."""
    options: Sequence[str]
    """Its arguments after the list."""
    tries: int
    """How often a download, and a slide that fails, is tried."""
    wait_s: float
    """Before the second download of a slide; doubled each time."""
    drop_failed: bool
    """Whether slides that fail every time are removed."""


@dataclass(kw_only=True)
class Window:
    """A manifest on its way through a shelf."""

    asked: Asked
    shelf: Shelf
    signals: list[int] = field(default_factory=list)
    """Requests to stop."""
    lock: int = -1
    """Held by this process and its children, as long as one of them lives."""
    fetching: Book | None = None
    fetcher: subprocess.Popen[bytes] | None = None
    running: Sequence[Book] = ()
    runner: subprocess.Popen[bytes] | None = None
    fruitless: int = 0
    """Runs in a row that were cut short and ended no slide."""

    def work(self) -> int:
        """Go on until all is done, nothing more can be done, or a signal comes."""
        self.shelf.slides.mkdir(parents=True, exist_ok=True)
        for number in STOPPING:
            signal.signal(number, lambda number, _frame: self.signals.append(number))
        try:
            if self.take_lock():
                while not self.stopping() and self.step():
                    time.sleep(POLL_S)
        except ManifestError:
            self.finish()
            raise
        if self.stopping():
            log.info("interrupted: run the same line again to go on")
            self.finish()
            return 130 if signal.SIGINT in self.signals else 75
        books = self.shelf.books
        for book in books:
            if not book.done:
                log.warning("%s: %s", book.entry.slide_id, self.why(book))
        done = sum(book.done for book in books)
        log.info("%d of %d slides are done", done, len(books))
        return 0 if done == len(books) else 1

    def stopping(self) -> bool:
        """Whether a signal came."""
        return bool(self.signals)

    def step(self) -> bool:
        """Do what can be done now; return whether there will be something to do later."""
        self.end_fetch()
        self.end_run()
        self.settle()
        self.begin_fetch()
        self.begin_run()
        waiting = any(book.not_before > time.monotonic() for book in self.shelf.fitting())
        return waiting or self.fetcher is not None or self.runner is not None

    def settle(self) -> None:
        """Give up what was tried often enough, and make room."""
        self.shelf.read_reports()
        for book in self.shelf.books:
            hopeless = book.runs >= self.asked.tries
            # Without a file, but failed: an earlier call has dropped it.
            hopeless |= self.asked.drop_failed and book.status == "failed" and not book.here
            book.given_up |= not book.done and hopeless
            if not book.here or book is self.fetching:
                continue
            if book.done:
                self.shelf.remove(book, "done")
            elif book.given_up and self.asked.drop_failed and book not in self.running:
                self.shelf.remove(book, "failed every time")

    def begin_fetch(self) -> None:
        """Begin the next download; a slide that is here and undamaged needs none."""
        while self.fetcher is None and not self.stopping():
            now = time.monotonic()
            book = next((b for b in self.shelf.fitting() if b.not_before <= now), None)
            if book is None:
                return
            if self.shelf.check(book, self.stopping) is None or self.stopping():
                continue
            path = self.shelf.make_room(book)
            words = {"id": book.entry.id, "dir": self.shelf.slides, "path": path}
            log.info("%s: downloading %d bytes", book.entry.slide_id, book.entry.size)
            self.fetching = book
            self.fetcher = self.start([word.format(**words) for word in self.asked.download])

    def end_fetch(self) -> None:
        """Take note of a download that has ended."""
        if self.fetcher is None or self.fetching is None or self.fetcher.poll() is None:
            return
        code, book = self.fetcher.returncode, self.fetching
        self.fetcher = self.fetching = None
        problem = self.shelf.check(book, self.stopping)
        if problem is None or self.stopping():
            return
        book.downloads += 1
        book.given_up = book.downloads >= self.asked.tries
        wait_s = min(self.asked.wait_s * 2 ** (book.downloads - 1), LONGEST_WAIT_S)
        book.not_before = time.monotonic() + wait_s
        then = "given up" if book.given_up else f"again in {wait_s:.0f} s"
        log.warning("%s: exit code %d, %s; %s", book.entry.slide_id, code, problem, then)
        if book.given_up and book.here:
            self.shelf.remove(book, problem)

    def begin_run(self) -> None:
        """Give wsi-run all slides that are here."""
        ready = self.shelf.ready()
        if self.runner is not None or self.stopping() or not ready:
            return
        if self.fruitless >= self.asked.tries:
            return
        path = self.shelf.slides / f".{self.asked.name}.now.csv"
        with path.open("w", newline="") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(("path", "slide_id"))
            for entry in (book.entry for book in ready):
                writer.writerow((entry.path(self.shelf.slides).absolute(), entry.slide_id))
        log.info("wsi-run on %d slides", len(ready))
        self.running = ready
        self.runner = self.start([*self.asked.run, str(path), *self.asked.options])

    def end_run(self) -> None:
        """Take note of a run that has ended.

        Raises:
            ManifestError: wsi-run refuses what it was told.
        """
        if self.runner is None or self.runner.poll() is None:
            return
        code, books = self.runner.returncode, self.running
        self.runner, self.running = None, ()
        self.shelf.read_reports()
        if code == 2:
            raise ManifestError("wsi-run refuses what it was told, see above")
        if code in {0, 1}:
            for book in books:
                book.runs += not book.done
        else:
            log.warning("wsi-run ended with %d", code)
        useful = code in {0, 1} or any(book.done for book in books)
        self.fruitless = 0 if useful else self.fruitless + 1

    def why(self, book: Book) -> str:
        """Say why a slide is not done though nothing more can be done."""
        if book.downloads >= self.asked.tries:
            return "could not be downloaded"
        if book.status == "failed":
            return "failed, see its report"
        if book.here:
            return "wsi-run was killed again and again, or another one is at work on it"
        return "no room: slides that failed fill the window; say --drop-failed, or more --disk"

    def take_lock(self) -> bool:
        """Wait until no child of an earlier, killed call is at work; False if asked to stop."""
        path = self.shelf.slides / f".{self.asked.name}.lock"
        self.lock = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        told = False
        while not self.stopping():
            try:
                fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if not told:
                    log.warning(
                        "waiting: another call, or what it left, is at work on this manifest"
                    )
                told = True
                time.sleep(POLL_S)
            except OSError as error:
                log.warning("no locks on this file system: %s", error)
                return True
            else:
                return True
        return False

    def start(self, words: Sequence[str]) -> subprocess.Popen[bytes]:
        """Start a child that signals reach only through this process."""
        return subprocess.Popen(words, start_new_session=True, pass_fds=[self.lock])

    def finish(self) -> None:
        """Tell the children to stop, pass further requests on, and wait for them."""
        passed = 0
        children = [child for child in (self.runner, self.fetcher) if child is not None]
        self.signals = self.signals or [signal.SIGTERM]
        while any(child.poll() is None for child in children):
            for number in self.signals[passed:]:
                for child in children:
                    child.send_signal(number if child is self.runner else signal.SIGTERM)
                passed += 1
            time.sleep(POLL_S / 4)


def main(arguments: Sequence[str] | None = None) -> int:
    """Do what was asked; return the exit code."""
    logging.basicConfig(
        level=logging.INFO, stream=sys.stderr, format="%(asctime)s %(message)s", datefmt="%H:%M:%S"
    )
    words = _parse(sys.argv[1:] if arguments is None else arguments)
    try:
        shelf = Shelf(_entries(words), slides=words.slides, out=words.out, disk=words.disk)
        return Window(asked=_asked(words), shelf=shelf).work()
    except ManifestError as error:
        log.error("Error: %s", error)
        return 2


def _entries(words: argparse.Namespace) -> list[Entry]:
    entries, out = select(read_manifest([words.manifest]))
    for entry, reason in out:
        log.info("left out: %s, %s", entry.filename, reason)
    for entry in entries:
        if entry.size > words.disk:
            raise ManifestError(f"{entry.filename} has {entry.size} bytes: say more --disk")
    return entries


def _asked(words: argparse.Namespace) -> Asked:
    download, run = shlex.split(words.download), shlex.split(words.wsi_run)
    for command in (download[0], run[0]):
        if shutil.which(command) is None:
            raise ManifestError(f"there is no {command} on the PATH")
    return Asked(
        name=words.manifest.stem,
        download=download,
        run=run,
        options=["--out", str(words.out), *words.options],
        tries=words.tries,
        wait_s=words.wait,
        drop_failed=words.drop_failed,
    )


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    words = list(arguments)
    cut = words.index("--") if "--" in words else len(words)
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("manifest", type=Path, metavar="MANIFEST")
    parser.add_argument("--slides", type=Path, required=True, metavar="DIR", help="for downloads")
    parser.add_argument("--out", type=Path, required=True, metavar="RESULTS")
    parser.add_argument(
        "--disk", type=_size, required=True, metavar="SIZE", help="for slides alone, such as 200G"
    )
    parser.add_argument(
        "--download",
        default="gdc-client download --no-related-files --no-annotations --dir {dir} {id}",
        help="{id}, {dir} and {path} are filled in; {path} is to be the slide  [%(default)s]",
    )
    parser.add_argument("--wsi-run", default="wsi-run", help="how it is called  [%(default)s]")
    parser.add_argument(
        "--tries", type=int, default=4, help="of a download, of a slide that fails  [%(default)s]"
    )
    parser.add_argument(
        "--wait", type=float, default=30, help="seconds before a second download  [%(default)s]"
    )
    parser.add_argument(
        "--drop-failed", action="store_true", help="also remove slides that fail every time"
    )
    asked = parser.parse_args(words[:cut])
    asked.options = words[cut + 1 :]
    return asked


def _size(text: str) -> int:
    try:
        return parse_bytes(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


if __name__ == "__main__":
    raise SystemExit(main())
