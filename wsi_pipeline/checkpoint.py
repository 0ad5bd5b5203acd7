"""Checkpoints from elsewhere, their tensors by our names: upstream's Cerberus, torchvision.

Facts of upstream's format: ``torch.save`` of a dict whose ``desc`` is the network's state
dict, every key prefixed with ``module.`` (it was saved from DataParallel). Decoders and
channels are read off the tensors; the settings file beside it is not needed. Its backbone
bears torchvision's names.
"""

from __future__ import annotations

import re
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from wsi_pipeline.errors import ModelBundleError
from wsi_pipeline.spec import AnchorRules, HeadSpec, ModelSpec, RunRules
from wsi_pipeline.upstream import CLASSES

__all__ = [
    "CerberusCheckpoint",
    "ResNetCheckpoint",
    "cerberus_heads",
    "load_pickled",
    "read_cerberus",
    "read_torchvision",
]

_HEAD_NAMES = {
    "Nuclei": "nuclei",
    "Nuclei#TYPE": "nuclei-class",
    "Gland": "gland",
    "Gland#TYPE": "gland-class",
    "Lumen": "lumen",
    "Patch-Class": "tissue",
}
"""Upstream's decoders and our heads."""

_COUNTER = ".num_batches_tracked"

_RENAMES = (
    (r"^backbone\.conv1\.", "encoder.stem.conv."),
    (r"^backbone\.bn1\.", "encoder.stem.norm."),
    *((rf"^backbone\.layer{n + 1}\.", f"encoder.stages.{n}.") for n in range(4)),
    (r"\.downsample\.0\.", ".shortcut.conv."),
    (r"\.downsample\.1\.", ".shortcut.norm."),
    (r"^conv_map\.", "project."),
    (r"^decoder_head\.([^.]+)\.(\d)\.block\.(\d)\.", r"heads.\1.stages.\2.\3."),
    (r"^output_head\.([^.]+)\.(?:INST|TYPE)\.x\.0\.block\.0\.", r"heads.\1.output.hidden."),
    (r"^output_head\.([^.]+)\.(?:INST|TYPE)\.x\.1\.conv\.", r"heads.\1.output.logits."),
    (r"^decoder_head\.(Patch-Class)\.", r"heads.\1."),
    *(
        (rf"^heads\.{re.escape(theirs)}\.", f"heads.{ours}.")
        for theirs, ours in _HEAD_NAMES.items()
    ),
    (r"\.bn(\d?)\.", r".norm\1."),
)
"""Upstream's key, piece by piece, to ours."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CerberusCheckpoint:
    """What a checkpoint of upstream's holds, in our words."""

    spec: ModelSpec
    """The network it is for."""
    tensors: Mapping[str, Tensor]
    """By our names, complete or not."""
    skipped: tuple[str, ...]
    """Upstream's keys left out: the unused classifier ``backbone.fc``, batch counters."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ResNetCheckpoint:
    """A ResNet of torchvision's, in our words."""

    tensors: Mapping[str, Tensor]
    """Of the encoder, by our names."""
    skipped: tuple[str, ...]
    """Keys of the file left out: its classifier ``fc``, batch counters."""


def read_cerberus(path: Path, *, name: str) -> CerberusCheckpoint:
    """Read ``weights.tar`` without unpickling anything but tensors.

    Args:
        path: the file.
        name: what the model shall be called.

    Raises:
        ModelBundleError: no such checkpoint, or it holds a tensor of no known place.
    """
    upstream = _read_state(path)
    skipped = tuple(
        key for key in upstream if key.startswith("backbone.fc.") or key.endswith(_COUNTER)
    )
    renamed = {key: _our_name(key) for key in upstream if key not in skipped}
    unknown = [key for key, name in renamed.items() if name == key]
    if unknown:
        shown = ", ".join(unknown[:8])
        raise ModelBundleError(f"{path}: {len(unknown)} unexpected tensors: {shown}")
    tensors = {ours: upstream[key] for key, ours in renamed.items()}
    if len(tensors) < len(renamed):
        raise ModelBundleError(f"{path}: two tensors claim one place, as two heads on one decoder")
    return CerberusCheckpoint(
        spec=_cerberus_spec(tensors, name=name), tensors=tensors, skipped=skipped
    )


def read_torchvision(path: Path) -> ResNetCheckpoint:
    """Read the state dict of torchvision's ``resnet18`` or ``resnet34``.

    The shapes are those of ``cerberus``' encoder of the same depth. Two things differ from
    where they were trained: torchvision's first convolution has stride 2, ours has 1, and
    ImageNet's pixels were standardised, ours are scaled to 0..1. The weights are a starting
    point, not a network that works as it is.

    Args:
        path: what ``torch.save(model.state_dict(), path)`` wrote, or a ``.safetensors`` file.

    Raises:
        ModelBundleError: no such file, a ResNet of bottleneck blocks (50 layers and more), or
            tensors of no known place.
    """
    state = _without_module(_read_flat(path))
    possible = "torchvision's resnet18 and resnet34 can be read"
    if any(re.match(r"layer\d\.\d+\.conv3\.", key) for key in state):
        msg = f"{path} holds a ResNet of bottleneck blocks (resnet50 and deeper); {possible}"
        raise ModelBundleError(msg)
    skipped = tuple(key for key in state if key.startswith("fc.") or key.endswith(_COUNTER))
    # Upstream's backbone is torchvision's ResNet: one table of names does for both.
    renamed = {key: _our_name(f"backbone.{key}") for key in state if key not in skipped}
    unknown = [key for key, name in renamed.items() if not name.startswith("encoder.")]
    if unknown or "conv1.weight" not in renamed:
        found = ", ".join((unknown or list(state))[:8])
        msg = f"{path} is no state dict of a ResNet of basic blocks: found {found}; {possible}"
        raise ModelBundleError(msg)
    tensors = {name: state[key] for key, name in renamed.items()}
    return ResNetCheckpoint(tensors=tensors, skipped=skipped)


def _read_flat(path: Path) -> dict[str, Tensor]:
    if path.suffix == ".safetensors":
        try:
            return dict(load_file(path))
        except (SafetensorError, OSError) as error:
            raise ModelBundleError(f"{path} cannot be read: {error}") from error
    content = load_pickled(path)
    if not isinstance(content, dict) or not all(isinstance(t, Tensor) for t in content.values()):
        found = sorted(map(str, content))[:8] if isinstance(content, dict) else type(content)
        raise ModelBundleError(f"{path} holds no state dict (names and tensors); found {found}")
    return {str(key): tensor for key, tensor in content.items()}


def load_pickled(path: Path) -> Any:  # noqa: ANN401 - whatever was pickled
    """Read what ``torch.save`` wrote, if it is tensors and plain values alone.

    Args:
        path: the file.

    Returns:
        The content, its tensors on the CPU.

    Raises:
        ModelBundleError: no such file, damaged, or it wants to run code.
    """
    try:
        _refuse_compressed(path)
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch follows bytes that are no checkpoint as far as they go
        msg = f"{path} cannot be read as a checkpoint of tensors alone: {error!r}"
        raise ModelBundleError(msg) from error


def _refuse_compressed(path: Path) -> None:
    """Refuse an archive with packed records: torch writes none, and any size may be in them.

    Raises:
        ValueError: there are such.
    """
    if not zipfile.is_zipfile(path):
        return
    with zipfile.ZipFile(path) as archive:
        packed = [info.filename for info in archive.infolist() if info.compress_type]
    if packed:
        msg = f"{len(packed)} of its records are compressed, such as {packed[0]!r:.80}"
        raise ValueError(msg)


def _without_module(state: dict[str, Tensor]) -> dict[str, Tensor]:
    prefix = "module."
    if all(key.startswith(prefix) for key in state):
        return {key.removeprefix(prefix): tensor for key, tensor in state.items()}
    return state


def _read_state(path: Path) -> dict[str, Tensor]:
    content = load_pickled(path)
    state = content.get("desc") if isinstance(content, dict) else None
    if not isinstance(state, dict) or not all(isinstance(t, Tensor) for t in state.values()):
        found = sorted(map(str, content))[:8] if isinstance(content, dict) else type(content)
        raise ModelBundleError(f"{path} has no tensors under 'desc'; found {found}")
    return _without_module(state)


def _our_name(key: str) -> str:
    for pattern, replacement in _RENAMES:
        key = re.sub(pattern, replacement, key)
    return key


def _cerberus_spec(tensors: Mapping[str, Tensor], *, name: str) -> ModelSpec:
    names = {key.split(".")[1] for key in tensors if key.startswith("heads.")}
    heads = tuple(head for head in cerberus_heads(names) if head.name in names)
    if not heads:
        raise ModelBundleError("the checkpoint holds no decoder of a known name")
    for head in heads:
        last = "conv2" if head.kind == "patch" else "output.logits"
        channels = _shape(tensors, f"heads.{head.name}.{last}.weight")[0]
        if channels != head.logit_channels:
            msg = f"head {head.name!r} has {channels} channels, upstream's {head.logit_channels}"
            raise ModelBundleError(msg)
    stages = [
        {key.split(".")[3] for key in tensors if key.startswith(f"encoder.stages.{n}.")}
        for n in range(4)
    ]
    options: dict[str, Any] = {
        "widths": [_shape(tensors, f"encoder.stages.{n}.0.conv1.weight")[0] for n in range(4)],
        "blocks": [len(stage) for stage in stages],
    }
    for head in heads:
        part, option = (
            ("conv1", "patch_width")
            if head.kind == "patch"
            else ("output.hidden.conv", "head_width")
        )
        options[option] = _shape(tensors, f"heads.{head.name}.{part}.weight")[0]
    return ModelSpec(
        name=name,
        architecture="cerberus",
        mpp=0.5,
        halo_px=160,
        heads=heads,
        options=options,
        description="Cerberus (Graham et al., 2023), imported from upstream's checkpoint.",
    )


def _shape(tensors: Mapping[str, Tensor], name: str) -> tuple[int, ...]:
    if name not in tensors:
        raise ModelBundleError(f"the checkpoint lacks the tensor that becomes {name!r}")
    return tuple(tensors[name].shape)


def cerberus_heads(names: set[str] | None = None) -> tuple[HeadSpec, ...]:
    """Return upstream's six heads with its post-processing constants; the map scale is ours.

    Args:
        names: the heads that the network has; nuclei and lumina have a parent only if there
            are glands. None: all of them.
    """
    gland = "gland" if names is None or "gland" in names else None
    return (
        HeadSpec(
            name="nuclei", kind="instance", object_kind="nucleus", rules=AnchorRules(), parent=gland
        ),
        HeadSpec(
            name="nuclei-class", kind="class", classes=CLASSES["nuclei-class"], classifies="nuclei"
        ),
        HeadSpec(
            name="gland",
            kind="instance",
            stride=2,
            object_kind="gland",
            rules=RunRules(inner_threshold=0.55, min_core_um2=250.0, grow_um=5.0),
        ),
        HeadSpec(
            name="gland-class",
            kind="class",
            stride=2,
            classes=CLASSES["gland-class"],
            classifies="gland",
        ),
        HeadSpec(
            name="lumen",
            kind="instance",
            stride=2,
            object_kind="lumen",
            rules=RunRules(inner_threshold=0.5, min_core_um2=37.5, grow_um=1.0),
            parent=gland,
            inside_parent=gland is not None,
        ),
        HeadSpec(name="tissue", kind="patch", stride=16, classes=CLASSES["tissue"]),
    )
