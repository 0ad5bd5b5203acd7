"""The scores as a Markdown table for a bundle's card."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

__all__ = ["markdown"]

OBJECTS = {
    "pq": "PQ",
    "f1": "F1 at IoU 0.5",
    "dice": "Dice of the pixels",
}
COLUMNS: dict[str, dict[str, str]] = {
    "nuclei": {
        "pq": "PQ",
        "pq_mean_of_images": "PQ, mean of images",
        "f1": "F1 at IoU 0.5",
        "aji": "AJI",
        "dice": "Dice of the pixels",
        "detection_f1": "F1 of centres within 3 um",
    },
    "gland": {
        "object_dice": "object Dice",
        "f1": "F1 at IoU 0.5",
        "pq": "PQ",
        "dice": "Dice of the pixels",
    },
    "whole gland": {"object_dice": "object Dice", "f1": "F1 at IoU 0.5", "pq": "PQ"},
    "lumen": OBJECTS,
    "one gland": {
        "best_dice": "Dice of the best object",
        "coverage": "share of the gland covered",
        "found": "glands with an object above IoU 0.5",
        "crop_dice": "Dice in the crop, all else as background",
    },
    "gland area": {"called_share": "area called gland"},
}
"""By measure, the scores shown and their names."""
NAMES = {"gland area": "gland, where there is none", "one gland": "gland, one a crop",
         "whole gland": "gland, those not cut by the edge", "lumen": "lumen (derived)"}  # fmt: skip
FAILURES = ("merged", "split", "too_small", "too_large", "shifted", "missed", "false")


def markdown(scores: Mapping[str, Any], baseline: Mapping[str, Any] | None) -> str:
    """Return the tables.

    Args:
        scores: of the bundle, as in ``scores.json``.
        baseline: of another one, shown beside it.
    """
    about = scores["about"]
    lines = [f"# Scores of {about['model']}", ""]
    lines += [
        f"{about['precision']} on {about['device']}, {about['mpp']} um a pixel; "
        f"{about['interval']}, over patients, over images where the table says so. "
        "Sets that the network learnt from are marked.",
        "",
    ]
    if about["fast"]:
        lines += ["A fast run on few images: not for a card.", ""]
    other = f" {baseline['about']['model']} |" if baseline else ""
    lines += [f"| set | what | score | value | 95 % |{other}"]
    lines += ["|---|---|---|---|---|" + ("---|" if baseline else "")]
    lines += list(_rows(scores, baseline))
    lines += ["", *_groups(scores), *_images(scores), *_failures(scores), *_same(scores)]
    return "\n".join(lines).rstrip() + "\n"


def _rows(scores: Mapping[str, Any], baseline: Mapping[str, Any] | None) -> Iterator[str]:
    for set_name, own in scores["sets"].items():
        where = f"{own['title']} ({_said(own)})"
        for name, measure in own["measures"].items():
            what = _what(set_name, name, measure)
            for key, words in COLUMNS.get(name, OBJECTS).items():
                value = measure["scores"].get(key)
                if value is None:
                    continue
                beside = ""
                if baseline is not None:
                    beside = f" {_number(_find(baseline, set_name, name, key))} |"
                yield f"| {where} | {what} | {words} | {_three(value)} |{beside}"
                where = what = ""


def _said(own: Mapping[str, Any]) -> str:
    counts = f"{own['images']} images, {own['patients']} patients"
    return (
        counts
        if own["standing"] in ("held out", "never seen")
        else (f"{counts}; **{own['standing']}**")
    )


def _what(set_name: str, name: str, measure: Mapping[str, Any]) -> str:
    words = NAMES.get(name, name)
    if name == "lumen" and set_name != "ebhi":
        words = "lumen"
    return words + ("" if measure["drawn"] == "patients" else ", images drawn")


def _groups(scores: Mapping[str, Any]) -> Iterator[str]:
    for own in scores["sets"].values():
        for name, measure in own["measures"].items():
            groups = measure.get("groups", {})
            if not groups:
                continue
            columns = _columns(name)
            yield f"{own['title']}: {NAMES.get(name, name)} by group"
            yield ""
            yield "| group | images | " + " | ".join(columns.values()) + " |"
            yield "|---|---|" + "---|" * len(columns)
            for group, row in groups.items():
                cells = [_with_ends(row["scores"][key]) for key in columns]
                yield f"| {group} | {row['images']} | " + " | ".join(cells) + " |"
            yield ""


def _columns(name: str) -> dict[str, str]:
    """Return the scores that are shown by image and by group."""
    columns = COLUMNS.get(name, OBJECTS)
    return {key: words for key, words in columns.items() if key != "pq_mean_of_images"}


def _images(scores: Mapping[str, Any]) -> Iterator[str]:
    own = scores["sets"].get("monuseg", {}).get("measures", {}).get("nuclei")
    if own is None:
        return
    yield "MoNuSeg by tile"
    yield ""
    keys = _columns("nuclei")
    yield "| tile | " + " | ".join(keys.values()) + " |"
    yield "|---|" + "---|" * len(keys)
    for name, row in own["by_image"].items():
        yield f"| {name} | " + " | ".join(_number(row[key]) for key in keys) + " |"
    yield ""


def _failures(scores: Mapping[str, Any]) -> Iterator[str]:
    yield "What became of the true objects, in per cent of them; false objects beside"
    yield ""
    yield "| set | what | true | matched | " + " | ".join(FAILURES).replace("_", " ") + " | area |"
    yield "|---|---|---|---|" + "---|" * (len(FAILURES) + 1)
    for set_name, own in scores["sets"].items():
        for name, measure in own["measures"].items():
            counts = measure["details"].get("true_objects")
            if not counts:
                continue
            true = measure["details"]["true"]
            cells = [f"{100 * counts[key] / max(true, 1):.1f}" for key in ("matched", *FAILURES)]
            area = _number(measure["details"]["area_of_matched_over_true"])
            yield f"| {set_name} | {name} | {true} | " + " | ".join([*cells, area]) + " |"
    yield ""


def _same(scores: Mapping[str, Any]) -> Iterator[str]:
    both = scores.get("consistency", {})
    region = both.get("region")
    if region is not None:
        yield f"The same {region['region_px']} px of {region['slide']} twice: PQ of the objects"
        yield ""
        heads = list(next(iter(region["tiles"].values())))
        yield "| | " + " | ".join(heads) + " |"
        yield "|---|" + "---|" * len(heads)
        rows = {f"tiles of {pair} px": row for pair, row in region["tiles"].items()}
        if "fp32 and bf16" in region:
            rows["fp32 and bf16"] = region["fp32 and bf16"]
        for words, row in rows.items():
            yield f"| {words} | " + " | ".join(_number(row[head]["pq"]) for head in heads) + " |"
        yield ""
    if "precision" in both:
        yield "PQ of annotated images at both precisions"
        yield ""
        yield "| | fp32 | bf16 | difference |"
        yield "|---|---|---|---|"
        for name, row in both["precision"].items():
            cells = [f"{row[key]:.4f}" for key in ("fp32", "bf16", "difference")]
            yield f"| {name} | " + " | ".join(cells) + " |"
        yield ""


def _find(scores: Mapping[str, Any], *path: str) -> float | None:
    set_name, name, key = path
    measure = scores["sets"].get(set_name, {}).get("measures", {}).get(name, {})
    value: float | None = measure.get("scores", {}).get(key, {}).get("value")
    return value


def _three(score: Mapping[str, float | None]) -> str:
    ends = f"{_number(score['low'])} to {_number(score['high'])}"
    return f"{_number(score['value'])} | {ends}"


def _with_ends(score: Mapping[str, float | None]) -> str:
    return f"{_number(score['value'])} ({_number(score['low'])} to {_number(score['high'])})"


def _number(value: float | None) -> str:
    return "-" if value is None or math.isnan(value) else f"{value:.3f}"
