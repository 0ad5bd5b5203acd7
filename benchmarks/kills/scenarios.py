"""What is done with a slide while it is killed: commands, and the folders they begin with."""

from __future__ import annotations

import asyncio
import gc
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.standin import StandIn
from wsi_pipeline.engines import Silent
from wsi_pipeline.job import SlideJob

__all__ = ["Scenario", "prepare", "scenarios", "settle"]

TILE_PX = 384


@dataclass(frozen=True, kw_only=True)
class Scenario:
    """A command, and the state of the results folder that it is given in."""

    name: str
    start: Path | None
    """A results folder to begin with; None: an empty one."""
    work: Callable[[Path], bool]
    """Runs the command on a results folder; whether every slide is done."""
    weight: float = 1.0
    """Of its number of points."""
    wanted: dict[str, bytes] = field(default_factory=dict)
    """What lies in the folder after an undisturbed run, but for what holds times."""
    changes: tuple[tuple[str, str], ...] = ()
    """Stage and name of each change to the file system that it makes."""
    seconds: float = 0.0


def scenarios(folder: Path) -> list[Scenario]:
    """Make a slide and the results folders to begin with, and list what is done with them."""
    from wsi_pipeline.synth import write_slide

    slide = folder / "a.svs"
    write_slide(slide, width=900, height=700, mpp=0.5, seed=3, truth=False)
    glass = folder / "b.svs"  # too little for tissue to be found
    write_slide(glass, width=320, height=256, mpp=0.5, seed=3, truth=False)
    on_gpu = StandIn(tile_px=TILE_PX, device="cuda:0")

    def run(out: Path, predictor: StandIn | None = None, **how: Any) -> bool:
        return run_stand_in(slide, out, predictor or StandIn(tile_px=TILE_PX), **how)

    done, half = folder / "done", folder / "half"
    run(done)
    run(half, stop_after=3)
    return [
        Scenario(name="first run", start=None, work=run),
        Scenario(name="resumed", start=half, work=run),
        Scenario(name="overwrite", start=done, work=lambda out: run(out, overwrite=True)),
        Scenario(name="drop maps", start=None, work=lambda out: run(out, keep_maps=False)),
        Scenario(name="objects beside", start=None, work=lambda out: run(out, on_gpu)),
        Scenario(
            name="command",
            start=None,
            work=lambda out: run_command([slide, glass], out),
            weight=0.5,
        ),
    ]


def run_stand_in(
    slide: Path,
    out: Path,
    predictor: Any,
    *,
    overwrite: bool = False,
    keep_maps: bool = True,
    stop_after: int | None = None,
) -> bool:
    """Run one slide with a stand-in for the network; whether it is done."""
    from wsi_pipeline.engines import run_slides

    job = SlideJob(
        path=str(slide),
        slide_id="a",
        out=out,
        model_name="stand-in",
        model_digest="0" * 64,
        keep_maps=keep_maps,
    )
    watcher = Stopper(stop_after)
    (report,) = run_slides(
        [job],
        predictor,
        watcher=watcher,
        stop=lambda: watcher.is_stopped,
        workers=2,
        overwrite=overwrite,
    )
    return report.done


class Stopper(Silent):
    """Asks to stop after so many blocks."""

    def __init__(self, after: int | None) -> None:
        self._after = after
        self.is_stopped = False

    def advance(self, job: SlideJob, stage: str, done: int, total: int) -> None:
        """A stage has come further."""
        if self._after is not None and stage == "predict" and done >= self._after:
            self.is_stopped = True


def run_command(slides: Sequence[Path], out: Path) -> bool:
    """Run slides with a real network, as the command does: run.json and all."""
    import wsi_pipeline as wsi

    reports = wsi.run(
        slides, out=out, model="stain-baseline", device="cpu", tile_size=512, workers=1
    )
    return all(report.done for report in reports)


def settle() -> None:
    """End the threads that a run leaves behind: a process with threads must not be forked."""
    from zarr.core import sync

    loop = sync.loop[0]
    if loop is not None:
        asyncio.run_coroutine_threadsafe(loop.shutdown_default_executor(), loop).result()
    sync.cleanup_resources()
    others = [
        thread.name for thread in threading.enumerate() if thread is not threading.main_thread()
    ]
    if others:
        raise RuntimeError(f"threads are left that a fork would lose: {others}")
    gc.collect()
    gc.freeze()  # or every child would copy what its collector looks at


def prepare() -> None:
    """Make runs cheap, and let a small slide do what a large one does."""
    import torch

    from wsi_pipeline import attempt, results
    from wsi_pipeline.engines import here
    from wsi_pipeline.instances import spool

    torch.set_num_threads(1)
    # Drawing is most of the time here, giving memory back much of the rest; neither changes files.
    results.draw_preview = lambda picture, *_, **__: picture[::4, ::4]
    attempt.release_memory = here.release_memory = lambda: None
    spool.HELD_BYTES = 1  # a file beside the table, as for a slide of many objects
