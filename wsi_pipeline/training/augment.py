"""Random geometry and colour for every crop, each from the seed of its sample.

::

    seeds -> draws (CPU, a few numbers a sample) -+-> affines  -> warp            (on the device)
                                                  +-> vesicles -> open_chromatin  (on the device)
                                                  +-> looks    -> recolour        (on the device)

A sample's augmentation is a function of its seed and the rules (and of its source's scales,
where it has its own): its place in the batch, the batch's size and the number of devices do
not matter. Every number is drawn whether or not
it is used, so turning one rule off leaves the others' numbers as they were.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from wsi_pipeline.errors import RecipeError
from wsi_pipeline.spec import ModelSpec
from wsi_pipeline.training.batch import Batch
from wsi_pipeline.training.recolour import SHARPEN_PX, Look, light_map, recolour, stain_map
from wsi_pipeline.training.vesicular import NOISE_BYTES, SHARE, Vesicles, open_chromatin
from wsi_pipeline.training.warp import warp

__all__ = ["AugmentRules", "Scales", "augment"]

Affines = tuple[NDArray[np.float64], NDArray[np.float64]]
Scales = tuple[float, float]
"""Smallest and largest magnification."""


@dataclass(frozen=True, kw_only=True, slots=True)
class AugmentRules:
    """How far a crop may depart from its window; the defaults suit H&E.

    "Up to" means uniform between nothing and that, to either side where there are two. The
    stain rules are standard deviations of normal numbers.
    """

    rotate_deg: float = 180.0
    """Rotation, up to."""
    flip_p: float = 0.5
    """Probability of a flip left to right; so for top to bottom."""
    scale_min: float = 0.75
    """Smallest magnification; log-uniform. A window is twice the crop, so 0.5 needs all of it."""
    scale_max: float = 1.3
    """Largest magnification."""
    anisotropy: float = 0.05
    """Magnification along x over that along y: 1 + this or its inverse, up to."""
    shear_deg: float = 2.0
    """Angle by which the vertical leans, up to."""
    shift: float = 0.02
    """Translation along each axis, up to; a share of the crop's side."""

    vesicular_p: float = 0.0
    """Probability that some of a crop's nuclei open their chromatin; see ``vesicular.py``."""
    vesicular_head: str = "nuclei"
    """The instance head whose labels are those nuclei; crops without its label stay."""

    stain_h: float = 0.28
    """Log of the haematoxylin's gain, in optical density."""
    stain_e: float = 0.28
    """Log of the eosin's gain."""
    stain_rest: float = 0.2
    """Log of the gain of whatever colour is neither."""
    stain_jitter: float = 0.06
    """Change of each component of the two stains' unit colours."""
    stain_offset: float = 0.04
    """Optical density of each stain added everywhere."""

    brightness: float = 0.06
    """Added to all intensities, up to; a share of white."""
    contrast: float = 0.15
    """Distance to mid grey changes by this share, up to."""
    grey_p: float = 0.1
    """Probability of losing colour."""
    grey_max: float = 0.7
    """Share of the colour that is then lost, up to."""
    blur_p: float = 0.2
    """Probability of a Gaussian blur. A crop is blurred or sharpened, never both."""
    blur_max_px: float = 1.2
    """Its standard deviation, up to."""
    sharpen_p: float = 0.15
    """Probability of sharpening by an unsharp mask."""
    sharpen_max: float = 1.0
    """Its gain, up to."""
    noise_p: float = 0.3
    """Probability of noise, independent for each pixel and colour."""
    noise_max: float = 6.0
    """Its standard deviation, up to; intensities 0..255."""

    def __post_init__(self) -> None:
        for name in self._numbers():
            value = getattr(self, name)
            if not isinstance(value, int | float) or not 0 <= value < math.inf:
                msg = f"augmentation: {name} must be a number from 0 on, not {value!r}"
                raise RecipeError(msg)
        for name in ("flip_p", "vesicular_p", "grey_p", "grey_max", "noise_p"):
            self._check_at_most(name, getattr(self, name), 1)
        self._check_at_most("blur_p + sharpen_p", self.blur_p + self.sharpen_p, 1)
        self._check_at_most("rotate_deg", self.rotate_deg, 180)
        self._check_at_most("shear_deg", self.shear_deg, 45)
        self._check_at_most("anisotropy", self.anisotropy, 1)
        self._check_at_most("shift", self.shift, 0.5)
        if not 0.5 <= self.scale_min <= self.scale_max <= 4:
            msg = (
                "augmentation: 0.5 <= scale_min <= scale_max <= 4 wanted, not "
                f"{self.scale_min:g} and {self.scale_max:g}"
            )
            raise RecipeError(msg)

    @staticmethod
    def _check_at_most(name: str, value: float, limit: float) -> None:
        if value > limit:
            msg = f"augmentation: {name} must be at most {limit:g}, not {value:g}"
            raise RecipeError(msg)

    @classmethod
    def _numbers(cls) -> list[str]:
        return [field.name for field in fields(cls) if field.name != "vesicular_head"]

    def check_heads(self, spec: ModelSpec) -> None:
        """Refuse a network that has no head for what the rules ask.

        Raises:
            RecipeError: nuclei are to change that the network has no instance head for.
        """
        offered = [head.name for head in spec.heads if head.kind == "instance"]
        if self.vesicular_p > 0 and self.vesicular_head not in offered:
            msg = (
                f"augmentation: vesicular_head {self.vesicular_head!r} is no instance head of the "
                f"model; it has {offered}"
            )
            raise RecipeError(msg)

    @classmethod
    def off(cls) -> AugmentRules:
        """Return rules that change nothing: the crop is the middle of its window."""
        nothing: dict[str, Any] = dict.fromkeys(cls._numbers(), 0.0)
        return cls(**{**nothing, "scale_min": 1.0, "scale_max": 1.0})

    @classmethod
    def paper(cls) -> AugmentRules:
        """Return rules near those Cerberus was trained with.

        Geometry, blur, noise, brightness and contrast are upstream's. Its changes of hue (8
        of 180) and saturation (0.2) become those of the stains; its median filter is left out.
        """
        return cls(
            rotate_deg=179.0,
            scale_min=0.9,
            scale_max=1.1,
            anisotropy=0.1,
            shear_deg=5.0,
            shift=0.01,
            stain_h=0.1,
            stain_e=0.1,
            stain_rest=0.1,
            stain_offset=0.0,
            brightness=0.1,
            contrast=0.25,
            grey_p=0.0,
            blur_p=1 / 3,
            blur_max_px=1.1,  # OpenCV's for a kernel of 5 pixels
            sharpen_p=0.0,
            noise_p=1 / 3,
            noise_max=12.75,
        )


def augment(
    batch: Batch,
    spec: ModelSpec,
    rules: AugmentRules,
    *,
    crop_px: int,
    seeds: Sequence[int],
    scales: Sequence[Scales | None] | None = None,
) -> Batch:
    """Cut crops out of windows, turned, scaled and recoloured at random.

    Args:
        batch: windows on any device, (B, S, S, 3) uint8, S about twice the crop's side.
        spec: tells the kind of each head, and the size of a pixel.
        rules: how far to go.
        crop_px: the crops' side C; S - C must be even.
        seeds: one a sample, 0 or more.
        scales: one a sample, instead of the rules'; None: the rules'.

    Returns:
        Crops on the same device, (B, 3, C, C) float32 in channels_last, 0..255. What lies
        beyond its window is unknown; see :func:`wsi_pipeline.training.warp.warp`.

    Raises:
        ValueError: a number of seeds or scales other than B, or sizes that do not fit.
    """
    scales = [None] * len(seeds) if scales is None else scales
    if not len(seeds) == len(scales) == len(batch.pixels):
        msg = f"as many seeds and scales, not {len(seeds)} and {len(scales)}"
        raise ValueError(f"{len(batch.pixels)} windows need {msg}")
    draws = _draw(seeds)
    matrix, shift = _affines(draws, rules, scales)
    crops = warp(batch, spec, matrix=matrix, shift_px=shift * crop_px, crop_px=crop_px)
    pixels_BCHW = crops.pixels
    vesicles, head = _vesicles(draws, rules), rules.vesicular_head
    if head in crops.labels and vesicles.share.any():
        pixels_BCHW = open_chromatin(
            pixels_BCHW, crops.labels[head], crops.rows[head], vesicles, mpp=spec.mpp
        )
    pixels_BCHW = recolour(pixels_BCHW, _look(draws, rules))
    return Batch(
        pixels=pixels_BCHW.contiguous(memory_format=torch.channels_last),
        rows=crops.rows,
        labels=crops.labels,
        unknown=crops.unknown,
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class _Draws:
    """Random numbers of a batch, one row a sample."""

    place: NDArray[np.float64]
    """(B, 8), 0..1."""
    stain: NDArray[np.float64]
    """(B, 12), normal."""
    light: NDArray[np.float64]
    """(B, 8), 0..1."""
    noise_key: NDArray[np.int64]
    """(B,), below 2^32."""
    vesicles: NDArray[np.float64]
    """(B, 2), 0..1."""
    vesicle_noise: NDArray[np.uint8]
    """(B, NOISE_BYTES)."""


def _draw(seeds: Sequence[int]) -> _Draws:
    generators = [np.random.Generator(np.random.Philox(seed)) for seed in seeds]
    return _Draws(
        place=np.array([each.random(8) for each in generators]),
        stain=np.array([each.standard_normal(12) for each in generators]),
        light=np.array([each.random(8) for each in generators]),
        noise_key=np.array([each.integers(2**32) for each in generators], np.int64),
        # In this order: what is drawn after the others leaves their numbers as they were.
        vesicles=np.array([each.random(2) for each in generators]),
        vesicle_noise=np.array(
            [np.frombuffer(each.bytes(NOISE_BYTES), np.uint8) for each in generators]
        ),
    )


def _affines(draws: _Draws, rules: AugmentRules, scales: Sequence[Scales | None]) -> Affines:
    """Return matrices (B, 2, 2), window to crop, and shifts (B, 2) in crops."""
    turn, flip_x, flip_y, size, stretch, lean, *_ = draws.place.T
    angle = np.deg2rad(rules.rotate_deg) * _either_way(turn)
    shear = np.tan(np.deg2rad(rules.shear_deg) * _either_way(lean))
    limits = [own or (rules.scale_min, rules.scale_max) for own in scales]
    low, high = np.array([[math.log(limit) for limit in own] for own in limits]).T
    scale = np.exp(low + (high - low) * size)
    ratio = np.exp(math.log1p(rules.anisotropy) * _either_way(stretch) / 2)
    along_x = np.where(flip_x < rules.flip_p, -scale, scale) * ratio
    along_y = np.where(flip_y < rules.flip_p, -scale, scale) / ratio
    cos, sin = np.cos(angle), np.sin(angle)
    # rotation @ [[1, shear], [0, 1]] @ diag(along_x, along_y), written out
    rows = [
        [cos * along_x, (cos * shear - sin) * along_y],
        [sin * along_x, (sin * shear + cos) * along_y],
    ]
    return np.moveaxis(np.array(rows), -1, 0), rules.shift * _either_way(draws.place[:, 6:8])


def _vesicles(draws: _Draws, rules: AugmentRules) -> Vesicles:
    chance, share = draws.vesicles.T
    least, most = SHARE
    changed = chance < rules.vesicular_p
    return Vesicles(
        share=np.where(changed, least + (most - least) * share, 0.0), noise=draws.vesicle_noise
    )


def _look(draws: _Draws, rules: AugmentRules) -> Look:
    """Turn numbers into what happens to colours; what is off for all is left out."""
    light, contrast, grey, grey_share, focus, focus_share, noise, noise_share = draws.light.T
    spread = np.array([rules.stain_h, rules.stain_e, rules.stain_rest])
    stained = spread.any() or rules.stain_jitter > 0 or rules.stain_offset > 0
    lit = rules.brightness > 0 or rules.contrast > 0 or rules.grey_p * rules.grey_max > 0
    blurred = focus < rules.blur_p
    sharpened = ~blurred & (focus < rules.blur_p + rules.sharpen_p)
    return Look(
        stain=stain_map(
            gain=np.exp(spread * draws.stain[:, :3]),
            offset=rules.stain_offset * draws.stain[:, 3:6],
            jitter=rules.stain_jitter * draws.stain[:, 6:].reshape(-1, 2, 3),
        )
        if stained
        else None,
        light=light_map(
            contrast=1 + rules.contrast * _either_way(contrast),
            brightness=rules.brightness * _either_way(light),
            grey=np.where(grey < rules.grey_p, rules.grey_max * grey_share, 0.0),
        )
        if lit
        else None,
        focus_px=np.where(blurred, rules.blur_max_px * focus_share, SHARPEN_PX),
        detail=np.where(blurred, 0, np.where(sharpened, 1 + rules.sharpen_max * focus_share, 1)),
        max_focus_px=max(rules.blur_max_px, SHARPEN_PX),
        noise=np.where(noise < rules.noise_p, rules.noise_max * noise_share, 0.0),
        noise_key=draws.noise_key,
    )


def _either_way(share: NDArray[np.float64]) -> NDArray[np.float64]:
    return 2 * share - 1
