"""Who trains and who validates: parts of a dataset that share no patient.

Two ways, for two needs::

    split_items   a patient's part depends on the seed and his name alone. Images and patients
                  that are added later move nobody, so a model that is trained further is
                  never scored on patients it has learnt from. Shares are met on average.
    k_folds       patients are dealt out evenly, diagnosis by diagnosis. Each is tested once.
                  For one experiment on a set that does not change.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Sequence

from wsi_pipeline.errors import DatasetError, RecipeError
from wsi_pipeline.training.annotation import Item

__all__ = ["PARTS", "k_folds", "split_items"]

PARTS = ("train", "validation", "test")
"""Names of parts, in their order."""


def split_items(
    items: Iterable[Item],
    *,
    validation: float,
    test: float = 0.0,
    seed: int = 0,
    published: bool = True,
) -> dict[str, tuple[Item, ...]]:
    """Split images by patient.

    Where chance leaves a wanted part empty, the patient who came closest to it is moved
    there; where it leaves nobody for another part, one is moved there.

    Args:
        items: the images of one or more datasets.
        validation: wanted share of the patients.
        test: wanted share of the patients.
        seed: another one, other patients.
        published: keep the parts that the publishers made. A part that they lack is then
            drawn from their training images and from images for which they name no part.
            Publishers may have put a patient in two parts; that is kept.

    Returns:
        Images by part, in the order given: ``train``, and ``validation`` and ``test`` where
        asked for or published.

    Raises:
        RecipeError: the shares are negative or leave nothing to train on.
        DatasetError: fewer patients than parts, or a part without images.
    """
    if validation < 0 or test < 0 or validation + test >= 1:
        msg = f"shares must be 0 or more and leave some to train on: {validation=}, {test=}"
        raise RecipeError(msg)
    items = tuple(items)
    _check_parts(items)
    shares = {"test": test, "validation": validation}
    kept = [item.part if published and item.part != "train" else None for item in items]
    shares = {part: 0.0 if part in kept else share for part, share in shares.items()}
    free = {item.patient for item, part in zip(items, kept, strict=True) if part is None}
    drawn = _draw(free, shares, seed)
    parts = [part or drawn[item.patient] for item, part in zip(items, kept, strict=True)]
    wanted = [part for part in PARTS if part == "train" or shares.get(part) or part in kept]
    split = {
        name: tuple(item for item, part in zip(items, parts, strict=True) if part == name)
        for name in wanted
    }
    _check_filled(split)
    return split


def k_folds(
    items: Iterable[Item], *, folds: int, seed: int = 0
) -> list[dict[str, tuple[Item, ...]]]:
    """Split images for cross-validation: every patient is in the test part of one fold.

    Patients are dealt out group by group (that of most of a patient's images), so that the
    folds are alike. Published parts do not count.

    Args:
        items: the images.
        folds: how many, 2 or more.
        seed: another one, other patients.

    Returns:
        For each fold, ``train`` and ``test``.

    Raises:
        RecipeError: fewer than two folds.
        DatasetError: fewer patients than folds.
    """
    if folds < 2:
        raise RecipeError(f"cross-validation needs 2 folds or more, not {folds}")
    items = tuple(items)
    groups: dict[str, Counter[str]] = {}
    for item in items:
        groups.setdefault(item.patient, Counter())[item.group or ""] += 1
    if len(groups) < folds:
        msg = f"{len(groups)} patients ({len(items)} images) cannot be dealt to {folds} folds"
        raise DatasetError(msg)

    def order(patient: str) -> tuple[str, float]:
        counts = groups[patient]
        return min(counts, key=lambda group: (-counts[group], group)), _chance(patient, seed)

    fold_of = {patient: i % folds for i, patient in enumerate(sorted(groups, key=order))}
    return [
        {
            "train": tuple(item for item in items if fold_of[item.patient] != fold),
            "test": tuple(item for item in items if fold_of[item.patient] == fold),
        }
        for fold in range(folds)
    ]


def _draw(patients: Iterable[str], shares: dict[str, float], seed: int) -> dict[str, str]:
    """Give each patient a part: the first share of the chances is one part's, and so on."""
    chances = {patient: _chance(patient, seed) for patient in patients}
    # names decide between equal chances, so that the order of a set does not
    ranked = sorted(chances, key=lambda patient: (chances[patient], patient))
    drawn = dict.fromkeys(ranked, "train")
    asked = [part for part, share in shares.items() if share]
    edge = 0.0
    for later, part in enumerate(asked, start=1):
        left = [p for p in ranked if drawn[p] == "train"]
        inside = [p for p in left if edge <= chances[p] < edge + shares[part]] or left[:1]
        # somebody must stay for the parts to come and for training
        spare = len(left) - (len(asked) - later) - 1
        drawn.update(dict.fromkeys(inside[: max(0, spare)], part))
        edge += shares[part]
    return drawn


def _chance(patient: str, seed: int) -> float:
    """Return a number in [0, 1) that depends on the patient and the seed alone."""
    digest = hashlib.sha256(f"{seed}/{patient}".encode()).digest()
    return int.from_bytes(digest[:6], "big") / 2**48


def _check_parts(items: Sequence[Item]) -> None:
    strange = sorted({item.part for item in items if item.part} - set(PARTS))
    if strange:
        raise DatasetError(f"parts must be {', '.join(PARTS)}, not {strange}")


def _check_filled(split: dict[str, tuple[Item, ...]]) -> None:
    if all(split.values()):
        return
    counts = ", ".join(
        f"{part} {len(items)} images of {len({item.patient for item in items})} patients"
        for part, items in split.items()
    )
    msg = f"the split leaves a part empty: {counts}"
    raise DatasetError(f"{msg}; annotate more patients, or ask for fewer parts")
