"""Plain words about files and folders: what they are, how far a run is, what it would do."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from wsi_pipeline import deidentified
from wsi_pipeline.api import Plan
from wsi_pipeline.batch import parse_shard
from wsi_pipeline.cohort import Cohort, SlideState, describe_totals, state_of
from wsi_pipeline.errors import JobError, WsiPipelineError
from wsi_pipeline.job import SlideJob, finished_report
from wsi_pipeline.pace import Pace, duration

__all__ = ["describe_file", "plan_lines", "state_line", "status_document", "status_lines"]


def plan_lines(plan: Plan, shard: str | None, *, json_lines: bool = False) -> Iterator[str]:
    """Describe what a plan would do, a line a slide; opens slides, writes nothing.

    Args:
        plan: what was decided on.
        shard: the shard of the plan, as it was asked for.
        json_lines: an object a line, with all that a program needs to write the list again.
    """
    import os

    index, count = parse_shard(shard, os.environ)
    if not json_lines:
        yield "slide_id\tsize\tmpp\tsource\tstate\tshard"
    for job in plan.jobs:
        facts = _planned(job)
        if json_lines:
            yield json.dumps({"event": "slide", **facts, "shard": f"{index}/{count}"})
            continue
        size = f"{facts['width']}x{facts['height']}" if facts["width"] else "-"
        mpp = f"{facts['mpp']:.4g}" if facts["mpp"] else "-"
        source = facts["mpp_source"] or facts["error"]["code"]
        yield f"{job.slide_id}\t{size}\t{mpp}\t{source}\t{facts['state']}\t{index}/{count}"
    of, model = len(plan.entries), plan.bundle.spec.name
    if json_lines:
        yield json.dumps({"event": "plan", "slides": len(plan.jobs), "of": of, "model": model})
    else:
        yield f"{len(plan.jobs)} of {of} slides, model {model}"


def _planned(job: SlideJob) -> dict[str, Any]:
    """Return what is known of a slide before it is begun: as asked for, and as found."""
    from wsi_pipeline.slide import Slide

    asked = {"mpp": job.mpp, "mask": str(job.mask) if job.mask else None}
    facts: dict[str, Any] = {"slide_id": job.slide_id, "path": job.path, "asked": asked}
    facts |= dict.fromkeys(("width", "height", "mpp", "mpp_source", "error"))
    try:
        with Slide.open(job.path, mpp=job.mpp) as slide:
            facts["width"], facts["height"] = slide.size
            facts["mpp"], facts["mpp_source"] = slide.pixel_size.x, slide.pixel_size.source
    except WsiPipelineError as error:
        facts["error"] = {"code": error.code, "message": str(error)}
    facts["state"] = "done" if finished_report(job) else state_of(job).state
    return facts


def status_lines(cohort: Cohort, pace: Pace, *, brief: bool = False) -> Iterator[str]:
    """Describe how far a run is: a line a slide, then totals and pace.

    Args:
        cohort: the run.
        pace: how fast it goes.
        brief: leave out the slides that are done or not begun.
    """
    for own in cohort.states:
        if not brief or own.state not in ("done", "missing"):
            yield state_line(own, cohort)
    yield describe_totals(cohort.totals)
    if cohort.local_clock:
        yield (
            "nothing can be written in the folder: signs of life are dated by this machine's "
            "clock, so if it is wrong, so is who counts as alive"
        )
    yield from _pace_lines(pace)


def state_line(own: SlideState, cohort: Cohort) -> str:
    """Describe how far one slide is, with the age of what is known."""
    parts = [own.reason] if own.reason else []
    if own.holder is not None:
        age = f"{cohort.age_s(own):.0f} s"
        facts = own.holder.facts
        share = "" if own.fraction is None else f" {own.fraction:.0%}"
        stage = f"{facts.get('stage', 'open')}{share}"
        spent = facts.get("for_s")
        if spent is not None:
            stage += f" after {duration(spent)}"
        alive = own.state == "running"
        parts += [stage, f"last sign of life {age} ago" if alive else f"no sign of life for {age}"]
    return "\t".join([own.slide_id, own.state, *([", ".join(parts)] if parts else [])])


def status_document(cohort: Cohort, pace: Pace) -> dict[str, Any]:
    """Return how far a run is, for machines."""
    slides = []
    for own in cohort.states:
        slide: dict[str, Any] = {"slide_id": own.slide_id, "state": own.state, "reason": own.reason}
        if own.holder is not None:
            names = ("host", "pid", "job", "stage", "done", "total", "for_s")
            slide |= {name: own.holder.facts.get(name) for name in names}
            slide["last_sign_of_life_s"] = round(cohort.age_s(own), 1)
        slides.append(slide)
    return {
        "slides": slides,
        "totals": cohort.totals,
        "pace": asdict(pace),
        "model": dict(cohort.model),
        "local_clock": cohort.local_clock,
    }


def _pace_lines(pace: Pace) -> Iterator[str]:
    if pace.slides_per_h is not None and pace.mm2_per_h is not None:
        lately = pace.slides_per_h_lately or 0, pace.mm2_per_h_lately or 0
        yield (
            f"pace: {pace.slides_per_h:,.4g} slides/h, {pace.mm2_per_h:,.4g} mm2/h; "
            f"in the last hour {lately[0]:,.4g} slides/h, {lately[1]:,.4g} mm2/h"
        )
    if pace.device_busy is not None:
        yield f"devices: busy {pace.device_busy:.0%} of the time in which slides were in work"
    if pace.left_s is not None:
        yield (
            f"about {duration(pace.left_s)} left with {pace.workers} at work "
            f"(by the {pace.left_by} that are left)"
        )


def describe_file(name: str, *, mpp: float | None = None, redact: bool = False) -> list[str]:
    """Say what a file or folder is, its pixel size and its provenance.

    Args:
        name: of a file or folder; where there is none, of a model in the zoo.
        mpp: pixel size of a slide that does not say it.
        redact: only what tells nothing of a patient or a place. Errors still name the file.

    Raises:
        WsiPipelineError: it is none of ours and no slide either.
    """
    path = Path(name)
    if not path.exists() and path.name == name:
        path = _in_zoo(name) or path
    if (path / "spec.json").is_file():
        return list(_describe_bundle(path))
    if (path / "zarr.json").is_file():
        return list((deidentified.maps_lines if redact else _describe_maps)(path))
    if path.suffix == ".parquet" and path.is_file():
        return list((deidentified.table_lines if redact else _describe_table)(path))
    if path.is_dir():
        msg = f"{name} is a folder, but neither a model bundle nor a store of maps"
        raise JobError(msg)
    return list((deidentified.slide_lines if redact else _describe_slide)(name, mpp))


def _in_zoo(name: str) -> Path | None:
    """Return the folder of a model in the zoo; None where none has this name."""
    from wsi_pipeline.bundle import list_bundles

    return next((own.path for own in list_bundles() if own.path.name == name), None)


def _describe_slide(name: str, mpp: float | None) -> Iterator[str]:
    from wsi_pipeline.slide import Slide

    with Slide.open(name, mpp=mpp) as slide:
        size = slide.pixel_size
        width, height = slide.size
        yield f"slide      {slide.name} ({slide.vendor}, read by {slide.reader})"
        yield f"size       {width} x {height} px, {width * size.x / 1e3:.2f} x " + (
            f"{height * size.y / 1e3:.2f} mm"
        )
        yield f"mpp        {size.x:.5g} x {size.y:.5g} um, from {size.source}"
        yield f"objective  {slide.objective_power or 'not stated'}"
        yield f"scanned    {_shown(slide.scan_date or 'not stated')}"
        for level in slide.levels:
            yield f"level {level.index}    {level.size[0]} x {level.size[1]}, " + (
                f"downsample {level.downsample[0]:.4g}"
            )
        beside = [f"{_shown(n)} {w} x {h}" for n, (w, h) in sorted(slide.associated.items())]
        yield f"beside it  {', '.join(beside) or 'no pictures'}" + (
            " (label and macro may show names; nothing here copies them)" * bool(beside)
        )


def _describe_table(path: Path) -> Iterator[str]:
    from wsi_pipeline.table import count_rows, read_metadata

    metadata = read_metadata(path)
    yield f"table      {path.name}, {count_rows(path):,} rows"
    yield from _tree(metadata)


def _describe_maps(path: Path) -> Iterator[str]:
    from wsi_pipeline.store import PredictionStore

    store = PredictionStore.open(path)
    yield f"maps       {path.name} of model {store.spec.name}"
    for key in store.keys:
        grid = store.head_grid(store.spec.maps[key].name)
        mpp = grid.spacing[0] * store.pixel_size[0]
        yield f"           {key}: {grid.size[0]} x {grid.size[1]} at {mpp:.4g} um"
    yield f"unreadable {store.unreadable_fraction():.2%}"


def _describe_bundle(path: Path) -> Iterator[str]:
    from wsi_pipeline.bundle import find_bundle

    bundle = find_bundle(str(path))
    yield f"model      {bundle.spec.name}: {_shown(bundle.spec.description)}"
    yield f"sha256     {bundle.digest}"
    size = sum((path / name).stat().st_size for name in bundle.weight_map)
    yield f"weights    {size / 2**20:.1f} MiB in {len(bundle.weight_map)} files"
    yield f"network    {bundle.spec.architecture}, {bundle.spec.mpp} um per pixel"
    for head in bundle.spec.heads:
        classes = f": {', '.join(head.classes)}" if head.classes else ""
        yield f"head       {head.name} ({head.kind}, stride {head.stride}){classes}"


def _shown(text: str) -> str:
    """Return a text out of a file as one line that does nothing to a terminal."""
    return "".join(character if character.isprintable() else "?" for character in text[:500])


def _tree(values: dict[str, Any]) -> Iterable[str]:
    for key, value in values.items():
        yield f"{key:<10} {_shown(value) if isinstance(value, str) else json.dumps(value)}"
