"""The command ``wsi bench``: thin over ``bench``."""

from __future__ import annotations

import json
import logging
import sys
import tempfile
from pathlib import Path
from typing import Any

import click

from wsi_pipeline.command import arithmetic_options, exit_if_interrupted, plain_errors, signals
from wsi_pipeline.errors import Interrupted

__all__ = ["bench_command"]


@click.command("bench")
@click.option(
    "--slide", metavar="FILE", help="The slide to measure on.  [default: a synthetic one]"
)
@click.option("--model", metavar="NAME|DIR", help="Model bundle.  [default: that of the device]")
@arithmetic_options
@click.option(
    "--mpp",
    type=float,
    metavar="FLOAT",
    help="Micrometres per pixel of level 0; overrides what the slide says.  [synthetic: 0.25]",
)
@click.option(
    "--size",
    "size_px",
    type=int,
    metavar="PX",
    help="Side of the synthetic slide in level-0 pixels.  [default: 8192; for a GPU 24576]",
)
@click.option(
    "--tiles",
    type=int,
    metavar="N",
    help="Measure at most N neighbouring tiles, from the middle of the tissue.  [default: all]",
)
@click.option(
    "--repeat", default=3, show_default=True, metavar="N", help="Rounds; medians are shown."
)
@click.option(
    "--scratch",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="Folder on the disk to measure; nothing stays in it.  [default: the system's]",
)
@click.option(
    "--json",
    "json_file",
    is_flag=False,
    flag_value="-",
    metavar="[FILE|-]",
    type=click.Path(dir_okay=False, allow_dash=True),
    help="Write the result as JSON, to FILE or (-, or nothing) to the standard output.",
)
@click.option("--verbose", "-v", is_flag=True, help="Also show what the library logs.")
def bench_command(
    scratch: Path | None,
    json_file: str | None,
    verbose: bool,
    **options: Any,  # noqa: ANN401 - the fields of BenchOptions, checked there
) -> None:
    """Measure every stage of the pipeline, alone and as a whole, and name the bottleneck.

    Each stage is compared with the least that its result costs on this machine, measured
    in the same rounds on the same tiles. Leave the machine alone meanwhile.
    """
    logging.basicConfig(
        level=logging.INFO if verbose else logging.WARNING, stream=sys.stderr, force=True
    )
    with plain_errors(), signals() as caught:
        from wsi_pipeline.bench import BenchOptions, bench
        from wsi_pipeline.durable import durable_file
        from wsi_pipeline.machine import keep_freed_memory

        keep_freed_memory()  # as wsi-run does
        asked = BenchOptions(**options)
        with tempfile.TemporaryDirectory(prefix="wsi-bench-", dir=scratch) as folder:
            try:
                result = bench(
                    asked,
                    Path(folder),
                    stop=lambda: bool(caught),
                    say=lambda text: click.echo(text, err=True),
                )
            except Interrupted as error:
                click.echo(str(error), err=True)
                exit_if_interrupted(caught)
                raise
        document = json.dumps(result.to_json(), indent=2)
        if json_file not in (None, "-"):
            with durable_file(Path(json_file)) as beside:
                beside.write_text(document + "\n", encoding="utf-8")
    # The standard output holds one thing: JSON where that is asked for there, else the table.
    for line in result.lines():
        click.echo(line, err=json_file == "-")
    if json_file == "-":
        click.echo(document)
