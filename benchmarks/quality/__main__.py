"""Judge a bundle on everything, for its card.

    python -m benchmarks.quality BUNDLE --data $WSI_DATA --annotations annotations --out DIR
        [--baseline stain-baseline] [--recipes STAGE.toml ...] [--fast] [--sweep [--write]]

``--recipes`` names the recipes of all stages, so that it is known what was learnt from; without it
the bundle's own is read, and those of the bundles it started from, where they are.

DIR gets ``scores.json`` (all numbers, with 95 % intervals), ``scores.md`` (the card's tables), and
``pictures/`` (good and bad cases, of sets whose pixels may be shown). The baseline is another
bundle, whose scores are kept in ``baseline.json``, or such a file of an earlier run. ``--sweep``
does something else: it tries other rules by which maps become objects, on images that may be
tuned on, and writes ``sweep.json``; with ``--write`` the best rules go into the bundle's
``spec.json``, too.

``benchmarks/quality/`` says how each score is defined: ``sets`` which images, ``measures`` and
``failures`` what is counted, ``judging`` how it is resampled, ``consistency`` what is compared.
"""

from __future__ import annotations

import argparse
import json
import logging
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.quality.consistency import precision_scores, tile_and_precision
from benchmarks.quality.judging import Judged, judge_set, scores_json
from benchmarks.quality.pictures import draw_cases
from benchmarks.quality.report import markdown
from benchmarks.quality.sets import ImageSet, open_sets
from benchmarks.quality.sweep import sweep, write_rules
from wsi_pipeline.bundle import ModelBundle, find_bundle
from wsi_pipeline.device import choose_device, choose_precision, half_pays
from wsi_pipeline.job import versions
from wsi_pipeline.training.predicted import ImagePredictor

log = logging.getLogger("quality")

DRAWS = {False: 1000, True: 200}
REGION_PX = {False: 2048, True: 1024}
TILES = {False: (512, 1024, 2048), True: (256, 512, 1024)}
PRECISION_IMAGES = {False: 24, True: 6}
"""Whether fast: draws of the bootstrap, the compared region and tiles, images at two precisions."""


def judge(
    bundle: ModelBundle, options: argparse.Namespace, *, whole: bool
) -> tuple[dict[str, Any], list[Judged]]:
    """Measure a bundle; ``whole``: also its consistency."""
    device = choose_device(options.device)
    precision = choose_precision(options.precision, device, architecture=bundle.spec.architecture)
    predictor = ImagePredictor(
        bundle.spec, bundle.load_network(), device=device, precision=precision
    )
    sets = _sets(bundle, options)
    judged, found = [], {}
    for own in sets:
        begin = time.perf_counter()
        judged.append(judge_set(predictor, own))
        found[own.plan.name] = scores_json(judged[-1], draws=DRAWS[options.fast])
        log.info("%s: %s, %.0f s", bundle.name, own.plan.name, time.perf_counter() - begin)
    about = {
        "model": bundle.name,
        "sha256": bundle.digest,
        "mpp": bundle.spec.mpp,
        "device": device,
        "precision": precision,
        "fast": options.fast,
        "interval": f"95 %, percentile bootstrap, {DRAWS[options.fast]} draws",
        "versions": versions(),
    }
    scores: dict[str, Any] = {"about": about, "sets": found}
    if whole:
        scores["consistency"] = _consistency(bundle, sets, device, options)
    return scores, judged


def _sets(bundle: ModelBundle, options: argparse.Namespace) -> list[ImageSet]:
    return open_sets(
        bundle.spec,
        data=options.data,
        annotations=options.annotations,
        recipes=options.recipes or [bundle.path / "train.toml"],
        fast=options.fast,
    )


def _consistency(
    bundle: ModelBundle, sets: list[ImageSet], device: str, options: argparse.Namespace
) -> dict[str, Any]:
    slides, fast = options.data / "slides", options.fast
    region = tile_and_precision(
        bundle, slides, device=device, side_px=REGION_PX[fast], tiles=TILES[fast]
    )
    if not half_pays(bundle.spec.architecture):
        return {"region": region}
    few = [
        replace(own, images=own.images[: PRECISION_IMAGES[fast]])
        for own in sets
        if own.plan.name in ("monuseg", "ebhi", "crops")
    ]
    log.info("%s: precisions", bundle.name)
    return {"region": region, "precision": precision_scores(bundle, few, device=device)}


def _baseline(options: argparse.Namespace) -> dict[str, Any] | None:
    if options.baseline is None:
        return None
    if options.baseline.endswith(".json"):
        return json.loads(Path(options.baseline).read_text(encoding="utf-8"))
    scores, _ = judge(find_bundle(options.baseline), options, whole=False)
    _write(options.out / "baseline.json", scores)
    return scores


def _write(path: Path, scores: dict[str, Any]) -> None:
    path.write_text(json.dumps(scores, indent=2, allow_nan=False) + "\n", encoding="utf-8")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="benchmarks.quality", description=__doc__.splitlines()[0])
    parser.add_argument("bundle", help="a name of the zoo, or a folder")
    parser.add_argument("--data", type=Path, required=True, help="the data kit's folder")
    parser.add_argument("--annotations", type=Path, help="the folder that holds crops/")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--baseline", help="a bundle, or the scores.json of another run")
    parser.add_argument(
        "--recipes",
        type=Path,
        nargs="+",
        help="what it was trained by, all stages; default: its own",
    )
    parser.add_argument("--fast", action="store_true", help="few images, few draws")
    parser.add_argument("--sweep", action="store_true", help="only try other rules for objects")
    parser.add_argument("--write", action="store_true", help="put the best into the bundle")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--precision", default="auto")
    options = parser.parse_args()
    if options.write and not options.sweep:
        parser.error("--write is for what --sweep finds")
    return options


def main() -> None:
    options = _options()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    bundle = find_bundle(options.bundle)
    options.out.mkdir(parents=True, exist_ok=True)
    if options.sweep:
        device = choose_device(options.device)
        precision = choose_precision(
            options.precision, device, architecture=bundle.spec.architecture
        )
        predictor = ImagePredictor(
            bundle.spec, bundle.load_network(), device=device, precision=precision
        )
        found = sweep(predictor, _sets(bundle, options), fast=options.fast)
        _write(options.out / "sweep.json", found)
        if options.write:
            changed = write_rules(bundle, found)
            log.info("%s: rules of %s; its sha256 is %s", changed.path, [*found], changed.digest)
        return
    scores, judged = judge(bundle, options, whole=True)
    _write(options.out / "scores.json", scores)
    table = markdown(scores, _baseline(options))
    (options.out / "scores.md").write_text(table, encoding="utf-8")
    draw_cases(bundle, judged, options.out / "pictures", device=choose_device(options.device))
    print(table)


if __name__ == "__main__":
    main()
