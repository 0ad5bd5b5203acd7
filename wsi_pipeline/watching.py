"""The commands ``wsi status`` and ``wsi summary``: thin over what a results folder tells."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING

import click

from wsi_pipeline.command import EXIT_CTRL_C, EXIT_FAILED, plain_errors, tell

if TYPE_CHECKING:
    from wsi_pipeline.cohort import Cohort

__all__ = ["status_command", "summary_command"]


@click.command("status")
@click.argument("folder", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="One JSON object instead of lines.")
@click.option(
    "--watch",
    type=click.FloatRange(min=0.1),
    metavar="SECONDS",
    help="Look again every so often, until every slide is done or failed; leaves out slides that "
    "are done or not begun. With --json, one object a line.",
)
def status_command(folder: Path, as_json: bool, watch: float | None) -> None:
    """Say how far the slides of a run in FOLDER are, also while jobs run on other machines.

    One line a slide: done; running (where, how far, when it last gave a sign of life); failed
    (why); interrupted; missing. Then totals, slides an hour, the share of time in which the
    devices computed, and an estimate of the time left while any process is at work.
    """
    with plain_errors():
        while True:
            cohort = _show_status(folder, as_json=as_json, redraw=watch is not None)
            settled = cohort.totals["done"] + cohort.totals["failed"] == len(cohort.states)
            if watch is None or settled:
                return
            try:
                time.sleep(watch)
            except KeyboardInterrupt:
                raise SystemExit(EXIT_CTRL_C) from None


def _show_status(folder: Path, *, as_json: bool, redraw: bool) -> Cohort:
    import json

    from wsi_pipeline.cohort import read_cohort
    from wsi_pipeline.describe import status_document, status_lines
    from wsi_pipeline.pace import measure_pace, slide_bytes

    cohort = read_cohort(folder)
    at_work = cohort.totals["running"] and cohort.totals["done"]
    pace = measure_pace(cohort, slide_bytes(cohort) if at_work else None)
    if as_json:
        document = status_document(cohort, pace)
        click.echo(json.dumps(document, indent=None if redraw else 2))
        return cohort
    lines = list(status_lines(cohort, pace, brief=redraw))
    if redraw:
        click.clear()  # does nothing where there is no terminal
    for line in lines:
        tell(line)
    return cohort


@click.command("summary")
@click.argument("folder", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--check", is_flag=True, help="Exit with 1 unless every slide is done.")
@click.option(
    "--verify", is_flag=True, help="Compute the SHA-256 of all results anew; reads all of them."
)
def summary_command(folder: Path, check: bool, verify: bool) -> None:
    """Write FOLDER/summary.parquet and FOLDER/summary.csv: a row for each slide of a run.

    May be repeated at any time, also while jobs run. Prints the totals, and the slides that are
    not done with the reason, failed ones last.

    Exit codes: 0 written; 1 with --check, some slide is not done; 2 wrong use.
    """
    from wsi_pipeline.cohort import read_cohort
    from wsi_pipeline.summary import write_summary

    with plain_errors():
        cohort = read_cohort(folder, verify=verify)
        files = write_summary(cohort)
    tell("wrote " + " and ".join(map(str, files)))
    _print_totals(cohort)
    if check and cohort.totals["done"] < len(cohort.states):
        raise SystemExit(EXIT_FAILED)


def _print_totals(cohort: Cohort) -> None:
    from wsi_pipeline.cohort import attention_last, describe_totals
    from wsi_pipeline.describe import state_line

    reports = [own.report for own in cohort.states if own.state == "done" and own.report]
    kinds = dict.fromkeys(kind for report in reports for kind in report.counts)
    counts = [f"{sum(report.counts.get(k, 0) for report in reports):,} {k}" for k in kinds]
    area = sum(report.tissue_mm2 for report in reports)
    hours = sum(report.seconds.get("total", 0.0) for report in reports) / 3600
    click.echo(describe_totals(cohort.totals))
    tell("done: " + ", ".join([*counts, f"{area:,.2f} mm2 of tissue", f"{hours:.2f} h"]))
    for own in attention_last(cohort.states):
        if own.state != "done":
            tell(state_line(own, cohort))
