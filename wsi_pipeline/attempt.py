"""One try at a slide: its lock, its log, its stages, and how it ends in a report.

:func:`record` is the one place where an exception becomes a failed slide.
"""

from __future__ import annotations

import errno
import logging
import os
import socket
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

from wsi_pipeline.durable import FULL, disk_errors
from wsi_pipeline.errors import (
    DiskFullError,
    FolderGoneError,
    Interrupted,
    OutOfMemoryError,
    SlideBusyError,
    WsiPipelineError,
)
from wsi_pipeline.history import append_event, earlier_starts
from wsi_pipeline.job import (
    STAGES,
    RunReport,
    SlideJob,
    Status,
    file_digest,
    folder_facts,
    versions,
)
from wsi_pipeline.lease import Lease, slurm_job
from wsi_pipeline.machine import SAID_OF_NO_MEMORY, peak_rss_mb, release_memory

__all__ = ["Attempt", "record", "refuse", "take_lease"]

logger = logging.getLogger(__name__)


class Attempt:
    """One try at a slide: times its stages, logs its events, and fills its report.

    It holds the lease of the slide until it is closed or the process ends.

    Raises:
        SlideBusyError: another process is at work on the slide in the same results folder.
        DiskFullError, OSError: the folder cannot be written.
    """

    def __init__(self, job: SlideJob, lease: Lease | None = None, *, ahead: bool = False) -> None:
        """Begin.

        Args:
            job: what is tried.
            lease: of the slide, if it is taken already.
            ahead: whether the slide is only made ready: its turn comes with :meth:`begin`, or
                it is put back.
        """
        self.job = job
        self._lease = lease or take_lease(job)
        self.stage_name = "open"
        self._outer: str | None = None
        self._log_failed = False
        self.predicted_px = 0
        """Pixels of the working grid that this try has predicted."""
        self.report = RunReport(
            slide_id=job.slide_id,
            path=job.redaction.text(job.path),
            job_id=job.job_id,
            model={"name": job.model_name, "sha256": job.model_digest},
            seconds=dict.fromkeys((*STAGES, "total"), 0.0),
            versions=versions(),
            started=_now(),
            host=socket.gethostname(),
            pid=os.getpid(),
            restarts=earlier_starts(job),
            batch_job=slurm_job()[0] or "",
        )
        self._begun = time.perf_counter()
        self._ready: float | None = None
        self.log("ahead" if ahead else "start", job_id=job.job_id, slide=job.path)

    def stand_by(self) -> None:
        """Note that the slide is ready and waits for its turn; the time until then is not its."""
        self._ready = time.perf_counter()
        self._lease.note("waiting for its turn", 0, 0)

    def begin(self) -> None:
        """Note that the turn of a slide that was made ready ahead has come."""
        if self._ready is not None:
            self._begun += time.perf_counter() - self._ready
        self._lease.note("predict", 0, 0)
        self.log("start", job_id=self.job.job_id, slide=self.job.path)

    def put_back(self) -> None:
        """Let others at a slide that was made ready and whose turn does not come."""
        self.log("put_back")
        self.release()

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

    @property
    def lost(self) -> bool:
        """Whether another process has taken the slide over: nothing may be published."""
        return self._lease.lost

    def require_ours(self) -> None:
        """Make sure that the folder is there and no other process has taken the slide over.

        Raises:
            SlideBusyError: one has, while this process gave no sign of life.
            FolderGoneError: the results folder is.
        """
        if self.lost:
            if not self.job.lease_path.parent.is_dir():
                msg = f"the results folder {self.job.out} is gone; when it is back, run again"
                raise FolderGoneError(msg)
            msg = (
                "this process was stopped for so long that another has taken the slide over; "
                "nothing of this try is kept"
            )
            raise SlideBusyError(msg)

    def advance(self, stage: str, done: int, total: int) -> None:
        """Note how far the slide is, for those who watch from elsewhere."""
        self._lease.note(stage, done, total)

    def add_seconds(self, stage: str, seconds: float) -> None:
        """Book time on a stage."""
        self.report.seconds[stage] += seconds

    def warn(self, code: str, message: str) -> None:
        """Note something the user should know though the slide goes on."""
        message = self.job.redaction.text(message)
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
            append_event(self.job.log_path, self.job.redaction.value(line))
        except OSError as problem:
            # A full disk must not keep the slide from ending with the right code.
            if not self._log_failed:
                logger.warning("%s: no line could be logged: %s", self.job.slide_id, problem)
            self._log_failed = True

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
        report, redaction = self.report, self.job.redaction
        error = redaction.value(error)
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
            self.require_ours()
            report.write(self.job.report_path)
        except (OSError, WsiPipelineError) as problem:
            code, message = _explain(problem)
            message = f"the report could not be written: {redaction.text(message)}"
            report.status = "interrupted" if _is_of_others(problem) else "failed"
            report.error = error or {"code": code, "stage": "write", "message": message}
            logger.warning("%s: %s", self.job.slide_id, problem)
        self.log("end", status=report.status, error=report.error, seconds=report.seconds["total"])
        self.release()
        return report

    def release(self) -> None:
        """Let other processes at the slide."""
        self._lease.release()


def take_lease(job: SlideJob) -> Lease:
    """Take the lease of a slide.

    Raises:
        SlideBusyError: another process is at work on it.
        DiskFullError, OSError: the folder cannot be written.
    """
    with disk_errors(job.lease_path):
        return Lease.take(job.lease_path)


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
        status: Status = "interrupted" if _is_of_others(error) else "failed"
        return attempt.close(
            status, {"code": code, "stage": attempt.stage_name, "message": message}
        )
    except BaseException:  # Ctrl-C in a notebook: no claim, but the slide is free again
        attempt.release()
        raise


def refuse(job: SlideJob, error: Exception) -> RunReport:
    """Return the report of a slide that could not even be begun; it is not written."""
    code, message = _explain(error)
    return RunReport(
        slide_id=job.slide_id,
        path=job.redaction.text(job.path),
        job_id="",
        status="interrupted" if _is_of_others(error) else "failed",
        error={"code": code, "stage": "begin", "message": job.redaction.text(message)},
        seconds=dict.fromkeys((*STAGES, "total"), 0.0),
    )


def _is_of_others(error: Exception) -> bool:
    """Whether neither the slide nor its job is to blame: the same command goes on."""
    return isinstance(error, FolderGoneError | SlideBusyError)


def _explain(error: Exception) -> tuple[str, str]:
    """Return the stable code and the message of an error."""
    if isinstance(error, WsiPipelineError):
        return error.code, str(error)
    if isinstance(error, OSError) and error.errno in FULL:
        return DiskFullError.code, f"no space is left: {error}"
    if _is_out_of_memory(error):
        reason = f" ({error})" if str(error) else ""
        msg = f"the host ran out of memory{reason}; use fewer --workers, smaller tiles or --memory"
        return OutOfMemoryError.code, msg
    return "internal", f"{type(error).__name__}: {error}"


def _is_out_of_memory(error: Exception) -> bool:
    """Tell whether an error is one of the many names that libraries have for a lack of memory."""
    if isinstance(error, MemoryError) or getattr(error, "errno", None) == errno.ENOMEM:
        return True
    # C++; and threads, which need memory for their stacks
    said = (*SAID_OF_NO_MEMORY, "bad_alloc", "start new thread", "launch worker thread")
    return any(words in str(error) for words in said)


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")
