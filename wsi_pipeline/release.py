"""A bundle as it is given away: half precision, small files, its own name."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import unquote

from wsi_pipeline.bundle import CARD, METRICS, RECIPE, ModelBundle, save_bundle
from wsi_pipeline.errors import ModelBundleError
from wsi_pipeline.weights import read_weights

__all__ = ["read_metrics", "release_bundle"]

_ALT = r"!\[(?:[^][]|\[[^][]*\])*\]"
_SHOWN = re.compile(
    rf"""{_ALT}\(\s*(?:<([^>]*)>|([^)\s]+))"""
    r"""|<img\b[^>]*?\bsrc\s*=\s*(?:"([^"]*)"|'([^']*)'|([^\s"'>]+))""",
    re.IGNORECASE,
)
"""A picture in Markdown or HTML; the group that matched is where it lies."""
_BY_REFERENCE = re.compile(rf"{_ALT}(?!\()")
_ELSEWHERE = re.compile(r"(?:[a-z][a-z0-9+.-]*:|//)", re.IGNORECASE)
"""How the address of a picture on the web begins."""


def release_bundle(
    bundle: ModelBundle,
    path: Path,
    *,
    card: Path | None = None,
    metrics: Mapping[str, Any] | None = None,
    finish: Callable[[ModelBundle], object] | None = None,
) -> ModelBundle:
    """Write a bundle as it is given away: in half precision, named after its folder.

    The same bundle always gives the same bytes.

    Args:
        bundle: what was trained; its recipe comes along.
        path: the new folder; an older bundle there is replaced, anything else is not.
        card: file of the card; None: the bundle's own. Of the pictures beside it and in the
            bundle, those that it shows come along.
        metrics: content of ``metrics.json``; None: the bundle's own. Where it does not say
            ``released_from``, that is added: name and digest of ``bundle``.
        finish: told the release before it gets its name, to add files (golden tiles); what it
            raises leaves everything as it was.

    Raises:
        ModelBundleError: the bundle is damaged or its weights are broken, it would replace
            itself or what is no bundle, or there is no card or not every picture that it shows.
        DiskFullError: no space.
    """
    path = Path(os.path.abspath(path))  # noqa: PTH100 - unlike resolve(), keeps links
    if path.exists() and path.samefile(bundle.path):
        raise ModelBundleError(f"{path} is the bundle itself: release it to another folder")
    card = bundle.path / CARD if card is None else card
    if not card.is_file():
        raise ModelBundleError(f"{bundle.path} has no {CARD}; give one")
    text = card.read_text(encoding="utf-8")
    if metrics is None and (bundle.path / METRICS).is_file():
        metrics = read_metrics(bundle.path / METRICS)
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
        finish=finish,
    )


def read_metrics(path: Path) -> dict[str, Any]:
    """Return the content of a ``metrics.json``.

    Raises:
        ModelBundleError: it cannot be read, or is no JSON object.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ModelBundleError(f"{path} cannot be read: {error!r}") from error
    if not isinstance(content, dict):
        raise ModelBundleError(f"{path} is no JSON object of scores")
    return content


def _shown(card: str) -> list[str]:
    """Return the names of the pictures that a card shows, without those on the web.

    Raises:
        ModelBundleError: one is shown by reference, or lies in another folder: a bundle has none.
    """
    if found := _BY_REFERENCE.search(card):
        raise ModelBundleError(f"the card shows {found[0]} by reference: write ![...](its name)")
    names = []
    for match in _SHOWN.finditer(card):
        target = next(group for group in match.groups() if group is not None)
        if _ELSEWHERE.match(target):
            continue
        name = str(PurePosixPath(unquote(target)))
        if Path(name).name != name:
            msg = (
                f"the card shows {target}, but a bundle has no folders: write the picture's name "
                "alone and lay it beside the card"
            )
            raise ModelBundleError(msg)
        names.append(name)
    return names


def _picture(name: str, *folders: Path) -> Path:
    found = next((folder / name for folder in folders if (folder / name).is_file()), None)
    if found is None:
        raise ModelBundleError(f"the card shows {name}, which is in none of {folders}")
    if not found.resolve().is_relative_to(found.parent.resolve()):
        # A stranger's bundle could give away with it what the link leads to.
        raise ModelBundleError(f"{found} is a link out of its folder: copy the picture there")
    return found
