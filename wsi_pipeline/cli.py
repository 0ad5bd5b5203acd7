"""The commands ``wsi-run`` and ``wsi``: thin over the functions of the package.

Exit codes: 0 all slides done; 1 some slide failed, the others were still done; 2 wrong use,
nothing was started; 75 interrupted by SIGTERM or SIGUSR1, 130 by Ctrl-C: run the same
command again to go on.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from wsi_pipeline.annotating import annotate_command
from wsi_pipeline.benching import bench_command
from wsi_pipeline.command import (
    EXIT_FAILED,
    EXIT_INTERRUPTED,
    arithmetic_options,
    collect_seldom,
    deaf,
    exit_if_interrupted,
    log_to_stderr,
    plain_errors,
    signals,
    tell,
)
from wsi_pipeline.importing import import_results_command
from wsi_pipeline.learning import evaluate_command, train_command
from wsi_pipeline.redaction import Redaction
from wsi_pipeline.watching import status_command, summary_command
from wsi_pipeline.zoo import models_group

if TYPE_CHECKING:
    from wsi_pipeline.api import Plan
    from wsi_pipeline.exposition import ClosingWatcher, MetricsWatcher
    from wsi_pipeline.job import RunReport
    from wsi_pipeline.progress import BarWatcher, LineWatcher

__all__ = ["main_run", "main_wsi", "run", "wsi"]


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="wsi-pipeline", prog_name="wsi")
def wsi() -> None:
    """Whole-slide histology images into tables of nuclei, glands, lumina and tissue."""


@click.command("run", context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("slides", nargs=-1, required=True)
@click.option(
    "--out",
    "-o",
    required=True,
    type=click.Path(file_okay=False, path_type=Path),
    help="Folder for the results; a run that was interrupted there goes on.",
)
@click.option(
    "--model",
    metavar="NAME|DIR",
    help="Model bundle: a name that `wsi models` lists, or a folder.  "
    "[default: the one --out was begun with, else the default of the device]",
)
@arithmetic_options
@click.option(
    "--memory",
    metavar="SIZE",
    help="What the process may hold on the host, such as 8G or 900M: tiles, batches and threads "
    "that are 'auto' follow from it.  [default: 3G on a CPU, less on a smaller machine or job]",
)
@click.option(
    "--mpp",
    type=float,
    metavar="FLOAT",
    help="Micrometres per pixel of level 0; overrides what the file says.",
)
@click.option(
    "--mask-dir",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="Own tissue masks, <slide_id>.png, any resolution, above 0 is tissue.",
)
@click.option(
    "--shard",
    metavar="I/N|auto",
    help="Take every N-th slide from the I-th on; I counts from 0. 'auto' asks the Slurm array.",
)
@click.option(
    "--keep-maps/--drop-maps",
    default=True,
    show_default=True,
    help="Keep the zarr maps after the objects are written.",
)
@click.option(
    "--only",
    type=click.Choice(["maps", "objects"]),
    help="Half of the work: 'maps' ends when the maps are complete; 'objects' makes the tables of "
    "complete maps, without the network and whatever device made them.",
)
@click.option(
    "--dask",
    metavar="ADDRESS",
    help="Run the slides on this Dask scheduler, such as tcp://10.0.0.1:8786, instead of here; "
    "--device, --memory and --workers are those of each of its workers.",
)
@click.option("--overwrite", is_flag=True, help="Do finished slides again.")
@click.option(
    "--retry-failed/--no-retry-failed",
    default=True,
    show_default=True,
    help="Do failed slides again.",
)
@click.option("--fail-fast", is_flag=True, help="Begin no further slide after one has failed.")
@click.option(
    "--dry-run",
    is_flag=True,
    help="List the slides with size, mpp and its source, state and shard; do nothing.",
)
@click.option(
    "--progress/--no-progress",
    default=None,
    help="Bars or plain lines.  [default: bars on a terminal]",
)
@click.option(
    "--log-format",
    default="text",
    show_default=True,
    type=click.Choice(["text", "json"]),
    help="Form of the plain lines, and of what --dry-run lists.",
)
@click.option(
    "--redact-paths",
    is_flag=True,
    help="Name files without the folders they lie in, in reports, logs, run.json, the summary and "
    "on the terminal. A folder that was begun so stays so.",
)
@click.option(
    "--metrics-file",
    metavar="FILE.prom",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Also keep counts of slides, seconds and objects there, for Prometheus' node_exporter; "
    "one file a process.",
)
@click.option("--verbose", "-v", is_flag=True, help="Also show what the library logs.")
def run(
    slides: tuple[str, ...],
    out: Path,
    model: str | None,
    mpp: float | None,
    mask_dir: Path | None,
    shard: str | None,
    keep_maps: bool,
    dry_run: bool,
    progress: bool | None,
    log_format: str,
    redact_paths: bool,
    metrics_file: Path | None,
    verbose: bool,
    **how: Any,  # noqa: ANN401 - the options that api.execute takes, checked by click
) -> None:
    """Turn SLIDES into tables in the folder --out.

    SLIDES are files, globs, folders, URLs, or a .txt or .csv list (columns: path, and if
    wanted slide_id, mpp, mask; in a .txt, a line a slide, and a line that begins with # is a
    comment unless a file is called so). Running the same command again goes on where it stopped.

    Exit codes: 0 all done; 1 some slide failed, all others were still done; 2 wrong use;
    75 interrupted, run the same command again; 130 Ctrl-C.
    """
    redaction = Redaction.of_run(slides, out, (model, mask_dir), wanted=redact_paths)
    json_lines = log_format == "json"
    log_to_stderr(verbose=verbose, json_lines=json_lines, redaction=redaction)
    with plain_errors(redaction), signals() as caught:
        from wsi_pipeline.api import execute, plan_run
        from wsi_pipeline.machine import keep_freed_memory, use_few_heaps
        from wsi_pipeline.memory import parse_size

        if how["memory"] is None:
            keep_freed_memory()  # faster, at some hundreds of megabytes
        else:
            use_few_heaps()
            parse_size(how["memory"])  # wrong use is told before a slide is looked for
        plan = plan_run(
            slides,
            out,
            model=model,
            mpp=mpp,
            mask_dir=mask_dir,
            shard=shard,
            keep_maps=keep_maps,
            device=how["device"],
            elsewhere=how["dask"] is not None,
            overwrite=how["overwrite"],
            redact_paths=redact_paths,
        )
        if dry_run:
            plan.check(overwrite=how["overwrite"], precision=how["precision"], only=how["only"])
            _list_plan(plan, shard, json_lines=log_format == "json")
            return
        # What lists and folders name is known only now.
        log_to_stderr(verbose=verbose, json_lines=json_lines, redaction=plan.redaction)
        watcher: ClosingWatcher = _watcher(len(plan.jobs), bars=progress, json_lines=json_lines)
        with plain_errors(plan.redaction):
            try:
                if metrics_file is not None:
                    watcher = _counting(
                        watcher, metrics_file, plan, shard=shard, device=how["device"]
                    )
                reports = execute(plan, watcher=watcher, stop=lambda: bool(caught), **how)
            finally:
                watcher.close()
        if not json_lines:
            _print_end(reports, plan)
    left = len(reports) < len(plan.jobs) or any(
        report.status == "interrupted" and not report.left for report in reports
    )
    if left:
        # A signal that comes when all is done changes nothing.
        exit_if_interrupted(caught)
    if any(report.status == "interrupted" and not report.left for report in reports):
        raise SystemExit(EXIT_INTERRUPTED)  # a folder or a scheduler went and did not come back
    if any(not report.as_asked for report in reports):
        raise SystemExit(EXIT_FAILED)


wsi.add_command(run)
wsi.add_command(train_command)
wsi.add_command(evaluate_command)
wsi.add_command(models_group)
wsi.add_command(annotate_command)
wsi.add_command(bench_command)
wsi.add_command(status_command)
wsi.add_command(summary_command)
wsi.add_command(import_results_command)


@wsi.command()
@click.argument("file", type=str)
@click.option("--mpp", type=float, help="Pixel size, where a slide does not say it.")
@click.option(
    "--redact",
    is_flag=True,
    help="Only what tells nothing of a patient or a place: no names, paths, dates or free text.",
)
def info(file: str, mpp: float | None, redact: bool) -> None:
    """Say what FILE is: a slide, table, store of maps or model (its name will do); its mpp."""
    from wsi_pipeline.describe import describe_file

    with plain_errors(redact=redact):
        for line in describe_file(file, mpp=mpp, redact=redact):
            tell(line)


@wsi.command()
@click.option("--model", metavar="NAME|DIR", help="The model to try.")
def doctor(model: str | None) -> None:
    """Check that the main job works here; exit status 1 if it does not."""
    from wsi_pipeline.doctor import examine

    failed = False
    for check in examine(model):
        failed |= not check.ok
        click.echo(f"{'ok  ' if check.ok else 'FAIL'}  {check.name:<10} {check.detail}")
    if failed:
        raise SystemExit(EXIT_FAILED)


@wsi.command()
@click.argument("out", type=click.Path(dir_okay=False, path_type=Path))
@click.option("--width", default=8192, show_default=True, help="Pixels of level 0.")
@click.option("--height", default=8192, show_default=True, help="Pixels of level 0.")
@click.option("--mpp", default=0.25, show_default=True, help="Micrometres per pixel.")
@click.option("--seed", default=0, show_default=True, help="Another seed is another slide.")
@click.option(
    "--compression", default="jpeg", show_default=True, type=click.Choice(["jpeg", "jpeg2000"])
)
def synth(out: Path, width: int, height: int, mpp: float, seed: int, compression: str) -> None:
    """Write a synthetic H&E slide OUT.svs, and its truth to OUT.truth.parquet."""
    from wsi_pipeline.synth import write_slide

    with plain_errors():
        truth = write_slide(
            out,
            width=width,
            height=height,
            mpp=mpp,
            seed=seed,
            compression="jpeg" if compression == "jpeg" else "jpeg2000",
        )
    click.echo(f"{out}: {width} x {height} px at {mpp} um; truth in {truth}")


def _watcher(total: int, *, bars: bool | None, json_lines: bool) -> BarWatcher | LineWatcher:
    from rich.console import Console

    from wsi_pipeline.progress import BarWatcher, LineWatcher

    console = Console(stderr=True)
    if bars or (bars is None and console.is_terminal and not json_lines):
        return BarWatcher(total, console)
    return LineWatcher(total, json_lines=json_lines)


def _counting(
    watcher: ClosingWatcher, path: Path, plan: Plan, *, shard: str | None, device: str
) -> MetricsWatcher:
    import os

    from wsi_pipeline.batch import parse_shard
    from wsi_pipeline.device import choose_device
    from wsi_pipeline.exposition import MetricsWatcher

    index, count = parse_shard(shard, os.environ)
    labels = {
        "shard": f"{index}/{count}",
        "device": choose_device(device) if device == "auto" else device,
        "model": plan.bundle.name,
    }
    return MetricsWatcher(watcher, path, planned=len(plan.jobs), labels=labels)


def _print_end(reports: Sequence[RunReport], plan: Plan) -> None:
    from rich.console import Console

    from wsi_pipeline.progress import final_table

    console = Console(stderr=True)
    if not console.is_terminal:
        # A log has no edge to fold at.
        console = Console(stderr=True, width=200)
    console.print(final_table(reports), soft_wrap=not console.is_terminal)
    # A shard that began at the same time may have decided on another model than was planned.
    ran = {report.model["name"] for report in reports if "name" in report.model}
    if not ran or ran == {plan.bundle.name}:
        ran = {f"{plan.bundle.name}: {plan.bundle.spec.description}"}
    click.echo(f"model {', '.join(sorted(ran))}", err=True)


def _list_plan(plan: Plan, shard: str | None, *, json_lines: bool) -> None:
    from wsi_pipeline.describe import plan_lines

    for line in plan_lines(plan, shard, json_lines=json_lines):
        tell(line)


def main_run(arguments: Sequence[str] | None = None) -> None:
    """Entry point of ``wsi-run``."""
    collect_seldom()
    try:
        run.main(args=None if arguments is None else list(arguments), prog_name="wsi-run")
    finally:
        deaf()


def main_wsi(arguments: Sequence[str] | None = None) -> None:
    """Entry point of ``wsi``."""
    collect_seldom()
    try:
        wsi.main(args=None if arguments is None else list(arguments), prog_name="wsi")
    finally:
        deaf()
