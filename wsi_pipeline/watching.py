"""The commands ``wsi status`` and ``wsi summary``: thin over what a results folder tells."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from wsi_pipeline.command import EXIT_FAILED, plain_errors

if TYPE_CHECKING:
    from wsi_pipeline.cohort import Cohort, SlideState

__all__ = ["status_command", "summary_command"]


@click.command("status")
@click.argument("folder", type=click.Path(exists=True, file_okay=False, path_type=Path))
def status_command(folder: Path) -> None:
    """Say of each slide of a run in FOLDER whether it is done, failed, interrupted or missing."""
    from wsi_pipeline.cohort import describe_totals, read_cohort

    with plain_errors():
        cohort = read_cohort(folder)
    for own in cohort.states:
        click.echo(_line(own))
    click.echo(describe_totals(cohort.totals))


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
    click.echo("wrote " + " and ".join(map(str, files)))
    _print_totals(cohort)
    if check and cohort.totals["done"] < len(cohort.states):
        raise SystemExit(EXIT_FAILED)


def _print_totals(cohort: Cohort) -> None:
    from wsi_pipeline.cohort import attention_last, describe_totals

    reports = [own.report for own in cohort.states if own.state == "done" and own.report]
    kinds = dict.fromkeys(kind for report in reports for kind in report.counts)
    counts = [f"{sum(report.counts.get(k, 0) for report in reports):,} {k}" for k in kinds]
    area = sum(report.tissue_mm2 for report in reports)
    hours = sum(report.seconds.get("total", 0.0) for report in reports) / 3600
    click.echo(describe_totals(cohort.totals))
    click.echo("done: " + ", ".join([*counts, f"{area:,.2f} mm2 of tissue", f"{hours:.2f} h"]))
    for own in attention_last(cohort.states):
        if own.state != "done":
            click.echo(_line(own))


def _line(own: SlideState) -> str:
    return f"{own.slide_id}\t{own.state}" + (f"\t{own.reason}" * bool(own.reason))
