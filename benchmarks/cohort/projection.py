"""What the real cohort costs, from what was measured here: arithmetic, no measurement.

    python -m benchmarks.cohort --project RESULTS [RESULTS ...]

takes results of real slides (tables, maps, reports) and the totals of the paper.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from benchmarks.cohort.slides import PAPER
from wsi_pipeline.job import folder_facts

__all__ = ["project"]

TISSUE_MM2 = 225.0
"""Of a large resection slide; 377 million nuclei on 599 of them are 2,800 a mm2."""
WORKING_MPP = 0.5
FLOP_PER_PX = 1.85e6
"""Of the full network, dense (arXiv 2203.00077's architecture, all heads)."""
REDUNDANCY = 1.17
"""Tiles of 2048 px with a halo of 160 px, by FLOPs."""
H200_BF16 = 989e12
"""Dense matrix rate of the data sheet, FLOP/s."""
SHARE = 0.45
"""Of it that is assumed to be reached; not measured."""


def project(results: list[Path]) -> dict[str, Any]:
    """Return the cost of the paper's cohort.

    Args:
        results: results folders of real slides, with maps.
    """
    rows = tables = maps = files = slides = slide_bytes = 0
    mm2 = seconds = 0.0
    for folder in results:
        for path in sorted(folder.glob("reports/*.json")):
            report = json.loads(path.read_text())
            name = report["slide_id"]
            if report["status"] != "done" or not report["tissue_mm2"]:
                continue
            slides += 1
            rows += sum(report["counts"].values())
            mm2 += report["tissue_mm2"]
            tables += (folder / "objects" / f"{name}.parquet").stat().st_size
            store = folder / "maps" / f"{name}.zarr"
            maps += folder_facts(store)["bytes"]
            files += sum(1 for p in store.rglob("*") if p.is_file())
            source = Path(report["path"])
            slide_bytes += source.stat().st_size if source.exists() else 0
            seconds += report["seconds"]["total"]
    area = PAPER["slides"] * TISSUE_MM2
    pixels = area * 1e6 / WORKING_MPP**2
    objects = PAPER["nucleus"] + PAPER["gland"] + PAPER["lumen"]
    return {
        "measured": {
            "slides": slides,
            "tissue_mm2": round(mm2, 2),
            "table_bytes_per_object": round(tables / rows, 1),
            "map_bytes_per_mm2": round(maps / mm2),
            "map_files_per_slide": round(files / slides),
            "slide_bytes_per_mm2": round(slide_bytes / mm2),
            "seconds_per_mm2": round(seconds / mm2, 3),
        },
        "projected": {
            "gpu_hours_full_network_h200": round(
                pixels * FLOP_PER_PX * REDUNDANCY / (H200_BF16 * SHARE) / 3600, 2
            ),
            "machine_hours_like_this_one": round(area * seconds / mm2 / 3600, 1),
            "tables_tb": round(objects * tables / rows / 1e12, 3),
            "maps_tb": round(area * maps / mm2 / 1e12, 3),
            "read_tb": round(area * slide_bytes / mm2 / 1e12, 2),
        },
    }
