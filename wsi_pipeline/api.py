"""The pipeline as one function: what ``wsi-run`` does, for scripts and notebooks."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from wsi_pipeline.batch import (
    SlideEntry,
    collect_slides,
    freeze_run,
    parse_shard,
    read_run,
    require_model,
    require_size,
    take_shard,
)
from wsi_pipeline.checked import plain_text
from wsi_pipeline.engines import (
    Only,
    Silent,
    Watcher,
    require_scheduler,
    run_on_dask,
    run_on_devices,
    run_slides,
)
from wsi_pipeline.errors import JobError, ModelBundleError, WsiPipelineError
from wsi_pipeline.history import suspected
from wsi_pipeline.job import RunReport, SlideJob
from wsi_pipeline.loading import BundleLoader, visible_alone
from wsi_pipeline.machine import available_cpus, peak_rss_mb
from wsi_pipeline.memory import parse_size
from wsi_pipeline.redaction import Redaction

if TYPE_CHECKING:
    from wsi_pipeline.bundle import ModelBundle
    from wsi_pipeline.inference import TorchPredictor

log = logging.getLogger(__name__)

__all__ = ["Plan", "execute", "plan_run", "run"]


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A run that is decided on but not begun."""

    out: Path
    """The results folder."""
    entries: tuple[SlideEntry, ...]
    """All slides of the run."""
    jobs: tuple[SlideJob, ...]
    """The slides of this shard."""
    bundle: ModelBundle
    """The model."""
    keep_maps: bool
    """Whether maps stay after the objects are written."""
    redaction: Redaction
    """Takes the folders out of what is written; leaves all as it is if that was not asked for."""
    model_named: bool = True
    """Whether the model was asked for; else it is the folder's, or the default."""

    @property
    def model(self) -> dict[str, str]:
        """Name and SHA-256 of the model, as ``run.json`` has them."""
        return {"name": self.bundle.name, "sha256": self.bundle.digest}

    def model_in(self, precision: str, only: str | None = None) -> dict[str, str]:
        """Return the model as ``run.json`` has it for a precision.

        In 8-bit integers it is another one: some of its objects are others. Where only tables
        are made, it is whatever made the maps.
        """
        arithmetic = "int8" if precision == "int8" else None
        if only == "objects":
            before = read_run(self.out)
            arithmetic = before["model"].get("arithmetic") if before else None
        return self.model | ({"arithmetic": arithmetic} if arithmetic else {})

    def check(self, *, overwrite: bool, precision: str = "auto", only: str | None = None) -> None:
        """Refuse what would be refused when the plan is done; writes nothing.

        Raises:
            JobError: the results folder belongs to another model.
        """
        model = self.model_in(precision, only)
        require_model(self.out, self.entries, model=model, overwrite=overwrite)

    def shown(self, entry: SlideEntry) -> SlideEntry:
        """Return a slide as it may be written down."""
        text = self.redaction.text
        return replace(entry, path=text(entry.path), mask=entry.mask and text(entry.mask))

    def with_bundle(self, bundle: ModelBundle) -> Plan:
        """Return the same plan for another model."""
        jobs = tuple(
            replace(job, model_name=bundle.name, model_digest=bundle.digest) for job in self.jobs
        )
        return replace(self, bundle=bundle, jobs=jobs)


def plan_run(
    slides: Sequence[str | os.PathLike[str]] | str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    model: str | None = None,
    mpp: float | None = None,
    mask_dir: str | os.PathLike[str] | None = None,
    shard: str | None = None,
    keep_maps: bool = True,
    device: str = "auto",
    elsewhere: bool = False,
    overwrite: bool = False,
    redact_paths: bool = False,
) -> Plan:
    """Find the slides and the model, and say what is to be done; touches nothing.

    Where no model is named, a folder goes on with the one it was begun with, whatever the
    device; a new folder gets the device's default. With ``elsewhere`` the device is one of other
    machines, and need not be here.

    Raises:
        JobError: the slides, the folder's name or the shard make no sense, or the model that the
            folder was begun with is not here (and ``overwrite`` is not set).
        ModelBundleError: there is no such model, or it is broken.
    """
    from wsi_pipeline.bundle import default_bundle, find_bundle
    from wsi_pipeline.device import name_devices

    if isinstance(slides, str | os.PathLike):
        slides = [slides]
    require_size(mpp, "--mpp")
    masks = None if mask_dir is None else Path(mask_dir)
    entries = tuple(
        # What a list says of one slide outweighs what is said for all.
        replace(entry, mpp=mpp) if entry.mpp is None else entry
        for entry in collect_slides([os.fspath(slide) for slide in slides], mask_dir=masks)
    )
    folder = Path(out)
    if plain_text(str(folder)) != str(folder):
        msg = f"{folder}: its name is not UTF-8, and libraries of tables and maps need it to be. "
        raise JobError(msg + "Name another folder with --out; slides may lie where they do.")
    if model is None and elsewhere:
        default = default_bundle(device.partition(":")[0])
        bundle = _frozen_bundle(folder, overwrite=overwrite) or find_bundle(default)
    elif model is None:
        frozen = _frozen_bundle(folder, overwrite=overwrite)
        bundle = frozen or find_bundle(device=name_devices(device)[0])
    else:
        bundle = find_bundle(model)
    named = (masks, bundle.path)
    redaction = Redaction.of_run(slides, folder, named, wanted=redact_paths)
    jobs = tuple(
        SlideJob(
            path=entry.path,
            slide_id=entry.slide_id,
            out=folder,
            model_name=bundle.spec.name,
            model_digest=bundle.digest,
            mpp=entry.mpp,
            mask=Path(entry.mask) if entry.mask else None,
            keep_maps=keep_maps,
            redaction=redaction.including(entry.path, entry.mask),
        )
        for entry in take_shard(entries, parse_shard(shard, os.environ))
    )
    return Plan(
        out=folder,
        entries=entries,
        jobs=jobs,
        bundle=bundle,
        keep_maps=keep_maps,
        redaction=redaction.including(*(e.path for e in entries), *(e.mask for e in entries)),
        model_named=model is not None,
    )


def execute(
    plan: Plan,
    *,
    device: str = "auto",
    precision: str = "auto",
    batch_size: int | Literal["auto"] = "auto",
    tile_size: int | Literal["auto"] = "auto",
    workers: int | Literal["auto"] = "auto",
    memory: int | str | None = None,
    only: Only | None = None,
    overwrite: bool = False,
    retry_failed: bool = True,
    fail_fast: bool = False,
    dask: str | None = None,
    watcher: Watcher | None = None,
    stop: Callable[[], bool] = lambda: False,
) -> list[RunReport]:
    """Do a plan. The arguments are those of :func:`run`."""
    options: dict[str, Any] = {
        "device": device,
        "precision": precision,
        "tile_size": tile_size,
        "batch_size": batch_size,
        "workers": workers,
        "memory": memory,
    }
    devices = _devices(device, dask, network=only != "objects")
    if dask is not None:
        require_scheduler(dask)
    if dask is None and len(devices) == 1:
        (options["device"],) = devices
    network = dask is None and len(devices) == 1 and only != "objects"
    plan, predictor = _begin(plan, options, network=network, only=only, overwrite=overwrite)
    how: dict[str, Any] = {
        "watcher": watcher or Silent(),
        "stop": stop,
        "only": only,
        "overwrite": overwrite,
        "retry_failed": retry_failed,
        "fail_fast": fail_fast,
    }
    if dask is not None:
        reports = _run_on_dask(plan, dask, options, how)
    elif len(devices) > 1:
        load = BundleLoader.of(plan.bundle, {**options, "share": len(devices)}, alone=True)
        reports = run_on_devices(plan.jobs, load, devices=visible_alone(devices), **how)
    else:
        extractors = available_cpus() if workers == "auto" else workers
        how["workers"] = predictor.extractors if predictor else extractors
        # Slides that may kill the process come last: the others are done before they do it again.
        reports = run_slides(sorted(plan.jobs, key=suspected), predictor, **how)
    if memory is not None and peak_rss_mb() * (1 << 20) > parse_size(memory):
        log.warning("the run held %.0f MiB, more than --memory %s", peak_rss_mb(), memory)
    if len(plan.jobs) == len(plan.entries) and not stop():
        _summarize(plan.out)
    place = {job.slide_id: number for number, job in enumerate(plan.jobs)}
    return sorted(reports, key=lambda report: place[report.slide_id])


def run(
    slides: Sequence[str | os.PathLike[str]] | str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    model: str | None = None,
    device: str = "auto",
    precision: str = "auto",
    batch_size: int | Literal["auto"] = "auto",
    tile_size: int | Literal["auto"] = "auto",
    workers: int | Literal["auto"] = "auto",
    memory: int | str | None = None,
    mpp: float | None = None,
    mask_dir: str | os.PathLike[str] | None = None,
    shard: str | None = None,
    keep_maps: bool = True,
    only: Only | None = None,
    overwrite: bool = False,
    retry_failed: bool = True,
    fail_fast: bool = False,
    redact_paths: bool = False,
    dask: str | None = None,
) -> list[RunReport]:
    """Turn slides into tables, as ``wsi-run`` does.

    Args:
        slides: files, globs, folders, URLs, or .txt / .csv lists.
        out: the results folder; a run that was interrupted there goes on.
        model: name of a bundle or its folder; None is what ``out`` was begun with, and for a
            new folder the default of the device.
        device: ``auto``, ``cpu``, ``cuda``, ``cuda:N`` or ``mps``; ``cuda:all`` or a list such as
            ``cuda:0,cuda:2`` runs a process on each of these GPUs, and divides ``memory`` and the
            threads that are ``auto`` among them.
        precision: ``auto``, ``fp32``, ``bf16`` or ``fp16``; on a CPU also ``int8``, which takes
            about half of bf16's time and changes some nuclei (see ``docs/speed.md``).
        batch_size: tiles the network sees at a time.
        tile_size: side of a tile in pixels of the model's mpp, a multiple of 16.
        workers: threads that read the slide, and that extract objects.
        memory: what the process holds at most on the host, bytes or a text such as ``"8G"``;
            tiles, batches and threads that are ``auto`` follow from it. None: 3 GiB on a CPU,
            less where the machine, the container or the job has less than 4.
        mpp: pixel size of level 0 in micrometres, overrides what the files say.
        mask_dir: folder of own tissue masks, ``<slide_id>.png``, any resolution.
        shard: ``"I/N"`` takes every N-th slide from the I-th on (from 0), or ``"auto"``.
        keep_maps: keep the zarr maps after the objects are written.
        only: ``"maps"`` ends each slide when its maps are complete, ``"objects"`` makes the tables
            of slides whose maps are complete, whatever device made them, without the network.
        overwrite: do finished slides again.
        retry_failed: try slides again that failed before.
        fail_fast: begin no further slide after one has failed.
        redact_paths: write file names alone, never the folders they lie in, into reports, logs,
            ``run.json`` and the summary. A folder that was begun so stays so.
        dask: address of a Dask scheduler; the slides run on its workers instead of here, and
            ``device``, ``memory`` and ``workers`` are those of each worker.

    Returns:
        One report a slide of this shard; failed ones say why in ``error``. Slides that a Dask
        scheduler took with it have the status ``interrupted``: the same call goes on.

    Raises:
        JobError: the run makes no sense as asked; nothing was started.
        ModelBundleError: there is no such model, or it is broken.
    """
    plan = plan_run(
        slides,
        out,
        model=model,
        mpp=mpp,
        mask_dir=mask_dir,
        shard=shard,
        keep_maps=keep_maps,
        device=device,
        elsewhere=dask is not None,
        overwrite=overwrite,
        redact_paths=redact_paths,
    )
    return execute(
        plan,
        device=device,
        precision=precision,
        batch_size=batch_size,
        tile_size=tile_size,
        workers=workers,
        memory=memory,
        only=only,
        overwrite=overwrite,
        retry_failed=retry_failed,
        fail_fast=fail_fast,
        dask=dask,
    )


def _devices(device: str, dask: str | None, *, network: bool) -> tuple[str, ...]:
    """Return the devices that get a process each; one where this process does all or none.

    Raises:
        JobError: one of several is not here, or several are asked of Dask's workers.
    """
    from wsi_pipeline.device import name_devices

    if dask is not None and (device == "cuda:all" or "," in device):
        msg = (
            f"--device {device} with --dask: each worker runs on one GPU. Start one a GPU that "
            "sees no other, and leave out --device"
        )
        raise JobError(msg)
    return name_devices(device) if network and dask is None else (device,)


def _run_on_dask(
    plan: Plan, address: str, options: Mapping[str, Any], how: Mapping[str, Any]
) -> list[RunReport]:
    device, workers = options["device"], options["workers"]
    return run_on_dask(
        plan.jobs,
        BundleLoader.of(plan.bundle, options),
        address=address,
        device=device,
        workers=None if workers == "auto" else workers,
        **how,
    )


def _begin(
    plan: Plan, options: dict[str, Any], *, network: bool, only: str | None, overwrite: bool
) -> tuple[Plan, TorchPredictor | None]:
    """Load the network and put the run on record; the plan has the model that was agreed on."""
    from wsi_pipeline.inference import TorchPredictor

    redacted = {"redact_paths": True} if plan.redaction.folders else {}
    while True:
        predictor = TorchPredictor.load(plan.bundle, **options) if network else None
        model = plan.model_in(options["precision"], only)
        if not plan.bundle.in_zoo and not plan.redaction.folders:
            model["folder"] = str(plan.bundle.path.absolute())
        try:
            freeze_run(
                plan.out,
                [plan.shown(entry) for entry in plan.entries],
                options={**options, "keep_maps": plan.keep_maps, **redacted},
                model=model,
                overwrite=overwrite,
                redaction=plan.redaction,
            )
        except JobError:
            other = None if plan.model_named else _frozen_bundle(plan.out, overwrite=overwrite)
            if other is None or other.digest == plan.bundle.digest:
                raise
            # A shard on another kind of device was faster, and its default holds for all.
            log.warning("%s was just begun with model %s: going on with it", plan.out, other.name)
            plan = plan.with_bundle(other)
        else:
            return plan, predictor


def _summarize(out: Path) -> None:
    """Write the summary of a run that is not one of several shards, which whoever gathers does."""
    from wsi_pipeline.cohort import read_cohort
    from wsi_pipeline.summary import write_summary

    try:
        write_summary(read_cohort(out))
    except (OSError, ValueError, WsiPipelineError) as error:
        # The slides are done, and `wsi summary` makes up for it.
        log.warning("no summary could be written: %s", error)


def _frozen_bundle(out: Path, *, overwrite: bool) -> ModelBundle | None:
    """Return the very model that a results folder was begun with; None where there is no run.

    Raises:
        JobError: it is not here. With ``overwrite`` that does not matter: None.
    """
    from wsi_pipeline.bundle import find_bundle

    before = read_run(out)
    if before is None:
        return None
    frozen = before["model"]
    for place in (frozen["name"], Path(frozen["folder"]) if "folder" in frozen else None):
        try:
            bundle = None if place is None else find_bundle(place)
        except ModelBundleError:
            continue
        if bundle is not None and bundle.digest == frozen["sha256"]:
            return bundle
    if overwrite:
        return None
    msg = (
        f"{out} was begun with model {frozen['name']} ({frozen['sha256'][:12]}), which is not "
        "here. Say where it is with --model, use another --out, or --overwrite to do its slides "
        "again with another."
    )
    raise JobError(msg)
