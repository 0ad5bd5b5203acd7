"""A bundle of cerberus-lite without one of its heads.

python -m workflows.weights.without_head BUNDLE HEAD --out FOLDER

Heads share the encoder and nothing else, so the others answer as before, to the bit.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import click

from wsi_pipeline.bundle import CARD, METRICS, RECIPE, open_bundle, save_bundle
from wsi_pipeline.release import read_metrics
from wsi_pipeline.weights import read_weights


@click.command()
@click.argument("bundle", type=click.Path(path_type=Path, exists=True, file_okay=False))
@click.argument("head")
@click.option("--out", type=click.Path(path_type=Path), required=True, help="The new bundle.")
def without_head(bundle: Path, head: str, out: Path) -> None:
    """Write BUNDLE without HEAD."""
    whole = open_bundle(bundle)
    heads = {own.name: own for own in whole.spec.heads}
    if head not in heads:
        raise click.BadParameter(f"{bundle} has no head {head!r}, only {sorted(heads)}")
    needed = [own.name for own in heads.values() if head in (own.parent, own.classifies)]
    if needed:
        raise click.BadParameter(f"{', '.join(needed)} cannot be without {head}")
    scales = {name: scale for name, scale in whole.spec.options["scales"].items() if name != head}
    spec = replace(
        whole.spec,
        name=out.name,
        heads=tuple(own for own in whole.spec.heads if own.name != head),
        options={**whole.spec.options, "scales": scales},
    )
    tensors = read_weights(whole.path, whole.weight_map)
    kept = {name: own for name, own in tensors.items() if not name.startswith(f"heads.{head}.")}
    save_bundle(
        out,
        spec,
        kept,
        card=(bundle / CARD).read_text(encoding="utf-8"),
        metrics=read_metrics(bundle / METRICS),
        recipe=(bundle / RECIPE).read_text(encoding="utf-8"),
    )


if __name__ == "__main__":
    without_head()
