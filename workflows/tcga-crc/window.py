"""Download, process and remove the slides of a manifest, a bounded number of bytes at a time.

    python window.py MANIFEST --slides DIR --out RESULTS --disk 200G [-- options of wsi-run]

First wsi-run --dry-run is asked what is done, by this model and undamaged, and what it refuses.
While wsi-run then works on the slides that are here, the next ones are downloaded, as far as the
manifest's sizes say that they fit. A slide is removed when its report says that it is done. What
has happened is read from the disk alone, so this may be stopped or killed at any moment, and the
same line goes on; with --overwrite among the options, every slide is done once, however often
that happens (RESULTS/window/MANIFEST.overwrite.json notes what was there before).

As a job array: a manifest a task (`prepare.py split`), one RESULTS for all, and --disk is what each
task may hold.

SIGTERM, SIGUSR1 and Ctrl-C are passed on to wsi-run; the download is ended.

Exit codes: 0 all slides are done; 1 some failed or could not be downloaded, all others are done;
2 wrong use; 75 interrupted, run the same line again; 130 Ctrl-C.
"""

from __future__ import annotations

import csv
import fcntl
import json
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from asked import Asked, find_asked, find_entries, parse
from manifest import ManifestError
from shelf import Anew, Book, Shelf

log = logging.getLogger("window")

POLL_S = 0.2
LONGEST_WAIT_S = 900.0
STOPPING = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


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
            if self.take_lock() and self.look():
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
        if done == len(books):
            self.anew().end()
        return 0 if done == len(books) else 1

    def anew(self) -> Anew:
        """Return the note of what was there before slides were to be done anew."""
        path = self.asked.out / "window" / f"{self.asked.name}.overwrite.json"
        return Anew(path, self.asked.options)

    def look(self) -> bool:
        """See what is there, by wsi-run's own words; False if asked to stop meanwhile.

        Raises:
            ManifestError: wsi-run refuses what it was told; nothing was downloaded.
        """
        # Without --overwrite: that would allow another model, which wants all slides at once.
        options = [word for word in self.asked.options if word != "--overwrite"]
        words = [*self.asked.run, str(self.write_list("all", self.shelf.books)), "--dry-run"]
        code, told, tries = -1, b"", 0
        while code not in {0, 2} and tries < self.asked.tries:
            child = self.start([*words, *options, "--log-format", "json"], stdout=subprocess.PIPE)
            while child.returncode is None:
                if self.stopping():
                    _end_group(child, signal.SIGKILL)
                    child.communicate()
                    return False
                with suppress(subprocess.TimeoutExpired):
                    told = child.communicate(timeout=POLL_S)[0]
            code, tries = child.returncode, tries + 1
        if code:
            raise ManifestError(
                f"wsi-run refuses what it was told, see above (exit code {code}). A window cannot "
                "overwrite with another model, which wants all slides at once: use another --out"
            )
        anew = self.anew()
        if "--overwrite" in self.asked.options:
            anew.begin(self.shelf)
            self.shelf.look(_states(told), anew)
        else:
            anew.end()
            self.shelf.look(_states(told), None)
        return True

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
        _end_group(self.fetcher, signal.SIGKILL)  # helpers, if it was killed
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
        path = self.write_list("now", ready)
        log.info("wsi-run on %d slides", len(ready))
        self.running = ready
        self.runner = self.start([*self.asked.run, str(path), *self.asked.options])

    def write_list(self, name: str, books: Sequence[Book]) -> Path:
        """Write a slide list for wsi-run, and return where."""
        path = self.shelf.slides / f".{self.asked.name}.{name}.csv"
        with path.open("w", newline="") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(("path", "slide_id"))
            for entry in (book.entry for book in books):
                writer.writerow((entry.path(self.shelf.slides).absolute(), entry.slide_id))
        return path

    def end_run(self) -> None:
        """Take note of a run that has ended.

        Raises:
            ManifestError: wsi-run refuses what it was told.
        """
        if self.runner is None or self.runner.poll() is None:
            return
        code, books = self.runner.returncode, self.running
        self.runner, self.running = None, ()
        # With 0 it says that all is as asked: also what it has found done, and left as it was.
        self.shelf.read_reports(believed=books if code == 0 else ())
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

    def start(self, words: Sequence[str], *, stdout: int | None = None) -> subprocess.Popen[bytes]:
        """Start a child that signals reach only through this process."""
        return subprocess.Popen(words, start_new_session=True, pass_fds=[self.lock], stdout=stdout)

    def finish(self) -> None:
        """End the download, tell wsi-run to stop, pass further requests on, and wait for it."""
        if self.fetcher is not None:
            # It resumes from what it has. Its helpers would hold the lock, and wait for ever.
            _end_group(self.fetcher, signal.SIGTERM)
            self.fetcher.wait()
        passed = 0
        self.signals = self.signals or [signal.SIGTERM]
        while self.runner is not None and self.runner.poll() is None:
            for number in self.signals[passed:]:
                self.runner.send_signal(number)
                passed += 1
            time.sleep(POLL_S / 4)


def _states(told: bytes) -> dict[str, str]:
    """Return how far slides are, by slide_id, from what wsi-run --dry-run lists.

    Raises:
        ManifestError: it is no such list.
    """
    try:
        events = [json.loads(line) for line in told.splitlines()]
        return {e["slide_id"]: e["state"] for e in events if e["event"] == "slide"}
    except (ValueError, KeyError, TypeError) as error:
        raise ManifestError(f"the list of wsi-run --dry-run is not understood: {error}") from error


def _end_group(child: subprocess.Popen[bytes], number: signal.Signals) -> None:
    with suppress(ProcessLookupError):
        os.killpg(child.pid, number)


def main(arguments: Sequence[str] | None = None) -> int:
    """Do what was asked; return the exit code."""
    logging.basicConfig(
        level=logging.INFO, stream=sys.stderr, format="%(asctime)s %(message)s", datefmt="%H:%M:%S"
    )
    words = parse(sys.argv[1:] if arguments is None else arguments, __doc__)
    try:
        shelf = Shelf(find_entries(words), slides=words.slides, out=words.out, disk=words.disk)
        return Window(asked=find_asked(words), shelf=shelf).work()
    except ManifestError as error:
        log.error("Error: %s", error)
        return 2


if __name__ == "__main__":
    raise SystemExit(main())
