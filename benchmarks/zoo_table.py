"""The table of the model zoo: from the bundles themselves into models/README.md.

    python benchmarks/zoo_table.py            write it
    python benchmarks/zoo_table.py --check    exit status 1 if it is not what it would write

Heads, parameters, operations and sizes are read off the bundles. What they cannot tell is in
their ``metrics.json``::

    "evaluations": {NAME: what `wsi evaluate --json` wrote, ...},
    "zoo": {"licence": ..., "data": [{"name": ..., "licence": ...}, ...],
            "scores": {"nuclei": NAME, "gland": NAME, "lumen": NAME}}

so no score is copied by hand. They are of the bundle, or of what it was released from (that is,
before its weights were rounded to half precision). A head whose evaluation is not named is "not
measured".
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from wsi_pipeline.bench.rates import dense_flops
from wsi_pipeline.bundle import ModelBundle, list_bundles
from wsi_pipeline.zoo import default_mark

README = Path(__file__).parents[1] / "models" / "README.md"
BEGIN, END = "<!-- written by benchmarks/zoo_table.py -->", "<!-- end -->"
SCORES = (("nuclei", "pq", "PQ"), ("gland", "object_dice", "object Dice"), ("lumen", "pq", "PQ"))
"""Head, score and its name in the head of the table."""
_SIDE = 256


def zoo_section(bundles: tuple[ModelBundle, ...]) -> str:
    """Return the table, and below it what the scores were taken on."""
    columns = [
        *("name", "heads", "parameters", "MFLOP/px", "pixel size", "weights"),
        *("training data", "licence"),
        *(f"{head} {title}" for head, _, title in SCORES),
    ]
    rows = [_row(bundle) for bundle in bundles]
    lines = [f"| {' | '.join(cells)} |" for cells in (columns, ["---"] * len(columns), *rows)]
    notes = [note for bundle in bundles for note in _notes(bundle)]
    return "\n".join([*lines, *([""] * bool(notes)), *notes])


def updated(text: str, section: str) -> str:
    """Return a README with its generated section replaced."""
    before, _, rest = text.partition(BEGIN)
    _, found, after = rest.partition(END)
    if not found:
        raise SystemExit(f"{README} lacks {BEGIN} or {END}")
    return f"{before}{BEGIN}\n\n{section}\n\n{END}{after}"


def _row(bundle: ModelBundle) -> list[str]:
    parameters, flops = _cost(bundle)
    said = _metrics(bundle)["zoo"]
    size = sum((bundle.path / name).stat().st_size for name in bundle.weight_map)
    data = [f"{own['name']} ({own['licence']})" for own in said["data"]]
    return [
        f"[{bundle.name}]({bundle.name}/card.md){default_mark(bundle.name)}",
        ", ".join(head.name for head in bundle.spec.heads),
        f"{parameters:,}" if parameters else "none learned",
        f"{flops / 1e6:.3f}" if flops else "no convolutions",
        f"{bundle.spec.mpp} um",
        f"{size / 2**20:.1f} MiB" if size > 2**16 else f"{size} bytes",
        ", ".join(data) or "none",
        said["licence"],
        *(_score(bundle, head, score) for head, score, _ in SCORES),
    ]


def _cost(bundle: ModelBundle) -> tuple[int, float]:
    """Return learned parameters, and floating-point operations of convolutions an input pixel."""
    network = bundle.load_network()
    parameters = sum(parameter.numel() for parameter in network.parameters())
    return parameters, dense_flops(bundle.spec, [(_SIDE, _SIDE)]) / _SIDE**2


def _score(bundle: ModelBundle, head: str, score: str) -> str:
    if head not in {own.name for own in bundle.spec.heads}:
        return "no such head"
    name = _metrics(bundle)["zoo"]["scores"].get(head)
    if name is None:
        return "not measured"
    found = _metrics(bundle)["evaluations"][name]["heads"][head][score]
    interval = f" ({found['low']:.3f} - {found['high']:.3f})" if "low" in found else ""
    return f"{found['value']:.3f}{interval}, {name}"


def _notes(bundle: ModelBundle) -> Iterator[str]:
    """Say of each evaluation in the table what was judged."""
    metrics = _metrics(bundle)
    for name in sorted(set(metrics["zoo"]["scores"].values())):
        own = metrics["evaluations"][name]
        about = own["about"]
        source = metrics.get("released_from", {}).get("sha256")
        if about["model"]["sha256"] not in (bundle.digest, source):
            raise SystemExit(f"{bundle.name}: evaluation {name!r} is of other weights")
        yield (
            f"- {bundle.name}, {name}: {own['images']} images of {own['patients']} patients of "
            f"`{about['dataset']}` ({about['part']}), {about['precision']} on {about['device']}; "
            f"{about['interval']}."
        )


def _metrics(bundle: ModelBundle) -> dict[str, Any]:
    metrics = json.loads((bundle.path / "metrics.json").read_text(encoding="utf-8"))
    lacking = {"licence", "data", "scores"} - set(metrics.get("zoo", {}))
    if lacking:
        raise SystemExit(f"{bundle.name}: metrics.json lacks {sorted(lacking)} under 'zoo'")
    return metrics


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing")
    options = parser.parse_args()
    before = README.read_text(encoding="utf-8")
    after = updated(before, zoo_section(list_bundles()))
    if before == after:
        return
    if options.check:
        raise SystemExit(f"{README} is out of date: run python benchmarks/zoo_table.py")
    README.write_text(after, encoding="utf-8")


if __name__ == "__main__":
    main()
