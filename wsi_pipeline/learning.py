"""The commands ``wsi train`` and ``wsi evaluate``: thin over ``training``."""

from __future__ import annotations

import json
import logging
import math
import os
import sys
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from wsi_pipeline.command import exit_if_interrupted, plain_errors, signals
from wsi_pipeline.errors import Interrupted

if TYPE_CHECKING:
    from wsi_pipeline.training.evaluate import Evaluation

__all__ = ["evaluate_command", "train_command"]

LINES_EVERY = 20
"""Steps between two lines where no bar can be drawn."""


@click.command("train")
@click.argument("recipe", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option(
    "--out",
    "-o",
    required=True,
    type=click.Path(file_okay=False, path_type=Path),
    help="Folder of the new bundle; a run that was interrupted goes on in OUT.training.",
)
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda, cuda:N, mps")
@click.option(
    "--set",
    "overrides",
    multiple=True,
    metavar="KEY=VALUE",
    help="Change a value of the recipe, as in --set schedule.steps=200; repeat at will.",
)
@click.option("--restart", is_flag=True, help="Throw away what an earlier run left; begin anew.")
@click.option("--verbose", "-v", is_flag=True, help="Also show what the library logs.")
def train_command(
    recipe: Path,
    out: Path,
    device: str,
    overrides: tuple[str, ...],
    restart: bool,
    verbose: bool,
) -> None:
    """Train a network as RECIPE (a TOML file) says, and write its bundle to --out.

    The same command goes on where it stopped. Several GPUs: torchrun --nproc-per-node N -m
    wsi_pipeline train RECIPE --out DIR.
    """
    logging.basicConfig(
        level=logging.INFO if verbose else logging.WARNING, stream=sys.stderr, force=True
    )
    with plain_errors(), signals() as caught:
        from wsi_pipeline.training.fit import train
        from wsi_pipeline.training.recipe import read_recipe

        plan = read_recipe(recipe, overrides)
        with _progress(plan.schedule.steps) as on_row:
            try:
                bundle = train(
                    plan,
                    out,
                    device=device,
                    restart=restart,
                    on_row=on_row,
                    stop=lambda: bool(caught),
                )
            except Interrupted as error:
                click.echo(str(error), err=True)
                exit_if_interrupted(caught)
                raise
        if int(os.environ.get("RANK", "0")):
            return  # the first rank speaks for all
        click.echo(f"{bundle.path}: {bundle.spec.description}")
        click.echo(f"look at: {out.with_name(out.name + '.training')}/curves.png")
        click.echo(f"run it with: wsi-run SLIDES... --out DIR --model {out}")


@click.command("evaluate")
@click.argument("bundle")
@click.argument("dataset", type=click.Path(exists=True, path_type=Path))
@click.option(
    "--json", "json_path", type=click.Path(dir_okay=False, path_type=Path), help="All scores."
)
@click.option("--layout", help="Layout of the folder DATASET.  [default: recognised]")
@click.option("--mpp", type=float, help="Micrometres per pixel of its images.")
@click.option(
    "--part",
    default=None,
    type=click.Choice(["train", "validation", "test", "all"]),
    help="Which part: of a recipe by default validation, of a folder all.",
)
@click.option("--images", "at_most", type=int, help="Judge at most so many.  [default: all]")
@click.option("--pictures", type=click.Path(dir_okay=False, path_type=Path), help="A PNG to draw.")
@click.option("--resamples", default=1000, show_default=True, help="Of the bootstrap; 0: none.")
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda, cuda:N, mps")
@click.option(
    "--precision",
    default="auto",
    show_default=True,
    type=click.Choice(["auto", "fp32", "bf16", "fp16", "int8"]),
)
def evaluate_command(
    bundle: str,
    dataset: Path,
    json_path: Path | None,
    pictures: Path | None,
    **how: Any,  # noqa: ANN401 - the options of score_bundle, checked by click
) -> None:
    """Score BUNDLE on DATASET: a folder of annotated images, or a recipe (.toml).

    Network and objects are those of `wsi-run`; intervals are bootstrapped over patients.
    """
    with plain_errors():
        from wsi_pipeline.training.scoring import score_bundle

        found = score_bundle(bundle, dataset, **how)
        _print_scores(found)
        if json_path is not None:
            json_path.parent.mkdir(parents=True, exist_ok=True)
            json_path.write_text(json.dumps(found.to_json(), indent=2) + "\n", encoding="utf-8")
        if pictures is not None:
            from wsi_pipeline.training.pictures import draw_examples

            draw_examples(found.examples, pictures, title="Judged images")


def _print_scores(found: Evaluation) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"{found.images} images, {found.patients} patients")
    for title in ("head", "score", "value", "95 % interval"):
        table.add_column(title)
    for head, scores in found.heads.items():
        for name, score in scores.items():
            ends = "" if score.low is None else f"{_number(score.low)} - {_number(score.high)}"
            table.add_row(head, name, _number(score.value), ends)
    Console().print(table)


def _number(value: float | None) -> str:
    return "-" if value is None or not math.isfinite(value) else f"{value:.3f}"


def _progress(steps: int) -> AbstractContextManager[Callable[[Mapping[str, Any]], None]]:
    from rich.console import Console

    console = Console(stderr=True)
    if console.is_terminal and "RANK" not in os.environ:
        return _Bar(steps, console)
    return nullcontext(lambda row: _say(row, steps))


def _say(row: Mapping[str, Any], steps: int) -> None:
    often = "losses" in row or "pretrain" in row
    if often and row["step"] % LINES_EVERY and row["step"] != steps:
        return
    # Pre-training has steps of its own.
    of = "" if "pretrain" in row else f"/{steps}"
    click.echo(f"{row['step']}{of} {describe_row(row)}", err=True)


def describe_row(row: Mapping[str, Any]) -> str:
    """Return a line of the log for people."""
    if "losses" in row:
        return "loss " + ", ".join(f"{name} {value:.3f}" for name, value in row["losses"].items())
    if "validation" in row:
        parts = [
            f"{head} {name} {value:.3f}"
            for head, scores in row["validation"].items()
            for name, value in scores.items()
            if value is not None
        ]
        return "validation " + (", ".join(parts) or "none: no image is held out")
    if "pretrain" in row:
        return f"SimCLR loss {row['pretrain']['loss']:.3f}"
    start = row["begin"]["start"]
    taken = f"{len(start['taken'])} tensors from {start['source']}" if start else "fresh weights"
    fresh = f", {len(start['fresh'])} fresh" if start else ""
    return f"{row['begin']['parameters']:,} parameters, {taken}{fresh}"


class _Bar(AbstractContextManager["Callable[[Mapping[str, Any]], None]"]):
    """A progress bar with the latest losses, and lines for what is rarer."""

    def __init__(self, steps: int, console: Any) -> None:  # noqa: ANN401 - rich is imported late
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            Progress,
            TextColumn,
            TimeRemainingColumn,
        )

        columns = (
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.description}"),
        )
        self._progress = Progress(*columns, console=console)
        self._task = self._progress.add_task("reading", total=steps)

    def __enter__(self) -> Callable[[Mapping[str, Any]], None]:
        self._progress.start()
        return self._show

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def _show(self, row: Mapping[str, Any]) -> None:
        if "pretrain" in row:
            self._progress.update(self._task, description=f"{row['step']} {describe_row(row)}")
            return
        if "losses" not in row:
            self._progress.console.print(f"{row['step']}: {describe_row(row)}", highlight=False)
            return
        self._progress.update(self._task, completed=row["step"], description=describe_row(row))
