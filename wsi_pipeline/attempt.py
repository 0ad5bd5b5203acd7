"""One try at a slide: its lock, its log, its stages, and how it ends in a report.

:func:`record` is the one place where an exception becomes a failed slide.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import socket
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Any

from wsi_pipeline.checked import parse_json
from wsi_pipeline.errors import DiskFullError, Interrupted, JobError, WsiPipelineError
from wsi_pipeline.job import (
    STAGES,
    RunReport,
    SlideJob,
    Status,
    file_digest,
    folder_facts,
    versions,
)
from wsi_pipeline.machine import peak_rss_mb, release_memory

__all__ = ["Attempt", "record", "refuse"]

logger = logging.getLogger(__name__)


class Attempt:
    """One try at a slide: times its stages, logs its events, and fills its report.

    It holds the lock of the slide (on its log file) until it is closed or the process ends.

    Raises:
        JobError: another process is at work on the slide in the same results folder.
    """

    def __init__(self, job: SlideJob) -> None:
        self.job = job
        self._lock = _lock(job)
        self.stage_name = "open"
        self._outer: str | None = None
        self.predicted_px = 0
        """Pixels of the working grid that this try has predicted."""
        self.report = RunReport(
            slide_id=job.slide_id,
            path=job.path,
            job_id=job.job_id,
            model={"name": job.model_name, "sha256": job.model_digest},
            seconds=dict.fromkeys((*STAGES, "total"), 0.0),
            versions=versions(),
            started=_now(),
            host=socket.gethostname(),
            restarts=_earlier_starts(job),
        )
        self._begun = time.perf_counter()
        self.log("start", job_id=job.job_id, slide=job.path)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Time a stage; an error inside it is reported under its name.

        A stage within another takes its seconds from that one.
        """
        outer, self._outer = self._outer, name
        self.stage_name = name
        begun = time.perf_counter()
        try:
            yield
        finally:
            # What one stage hoards, the next would add to.
            release_memory()
            self._outer = outer
            spent = time.perf_counter() - begun
            self.add_seconds(name, spent)
            if outer is not None:
                self.add_seconds(outer, -spent)
        self.stage_name = outer or name
        self.log("stage", stage=name, seconds=round(self.report.seconds[name], 3))

    def add_seconds(self, stage: str, seconds: float) -> None:
        """Book time on a stage."""
        self.report.seconds[stage] += seconds

    def warn(self, code: str, message: str) -> None:
        """Note something the user should know though the slide goes on."""
        warning = {"code": code, "stage": self.stage_name, "message": message}
        self.report.warnings.append(warning)
        self.log("warning", level="warning", code=code, message=message)

    def log(self, event: str, *, level: str = "info", **details: object) -> None:
        """Append a line to the slide's log."""
        line = {
            "time": _now(),
            "level": level,
            "event": event,
            "slide_id": self.job.slide_id,
            "host": socket.gethostname(),
            "pid": os.getpid(),
            **details,
        }
        try:
            self.job.log_path.parent.mkdir(parents=True, exist_ok=True)
            with self.job.log_path.open("a") as file:
                file.write(json.dumps(line) + "\n")
        except OSError as problem:
            # A full disk must not keep the slide from ending with the right code.
            logger.warning("%s: no line could be logged: %s", self.job.slide_id, problem)

    def add_output(self, path: Path) -> None:
        """List a finished file (or folder of maps) in the report."""
        name = path.relative_to(self.job.out).as_posix()
        if path.is_dir():
            self.report.outputs[name] = folder_facts(path)
        else:
            self.report.outputs[name] = {
                "bytes": path.stat().st_size,
                "sha256": file_digest(path),
            }

    def close(self, status: Status, error: dict[str, str] | None = None) -> RunReport:
        """Write the report: the claim."""
        report = self.report
        report.status = status
        # A slide that is done carries its first warning's code where a failed one has its error.
        report.error = error or (
            report.warnings[0] if status == "done" and report.warnings else None
        )
        report.seconds["total"] = time.perf_counter() - self._begun
        report.throughput = {
            "mm2_per_s": round(report.tissue_mm2 / report.seconds["total"], 4),
            "mpx_per_s": round(self.predicted_px / 1e6 / report.seconds["total"], 4),
        }
        report.seconds = {name: round(value, 3) for name, value in report.seconds.items()}
        stages = {name: report.seconds[name] for name in STAGES}
        report.bottleneck = max(stages, key=lambda name: stages[name])
        report.peak_rss_mb = round(peak_rss_mb(), 1)
        report.finished = _now()
        try:
            report.write(self.job.report_path)
        except (OSError, DiskFullError) as problem:
            report.status = "failed"
            report.error = error or {
                "code": DiskFullError.code,
                "stage": "write",
                "message": f"the report could not be written: {problem}",
            }
            logger.warning("%s: %s", self.job.slide_id, problem)
        self.log("end", status=report.status, error=report.error, seconds=report.seconds["total"])
        self.release()
        return report

    def release(self) -> None:
        """Let other processes at the slide."""
        if self._lock is not None:
            self._lock.close()


def record(attempt: Attempt, work: Callable[[], None], *, last: bool) -> RunReport | None:
    """Do a part of a slide's work; the one place where an exception becomes a failed slide.

    Args:
        attempt: the try this work belongs to.
        work: raises to fail.
        last: whether the slide is done when this part succeeds.

    Returns:
        The report when the slide is done, failed or interrupted; None when it goes on.
    """
    try:
        work()
        return attempt.close("done") if last else None
    except Interrupted:
        return attempt.close("interrupted")
    except Exception as error:  # the slide boundary: everything becomes a report
        code, message = _explain(error)
        attempt.log("error", level="error", code=code, traceback=traceback.format_exc())
        return attempt.close(
            "failed", {"code": code, "stage": attempt.stage_name, "message": message}
        )
    except BaseException:  # Ctrl-C in a notebook: no claim, but the slide is free again
        attempt.release()
        raise


def refuse(job: SlideJob, error: Exception) -> RunReport:
    """Return the report of a slide that could not even be begun; it is not written."""
    code, message = _explain(error)
    return RunReport(
        slide_id=job.slide_id,
        path=job.path,
        job_id="",
        error={"code": code, "stage": "begin", "message": message},
        seconds=dict.fromkeys((*STAGES, "total"), 0.0),
    )


def _explain(error: Exception) -> tuple[str, str]:
    """Return the stable code and the message of an error."""
    if isinstance(error, WsiPipelineError):
        return error.code, str(error)
    if isinstance(error, MemoryError):
        return "out_of_memory", "the host ran out of memory; use fewer --workers or smaller tiles"
    if isinstance(error, RuntimeError) and "allocate memory" in str(error):
        return "out_of_memory", f"the host ran out of memory ({error}); use smaller tiles"
    return "internal", f"{type(error).__name__}: {error}"


def _earlier_starts(job: SlideJob) -> int:
    """Count the tries at this job since it was last done."""
    try:
        # a torn write may end within a letter
        text = job.log_path.read_text(errors="replace")
    except OSError:
        return 0
    starts = 0
    for line in map(_parsed, text.splitlines()):
        if line.get("event") == "start" and line.get("job_id") == job.job_id:
            starts += 1
        if line.get("event") == "end" and line.get("status") == "done":
            starts = 0
    return starts


def _lock(job: SlideJob) -> IO[str] | None:
    """Lock a slide's log file against other processes; None where the file system cannot."""
    try:
        job.log_path.parent.mkdir(parents=True, exist_ok=True)
        file = job.log_path.open("a")
    except OSError:
        return None  # nothing can be logged either; the first result to be written will tell
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        file.close()
        msg = (
            f"another process is at work on {job.slide_id} in {job.out}; wait for it, or use "
            "another --out"
        )
        raise JobError(msg) from error
    except OSError as error:
        logger.warning("%s: no locks on this file system: %s", job.slide_id, error)
        file.close()
        return None
    return file


def _parsed(line: str) -> dict[str, Any]:
    """Return an event of a log; nothing where a kill tore the line."""
    try:
        event = parse_json(line)
    except ValueError:
        return {}
    return event if isinstance(event, dict) else {}


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")
