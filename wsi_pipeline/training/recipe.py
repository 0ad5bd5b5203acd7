"""Training recipes: a TOML file that says everything a training run depends on.

::

    description = "..."       one sentence for the bundle
    seed = 5

    [model]                   architecture, mpp, halo_px, heads, options; with [start] only changes
    [start]                   where the weights come from; see transfer.Start
    [pretrain]                or: slides without labels to learn an encoder from
    [freeze]                  which parts do not learn; see transfer.Freeze
    [[source]]                a folder of annotated images; as many as wanted
    [split]                   which of their patients validate
    [batches]                 how sources are mixed
    [heads.NAME]              targets and loss of a head
    [augment]                 see augment.AugmentRules
    [schedule]                optimiser, learning rate, length
    [validation]              how often, on how many images

An unknown key is an error that lists the known ones. Paths are relative to the recipe, and
``$NAME`` in them is an environment variable.
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import tomli_w

from wsi_pipeline.checkpoint import cerberus_heads
from wsi_pipeline.errors import ModelBundleError, RecipeError
from wsi_pipeline.spec import HeadSpec, ModelSpec, head_from_json
from wsi_pipeline.training.augment import AugmentRules
from wsi_pipeline.training.losses import HeadRules
from wsi_pipeline.training.pretraining import PretrainRules
from wsi_pipeline.training.sampler import BatchRules
from wsi_pipeline.training.schema import build, override_value
from wsi_pipeline.training.transfer import Freeze, Start

__all__ = [
    "ModelRules",
    "Recipe",
    "Schedule",
    "SourceRules",
    "SplitRules",
    "ValidationRules",
    "model_spec",
    "read_recipe",
]


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelRules:
    """What network is trained; None means: as in the bundle or checkpoint it starts from."""

    architecture: str | None = None
    """As in ``network.py``."""
    mpp: float | None = None
    """Micrometres per input pixel."""
    halo_px: int | None = None
    """Margin of the tiles at inference, a multiple of 16."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """Arguments of the architecture."""
    heads: tuple[Any, ...] = ()
    """Names of Cerberus' heads, or tables with the fields of ``spec.HeadSpec``. They are added
    to those of the starting point; one of the same name takes its place."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SourceRules:
    """A folder of annotated images."""

    path: Path
    """The folder."""
    layout: str | None = None
    """One of ``layouts.LAYOUTS``; None: recognised by what the folder holds."""
    mpp: float | None = None
    """Micrometres per pixel of its images; needed where the layout has none of its own."""
    task: str | None = None
    """What its images are drawn for; None: its heads' names joined by ``+``."""
    weight: float = 1.0
    """Share of the source among those of its task, relative to the others'."""
    crop_px: int | None = None
    """Side of the crops; None: that of ``[batches]``."""
    object_share: float = 0.5
    """Share of the crops whose centre lies on an object."""
    scale_min: float | None = None
    """Smallest magnification of its crops; None: that of ``[augment]``. A source whose pixel
    size is only estimated wants a wider range."""
    scale_max: float | None = None
    """Largest magnification of its crops; None: that of ``[augment]``."""
    leave_out: tuple[str, ...] = ()
    """Names of images that neither train nor validate, or shell patterns (``*``, ``?``,
    ``[ab]``) of names."""
    heads: Mapping[str, str] = field(default_factory=dict)
    """The layout's label and the model's head, where the names differ; ``""``: not used."""
    classes: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    """By the layout's label: its class and the model's; ``"ignore"``: those pixels are unknown."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """Further arguments of the layout's reader, such as ``lumen = false`` of ``ebhi``."""
    split: bool = True
    """False: every image is for training."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SplitRules:
    """Which images validate. Patients are never split."""

    validation: float = 0.2
    """Share of the patients."""
    published: bool = True
    """Keep the publishers' own parts where there are any."""
    seed: int = 0
    """Another seed, other patients."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Schedule:
    """Optimiser, learning rate, length. The defaults are the paper's."""

    steps: int = 90_000
    """Batches."""
    optimiser: Literal["adam", "adamw"] = "adam"
    """Adam, or Adam with decoupled weight decay."""
    learning_rate: float = 1e-3
    """At its highest."""
    weight_decay: float = 0.0
    """Of AdamW; Adam has none."""
    decay: Literal["step", "cosine"] = "step"
    """``step``: times 0.1 at each milestone; ``cosine``: down to a hundredth."""
    milestones: tuple[int, ...] = (70_000,)
    """Steps at which the learning rate falls to a tenth; ``step`` only."""
    warmup: int = 0
    """Steps over which the learning rate rises linearly from 0."""
    clip_norm: float = 5.0
    """Gradients are scaled down to at most this norm; 0: never."""
    ema: float = 0.995
    """Decay of the moving average of the weights, which is what is kept; 0: none."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """Of the forward pass; auto: bf16 where the device has it."""

    def __post_init__(self) -> None:
        if self.steps < 1 or self.learning_rate <= 0 or not 0 <= self.ema < 1:
            raise RecipeError("[schedule] wants steps >= 1, learning_rate > 0 and 0 <= ema < 1")
        if min(self.warmup, self.clip_norm, self.weight_decay, *self.milestones, 0) < 0:
            raise RecipeError("[schedule] wants no negative numbers")
        if self.weight_decay and self.optimiser == "adam":
            raise RecipeError("[schedule] weight_decay is for optimiser 'adamw'; 'adam' has none")


@dataclass(frozen=True, kw_only=True, slots=True)
class ValidationRules:
    """How the network is watched while it learns."""

    every: int = 2000
    """Steps between two validations (and checkpoints)."""
    images: int = 64
    """At most so many, evenly over the groups of each source; `wsi evaluate` takes them all."""
    patience: int = 0
    """Stop after so many validations without a better score; 0: never early."""
    pictures: int = 6
    """Validation images drawn with truth and prediction each time."""

    def __post_init__(self) -> None:
        if self.every < 1 or self.images < 1 or min(self.patience, self.pictures) < 0:
            raise RecipeError("[validation] wants every and images >= 1, and no negative numbers")


@dataclass(frozen=True, kw_only=True, slots=True)
class Recipe:
    """Everything a training run depends on."""

    text: str
    """The TOML it was read from; written anew where values were overridden."""
    description: str = ""
    """One sentence for the bundle."""
    seed: int = 5
    """Of every random draw."""
    model: ModelRules = field(default_factory=ModelRules)
    """``[model]``."""
    start: Start = field(default_factory=Start)
    """``[start]``."""
    pretrain: PretrainRules | None = None
    """``[pretrain]``: instead of ``[start]``."""
    freeze: Freeze = field(default_factory=Freeze)
    """``[freeze]``."""
    source: tuple[SourceRules, ...] = ()
    """``[[source]]``."""
    split: SplitRules = field(default_factory=SplitRules)
    """``[split]``."""
    batches: BatchRules = field(default_factory=BatchRules)
    """``[batches]``."""
    heads: Mapping[str, HeadRules] = field(default_factory=dict)
    """``[heads.NAME]``; a head that is absent has the defaults."""
    augment: AugmentRules = field(default_factory=AugmentRules)
    """``[augment]``."""
    schedule: Schedule = field(default_factory=Schedule)
    """``[schedule]``."""
    validation: ValidationRules = field(default_factory=ValidationRules)
    """``[validation]``."""


def read_recipe(path: Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe.

    Args:
        path: the TOML file.
        overrides: ``key.key=value`` each, the value in TOML; they win over the file.

    Raises:
        RecipeError: not TOML, an unknown key, a value of another type, or no source.
    """
    try:
        text = path.read_text(encoding="utf-8")
        data = tomllib.loads(text)
    except (OSError, ValueError) as error:
        raise RecipeError(f"{path} cannot be read as a recipe: {error}") from error
    for override in overrides:
        override_value(data, override)
    if overrides:
        changes = "".join(f"# changed: {override}\n" for override in overrides)
        text = f"{changes}{tomli_w.dumps(data)}"
    if "text" in data:
        raise RecipeError(f"{path}: unknown key 'text'")
    recipe = build(Recipe, {**data, "text": text}, where=path.name, folder=path.parent)
    if not 0 <= recipe.seed < 2**31:
        raise RecipeError(f"{path}: seed must be 0 to 2147483647, not {recipe.seed}")
    if not recipe.source:
        raise RecipeError(f"{path} names no [[source]] of annotated images")
    if recipe.pretrain is not None and recipe.start != Start():
        raise RecipeError(f"{path}: [start] and [pretrain] both say what to start from: keep one")
    return recipe


def model_spec(recipe: Recipe, base: ModelSpec | None, *, name: str) -> ModelSpec:
    """Return the spec of the network that a recipe trains.

    Args:
        recipe: its ``[model]`` says what is new or changed.
        base: the spec of the bundle or checkpoint it starts from, if there is one.
        name: of the new bundle.

    Raises:
        RecipeError: there is no base and ``[model]`` lacks architecture, mpp or heads.
    """
    rules = recipe.model
    heads = {head.name: head for head in (base.heads if base else ())}
    heads |= {head.name: head for head in map(_head, rules.heads)}
    heads = {name: _known_references(head, heads) for name, head in heads.items()}
    trained = ", ".join(head.name for head in (heads.values()))
    description = recipe.description or f"{name}: {trained}, trained by a recipe"
    if rules.mpp is not None and not 0.05 <= rules.mpp <= 5:
        raise RecipeError(f"[model] mpp must be from 0.05 to 5, not {rules.mpp}")
    changes = {
        key: value
        for key in ("architecture", "mpp", "halo_px")
        if (value := getattr(rules, key)) is not None
    }
    try:
        if base is not None:
            return replace(
                base,
                name=name,
                heads=tuple(heads.values()),
                options={**base.options, **rules.options},
                description=description,
                **changes,
            )
        lacking = [key for key in ("architecture", "mpp") if key not in changes]
        if lacking or not heads:
            msg = f"[model] lacks {lacking or ['heads']}, and there is no bundle to start from"
            raise RecipeError(msg)
        return ModelSpec(
            name=name,
            heads=tuple(heads.values()),
            options=dict(rules.options),
            description=description,
            **{"halo_px": 160, **changes},
        )
    except ModelBundleError as error:
        raise RecipeError(f"[model]: {error}") from error


def _head(data: str | HeadSpec | Mapping[str, Any]) -> HeadSpec:
    if isinstance(data, HeadSpec):
        return data
    known = {head.name: head for head in cerberus_heads()}
    if isinstance(data, str):
        if data not in known:
            msg = f"[model] heads: {data!r} is none of {sorted(known)}; write a table for a new one"
            raise RecipeError(msg)
        return known[data]
    try:
        return head_from_json(dict(data))
    except ModelBundleError as error:
        raise RecipeError(f"[model] heads: {error}") from error


def _known_references(head: HeadSpec, heads: Mapping[str, HeadSpec]) -> HeadSpec:
    # Cerberus' nuclei and lumina name their gland; a network without glands has none to name.
    if head.parent is not None and head.parent not in heads:
        return replace(head, parent=None, inside_parent=False)
    return head
