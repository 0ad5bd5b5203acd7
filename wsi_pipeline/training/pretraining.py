"""The ``[pretrain]`` table of a recipe: an encoder learns from slides before there are labels."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from wsi_pipeline.errors import RecipeError
from wsi_pipeline.network import Cerberus, build_network
from wsi_pipeline.spec import ModelSpec
from wsi_pipeline.training.augment import AugmentRules, augment
from wsi_pipeline.training.batch import Batch
from wsi_pipeline.training.pixels import SlideWindows
from wsi_pipeline.training.simclr import ENCODER_FILE, SimclrRules, pretrain

__all__ = ["PretrainRules", "PretrainSlide", "pretrain_encoder"]


@dataclass(frozen=True, kw_only=True, slots=True)
class PretrainSlide:
    """A slide without labels."""

    path: Path
    """The file."""
    mpp: float | None = None
    """Micrometres per pixel of level 0; None: as the file says."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PretrainRules:
    """SimCLR on the tissue of slides; its encoder is what training starts from."""

    slide: tuple[PretrainSlide, ...]
    """``[[pretrain.slide]]``: at least one."""
    batch: int = 128
    """Windows a step; each is seen twice."""
    crop_px: int = 224
    """Side of a view at the model's mpp, a multiple of 16."""
    workers: int = 2
    """Threads that read the slides."""
    simclr: SimclrRules = field(default_factory=SimclrRules)
    """``[pretrain.simclr]``."""
    views: AugmentRules = field(
        default_factory=lambda: AugmentRules(shift=0.25, scale_min=0.6, scale_max=2.0)
    )
    """``[pretrain.views]``: how two views of a window differ. They are cut from different places
    and at different scales, which is what SimCLR learns from most (Chen et al., 2020, 3.1)."""

    def __post_init__(self) -> None:
        if not self.slide or self.batch < 2 or self.crop_px < 16 or self.crop_px % 16:
            msg = "[pretrain] wants a slide, batch >= 2 and crop_px a multiple of 16"
            raise RecipeError(msg)


def pretrain_encoder(
    rules: PretrainRules,
    spec: ModelSpec,
    *,
    out: Path,
    device: str,
    on_row: Callable[[Mapping[str, Any]], None] = lambda _: None,
    stop: Callable[[], bool] = lambda: False,
) -> Path:
    """Pre-train the encoder of a network; a run that was interrupted goes on.

    Args:
        rules: ``[pretrain]``.
        spec: of the network that will be trained.
        out: where checkpoint, log and result go.
        device: what computes.
        on_row: told about each step.
        stop: asked before each step.

    Returns:
        The file of the encoder's tensors, for ``Start.simclr``.

    Raises:
        RecipeError: the network has no encoder of Cerberus' kind.
        SlideError: a slide cannot be read.
        Interrupted: ``stop`` said so.
    """
    if (out / ENCODER_FILE).is_file():
        return out / ENCODER_FILE
    torch.manual_seed(rules.simclr.seed)
    network = build_network(spec)
    if not isinstance(network, Cerberus):
        raise RecipeError(f"[pretrain] is for architecture 'cerberus', not {spec.architecture!r}")

    def views(windows_BSS3: Tensor, seeds_B: Tensor) -> Tensor:
        bare = Batch(pixels=windows_BSS3, rows={}, labels={}, unknown={})
        seeds = [int(seed) for seed in seeds_B]
        return augment(bare, spec, rules.views, crop_px=rules.crop_px, seeds=seeds).pixels

    with SlideWindows(
        {slide.path: slide.mpp for slide in rules.slide},
        mpp=spec.mpp,
        window_px=2 * rules.crop_px,
        batch=rules.batch,
        seed=rules.simclr.seed,
    ) as windows:
        return pretrain(
            network,
            windows,
            views,
            rules.simclr,
            out=out,
            device=device,
            workers=rules.workers,
            on_step=lambda record: on_row({"pretrain": asdict(record), "step": record.step}),
            stop=stop,
        )
