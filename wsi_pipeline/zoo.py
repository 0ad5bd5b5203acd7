"""The command ``wsi models``: lists the bundles, imports, releases and guards them."""

from __future__ import annotations

from pathlib import Path

import click

from wsi_pipeline.command import EXIT_FAILED, plain_errors

__all__ = ["models_group"]


@click.group("models", invoke_without_command=True)
@click.pass_context
def models_group(context: click.Context) -> None:
    """List the model bundles; import one, release one, or see that it still computes the same."""
    if context.invoked_subcommand is not None:
        return
    from wsi_pipeline.bundle import list_bundles

    with plain_errors():
        for bundle in list_bundles():
            mark = default_mark(bundle.name)
            click.echo(f"{bundle.name}{mark}\t{bundle.digest[:12]}\t{bundle.spec.description}")


@models_group.command("import-cerberus")
@click.argument("weights", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option(
    "--out", "-o", required=True, type=click.Path(path_type=Path), help="Folder of the new bundle."
)
def import_cerberus_command(weights: Path, out: Path) -> None:
    """Convert upstream's checkpoint WEIGHTS (weights.tar) to a bundle."""
    from wsi_pipeline.bundle import import_cerberus

    with plain_errors():
        bundle = import_cerberus(weights, out)
    click.echo(f"{bundle.path}: {bundle.spec.description}")
    click.echo(f"run it with: wsi-run SLIDES... --out DIR --model {out}")


@models_group.command("release")
@click.argument("bundle")
@click.option(
    "--out", "-o", required=True, type=click.Path(path_type=Path), help="Folder of the release."
)
@click.option(
    "--card",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="Its card.md; pictures that it shows may lie beside it.",
)
@click.option(
    "--metrics",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="Its metrics.json.",
)
def release_command(bundle: str, out: Path, card: Path | None, metrics: Path | None) -> None:
    """Write BUNDLE as it is given away: half precision, small files, golden tiles, own name."""
    from wsi_pipeline.bundle import find_bundle
    from wsi_pipeline.golden import write_golden
    from wsi_pipeline.release import read_metrics, release_bundle

    with plain_errors():
        released = release_bundle(
            find_bundle(bundle),
            out,
            card=card,
            metrics=None if metrics is None else read_metrics(metrics),
            finish=write_golden,
        )
    size = sum((released.path / name).stat().st_size for name in released.weight_map)
    click.echo(f"{out}: {len(released.weight_map)} weight files, {size / 2**20:.1f} MiB")


@models_group.command("golden")
@click.argument("bundle")
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda, cuda:N, mps")
@click.option(
    "--precision",
    default="auto",
    show_default=True,
    type=click.Choice(["auto", "fp32", "bf16", "fp16", "int8"]),
)
@click.option("--write", is_flag=True, help="Write golden.json anew, from float32 on this CPU.")
def golden_command(bundle: str, device: str, precision: str, write: bool) -> None:
    """See that BUNDLE says about its golden tiles what it said when it was made."""
    from wsi_pipeline.bundle import find_bundle
    from wsi_pipeline.golden import check_golden, write_golden

    with plain_errors():
        found = find_bundle(bundle)
        if write:
            click.echo(f"{write_golden(found)}")
            return
        faults = check_golden(found, device=device, precision=precision)
    for fault in faults:
        click.echo(fault)
    if faults:
        raise SystemExit(EXIT_FAILED)
    click.echo(f"{found.name}: as expected")


def default_mark(name: str) -> str:
    """Return what a list says behind a bundle's name: whether, and where, it is the default."""
    from wsi_pipeline.bundle import DEFAULTS, default_bundle

    kinds = [kind for kind in DEFAULTS if default_bundle(kind) == name]
    if len(kinds) == len(DEFAULTS):
        return " (default)"
    return "".join(f" (default on a {'GPU' if kind == 'cuda' else 'CPU'})" for kind in kinds)
