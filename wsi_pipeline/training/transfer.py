"""What a network starts from, and which of its parts do not learn.

::

    Start  -> read_start -> StartingPoint: tensors by our names, a spec where there is one
    network, StartingPoint -> start_from -> TransferReport: taken, skipped, fresh
    network, Freeze, step  -> apply_freeze: what learns now

A tensor is taken where its name and its shape fit; nothing is cut, padded or guessed. The
last layer of a head is not taken where the head's classes are others. Batch counters of the
normalisations are no part of what a network computes and are not counted.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from wsi_pipeline.bundle import find_bundle, open_bundle
from wsi_pipeline.checkpoint import read_cerberus, read_torchvision
from wsi_pipeline.errors import ModelBundleError, RecipeError
from wsi_pipeline.spec import ModelSpec

__all__ = [
    "Freeze",
    "Start",
    "StartingPoint",
    "TransferReport",
    "apply_freeze",
    "read_start",
    "start_from",
    "take",
]

_COUNTER = ".num_batches_tracked"
_LAST_LAYERS = ("", "output.logits.", "conv2.")
"""Where a head's logits come from: a comparison network's, a decoder's, a patch head's."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Start:
    """Where the weights come from: one of these, or none for fresh weights."""

    model: str | None = None
    """A bundle of the model zoo, by name."""
    bundle: Path | None = None
    """A bundle's folder."""
    cerberus: Path | None = None
    """A checkpoint of upstream's Cerberus."""
    torchvision: Path | None = None
    """A state dict of torchvision's ResNet-18 or 34."""
    simclr: Path | None = None
    """An encoder that :func:`wsi_pipeline.training.simclr.pretrain` wrote."""
    only: tuple[str, ...] = ()
    """Module names (``encoder``, ``heads.gland``) to take; none: all that fit. Heads that are
    not named are not part of the new network, unless ``[model]`` names them."""

    def __post_init__(self) -> None:
        given = [f.name for f in fields(self) if f.name != "only" and getattr(self, f.name)]
        if len(given) > 1:
            raise RecipeError(f"[start] names {len(given)} sources, {given}: give one")
        if self.only and not given:
            raise RecipeError("[start] says what to take (only), but not from where")


@dataclass(frozen=True, kw_only=True, slots=True)
class StartingPoint:
    """Weights to start from."""

    source: str
    """For messages and reports."""
    tensors: Mapping[str, Tensor]
    """By our names."""
    spec: ModelSpec | None = None
    """Of the network they are from; None where they are an encoder alone."""
    skipped: Mapping[str, str] = field(default_factory=dict)
    """What was left out on reading, by the source's own names, and why."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TransferReport:
    """What became of a source's tensors, and where the network's are from."""

    source: str
    """What was loaded."""
    taken: tuple[str, ...]
    """Tensors of the network that are the source's now."""
    skipped: Mapping[str, str]
    """Tensors of the source that were not used, and why."""
    fresh: tuple[str, ...]
    """Tensors of the network that kept their own values."""

    def summary(self) -> str:
        """Return one line a part of the network: ``encoder: 104 taken; project: 1 fresh``."""
        counts = Counter(
            (_group(name), what)
            for what in ("taken", "skipped", "fresh")
            for name in getattr(self, what)
        )
        groups = dict.fromkeys(group for group, _ in counts)
        lines = [
            f"{group}: "
            + ", ".join(
                f"{counts[group, what]} {what}"
                for what in ("taken", "skipped", "fresh")
                if (group, what) in counts
            )
            for group in groups
        ]
        return "\n".join([f"from {self.source}:", *lines])

    def to_dict(self) -> dict[str, Any]:
        """Return the whole report for JSON."""
        return {
            "source": self.source,
            "taken": list(self.taken),
            "skipped": dict(self.skipped),
            "fresh": list(self.fresh),
        }


def read_start(start: Start) -> StartingPoint | None:
    """Read the weights that a recipe starts from; None where it starts afresh.

    Raises:
        ModelBundleError: there is no such source, or it is damaged.
    """
    if start.model is not None or start.bundle is not None:
        bundle = open_bundle(start.bundle) if start.bundle else find_bundle(start.model)
        tensors = bundle.load_network().state_dict()
        source = f"bundle {start.bundle or start.model}"
        return StartingPoint(source=source, tensors=tensors, spec=bundle.spec)
    if start.cerberus is not None:
        found = read_cerberus(start.cerberus, name=start.cerberus.stem)
        return StartingPoint(
            source=f"Cerberus checkpoint {start.cerberus}",
            tensors=found.tensors,
            spec=found.spec,
            skipped=_left_out(found.skipped),
        )
    if start.torchvision is not None:
        resnet = read_torchvision(start.torchvision)
        return StartingPoint(
            source=f"torchvision ResNet {start.torchvision}",
            tensors=resnet.tensors,
            skipped=_left_out(resnet.skipped),
        )
    if start.simclr is not None:
        return StartingPoint(
            source=f"SimCLR encoder {start.simclr}", tensors=_read_encoder(start.simclr)
        )
    return None


def start_from(
    network: nn.Module, spec: ModelSpec, point: StartingPoint, *, only: Sequence[str] = ()
) -> TransferReport:
    """Copy what fits of a starting point into a network.

    Args:
        network: built of ``spec``.
        spec: what it is to become. Last layers of heads whose kind or classes differ from the
            starting point's are left fresh, whatever their shapes.
        point: what to start from.
        only: module names to take; none: all that fit.

    Raises:
        ModelBundleError: nothing fits.
        RecipeError: ``only`` names what neither side has.
    """
    reasons = dict(point.skipped)
    changed = _changed_layers(spec, point.spec)
    for name in _counted_out(point.tensors):
        if name.rpartition(".")[0] in changed:
            reasons[name] = "the head has other classes now"
        elif only and not any(_is_below(name, part) for part in only):
            reasons[name] = "not asked for"
    places = (*point.tensors, *network.state_dict())
    unknown = [part for part in only if not any(_is_below(name, part) for name in places)]
    if unknown:
        msg = f"[start] only: {unknown} are no modules; there are {_parts(network)}"
        raise RecipeError(msg)
    wanted = {name: tensor for name, tensor in point.tensors.items() if name not in reasons}
    report = take(network, wanted, source=point.source)
    return TransferReport(
        source=report.source,
        taken=report.taken,
        skipped={**reasons, **report.skipped},
        fresh=report.fresh,
    )


def take(network: nn.Module, tensors: Mapping[str, Tensor], *, source: str) -> TransferReport:
    """Copy every tensor whose name and shape fit into a network.

    Args:
        network: changed in place; precision and device stay its own.
        tensors: by the network's names.
        source: names them in the report.

    Raises:
        ModelBundleError: none fits; the network is as it was.
    """
    places = _counted_out(network.state_dict())
    skipped = {}
    fitting = {}
    for name, tensor in _counted_out(tensors).items():
        if name not in places:
            skipped[name] = "the network has no such place"
        elif tensor.shape != places[name].shape:
            skipped[name] = f"shape {tuple(tensor.shape)}, not {tuple(places[name].shape)}"
        else:
            fitting[name] = tensor
    if not fitting:
        msg = (
            f"{source}: none of its {len(tensors)} tensors fits the network. "
            f"It has {_some(tensors)}; the network has {_some(places)}"
        )
        raise ModelBundleError(msg)
    with torch.no_grad():
        for name, tensor in fitting.items():
            places[name].copy_(tensor)
    fresh = tuple(name for name in places if name not in fitting)
    return TransferReport(source=source, taken=tuple(fitting), skipped=skipped, fresh=fresh)


@dataclass(frozen=True, kw_only=True, slots=True)
class Freeze:
    """Which parts do not learn: module names, of which the longest that fits a part decides.

    Nothing given: everything learns. Nuclear subtyping is ``all_but=("heads.nuclei-class",)``,
    a fixed encoder is ``parts=("encoder",)``, and it thaws from its end with
    ``thaw={"encoder.stages.3": 500, "encoder.stages.2": 1000}`` beside that.
    """

    parts: tuple[str, ...] = ()
    """These do not learn."""
    all_but: tuple[str, ...] = ()
    """Only these learn."""
    thaw: Mapping[str, int] = field(default_factory=dict)
    """These do not learn before that step."""

    def __post_init__(self) -> None:
        twice = sorted(
            name
            for name, count in Counter([*self.parts, *self.all_but, *self.thaw]).items()
            if count > 1
        )
        if twice:
            raise RecipeError(f"[freeze] says two things about {twice}")
        if any(step < 0 for step in self.thaw.values()):
            raise RecipeError(f"[freeze] thaw: steps are 0 or more, not {dict(self.thaw)}")

    @property
    def first_steps(self) -> dict[str, float]:
        """By module name: the first step at which it learns; infinite: it never does.

        The empty name is the whole network.
        """
        steps = {"": float("inf") if self.all_but else 0.0}
        steps |= dict.fromkeys(self.parts, float("inf"))
        steps |= dict.fromkeys(self.all_but, 0.0)
        return steps | dict(self.thaw)


def apply_freeze(network: nn.Module, freeze: Freeze, step: int) -> list[str]:
    """Put a network into the state in which it trains at a step.

    What learns is in training mode and has gradients. What does not is in evaluation mode
    (normalisation by its running statistics, which stay; no dropout), has no gradients, and
    an optimiser passes over it. Call it before each step, and after every ``network.train()``
    or ``network.eval()``.

    Args:
        network: changed in place.
        freeze: which parts do not learn.
        step: counted from 0.

    Returns:
        The parts that learn: the shortest list of module names that covers them.

    Raises:
        RecipeError: a name that no module has (the message lists the modules), or nothing
            with parameters learns.
    """
    first = freeze.first_steps
    modules = dict(network.named_modules())
    unknown = sorted(set(first) - set(modules))
    if unknown:
        msg = f"[freeze] names {unknown}; the network's parts are {_parts(network)}"
        raise RecipeError(msg)
    for name, module in modules.items():
        learns = step >= _first_step(name, first)
        module.training = learns
        for parameter in module.parameters(recurse=False):
            parameter.requires_grad_(learns)
            if not learns:
                parameter.grad = None  # or a leftover would move it once more
    learning = _learning(network, "")
    if not learning:
        msg = f"[freeze] leaves nothing to learn at step {step}: everything is frozen by {freeze}"
        raise RecipeError(msg)
    return learning


def _first_step(name: str, first: Mapping[str, float]) -> float:
    while name not in first:
        name = name.rpartition(".")[0]
    return first[name]


def _learning(module: nn.Module, name: str) -> list[str]:
    """Names of the largest modules of which every parameter learns."""
    found = []
    for child_name, child in module.named_children():
        full = f"{name}.{child_name}" if name else child_name
        learns = [parameter.requires_grad for parameter in child.parameters()]
        if learns and all(learns):
            found.append(full)
        elif any(learns):
            found += _learning(child, full)
    return found


def _parts(network: nn.Module) -> list[str]:
    """Names of the modules that one would freeze: those near the top, stages and heads."""
    modules = dict(network.named_modules())
    return [
        name
        for name, module in modules.items()
        if name
        and next(module.parameters(), None) is not None
        and (name.count(".") < 2 or isinstance(modules[name.rpartition(".")[0]], nn.ModuleList))
        and name.count(".") < 3
    ]


def _changed_layers(spec: ModelSpec, old: ModelSpec | None) -> set[str]:
    """Names of last layers whose channels mean something else than they did."""
    if old is None:
        return set()
    before = {head.name: (head.kind, head.classes) for head in old.heads}
    changed = [
        head.name
        for head in spec.heads
        if before.get(head.name, (head.kind, head.classes)) != (head.kind, head.classes)
    ]
    return {f"heads.{name}.{last}".rstrip(".") for name in changed for last in _LAST_LAYERS}


def _read_encoder(path: Path) -> dict[str, Tensor]:
    try:
        tensors = dict(load_file(path))
    except (SafetensorError, OSError) as error:
        raise ModelBundleError(f"{path} cannot be read as an encoder: {error}") from error
    strange = [name for name in tensors if not name.startswith("encoder.")]
    if strange:
        raise ModelBundleError(f"{path} holds more than an encoder: {_some(strange)}")
    return tensors


def _left_out(names: Sequence[str]) -> dict[str, str]:
    return {
        name: "a classifier that the encoder does not have"
        for name in names
        if not name.endswith(_COUNTER)
    }


def _counted_out(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in tensors.items() if not name.endswith(_COUNTER)}


def _is_below(name: str, module: str) -> bool:
    return name.startswith(f"{module}.")


def _group(name: str) -> str:
    first, second, *_ = [*name.split("."), ""]
    return f"{first}.{second}" if first == "heads" else first


def _some(names: Mapping[str, Tensor] | Sequence[str]) -> str:
    shown = list(names)[:5]
    return ", ".join(shown) + (", ..." if len(names) > len(shown) else "")
