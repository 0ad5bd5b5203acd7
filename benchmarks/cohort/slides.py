"""Hundreds of small synthetic slides, a few of them broken, drawn as a cohort's sizes are."""

from __future__ import annotations

import json
import math
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from wsi_pipeline.synth import write_slide

PAPER = {"slides": 599, "nucleus": 377e6, "gland": 0.9e6, "lumen": 2.1e6}
"""Objects found on the colorectal slides of TCGA (arXiv 2203.00077)."""
SCALE = 1 / 1_000
"""Our slides hold so many of the paper's objects: 629 nuclei on average instead of 629,000."""
NUCLEI_PER_PX = 1.25e-3
"""Of the synthetic slide at 0.5 um, all tissue types together; only sizes follow from it."""
BROKEN_SHARE = 0.02
MPP = 0.5


@dataclass(frozen=True, kw_only=True)
class Cohort:
    """Slides on disk, and what is to become of each."""

    folder: Path
    """Where the slides lie."""
    broken: dict[str, str]
    """Slides that must fail, and the code of each."""
    healthy: tuple[str, ...]
    """Slides that must be done."""

    @property
    def paths(self) -> list[Path]:
        """All slides, healthy or not."""
        return sorted(self.folder.glob("*.svs"))


def make_cohort(folder: Path, number: int, *, seed: int, processes: int = 2) -> Cohort:
    """Write the slides, or find those that an earlier call wrote.

    Args:
        folder: of this cohort alone.
        number: how many slides.
        seed: other sizes, tissue and faults.
        processes: that draw at the same time.
    """
    rng = np.random.default_rng(seed)
    nuclei = PAPER["nucleus"] / PAPER["slides"] * SCALE
    # Tissue areas of a cohort are skewed: half of the slides hold a quarter of it.
    areas = rng.lognormal(mean=math.log(nuclei / NUCLEI_PER_PX) - 0.18, sigma=0.6, size=number)
    shapes = rng.uniform(0.6, 1.6, size=number)
    sizes = [
        (_side(math.sqrt(area * shape)), _side(math.sqrt(area / shape)))
        for area, shape in zip(areas, shapes, strict=True)
    ]
    names = [f"slide-{index:05d}" for index in range(number)]
    bad = rng.choice(number, size=max(1, round(BROKEN_SHARE * number)), replace=False)
    kinds = {names[index]: _KINDS[turn % len(_KINDS)] for turn, index in enumerate(sorted(bad))}
    folder.mkdir(parents=True, exist_ok=True)
    done = folder / "cohort.json"
    asked = {"number": number, "seed": seed, "sizes": sizes, "kinds": kinds}
    if not done.exists() or json.loads(done.read_text()) != json.loads(json.dumps(asked)):
        with ProcessPoolExecutor(processes) as pool:
            jobs = zip(names, sizes, range(number), strict=True)
            list(pool.map(_write, ((folder, *job, seed, kinds.get(job[0])) for job in jobs)))
        done.write_text(json.dumps(asked))
    codes = {name: _CODES[kind] for name, kind in kinds.items()}
    return Cohort(
        folder=folder, broken=codes, healthy=tuple(name for name in names if name not in codes)
    )


_CODES = {
    "empty": "unreadable_slide",
    "cut": "unreadable_slide",
    "text": "unreadable_slide",
    "no size": "missing_mpp",
}
_KINDS = tuple(_CODES)


def _side(pixels: float) -> int:
    return int(min(1400, max(256, pixels)))


def _write(job: tuple[Path, str, tuple[int, int], int, int, str | None]) -> None:
    folder, name, (width, height), index, seed, kind = job
    path = folder / f"{name}.svs"
    if kind == "empty":
        path.write_bytes(b"")
        return
    if kind == "text":
        path.write_text("a note that somebody saved under the name of a slide\n" * 40)
        return
    write_slide(
        path,
        width=width,
        height=height,
        mpp=MPP,
        seed=seed * 100_000 + index,
        truth=False,
        threads=1,
    )
    content = path.read_bytes()
    if kind == "cut":
        # A download that broke off: the directories at the end of the file are missing.
        path.write_bytes(content[: len(content) // 2])
    if kind == "no size":
        path.write_bytes(content.replace(b"MPP = ", b"XXX = ").replace(b"AppMag = ", b"XxxXxx = "))
