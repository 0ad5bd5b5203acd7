"""The log of a slide's tries: whole lines, a bounded file, and what they tell of earlier tries.

::

    logs/<slide_id>.jsonl      one JSON object a line, appended by every try
    logs/<slide_id>.jsonl.1    what came before, once the file had grown to a size

Every line is one write at the end of the file, so lines of several writers never mix (there may
be an empty one between them), and the file is opened for each, so others may rename or truncate
it (logrotate). Only the process that works on the slide puts it aside. What must outlive old
lines, how often a slide was begun and how often that killed its process, is carried over in the
first line of the new file.
"""

from __future__ import annotations

import errno
import json
import os
import uuid
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from wsi_pipeline.job import SlideJob

__all__ = ["append_event", "deaths", "earlier_starts", "older_path", "suspected"]

ROTATED_BYTES = 1 << 20
"""A log that has grown beyond is put aside, and replaces the one that was put aside before."""
LONGEST_TEXT = 1 << 14
"""Of a longer text in a line the end is kept: of a traceback, the part that tells."""
MOST_JOBS = 16
"""Jobs of a slide whose starts are counted."""


@dataclass(kw_only=True)
class _History:
    """What is to be known of the tries at a slide."""

    starts: dict[str, int] = field(default_factory=dict)
    """Tries since the slide was last done, by job."""
    job_id: str = ""
    """The job of the last try."""
    died: int = 0
    """Its tries, the last ones in a row, that were killed without having come further."""
    finished: int = 0
    """The most blocks one of them has found finished."""
    working: bool = False
    """Whether the last try has left no word of its end."""
    ahead: str = ""
    """The job for which the slide was made ready beside another one, if no word followed."""

    def add(self, event: Mapping[str, Any]) -> None:
        """Take note of a line."""
        name, job_id = event.get("event"), str(event.get("job_id", ""))
        if name in ("ahead", "start", "put_back", "end"):
            self.ahead = job_id if name == "ahead" else ""
        if name == "rotated":
            with suppress(KeyError, TypeError, ValueError, AttributeError):
                self._take_over(event["carried"])
        elif name == "start":
            if job_id != self.job_id:
                self.job_id, self.died, self.finished, self.working = job_id, 0, 0, False
            self.died, self.working = self.died + self.working, True
            self.starts[job_id] = self.starts.pop(job_id, 0) + 1
            if len(self.starts) > MOST_JOBS:
                del self.starts[next(iter(self.starts))]
        elif name == "end":
            self.died, self.working = 0, False
            if event.get("status") == "done":
                self.starts = {}
        elif name == "blocks":
            done = event.get("done")
            if isinstance(done, int) and done > self.finished:
                # It came further than ever: the slide is not what kills.
                self.finished, self.died = done, 0

    def _take_over(self, carried: Mapping[str, Any]) -> None:
        starts = {str(job_id): int(number) for job_id, number in carried["starts"].items()}
        died, finished = int(carried["died"]), int(carried["finished"])
        self.starts, self.died, self.finished = starts, died, finished
        self.job_id, self.working = str(carried["job_id"]), bool(carried["working"])
        self.ahead = str(carried.get("ahead", ""))


def append_event(path: Path, event: Mapping[str, Any]) -> None:
    """Append a line to a log, whole or, if the process is killed or the disk full, torn.

    A torn line costs itself alone: the next one begins on a line of its own.

    Args:
        path: the log, in a folder that is there.
        event: the content of the line; long texts in it lose their beginning.

    Raises:
        OSError: the log cannot be written.
    """
    if _size(path) >= ROTATED_BYTES:
        _rotate(path)
    # Not through a link, which could lead to any file.
    flags = os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW
    descriptor = os.open(path, flags, 0o644)
    try:
        end = os.fstat(descriptor).st_size
        torn = end > 0 and os.pread(descriptor, 1, end - 1) not in (b"\n", b"")
        _write_whole(descriptor, (b"\n" if torn else b"") + _line(event))
    finally:
        os.close(descriptor)


def older_path(path: Path) -> Path:
    """Return where the lines lie that were in a log before."""
    return path.with_name(f"{path.name}.1")


def deaths(job: SlideJob) -> int:
    """Count the tries at this job, the last ones in a row, whose process was killed.

    They left neither a word nor a finished block more than the try before.
    """
    history = _read(job.log_path)
    died = history.died + history.working
    # Naming a job reads its slide: only where there is something to count. A run asks this of all
    # its slides before the first is begun.
    return died if died and history.job_id == job.job_id else 0


def suspected(job: SlideJob) -> int:
    """Count the deaths at this job, and one more if it was made ready when a process was killed.

    That one may have been of the slide that was at work then: no slide is given up for it, but
    nothing is done beside a slide that may kill.
    """
    ahead = _read(job.log_path).ahead
    return deaths(job) + bool(ahead and ahead == job.job_id)


def earlier_starts(job: SlideJob) -> int:
    """Count the tries at this job since the slide was last done."""
    return _read(job.log_path).starts.get(job.job_id, 0)


def _read(path: Path) -> _History:
    history = _History()
    for file in (older_path(path), path):
        for event in _events(file):
            history.add(event)
    return history


def _events(path: Path) -> Iterator[dict[str, Any]]:
    try:
        text = path.read_text(errors="replace")
    except OSError:
        return
    # Not splitlines, which also parts lines at characters that JSON leaves as they are.
    yield from map(_parsed, text.split("\n"))


def _parsed(line: str) -> dict[str, Any]:
    """Return an event of a log; nothing where a kill tore the line."""
    try:
        event = json.loads(line)
    except (ValueError, RecursionError):
        return {}
    return event if isinstance(event, dict) else {}


def _rotate(path: Path) -> None:
    """Put a log aside and begin a new one with what must not be forgotten.

    A process that is killed in between leaves the old one alone, which is read, too.
    """
    carried = asdict(_read(path))
    beside = path.with_name(f".{path.name}~{uuid.uuid4().hex}.partial")
    try:
        beside.write_bytes(_line({"event": "rotated", "carried": carried}))
        os.replace(path, older_path(path))
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


def _line(event: Mapping[str, Any]) -> bytes:
    short = {name: _shortened(value) for name, value in event.items()}
    return json.dumps(short).encode() + b"\n"


def _shortened(value: object) -> object:
    if isinstance(value, str) and len(value) > LONGEST_TEXT:
        return f"[...] {value[-LONGEST_TEXT:]}"
    return value


def _write_whole(descriptor: int, line: bytes) -> None:
    if os.write(descriptor, line) < len(line):
        raise OSError(errno.ENOSPC, "only part of a line was written; is the disk full?")


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0
