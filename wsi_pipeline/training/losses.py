"""What each head is punished for: one number a labelled sample and term.

======== =================================================================================
kind     terms
======== =================================================================================
instance ``ce``: cross-entropy of background, inner and contour, times the weight between
         neighbours; ``dice``: 1 - soft Dice over inner and contour
class    ``ce``: class-weighted cross-entropy over the pixels that have a class; ``dice``:
         1 - soft Dice over the classes there
patch    ``ce``: cross-entropy where a cell sees a whole patch
detect   see ``centres``
======== =================================================================================

The forms are those of Graham et al. (Cerberus, 2023); the weight between neighbours is from
Ronneberger et al. (U-Net, 2015). Two things differ from upstream's code on purpose: Dice is
taken a sample and over the classes it has, so that a sample's loss does not depend on its
neighbours in the batch (nor on the number of devices), and unknown pixels count for nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache

import torch
from torch import Tensor
from torch.nn import functional

from wsi_pipeline.blocks import enlarged
from wsi_pipeline.errors import RecipeError
from wsi_pipeline.network import PATCH_CELLS
from wsi_pipeline.spec import HeadSpec, ModelSpec
from wsi_pipeline.training.batch import Batch
from wsi_pipeline.training.centres import centre_loss
from wsi_pipeline.training.targets import (
    at_scale,
    between_weights,
    class_targets,
    interior_and_contour,
)

__all__ = ["HeadRules", "Losses", "check_head_rules", "compute_losses"]

_SMOOTH = 1e-3
"""Added to both halves of a Dice fraction: upstream's."""


@dataclass(frozen=True, kw_only=True, slots=True)
class HeadRules:
    """Targets and loss of one head."""

    weight: float = 1.0
    """Of the head's loss in the sum over heads."""
    ce: float = 1.0
    """Of the cross-entropy term (of the heat for detect heads)."""
    dice: float = 1.0
    """Of the Dice term (of the sizes for detect heads)."""
    element_um: float = 1.5
    """Instance heads: diameter of the ellipse that erodes and dilates objects. Upstream: 1.5
    for nuclei and lumina, 5.5 for glands (3 and 11 px at 0.5 um)."""
    contour: bool = True
    """Instance heads: learn the contour (Cerberus+), or the eroded inside alone (Cerberus)."""
    between: float = 10.0
    """Instance heads: extra weight where two objects almost touch; 0: none."""
    channel_weights: tuple[float, float, float] = (1.0, 1.0, 1.0)
    """Instance heads: weight of background, inner and contour pixels in the cross-entropy."""
    class_weights: Mapping[str, float] = field(default_factory=dict)
    """Class and patch heads: weight by class name; a class that is absent has 1."""

    def __post_init__(self) -> None:
        weights = (*self.channel_weights, *self.class_weights.values())
        if min(self.weight, self.ce, self.dice, self.between, *weights) < 0 or self.element_um <= 0:
            raise RecipeError("[heads]: weights cannot be negative, element_um must be positive")


@dataclass(frozen=True, kw_only=True, slots=True)
class Losses:
    """Losses of one batch."""

    total: Tensor
    """What is minimised: the weighted sum."""
    terms: Mapping[str, Tensor]
    """Detached sums over this device's samples: ``<head>/<term>``."""

    def detached(self) -> Losses:
        """Return the same numbers without the graph that led to them."""
        return Losses(total=self.total.detach(), terms=self.terms)


def check_head_rules(rules: Mapping[str, HeadRules], spec: ModelSpec) -> None:
    """Check that rules are for heads and classes of the network.

    Raises:
        RecipeError: a head or class that it does not have.
    """
    names = {head.name: head for head in spec.heads}
    for name, own in rules.items():
        if name not in names:
            raise RecipeError(f"[heads.{name}]: the network's heads are {sorted(names)}")
        unknown = sorted(set(own.class_weights) - set(names[name].classes))
        if unknown:
            found = list(names[name].classes)
            raise RecipeError(f"[heads.{name}] class_weights: {unknown} are none of {found}")


def compute_losses(
    logits: Mapping[str, Tensor],
    batch: Batch,
    spec: ModelSpec,
    rules: Mapping[str, HeadRules],
    counts: Mapping[str, int],
) -> Losses:
    """Compare the network's logits with the labels.

    Args:
        logits: ``(n, C, h, w)`` by head, for the batch's rows of that head.
        batch: crops.
        spec: the network's.
        rules: by head; a head that is absent has the defaults.
        counts: labelled samples by head in the whole batch, over all devices. Sums over
            samples are divided by it, so that the devices' gradients add up.
    """
    parts: list[Tensor] = []
    terms: dict[str, Tensor] = {}
    side = batch.pixels.shape[-1]
    for name, logits_NCHW in logits.items():
        own = rules.get(name, HeadRules())
        head = spec.head(name)
        found = _head_terms(head, own, logits_NCHW.float(), batch, side, spec.mpp)
        for term, loss_N in found.items():
            weight = own.weight * (own.ce if term in ("ce", "heat") else own.dice)
            parts.append(weight * loss_N.sum() / counts[name])
            terms[f"{name}/{term}"] = loss_N.detach().sum()
    # A rank may be without labels where another has them.
    total = torch.stack(parts).sum() if parts else batch.pixels.new_zeros(())
    return Losses(total=total, terms=terms)


def _head_terms(
    head: HeadSpec, rules: HeadRules, logits_NCHW: Tensor, batch: Batch, side: int, mpp: float
) -> dict[str, Tensor]:
    labels = batch.labels[head.name]
    if head.kind == "patch":
        return _patch_terms(head, rules, logits_NCHW, labels)
    scale = side // logits_NCHW.shape[-1]
    if head.kind == "detect":
        unknown = batch.unknown[head.name]
        return centre_loss(logits_NCHW, labels, unknown, head, mpp=mpp)
    if scale > head.stride:
        logits_NCHW = enlarged(logits_NCHW, scale // head.stride)
        scale = head.stride
    labels_NHW = at_scale(labels, scale)
    if head.kind == "class":
        return _class_terms(head, rules, logits_NCHW, class_targets(labels_NHW))
    return _instance_terms(rules, logits_NCHW, labels_NHW, mpp * scale)


def _instance_terms(
    rules: HeadRules, logits_NCHW: Tensor, ids_NHW: Tensor, mpp: float
) -> dict[str, Tensor]:
    element_px = max(1, round(rules.element_um / mpp))
    element_px += 1 - element_px % 2  # odd, so that it has a middle
    target_NHW = interior_and_contour(ids_NHW, element_px, contour=rules.contour)
    weights = _on_device(rules.channel_weights, logits_NCHW.device)
    ce_NHW = _cross_entropy(logits_NCHW, target_NHW, weights)
    if rules.between:
        weights_NHW = between_weights(
            ids_NHW, sigma_px=element_px, gain=rules.between, inner=target_NHW == 1
        )
        ce_NHW = ce_NHW * weights_NHW
    known_NHW = (target_NHW >= 0).float()
    return {
        "ce": (ce_NHW * known_NHW).sum((1, 2)) / known_NHW.sum((1, 2)).clamp(min=1),
        "dice": _dice(logits_NCHW, target_NHW, known_NHW),
    }


def _class_terms(
    head: HeadSpec, rules: HeadRules, logits_NCHW: Tensor, target_NHW: Tensor
) -> dict[str, Tensor]:
    # Pixels without a class are background of the instance head; this head need not know them.
    weights = _class_weights(head, rules, logits_NCHW.device)
    foreground_NHW = (target_NHW > 0).float()
    ce_NHW = _cross_entropy(logits_NCHW, target_NHW, weights) * foreground_NHW
    norm_NHW = weights[target_NHW.clamp(min=0)] * foreground_NHW
    return {
        "ce": ce_NHW.sum((1, 2)) / norm_NHW.sum((1, 2)).clamp(min=1e-6),
        "dice": _dice(logits_NCHW, target_NHW, foreground_NHW),
    }


def _patch_terms(
    head: HeadSpec, rules: HeadRules, logits_NCHW: Tensor, target_N: Tensor
) -> dict[str, Tensor]:
    # Nearer to the border a cell's patch is not all inside the crop.
    rim = min(PATCH_CELLS // 2, (logits_NCHW.shape[-1] - 1) // 2)
    kept = slice(rim, logits_NCHW.shape[-1] - rim)
    log_NCHW = logits_NCHW[:, :, kept, kept].log_softmax(1)
    weights = _class_weights(head, rules, logits_NCHW.device)
    chosen_N = log_NCHW.mean((2, 3)).gather(1, target_N[:, None])[:, 0]
    return {"ce": -weights[target_N] * chosen_N}


def _cross_entropy(logits_NCHW: Tensor, target_NHW: Tensor, weights: Tensor) -> Tensor:
    """Return (N, H, W), 0 where the target is unknown (-1)."""
    return functional.cross_entropy(
        logits_NCHW,
        target_NHW,
        weight=weights,
        ignore_index=-1,
        reduction="none",
    )


def _dice(logits_NCHW: Tensor, target_NHW: Tensor, mask_NHW: Tensor) -> Tensor:
    """Return 1 - soft Dice, the mean over the classes from 1 on that a sample has; 0 if none."""
    classes = logits_NCHW.shape[1]
    prob_NCHW = logits_NCHW.softmax(1)[:, 1:] * mask_NHW[:, None]
    truth_NCHW = functional.one_hot(target_NHW.clamp(min=0), classes).movedim(-1, 1)[:, 1:]
    truth_NCHW = truth_NCHW * mask_NHW[:, None]
    common_NC = (prob_NCHW * truth_NCHW).sum((2, 3))
    size_NC = prob_NCHW.sum((2, 3)) + truth_NCHW.sum((2, 3))
    loss_NC = 1 - (2 * common_NC + _SMOOTH) / (size_NC + _SMOOTH)
    present_NC = truth_NCHW.amax((2, 3))
    return (loss_NC * present_NC).sum(1) / present_NC.sum(1).clamp(min=1)


def _class_weights(head: HeadSpec, rules: HeadRules, device: torch.device) -> Tensor:
    return _on_device(tuple(rules.class_weights.get(name, 1.0) for name in head.classes), device)


@cache
def _on_device(weights: tuple[float, ...], device: torch.device) -> Tensor:
    # Once a run: each copy from the host would make the host wait for the device.
    return torch.tensor(weights, dtype=torch.float32, device=device)
