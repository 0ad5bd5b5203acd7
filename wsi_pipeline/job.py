"""What was asked of one slide, what happened, and where its files lie.

Done is a claim, not a file: a slide is done when its report says so for this very job
and the files it lists are there in the size it lists. The report is written last.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
from contextlib import suppress
from dataclasses import asdict, dataclass, field, fields
from functools import cache, cached_property
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

from wsi_pipeline.checked import fits, misfits, parse_json
from wsi_pipeline.durable import durable_file
from wsi_pipeline.errors import JobError
from wsi_pipeline.redaction import Redaction

__all__ = [
    "STAGES",
    "RunReport",
    "SlideJob",
    "Status",
    "file_digest",
    "finished_report",
    "folder_facts",
    "read_report",
    "versions",
]

STAGES = ("open", "tissue", "predict", "polygonize", "write")
_MISSING = "missing"
_MOST = 1e10
"""Seconds, or mm2 of tissue, in a report: sums of them over any cohort are numbers, too."""
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
    redaction: Redaction = field(default_factory=Redaction, compare=False, repr=False)
    """What reports and logs of the slide pass; tables and maps name no folder anyway."""

    def __post_init__(self) -> None:
        # Every path below is made of it. A list is checked with better words (batch); this is
        # for ids that come another way, such as from run.json.
        if self.slide_id in ("", ".", "..") or os.sep in self.slide_id or "\0" in self.slide_id:
            raise JobError(f"a slide_id is the name of a file and no path: {self.slide_id!r}")

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

    @property
    def lease_path(self) -> Path:
        """There while a process is at work on the slide."""
        return self.out / "logs" / f"{self.slide_id}.lease"

    def missing_input(self) -> str | None:
        """Return the slide or the mask if it is a file that cannot be read here."""
        if _slide_content(self.path)[0] == _MISSING:
            return self.path
        return str(self.mask) if _mask_content(self.mask)[0] == _MISSING else None

    @cached_property
    def job_id(self) -> str:
        """Name of this job: changes when the slide, its mpp or mask, or the model changes."""
        (content, _), (mask, _) = self._begun_with
        identity = {
            "slide": self.slide_id,
            "content": content,
            "mpp": self.mpp,
            "mask": mask,
            "model": self.model_digest,
        }
        text = json.dumps(identity, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    @cached_property
    def _begun_with(self) -> tuple[_Content, _Content]:
        return _slide_content(self.path), _mask_content(self.mask)

    def changed_input(self) -> Path | None:
        """Return the slide or the mask if it is no longer what it was when the job was named.

        Noticed are other sizes, times of change, and contents where :attr:`job_id` looks; of
        a URL nothing is.
        """
        slide, mask = self._begun_with
        if _slide_content(self.path) != slide:
            return Path(self.path)
        return self.mask if _mask_content(self.mask) != mask else None


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
    pid: int = 0
    """Number of the process on ``host``."""
    device_busy_s: float | None = None
    """Seconds in which the network ran on its device; None where no network was asked for."""
    batch_job: str = ""
    """The job of a cluster that did it: for Slurm, the number of the array's task."""
    left: str = ""
    """What was left to another run on purpose: ``objects``, after ``--only maps``."""

    @property
    def done(self) -> bool:
        """Whether the slide's results are complete."""
        return self.status == "done"

    @property
    def reason(self) -> str:
        """One line on why the slide is not done, or done with a warning; or an empty string."""
        if self.left:
            return f"its maps are complete, its {self.left} are left to another run"
        error = self.error or {}
        return f"{error.get('code')}: {error.get('message')}" if error else ""

    @property
    def as_asked(self) -> bool:
        """Whether all was done that this run was asked for."""
        return self.done or bool(self.left)

    def write(self, path: Path) -> None:
        """Write the report; it appears under its name complete or not at all."""
        with durable_file(path) as beside:
            beside.write_text(json.dumps(asdict(self), indent=2) + "\n")


def read_report(path: Path) -> RunReport | None:
    """Read a report; None where there is none or it is of no use."""
    try:
        if not path.is_file():  # a pipe would be waited for
            return None
        data = parse_json(path.read_text())
        if not isinstance(data, dict) or misfits(RunReport, data):
            return None
        known = {f.name for f in fields(RunReport)}
        report = RunReport(**{key: value for key, value in data.items() if key in known})
        return report if _is_sound(report) else None
    except (OSError, ValueError, TypeError):
        return None


def _is_sound(report: RunReport) -> bool:
    """Return whether the parts of a report are of the kinds that all who read it rely on."""
    maps = (report.counts, report.seconds, report.throughput, report.model, report.versions)
    amounts = (*report.seconds.values(), report.tissue_mm2, report.device_busy_s or 0.0)
    return (
        all(isinstance(part, dict) for part in maps)
        and all(0 <= amount <= _MOST for amount in amounts)
        and all(fits(facts, {"bytes": int, "sha256": str}) for facts in report.outputs.values())
        and all(map(_is_name_inside, report.outputs))
        and all("code" in warning for warning in report.warnings)
        and (report.error is None or {"code", "message"} <= report.error.keys())
        and (report.mpp is None or fits(report.mpp, {"x": float, "y": float, "source": str}))
    )


def _is_name_inside(name: str) -> bool:
    """Return whether a name may be that of a file in the results folder."""
    return name.isprintable() and not name.startswith("/") and ".." not in name.split("/")


def finished_report(job: SlideJob) -> RunReport | None:
    """Return the report of a job that is done, or None if there is still work.

    Files must have the size the report lists. Maps that were dropped, or removed since, are no
    work that is left: what was to be made of them is there.
    """
    report = read_report(job.report_path)
    if report is None or not report.done or report.job_id != job.job_id:
        return None
    maps = job.maps_path.relative_to(job.out).as_posix()
    for name, facts in report.outputs.items():
        path = job.out / name
        try:
            if name != maps and path.stat().st_size != facts.get("bytes"):
                return None
        except OSError:
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
    return dict(_versions())


@cache  # reading what is installed takes longer than some stages of a small slide
def _versions() -> tuple[tuple[str, str], ...]:
    found = [("python", platform.python_version())]
    for name in ("wsi-pipeline", "torch", "numpy", "openslide-python", "zarr", "pyarrow", "numba"):
        with suppress(metadata.PackageNotFoundError):
            found.append((name, metadata.version(name)))
    return tuple(found)


_Content = tuple[str | None, int]
"""A digest that takes part in :attr:`SlideJob.job_id`, and the time of the last change."""


def _slide_content(path: str) -> _Content:
    """Return a digest of a slide's size and of samples all over it, or that it is missing."""
    if "://" in path:
        return path, 0
    block, samples = 1 << 13, 64
    try:
        with Path(path).open("rb") as file:
            changed = os.fstat(file.fileno()).st_mtime_ns
            size = file.seek(0, os.SEEK_END)
            digest = hashlib.sha256(str(size).encode())
            for number in range(samples):
                file.seek(max(0, size - block) * number // (samples - 1))
                digest.update(file.read(block))
    except OSError:
        return _MISSING, 0
    return digest.hexdigest(), changed


def _mask_content(path: Path | None) -> _Content:
    if path is None:
        return None, 0
    try:
        return file_digest(path), path.stat().st_mtime_ns
    except OSError:
        return _MISSING, 0
