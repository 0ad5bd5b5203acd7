"""What the tests of engines share: a network that other processes can load, slides, and watching.

Imported by the processes that engines start, so it must be a module of its own.
"""

import json
import os
import signal
import threading
import time
from dataclasses import dataclass, fields, replace
from pathlib import Path

import numpy as np

from wsi_pipeline.errors import ModelBundleError
from wsi_pipeline.job import SlideJob
from wsi_pipeline.loading import BundleLoader
from wsi_pipeline.spec import HeadSpec, ModelSpec, RunRules
from wsi_pipeline.store import PredictionBlock

POISON_PX = 900
"""A slide of this width kills whoever predicts it."""
BIG_PX = 2600
"""Of this width, one may be told to wait for others."""
LONG_S = 60
"""Whoever waits longer goes on, so that no test hangs."""


class SlowStub:
    """Calls dark pixels objects; waits before each tile, and is at the mercy of the poison slide.

    Its modules are few, because so many processes load it.
    """

    spec = ModelSpec(
        name="stub",
        architecture="none",
        mpp=0.5,
        halo_px=32,
        options={},
        heads=(HeadSpec(name="dark", kind="instance", object_kind="dark", rules=RunRules()),),
    )
    precision = "fp32"
    tile_px = 256
    halo_px = 32
    is_fitting = False
    canvas_bytes = 1 << 28
    extractors = 1

    def __init__(self, device: str, delay_s: float, may_begin=lambda _slide: True):
        self.device = device
        self.delay_s = delay_s
        self.may_begin = may_begin

    def begin(self, slide, tiles):
        """Read nothing ahead."""

    def predict(self, slide, tiles, *, stop, warn, feed):
        if slide.size[0] == POISON_PX:
            os.kill(os.getpid(), signal.SIGKILL)
        deadline = time.monotonic() + LONG_S
        while not self.may_begin(slide) and time.monotonic() < deadline:
            time.sleep(0.02)
        for tile in tiles.tiles:
            if stop():
                return
            time.sleep(self.delay_s)
            dark = 255 - slide.read(tiles.grid, tile.write).mean(axis=2)
            inner = np.where(dark > 75, 255, 0).astype(np.uint8)
            maps = {"dark/prob": np.stack([inner, np.zeros_like(inner)])}
            yield PredictionBlock(tile=tile, arrays=maps)


@dataclass(frozen=True)
class StubLoader:
    """Loads the stub, or kills or fails on a device when told; leaves a file each time."""

    folder: Path
    delay_s: float = 0.0
    kills: tuple[str, ...] = ()
    fails: tuple[str, ...] = ()
    meet: int = 0
    """So many must have come here before it goes on."""
    before_big: int = 0
    """So many slides must be done before the first tile of the big one is."""

    def _may_begin(self, slide):
        if slide.size[0] != BIG_PX:
            return True
        return len(list(self.folder.glob("reports/*.json"))) >= self.before_big

    def __call__(self, device):
        (self.folder / f"loaded-{device}-{os.getpid()}").touch()
        if device in self.kills:
            os._exit(3)
        if device in self.fails:
            raise ModelBundleError("no such model here")
        while len(list(self.folder.glob("loaded-*"))) < self.meet:
            time.sleep(0.02)
        return SlowStub(device, self.delay_s, self._may_begin)


class CpuLoader(BundleLoader):
    """Loads on the CPU whatever device is asked for."""

    def __call__(self, device):
        plain = BundleLoader(**{f.name: getattr(self, f.name) for f in fields(self)})
        return replace(plain, alone=False)("cpu")


def make_slides(folder: Path, **widths: int) -> dict[str, Path]:
    """Write slides of these widths, by their ids."""
    from wsi_pipeline.synth import write_slide

    folder.mkdir(parents=True, exist_ok=True)
    for name, width in widths.items():
        write_slide(
            folder / f"{name}.svs", width=width, height=700, mpp=0.5, seed=len(name), truth=False
        )
    return {name: folder / f"{name}.svs" for name in widths}


def job(slide: Path, out: Path, **changes) -> SlideJob:
    facts = {"path": str(slide), "slide_id": slide.stem, "out": out}
    return SlideJob(**{**facts, "model_name": "stub", "model_digest": "0" * 64, **changes})


def tables(out: Path) -> dict[str, bytes]:
    """All result files except what holds times."""
    kinds = ("objects", "tissue", "maps", "previews")
    files = (path for kind in kinds for path in out.glob(f"{kind}/**/*") if path.is_file())
    return {str(path.relative_to(out)): path.read_bytes() for path in files}


def events(out: Path, slide_id: str) -> list[dict]:
    text = (out / "logs" / f"{slide_id}.jsonl").read_text()
    return [json.loads(line) for line in text.splitlines()]


def holder(out: Path, slide_id: str, timeout_s: float = 60) -> int:
    """Return the process that is at work on a slide, once there is one with blocks to lose."""
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        try:
            if any(event["event"] == "blocks" for event in events(out, slide_id)):
                return json.loads((out / "logs" / f"{slide_id}.lease").read_text())["pid"]
        except (OSError, ValueError):
            pass
        time.sleep(0.02)
    raise AssertionError(f"nobody is at work on {slide_id}")


class Watcher:
    """Remembers what it is told."""

    def __init__(self):
        self.started: list[str] = []
        self.ended: list[tuple[str, str, bool]] = []
        self.stages: set[tuple[str, str]] = set()
        self.predicting = threading.Event()

    def start(self, job):
        self.started.append(job.slide_id)

    def advance(self, job, stage, done, total):
        self.stages.add((job.slide_id, stage))
        if stage == "predict" and done:
            self.predicting.set()

    def finish(self, job, report, *, skipped):
        self.ended.append((job.slide_id, report.status, skipped))


def nothing_left_over(out: Path) -> bool:
    """Whether no temporary file or lease remains."""
    return not [p for p in out.rglob("*") if p.name.endswith((".partial", ".lease"))]
