"""Results folders as runs leave them, without running anything."""

import json
import os

from wsi_pipeline.batch import SlideEntry, freeze_run
from wsi_pipeline.job import RunReport, SlideJob, file_digest

MODEL = {"name": "m", "sha256": "5" * 64}
SECONDS = {"open": 1.0, "tissue": 1.0, "predict": 6.0, "polygonize": 1.0, "write": 1.0}


def begin(out, *names, folder="/slides", **more):
    """Write run.json."""
    entries = [SlideEntry(path=f"{folder}/{n}.svs", slide_id=n, **more) for n in names]
    freeze_run(out, entries, model=MODEL, options={}, overwrite=False)
    return out


def job(out, slide_id):
    return SlideJob(path="", slide_id=slide_id, out=out, model_name="m", model_digest="5" * 64)


def report(out, slide_id, status="done", *, written=None, **facts):
    """Write a report and the table it claims."""
    own = job(out, slide_id)
    outputs = {}
    if status == "done":
        own.objects_path.parent.mkdir(parents=True, exist_ok=True)
        own.objects_path.write_bytes(b"table of " + slide_id.encode())
        size = own.objects_path.stat().st_size
        name = f"objects/{slide_id}.parquet"
        outputs[name] = {"bytes": size, "sha256": file_digest(own.objects_path)}
    defaults = {
        "mpp": {"x": 0.25, "y": 0.25, "source": "aperio.MPP"},
        "tissue_mm2": 2.0 if status == "done" else 0.0,
        "counts": {"nucleus": 10, "gland": 2} if status == "done" else {},
        "seconds": {**SECONDS, "total": 10.0},
        "throughput": {"mm2_per_s": 0.2, "mpx_per_s": 3.0},
        "bottleneck": "predict",
        "device": "cpu",
        "precision": "fp32",
        "model": MODEL,
        "started": "2026-01-02T03:04:05.000+00:00",
        "finished": "2026-01-02T03:04:15.000+00:00",
        "host": "node1",
    }
    made = RunReport(
        slide_id=slide_id,
        path=f"/slides/{slide_id}.svs",
        job_id="j" * 16,
        status=status,
        outputs=outputs,
        **{**defaults, **facts},
    )
    made.write(own.report_path)
    if written is not None:
        os.utime(own.report_path, (written, written))
    return made


def lease(out, slide_id, *, age_s=0.0, **facts):
    """Leave a lease as a process of another machine writes it."""
    path = job(out, slide_id).lease_path
    path.parent.mkdir(parents=True, exist_ok=True)
    elsewhere = {"host": "node7", "machine": "node7 x y", "pid": 5, "born": 1.0, "job": None}
    path.write_text(json.dumps({**elsewhere, "restart": 0, **facts}))
    now = path.stat().st_mtime
    os.utime(path, (now - age_s, now - age_s))
    return path
