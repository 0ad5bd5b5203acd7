"""The card that a trained bundle begins its life with: facts filled in, judgements left open."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from wsi_pipeline.spec import ModelSpec
from wsi_pipeline.training.begin import Beginning
from wsi_pipeline.training.recipe import Recipe

__all__ = ["write_card"]


def write_card(
    recipe: Recipe, spec: ModelSpec, beginning: Beginning, metrics: Mapping[str, Any]
) -> str:
    """Return the text of ``card.md``.

    Args:
        recipe: what was done.
        spec: of the network.
        beginning: the data and the starting weights.
        metrics: what goes into ``metrics.json``.
    """
    parameters = sum(parameter.numel() for parameter in beginning.network.parameters())
    heads = "\n".join(
        f"| {head.name} | {head.kind} | {', '.join(head.classes) or head.object_kind} |"
        for head in spec.heads
    )
    data = "\n".join(
        f"| {row['source']} | {row['part']} | {row['images']} | {row['patients']} "
        f"| {', '.join(row['heads'])} |"
        for row in metrics["data"]
    )
    start = beginning.report.source if beginning.report else "fresh weights"
    return _CARD.format(
        name=spec.name,
        description=recipe.description or "(one sentence: what it is for)",
        architecture=spec.architecture,
        parameters=parameters,
        mpp=spec.mpp,
        start=start,
        steps=metrics["steps"],
        step=metrics["step"],
        seed=recipe.seed,
        heads=heads,
        data=data,
        scores=_scores(metrics.get("validation", {})),
    )


def _scores(validation: Mapping[str, Mapping[str, float | None]]) -> str:
    rows = [
        f"| {head} | {name} | {'undefined' if value is None else f'{value:.3f}'} |"
        for head, scores in validation.items()
        for name, value in scores.items()
    ]
    if not rows:
        return "None: no image was held out."
    return "\n".join(["| head | score | value |", "|---|---|---|", *rows])


_CARD = """# {name}

{description}

`{architecture}`, {parameters:,} parameters, {mpp} um a pixel; started from {start}; the moving
average of the weights after step {step} of {steps}, seed {seed}. The recipe is `train.toml`.

| head | kind | finds |
|---|---|---|
{heads}

## Data

| source | part | images | patients | heads |
|---|---|---|---|---|
{data}

Licence of the data and of these weights: (fill in; weights trained on non-commercial data are not
for commercial use)

## Scores on the validation images, while training

{scores}

These chose the weights, so they flatter. `wsi evaluate` on images of another source says more.

![Learning curves](curves.png)

## Not for

Diagnosis. Stains, scanners, organs and magnifications that the data above does not show.
"""
