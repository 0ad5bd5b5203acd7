"""The command ``wsi import-cerberus``: upstream's result files to our tables."""

from __future__ import annotations

from pathlib import Path

import click

from wsi_pipeline.command import plain_errors

__all__ = ["import_results_command"]


@click.command("import-cerberus")
@click.argument("file", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--slide", required=True, metavar="SLIDE", help="The slide that FILE is about.")
@click.option(
    "--out",
    "-o",
    required=True,
    type=click.Path(dir_okay=False, path_type=Path),
    help="The table of objects, a .parquet file; an older one is replaced.",
)
@click.option("--mpp", type=float, help="Pixel size, where the slide does not say it.")
@click.option(
    "--memory",
    metavar="SIZE",
    help="What FILE may take in memory, such as 8G; a million nuclei count as 4.5G.  "
    "[default: three quarters of what the machine or the job has]",
)
def import_results_command(
    file: Path, slide: str, out: Path, mpp: float | None, memory: str | None
) -> None:
    """Convert FILE.dat, a result of upstream Cerberus, to a table of objects.

    Such files are pickles; nothing in FILE is run. For upstream's checkpoint see
    `wsi models import-cerberus`.
    """
    if out.suffix != ".parquet":
        raise click.BadParameter(f"{out} must end in .parquet", param_hint="--out")
    with plain_errors():
        from wsi_pipeline.cerberus_results import import_results
        from wsi_pipeline.memory import parse_size

        limit = None if memory is None else parse_size(memory)
        found = import_results(file, slide, out, mpp=mpp, limit_bytes=limit)
    counts = ", ".join(f"{count:,} {kind}" for kind, count in found.counts.items()) or "no objects"
    click.echo(
        f"{out}: {counts}; {found.layout} layout, {found.mended} contours mended, "
        f"{found.left_out} empty ones left out"
    )
