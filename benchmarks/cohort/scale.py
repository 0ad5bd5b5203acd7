"""Where a folder of a hundred thousand slides hurts: the commands that look at all of them.

python -m benchmarks.cohort --scale 100000 --folder FOLDER
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from wsi_pipeline.batch import SlideEntry, freeze_run
from wsi_pipeline.job import STAGES, RunReport

__all__ = ["time_commands"]


def time_commands(folder: Path, slides: int) -> dict[str, Any]:
    """Make up a results folder and time what a task and a watcher do with it.

    Args:
        folder: does not exist, or is of an earlier call with as many slides.
        slides: how many.
    """
    entries = [
        SlideEntry(path=f"/slides/s{n:06d}.svs", slide_id=f"s{n:06d}") for n in range(slides)
    ]
    model = {"name": "made up", "sha256": "0" * 64}
    (folder / "reports").mkdir(parents=True, exist_ok=True)
    seconds = dict.fromkeys((*STAGES, "total"), 1.0)
    for entry in entries:
        path = folder / "reports" / f"{entry.slide_id}.json"
        if not path.exists():
            report = RunReport(
                slide_id=entry.slide_id,
                path=entry.path,
                job_id="0" * 16,
                status="done",
                model=model,
                seconds=seconds,
                tissue_mm2=100.0,
                counts={"nucleus": 1000, "gland": 10, "lumen": 20},
                started="2026-01-01T00:00:00+00:00",
                finished="2026-01-01T00:01:00+00:00",
            )
            path.write_text(json.dumps(asdict(report), indent=2) + "\n")
    begun = time.perf_counter()
    freeze_run(folder, entries, model=model, options={}, overwrite=False)
    first = time.perf_counter() - begun
    begun = time.perf_counter()
    freeze_run(folder, entries, model=model, options={}, overwrite=False)
    own = Path(sys.executable).parent / "wsi"
    return {
        "slides": slides,
        "run_json_mb": round((folder / "run.json").stat().st_size / 1e6, 1),
        "freeze_first_s": round(first, 2),
        "freeze_again_s": round(time.perf_counter() - begun, 2),
        **{f"{name}_s": _time(own, name, folder) for name in ("status", "summary")},
    }


def _time(program: Path, name: str, folder: Path) -> float:
    begun = time.perf_counter()
    subprocess.run([program, name, folder], check=True, stdout=subprocess.DEVNULL)
    return round(time.perf_counter() - begun, 2)
