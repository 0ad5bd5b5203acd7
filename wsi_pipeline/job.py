"""What was asked of one slide, what happened, and where its files lie.

Done is a claim, not a file: a slide is done when its report says so for this very job
and the files it lists are there in the size it lists. The report is written last.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import os
import platform
import socket
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from datetime import UTC, datetime
from functools import cached_property
from importlib import metadata
from pathlib import Path
from typing import IO, Any, Literal

from wsi_pipeline.durable import durable_file
from wsi_pipeline.errors import DiskFullError, Interrupted, JobError, WsiPipelineError
from wsi_pipeline.machine import peak_rss_mb

__all__ = [
    "STAGES",
    "Attempt",
    "RunReport",
    "SlideJob",
    "file_digest",
    "finished_report",
    "read_report",
    "record",
    "refuse",
    "versions",
]

logger = logging.getLogger(__name__)

STAGES = ("open", "tissue", "predict", "polygonize", "write")
Status = Literal["done", "failed", "interrupted"]


@dataclass(frozen=True, kw_only=True)
class SlideJob:
    """One slide, and what was asked of it.

    Device, precision and tile size are not part of a job: they change the maps a little,
    not what was asked, so a slide that is done on one device is done. They are kept in the
    maps and tables themselves.
    """

    path: str
    """File name or URL of the slide."""
    slide_id: str
    """File name without its last extension."""
    out: Path
    """The results folder."""
    model_name: str
    """Name of the model bundle."""
    model_digest: str
    """SHA-256 of the model bundle."""
    mpp: float | None = None
    """Pixel size of level 0 in micrometres; None: what the file says."""
    mask: Path | None = None
    """Tissue mask given by the user."""
    keep_maps: bool = True
    """Whether the maps stay after the objects are written."""

    @property
    def objects_path(self) -> Path:
        """The table of objects."""
        return self.out / "objects" / f"{self.slide_id}.parquet"

    @property
    def tissue_path(self) -> Path:
        """The table of tissue regions."""
        return self.out / "tissue" / f"{self.slide_id}.parquet"

    @property
    def maps_path(self) -> Path:
        """The store of maps."""
        return self.out / "maps" / f"{self.slide_id}.zarr"

    @property
    def preview_path(self) -> Path:
        """The picture for a first look."""
        return self.out / "previews" / f"{self.slide_id}.png"

    @property
    def report_path(self) -> Path:
        """The claim."""
        return self.out / "reports" / f"{self.slide_id}.json"

    @property
    def log_path(self) -> Path:
        """One JSON object a line, appended by every attempt."""
        return self.out / "logs" / f"{self.slide_id}.jsonl"

    @cached_property
    def job_id(self) -> str:
        """Name of this job: changes when the slide, its mpp or mask, or the model changes."""
        identity = {
            "slide": self.slide_id,
            "content": _fingerprint(self.path),
            "mpp": self.mpp,
            "mask": file_digest(self.mask) if self.mask and self.mask.is_file() else None,
            "model": self.model_digest,
        }
        text = json.dumps(identity, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]


@dataclass(kw_only=True)
class RunReport:
    """What happened to one slide; the content of ``reports/<slide_id>.json``."""

    slide_id: str
    path: str
    job_id: str
    status: Status = "failed"
    error: dict[str, str] | None = None
    warnings: list[dict[str, str]] = field(default_factory=list)
    mpp: dict[str, Any] | None = None
    tissue_mm2: float = 0.0
    counts: dict[str, int] = field(default_factory=dict)
    truncated: int = 0
    unreadable_fraction: float = 0.0
    seconds: dict[str, float] = field(default_factory=dict)
    throughput: dict[str, float] = field(default_factory=dict)
    bottleneck: str | None = None
    peak_rss_mb: float = 0.0
    device: str | None = None
    precision: str | None = None
    model: dict[str, str] = field(default_factory=dict)
    outputs: dict[str, dict[str, Any]] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    started: str = ""
    finished: str = ""
    host: str = ""
    restarts: int = 0

    @property
    def done(self) -> bool:
        """Whether the slide's results are complete."""
        return self.status == "done"

    @property
    def reason(self) -> str:
        """One line on why the slide is not done, or an empty string."""
        return f"{self.error['code']}: {self.error['message']}" if self.error else ""

    def write(self, path: Path) -> None:
        """Write the report; it appears under its name complete or not at all."""
        with durable_file(path) as beside:
            beside.write_text(json.dumps(asdict(self), indent=2) + "\n")


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
        """Time a stage; an error inside it is reported under its name."""
        self.stage_name = name
        begun = time.perf_counter()
        try:
            yield
        finally:
            self.add_seconds(name, time.perf_counter() - begun)
        self.log("stage", stage=name, seconds=round(self.report.seconds[name], 3))

    def add_seconds(self, stage: str, seconds: float) -> None:
        """Book time on a stage."""
        self.report.seconds[stage] += seconds

    def warn(self, code: str, message: str) -> None:
        """Note something the user should know though the slide goes on."""
        self.report.warnings.append({"code": code, "message": message})
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
        report.error = error
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


def read_report(path: Path) -> RunReport | None:
    """Read a report; None where there is none or it is of no use."""
    try:
        data = json.loads(path.read_text())
        known = {f.name for f in fields(RunReport)}
        return RunReport(**{key: value for key, value in data.items() if key in known})
    except (OSError, ValueError, TypeError, AttributeError):
        return None


def finished_report(job: SlideJob) -> RunReport | None:
    """Return the report of a job that is done, or None if there is still work.

    Files must have the size the report lists; of the maps' folder only the presence is
    checked, because it holds thousands of files.
    """
    report = read_report(job.report_path)
    if report is None or not report.done or report.job_id != job.job_id:
        return None
    maps = job.maps_path.relative_to(job.out).as_posix()
    if job.keep_maps and maps not in report.outputs:
        return None
    for name, facts in report.outputs.items():
        if name == maps and not job.keep_maps:
            continue
        path = job.out / name
        if not path.exists() or (path.is_file() and path.stat().st_size != facts["bytes"]):
            return None
    return report


def file_digest(path: Path) -> str:
    """Return the SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def folder_facts(path: Path) -> dict[str, Any]:
    """Return the bytes in a folder, and a SHA-256 over the names and digests of its files."""
    digest, size = hashlib.sha256(), 0
    for file in sorted(p for p in path.rglob("*") if p.is_file()):
        size += file.stat().st_size
        digest.update(f"{file.relative_to(path).as_posix()} {file_digest(file)}\n".encode())
    return {"bytes": size, "sha256": digest.hexdigest()}


def versions() -> dict[str, str]:
    """Return the versions that may matter for a result."""
    found = {"python": platform.python_version()}
    for name in ("wsi-pipeline", "torch", "numpy", "openslide-python", "zarr", "pyarrow", "numba"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def _explain(error: Exception) -> tuple[str, str]:
    """Return the stable code and the message of an error."""
    if isinstance(error, WsiPipelineError):
        return error.code, str(error)
    if isinstance(error, MemoryError):
        return "out_of_memory", "the host ran out of memory; use fewer --workers or smaller tiles"
    if isinstance(error, RuntimeError) and "allocate memory" in str(error):
        return "out_of_memory", f"the host ran out of memory ({error}); use smaller tiles"
    return "internal", f"{type(error).__name__}: {error}"


def _fingerprint(path: str) -> str:
    """Return a digest of a slide's size and of samples all over it; "missing" where unreadable."""
    if "://" in path:
        return path
    block, samples = 1 << 13, 64
    try:
        with Path(path).open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            digest = hashlib.sha256(str(size).encode())
            for number in range(samples):
                file.seek(max(0, size - block) * number // (samples - 1))
                digest.update(file.read(block))
    except OSError:
        return "missing"
    return digest.hexdigest()


def _earlier_starts(job: SlideJob) -> int:
    """Count the tries at this job since it was last done."""
    try:
        text = job.log_path.read_text()
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
        event = json.loads(line)
    except ValueError:
        return {}
    return event if isinstance(event, dict) else {}


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")
