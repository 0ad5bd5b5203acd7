"""Whether peak memory grows with the slide.

    python benchmarks/memory.py [--sides 15000 60000] [--model NAME|DIR] [--keep FOLDER]

Writes synthetic slides, runs the main job on each in a process of its own, and prints JSON:
peak resident memory of each, and the largest over the smallest. The slides of the default
sides take some minutes to write; --keep leaves them there for the next time.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from wsi_pipeline.synth import write_slide


def peak_of_run(slide: Path, out: Path, model: str) -> dict[str, float]:
    """Run one slide in a fresh process; return its peak memory and time."""
    code = "from wsi_pipeline.cli import main_run; main_run()"
    begun = time.perf_counter()
    command = [sys.executable, "-c", code, str(slide), "--out", str(out), "--no-progress"]
    command += ["--model", model, "--overwrite", "--drop-maps"]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    report = json.loads((out / "reports" / f"{slide.stem}.json").read_text())
    return {
        "peak_rss_mb": report["peak_rss_mb"],
        "seconds": round(time.perf_counter() - begun, 1),
        "stages_s": report["seconds"],
        "tissue_mm2": report["tissue_mm2"],
        **{f"n_{kind}": number for kind, number in report["counts"].items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sides", type=int, nargs="+", default=[15000, 60000])
    parser.add_argument("--mpp", type=float, default=0.25)
    parser.add_argument("--model", default="stain-baseline", help="NAME or DIR")
    parser.add_argument("--keep", type=Path, help="folder for the slides")
    parser.add_argument("--json", action="store_true", help="compact, on one line")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = options.keep or Path(scratch)
        folder.mkdir(parents=True, exist_ok=True)
        result: dict[str, object] = {}
        peaks = []
        for side in options.sides:
            slide = folder / f"memory-{side}.svs"
            if not slide.exists():
                write_slide(slide, width=side, height=side, mpp=options.mpp, seed=1, truth=False)
            facts = peak_of_run(slide, Path(scratch) / "out", options.model)
            peaks.append(facts["peak_rss_mb"])
            result[str(side)] = facts
    result["ratio"] = round(max(peaks) / min(peaks), 3)
    result["this_process_mb"] = round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, 1)
    print(json.dumps(result, indent=None if options.json else 2))


if __name__ == "__main__":
    main()
