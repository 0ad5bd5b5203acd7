"""What earlier tries at a slide have left: whether it stands, and how it is taken back."""

from __future__ import annotations

from wsi_pipeline.durable import partial_path, remove_tree, sweep
from wsi_pipeline.errors import DiskFullError, OutOfMemoryError, SlideError, StoreError
from wsi_pipeline.job import RunReport, SlideJob, finished_report, read_report
from wsi_pipeline.lease import slurm_job
from wsi_pipeline.store import PredictionStore

__all__ = [
    "clear",
    "ended",
    "failed_report",
    "made_before_restart",
    "require_maps",
    "require_slide",
    "sweep_up",
]

LACKS = DiskFullError.code, OutOfMemoryError.code
"""Errors that tell nothing of what was made before them."""


def failed_report(job: SlideJob) -> RunReport | None:
    """Return the report of this very job, if it has failed."""
    report = read_report(job.report_path)
    same = report is not None and report.job_id == job.job_id and report.status == "failed"
    return report if same else None


def made_before_restart(report: RunReport) -> bool:
    """Whether an earlier start of the same Slurm job did this: it is not overwritten again."""
    number, restart = slurm_job()
    return restart > 0 and report.batch_job == number


def require_slide(job: SlideJob) -> None:
    """Refuse to take back what is done for a slide that nobody can see now.

    A disk may not be mounted, or the slide was removed to make room.

    Raises:
        SlideError: the slide is done, and its file or its mask is not there.
    """
    report = read_report(job.report_path)
    missing = job.missing_input()
    if report is not None and report.done and missing is not None:
        msg = (
            f"{missing} is not there or cannot be read, so it cannot be told whether it is still "
            "the slide whose results are in the folder; they stay as they are. Bring it back, or "
            "leave it out."
        )
        raise SlideError(msg)


def require_maps(job: SlideJob) -> None:
    """Refuse to report on a slide that is done what can only be that there are no maps of it.

    Raises:
        StoreError: the maps that this job asks for are not there.
    """
    report = read_report(job.report_path)
    if report is None or not report.done:
        return  # whose report may say so
    try:
        store = PredictionStore.open(job.maps_path)
        if store.meta["made"].get("job") != job.job_id:
            raise StoreError(f"{job.maps_path} was made by other options, or of another slide.")
    except StoreError as error:
        msg = (
            f"{error} The tables that were made of it stay as they are; to make them again, run "
            "with --overwrite and without --only."
        )
        raise StoreError(msg) from error


def ended(job: SlideJob) -> bool:
    """Whether the last try at this job came to an end that --overwrite throws away.

    One that was interrupted goes on, and so does one that lacked room: its maps are good.
    """
    failed = failed_report(job)
    lacked = failed is not None and (failed.error or {}).get("code") in LACKS
    return finished_report(job) is not None or (failed is not None and not lacked)


def clear(job: SlideJob, *, maps: bool) -> None:
    """Take back the claim and the tables.

    Args:
        job: what is begun.
        maps: whether finished and half-finished maps go, too.
    """
    job.report_path.unlink(missing_ok=True)
    for path in (job.objects_path, job.tissue_path, job.preview_path):
        # A table of another pixel size or mask must not outlive its report.
        path.unlink(missing_ok=True)
    if maps:
        remove_tree(partial_path(job.maps_path))
        remove_tree(job.maps_path)


def sweep_up(job: SlideJob) -> None:
    """Sweep up after processes that were killed."""
    for path in (
        job.objects_path,
        job.tissue_path,
        job.preview_path,
        job.maps_path,
        job.report_path,
        job.lease_path,
        job.log_path,
    ):
        sweep(path)
