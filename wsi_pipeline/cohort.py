"""How far the slides of a run are: told from its files alone, also while jobs run elsewhere.

No slide is opened. For each slide its report, its lease and the sizes of the files that the
report claims are looked at, by several threads, because a network file system answers slowly
but many at once. Ages are differences of times that the file system noted.
"""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Mapping, Sequence, Set
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from wsi_pipeline.batch import read_run
from wsi_pipeline.durable import filesystem_time, partial_path
from wsi_pipeline.errors import JobError
from wsi_pipeline.job import RunReport, SlideJob, file_digest, folder_facts, read_report
from wsi_pipeline.lease import DEAD_AFTER_S, Holder, read_holder

__all__ = [
    "STATES",
    "Cohort",
    "SlideState",
    "attention_last",
    "describe_totals",
    "read_cohort",
    "slide_states",
    "state_of",
]

State = Literal["done", "running", "interrupted", "missing", "failed"]
STATES: tuple[State, ...] = ("done", "running", "interrupted", "missing", "failed")
"""What a slide may be, those that want attention last."""
ASKED_AT_ONCE = 16
"""Slides whose files are looked at together."""


@dataclass(frozen=True, kw_only=True)
class SlideState:
    """How far one slide of a run is."""

    slide_id: str
    """Which slide."""
    state: State
    """``missing`` is never begun as the run wants it, or its results are gone."""
    reason: str = ""
    """Why it failed, or what is there instead; says the same as long as nothing changes."""
    path: str = ""
    """The slide, as the run names it."""
    report: RunReport | None = None
    """What was reported of it, if that counts."""
    reported: float | None = None
    """When the report was written, in seconds of the file system's clock."""
    holder: Holder | None = None
    """The process that is at work on it, or that died over it."""

    @property
    def fraction(self) -> float | None:
        """How much of its stage a running slide has behind it, 0 to 1; None if unknown."""
        facts = self.holder.facts if self.holder else {}
        done, total = facts.get("done", 0), facts.get("total", 0)
        return min(1.0, max(0, done) / total) if total > 0 else None


@dataclass(frozen=True, kw_only=True)
class Cohort:
    """The slides of a results folder at one moment."""

    folder: Path
    """The results folder."""
    states: tuple[SlideState, ...]
    """One a slide of ``run.json``, sorted by id."""
    now: float
    """When it was looked at, in seconds of the file system's clock."""
    local_clock: bool
    """Whether ``now`` is this machine's clock, because nothing can be written in the folder."""
    model: Mapping[str, str]
    """Name and SHA-256 of the run's model."""

    @property
    def totals(self) -> dict[State, int]:
        """How many slides are in each state, all of them named."""
        found = Counter(own.state for own in self.states)
        return {name: found[name] for name in STATES}

    def age_s(self, own: SlideState) -> float:
        """Return the seconds since the process at a slide gave a sign of life."""
        return max(0.0, self.now - own.holder.beat) if own.holder else 0.0


def read_cohort(folder: Path, *, verify: bool = False) -> Cohort:
    """Look at a run.

    Args:
        folder: the results folder.
        verify: compute the SHA-256 of all results anew, which reads every byte of them.

    Raises:
        JobError: the folder holds no run.
    """
    content = read_run(folder)
    if content is None:
        raise JobError(f"{folder} holds no run.json, so it is no results folder")
    now, local_clock = _now(folder)
    look = _Look(
        folder=folder,
        digest=str(content["model"]["sha256"]),
        now=now,
        reports=_names(folder / "reports"),
        logs=_names(folder / "logs"),
        maps=_names(folder / "maps"),
        verify=verify,
    )
    with ThreadPoolExecutor(ASKED_AT_ONCE, thread_name_prefix="cohort") as pool:
        states = tuple(pool.map(look.state_of, content["slides"]))
    return Cohort(
        folder=folder, states=states, now=now, local_clock=local_clock, model=content["model"]
    )


def slide_states(folder: Path) -> list[SlideState]:
    """Return the state of every slide of the run in a results folder.

    Raises:
        JobError: the folder holds no run.
    """
    return list(read_cohort(folder).states)


def state_of(job: SlideJob) -> SlideState:
    """Return how far one slide is, whether or not it is in ``run.json`` yet."""
    look = _Look(
        folder=job.out,
        digest=job.model_digest,
        now=_now(job.out)[0],
        reports={job.report_path.name},
        logs={job.lease_path.name},
        maps=_names(job.maps_path.parent),
        verify=False,
    )
    return look.state_of({"slide_id": job.slide_id, "path": job.path, "mpp": job.mpp})


@dataclass(frozen=True, kw_only=True)
class _Look:
    """What is the same for all slides of one look at a run."""

    folder: Path
    digest: str
    now: float
    reports: Set[str]
    logs: Set[str]
    maps: Set[str]
    verify: bool

    def state_of(self, slide: Mapping[str, Any]) -> SlideState:
        """Look at the files of one slide of ``run.json``."""
        slide_id = str(slide["slide_id"])
        blank = SlideState(slide_id=slide_id, path=str(slide.get("path", "")), state="missing")
        files = SlideJob(
            path="", slide_id=slide_id, out=self.folder, model_name="", model_digest=""
        )
        report, reported = self._report(files)
        objection = self._objection(report, slide) if report else ""
        counts = report is not None and not objection
        own = replace(blank, report=report, reported=reported) if counts else blank
        if report and counts and report.done:
            return replace(own, state="done")
        holder = self._holder(files)
        # A beat in the future is as bad as an old one: a process that lives writes a new one soon.
        silent_s = 0.0 if holder is None else abs(self.now - holder.beat)
        if holder is not None and not holder.has_ended and silent_s < DEAD_AFTER_S:
            return replace(blank, state="running", reason=f"by {holder.name}", holder=holder)
        if report and counts:
            return replace(own, state=report.status, reason=report.reason)
        if holder is not None:
            # A lease that is left over: its process was killed, or its machine is gone.
            reason = f"{holder.name} ended without a word"
            return replace(blank, state="interrupted", reason=reason, holder=holder)
        if report is not None:
            return replace(blank, reason=objection)
        if reported is not None:
            return replace(blank, reason="its report is broken; run it again")
        # Killed without a word: there are maps, but no claim that the slide is done.
        begun = {partial_path(files.maps_path).name, files.maps_path.name} & self.maps
        return replace(blank, state="interrupted") if begun else blank

    def _report(self, files: SlideJob) -> tuple[RunReport | None, float | None]:
        if files.report_path.name not in self.reports:
            return None, None
        try:
            reported = files.report_path.stat().st_mtime
        except OSError:  # begun again meanwhile
            return None, None
        report = read_report(files.report_path)
        return report, reported

    def _holder(self, files: SlideJob) -> Holder | None:
        return read_holder(files.lease_path) if files.lease_path.name in self.logs else None

    def _objection(self, report: RunReport, slide: Mapping[str, Any]) -> str:
        """Return why a report is not about what the run wants, or no longer true; or nothing."""
        if report.model.get("sha256", self.digest) != self.digest:
            return f"what is there is of model {report.model.get('name')}; run it again"
        if report.mpp and "mpp" in slide:
            given = report.mpp["x"] if report.mpp["source"] == "argument" else None
            if given != slide["mpp"]:
                return "what is there is of another pixel size; run it again"
        return self._damage(report) if report.done else ""

    def _damage(self, report: RunReport) -> str:
        """Return which result of a slide that is done is not there as it was."""
        for name, facts in report.outputs.items():
            path = self.folder / name
            maps = path.suffix == ".zarr"
            try:
                size = os.stat(path).st_size  # noqa: PTH116 - a plain system call
                if not maps and size != facts["bytes"]:
                    return f"{name} has {size} bytes, not the {facts['bytes']} of its report"
                if self.verify:
                    digest = folder_facts(path)["sha256"] if maps else file_digest(path)
                    if digest != facts["sha256"]:
                        return f"the bytes of {name} are not those of its report (SHA-256)"
            except OSError:
                if not maps:  # which may be dropped later
                    return f"{_called(name)} is gone: {name}"
        return ""


def describe_totals(totals: Mapping[State, int]) -> str:
    """Return how many slides are in which state, as one line."""
    listed = ", ".join(f"{number} {name}" for name, number in totals.items())
    return f"{sum(totals.values())} slides: {listed}"


def attention_last(states: Sequence[SlideState]) -> list[SlideState]:
    """Return the states with those that want attention last."""
    return sorted(states, key=lambda own: STATES.index(own.state))


def _called(name: str) -> str:
    folder = name.partition("/")[0]
    return {"objects": "its table", "tissue": "its table of tissue"}.get(folder, "its picture")


def _names(folder: Path) -> frozenset[str]:
    try:
        return frozenset(os.listdir(folder))  # noqa: PTH208 - names alone
    except OSError:
        return frozenset()


def _now(folder: Path) -> tuple[float, bool]:
    """Return what time it is by the clock that stamps the folder's files, or by this machine's."""
    for place in (folder / "logs", folder):
        try:
            return filesystem_time(place), False
        except OSError:  # not there, or mounted read-only
            continue
    return time.time(), True
