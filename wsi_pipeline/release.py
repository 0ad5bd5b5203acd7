"""A bundle as it is given away: half precision, small files, its own name."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from wsi_pipeline.bundle import CARD, METRICS, RECIPE, ModelBundle, save_bundle
from wsi_pipeline.errors import ModelBundleError
from wsi_pipeline.weights import read_weights

__all__ = ["release_bundle"]


def release_bundle(
    bundle: ModelBundle,
    path: Path,
    *,
    card: Path | None = None,
    metrics: Mapping[str, Any] | None = None,
) -> ModelBundle:
    """Write a bundle as it is given away: in half precision, named after its folder.

    The same bundle always gives the same bytes.

    Args:
        bundle: what was trained; its recipe comes along.
        path: the new folder; an older bundle there is replaced.
        card: file of the card; None: the bundle's own. Of the pictures beside it and in the
            bundle, those that it shows come along.
        metrics: content of ``metrics.json``; None: the bundle's own. Where it does not say
            ``released_from``, that is added: name and digest of ``bundle``.

    Raises:
        ModelBundleError: the bundle is damaged, would replace itself, or there is no card or
            not every picture that it shows.
        DiskFullError: no space.
    """
    path = Path(os.path.abspath(path))  # noqa: PTH100 - unlike resolve(), keeps links
    if path == Path(os.path.abspath(bundle.path)):  # noqa: PTH100
        raise ModelBundleError(f"{path} is the bundle itself: release it to another folder")
    card = bundle.path / CARD if card is None else card
    if not card.is_file():
        raise ModelBundleError(f"{bundle.path} has no {CARD}; give one")
    text = card.read_text(encoding="utf-8")
    if metrics is None and (bundle.path / METRICS).is_file():
        metrics = json.loads((bundle.path / METRICS).read_text(encoding="utf-8"))
    recipe = bundle.path / RECIPE
    return save_bundle(
        path,
        replace(bundle.spec, name=path.name),
        read_weights(bundle.path, bundle.weight_map),
        card=text,
        metrics={
            "released_from": {"name": bundle.name, "sha256": bundle.digest},
            **(metrics or {}),
        },
        recipe=recipe.read_text(encoding="utf-8") if recipe.is_file() else None,
        pictures={name: _picture(name, card.parent, bundle.path) for name in _shown(text)},
        half=True,
    )


def _shown(card: str) -> list[str]:
    """Return the names of the pictures that a card shows."""
    return re.findall(r"!\[[^]]*\]\(([\w.-]+)\)", card)


def _picture(name: str, *folders: Path) -> Path:
    found = next((folder / name for folder in folders if (folder / name).is_file()), None)
    if found is None:
        raise ModelBundleError(f"the card shows {name}, which is in none of {folders}")
    return found
