"""One table over all slides of a run: ``summary.parquet`` and ``summary.csv``.

The same columns and types for every run, one without slides included. Files are replaced only
when their content changes, so writing them again, or by two processes at once, does no harm.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from wsi_pipeline.checked import plain_text
from wsi_pipeline.cohort import Cohort, SlideState
from wsi_pipeline.durable import durable_file, sweep_shared
from wsi_pipeline.errors import SlideBusyError
from wsi_pipeline.job import STAGES, RunReport
from wsi_pipeline.lease import remove_if_dead

__all__ = ["KINDS", "SUMMARY_SCHEMA", "summary_table", "write_summary"]

KINDS = ("nucleus", "gland", "lumen")
"""Kinds of objects that have a column in every summary; others follow where a model has them."""

_TIME = pa.timestamp("ms", tz="UTC")

SUMMARY_SCHEMA = pa.schema(
    [
        pa.field("slide_id", pa.string(), nullable=False),
        pa.field("path", pa.string()),
        pa.field("status", pa.string(), nullable=False),
        pa.field("error_code", pa.string()),
        pa.field("error_message", pa.string()),
        pa.field("warnings", pa.string()),
        pa.field("mpp_x", pa.float64()),
        pa.field("mpp_y", pa.float64()),
        pa.field("mpp_source", pa.string()),
        pa.field("tissue_mm2", pa.float64()),
        *(pa.field(f"n_{kind}", pa.int64()) for kind in KINDS),
        pa.field("truncated", pa.int64()),
        pa.field("unreadable_fraction", pa.float64()),
        *(pa.field(f"seconds_{stage}", pa.float64()) for stage in (*STAGES, "total")),
        pa.field("mm2_per_s", pa.float64()),
        pa.field("mpx_per_s", pa.float64()),
        pa.field("device_busy_s", pa.float64()),
        pa.field("bottleneck", pa.string()),
        pa.field("peak_rss_mb", pa.float64()),
        pa.field("device", pa.string()),
        pa.field("precision", pa.string()),
        pa.field("model_name", pa.string()),
        pa.field("model_sha256", pa.string()),
        pa.field("table_bytes", pa.int64()),
        pa.field("restarts", pa.int64()),
        pa.field("started", _TIME),
        pa.field("finished", _TIME),
        pa.field("host", pa.string()),
        pa.field("job_id", pa.string()),
    ]
)
"""Columns of the summary. ``status`` is ``done``, ``failed``, ``interrupted``, ``running`` or
``missing``; what is not known of a slide is null."""


def write_summary(cohort: Cohort) -> tuple[Path, Path]:
    """Write ``summary.parquet`` and ``summary.csv`` of a run into its folder.

    Args:
        cohort: the run, as it was looked at.

    Returns:
        The two files.

    Raises:
        WsiPipelineError: the disk is full.
        OSError: the folder cannot be written.
    """
    table = summary_table(cohort)
    sink = io.BytesIO()
    pq.write_table(table, sink, compression="zstd")
    text = io.StringIO()
    lines = csv.writer(text, lineterminator="\n")
    lines.writerow(table.column_names)
    lines.writerows([_cell(value) for value in row.values()] for row in table.to_pylist())
    files = cohort.folder / "summary.parquet", cohort.folder / "summary.csv"
    for path, content in zip(files, (sink.getvalue(), text.getvalue().encode()), strict=True):
        _replace(path, content)
    # Killed after its last word, a process leaves a lease that nobody takes again.
    ended = (own.slide_id for own in cohort.states if own.state in ("done", "failed"))
    for name in (".run.lease", *(f"logs/{slide_id}.lease" for slide_id in ended)):
        with suppress(SlideBusyError, OSError):
            remove_if_dead(cohort.folder / name)
    # What belongs to no slide, nobody else would sweep up.
    for path in (*files, *(cohort.folder / name for name in ("run.json", "clock", "logs/clock"))):
        sweep_shared(path)
    return files


def summary_table(cohort: Cohort) -> pa.Table:
    """Return one row a slide, sorted by id.

    Objects of kinds beyond :data:`KINDS` get columns at the end, ``n_<kind>``.
    """
    kinds = {kind for own in cohort.states if own.report for kind in own.report.counts}
    # Of two that are spelt alike, one: no process of ours writes such.
    more = sorted({plain_text(kind): kind for kind in sorted(kinds - set(KINDS))}.values())
    schema = SUMMARY_SCHEMA
    for kind in more:
        schema = schema.append(pa.field(plain_text(f"n_{kind}"), pa.int64()))
    rows = [
        {plain_text(name): _plain(value) for name, value in _row(own, (*KINDS, *more)).items()}
        for own in cohort.states
    ]
    model = {name: cohort.model[name] for name in ("name", "sha256")}
    metadata = {"wsi_pipeline": json.dumps({"model": model}, sort_keys=True)}
    return pa.Table.from_pylist(rows, schema=schema).replace_schema_metadata(metadata)


def _row(own: SlideState, kinds: Sequence[str]) -> dict[str, Any]:
    row: dict[str, Any] = {
        "slide_id": own.slide_id,
        "path": own.path,
        "status": own.state,
        "error_message": own.reason or None,
    }
    return row if own.report is None else row | _measured(own.report, kinds)


def _measured(report: RunReport, kinds: Sequence[str]) -> dict[str, Any]:
    """Return the columns that a report fills; what a slide that failed did not reach is null."""
    # A slide that is done carries its first warning where a failed one has its error.
    error = None if report.done or report.left else report.error
    tissue = report.tissue_mm2 if report.done or report.tissue_mm2 else None
    return {
        "error_code": error and error["code"],
        "error_message": (error and error["message"]) or (report.left and report.reason) or None,
        "warnings": "; ".join(dict.fromkeys(w["code"] for w in report.warnings)) or None,
        **{f"mpp_{name}": value for name, value in (report.mpp or {}).items()},
        "tissue_mm2": tissue,
        **{f"n_{kind}": report.counts.get(kind) for kind in kinds},
        "truncated": report.truncated if report.done else None,
        "unreadable_fraction": report.unreadable_fraction if report.done else None,
        **{f"seconds_{stage}": report.seconds.get(stage) for stage in (*STAGES, "total")},
        "mm2_per_s": report.throughput.get("mm2_per_s"),
        "mpx_per_s": report.throughput.get("mpx_per_s"),
        "device_busy_s": report.device_busy_s,
        "bottleneck": report.bottleneck,
        "peak_rss_mb": report.peak_rss_mb,
        "device": report.device,
        "precision": report.precision,
        "model_name": report.model.get("name"),
        "model_sha256": report.model.get("sha256"),
        "table_bytes": report.outputs.get(f"objects/{report.slide_id}.parquet", {}).get("bytes"),
        "restarts": report.restarts,
        "started": _moment(report.started),
        "finished": _moment(report.finished),
        "host": report.host or None,
        "job_id": report.job_id or None,
    }


def _moment(text: str) -> datetime | None:
    try:
        return datetime.fromisoformat(text).astimezone(UTC)
    except (ValueError, OverflowError):  # the last hour of the year 9999, west of Greenwich
        return None


def _plain(value: object) -> object:
    return plain_text(value) if isinstance(value, str) else value


def _cell(value: object) -> object:
    return value.isoformat(timespec="milliseconds") if isinstance(value, datetime) else value


def _replace(path: Path, content: bytes) -> None:
    """Give a file its content, unless it has it already."""
    with suppress(OSError):
        if path.read_bytes() == content:
            return
    with durable_file(path) as beside:
        beside.write_bytes(content)
