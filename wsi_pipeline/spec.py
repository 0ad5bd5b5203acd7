"""What a network promises: its input, its heads, and the rules that turn maps into objects.

Tasks are data. A head has a kind, and everything that differs between "gland" and
"nucleus" is a field of its :class:`HeadSpec`; no other module knows these words.

========  ==============================  ============================================
kind      network's logits                stored maps
========  ==============================  ============================================
instance  background, inner, contour      ``<name>/prob`` (2, H, W): inner, contour
class     one channel a class, 0 = none   ``<name>/class`` (H, W): argmax
patch     one channel a class             ``<name>/prob`` (C, H, W), ``<name>/class``
detect    heat, width, height             ``<name>/prob`` (3, H, W): the same
========  ==============================  ============================================

Probabilities are stored as uint8, 255 = 1.0. A detect head's channels pass through a sigmoid:
heat is the probability that an object's centre is here, width and height are shares of the
rules' ``max_size_um``.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, TypeVar

from wsi_pipeline.checked import misfits, parse_json
from wsi_pipeline.errors import ModelBundleError

__all__ = [
    "AnchorRules",
    "HeadKind",
    "HeadSpec",
    "ModelSpec",
    "PeakRules",
    "RunRules",
    "head_from_json",
]

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,99}")
_TAKEN = "blocks"
"""An array in the store of maps, beside the folders of the heads."""
HeadKind = Literal["instance", "class", "patch", "detect"]
T = TypeVar("T")

_MOST_HEADS = 64
_MOST_STRIDE = 1024
_MOST_HALO_PX = 4096
_MOST_UM = 10_000.0
"""No object that is found by rules is larger than a centimetre."""


@dataclass(frozen=True, kw_only=True, slots=True)
class AnchorRules:
    """Many small objects: each is owned by the window that holds its first core pixel.

    ``foreground`` is the erosion of ``inner + contour > foreground_threshold`` by the
    3 x 3 cross; a *core* is a 4-connected component of ``inner > inner_threshold``
    within it, and grows back into it for ``grow_um``. Constants: upstream Cerberus'
    nuclei at 0.5 micrometres a pixel (8 px mask, 4 px marker).
    """

    inner_threshold: float = 0.5
    """A core pixel's interior probability is above this."""
    foreground_threshold: float = 0.5
    """A foreground pixel's interior + contour probability is above this."""
    min_core_um2: float = 1.0
    """Smaller cores are no seeds."""
    min_area_um2: float = 2.0
    """Smaller finished objects are dropped."""
    grow_um: float = 1.5
    """How far a core grows back into the foreground."""
    max_diameter_um: float = 128.0
    """A core whose box is wider or higher than this is an artefact and is dropped."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RunRules:
    """Few large objects of any extent: labelled over the whole slide from pixel runs.

    A core is a 4-connected component of ``inner > inner_threshold`` and
    ``contour <= contour_threshold``. It is widened by an elliptical element. Constants:
    upstream Cerberus' glands and lumina.
    """

    inner_threshold: float = 0.5
    """A core pixel's interior probability is above this."""
    contour_threshold: float = 0.5
    """A core pixel's contour probability is not above this."""
    min_core_um2: float = 37.5
    """Smaller cores are dropped."""
    grow_um: float = 1.0
    """Diameter of the elliptical element that widens a core; one pixel or less does nothing."""
    fill_holes_um2: float | None = None
    """Holes smaller than this are filled; None fills every hole."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PeakRules:
    """Objects found by their centre: a pixel whose heat is the highest of its surroundings.

    The object is the box of the size that the map states at that pixel. Of equal pixels the
    first in raster order counts, so that windows agree.
    """

    threshold: float = 0.3
    """A centre's heat is above this."""
    min_distance_um: float = 6.0
    """No pixel within this distance of a centre has more heat."""
    max_size_um: float = 64.0
    """Width and height that the value 1.0 of the size channels stands for."""

    def __post_init__(self) -> None:
        if not 0 <= self.threshold < 1 or self.min_distance_um < 0 or not self.max_size_um > 0:
            msg = (
                f"peak rules: a threshold from 0 to 1, a distance and a positive size wanted, "
                f"not {self.threshold}, {self.min_distance_um} um, {self.max_size_um} um"
            )
            raise ModelBundleError(msg)


@dataclass(frozen=True, kw_only=True, slots=True)
class HeadSpec:
    """One output of the network."""

    name: str
    """Key of the head in maps and in the network."""
    kind: HeadKind
    """``instance``, ``class``, ``patch`` or ``detect``."""
    stride: int = 1
    """Pixels of the model's mpp that one stored map pixel spans, in x and y."""
    classes: tuple[str, ...] = ()
    """Class names by id, id 0 first. For a class head, id 0 means "none"."""
    object_kind: str | None = None
    """Instance and detect heads: the value of the table's ``kind`` column."""
    rules: AnchorRules | RunRules | PeakRules | None = None
    """Instance and detect heads: how maps become objects."""
    classifies: str | None = None
    """Class heads: the instance head whose objects vote here."""
    parent: str | None = None
    """Instance heads: the instance head whose object may contain this one's."""
    inside_parent: bool = False
    """Instance heads: pixels outside every parent object do not count."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "classes", tuple(self.classes))
        if not _NAME.fullmatch(self.name) or self.name == _TAKEN:
            msg = f"a name is letters, digits, '-' and '_', and not {_TAKEN!r}"
            raise ModelBundleError(
                f"head {self.name!r:.120}: {msg}: it becomes a folder of the maps"
            )
        if not 1 <= self.stride <= _MOST_STRIDE:
            raise ModelBundleError(f"head {self.name!r}: stride must be 1 to {_MOST_STRIDE}")
        if self.kind == "instance":
            self._require("object_kind", "rules")
            if isinstance(self.rules, PeakRules):
                raise ModelBundleError(f"head {self.name!r}: peak rules are for detect heads")
            if self.inside_parent and self.parent is None:
                raise ModelBundleError(f"head {self.name!r}: inside_parent needs a parent")
        elif self.kind == "detect":
            self._require("object_kind", "rules")
            if not isinstance(self.rules, PeakRules) or self.inside_parent:
                msg = f"detect head {self.name!r} takes peak rules and no inside_parent"
                raise ModelBundleError(msg)
        else:
            self._require("classes")
            if len(self.classes) > 255:
                raise ModelBundleError(f"head {self.name!r}: more than 255 classes")
        if self.kind == "class":
            self._require("classifies")

    def _require(self, *names: str) -> None:
        for name in names:
            if not getattr(self, name):
                msg = f"head {self.name!r} of kind {self.kind!r} lacks {name!r}"
                raise ModelBundleError(msg)

    @property
    def logit_channels(self) -> int:
        """Channels the network puts out for this head."""
        return 3 if self.kind in ("instance", "detect") else len(self.classes)

    @property
    def prob_channels(self) -> tuple[str, ...]:
        """Names of the channels of ``<name>/prob``; empty where only classes are kept."""
        return {
            "instance": ("inner", "contour"),
            "class": (),
            "patch": self.classes,
            "detect": ("heat", "width", "height"),
        }[self.kind]

    @property
    def has_class_map(self) -> bool:
        """Whether ``<name>/class`` exists."""
        return self.kind in ("class", "patch")


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelSpec:
    """A network as its bundle's ``spec.json`` describes it."""

    name: str
    """Name of the bundle."""
    architecture: str
    """Which module of ``network.py`` runs it."""
    mpp: float
    """Micrometres per input pixel, from 0.05 to 5."""
    halo_px: int
    """Input pixels around a tile that its outputs depend on noticeably; multiple of 16."""
    heads: tuple[HeadSpec, ...]
    """In the order in which their objects stand in the table."""
    options: Mapping[str, Any]
    """Arguments of the architecture (widths and the like)."""
    description: str = ""
    """One sentence: what the model is."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "heads", tuple(self.heads))
        if not (self.name and self.name.isprintable()) or "/" in self.name or "\\" in self.name:
            raise ModelBundleError(f"model {self.name!r}: a name is printable, without slashes")
        names = [head.name for head in self.heads]
        if len(set(names)) != len(names):
            raise ModelBundleError(f"model {self.name!r} names a head twice: {names}")
        if not 0.05 <= self.mpp <= 5:
            raise ModelBundleError(
                f"model {self.name!r}: mpp must be from 0.05 to 5, not {self.mpp}"
            )
        if self.halo_px % 16 or not 0 <= self.halo_px <= _MOST_HALO_PX:
            msg = f"model {self.name!r}: halo_px must be a multiple of 16 up to {_MOST_HALO_PX}"
            raise ModelBundleError(msg)
        if len(names) > _MOST_HEADS:
            raise ModelBundleError(f"model {self.name!r} has more than {_MOST_HEADS} heads")
        for head in self.heads:
            for other in (head.classifies, head.parent):
                self._check_reference(head, other)

    def _check_reference(self, head: HeadSpec, other: str | None) -> None:
        if other is None:
            return
        found = next((h for h in self.heads if h.name == other), None)
        if found is None or found.kind != "instance" or found is head:
            msg = f"head {head.name!r} refers to {other!r}, which is no other instance head"
            raise ModelBundleError(msg)
        if (head.inside_parent or head.classifies == other) and head.stride != found.stride:
            msg = f"heads {head.name!r} and {other!r} must have the same stride"
            raise ModelBundleError(msg)
        if head.parent == other and not isinstance(found.rules, RunRules):
            raise ModelBundleError(f"parent head {other!r} must have run rules")

    def head(self, name: str) -> HeadSpec:
        """Return the head of that name, or raise ``KeyError``."""
        for head in self.heads:
            if head.name == name:
                return head
        raise KeyError(name)

    @property
    def maps(self) -> dict[str, HeadSpec]:
        """Names of all stored maps, ``<name>/prob`` and ``<name>/class``, and their heads."""
        named: dict[str, HeadSpec] = {}
        for head in self.heads:
            if head.prob_channels:
                named[f"{head.name}/prob"] = head
            if head.has_class_map:
                named[f"{head.name}/class"] = head
        return named

    @property
    def instance_heads(self) -> tuple[HeadSpec, ...]:
        """The heads that tell objects by their pixels."""
        return tuple(head for head in self.heads if head.kind == "instance")

    @property
    def object_heads(self) -> tuple[HeadSpec, ...]:
        """The heads that yield objects, by their pixels or by their boxes."""
        return tuple(head for head in self.heads if head.kind in ("instance", "detect"))

    @property
    def patch_head(self) -> HeadSpec | None:
        """The head that classifies tissue, if there is one."""
        return next((head for head in self.heads if head.kind == "patch"), None)

    def class_head(self, instance_head: str) -> HeadSpec | None:
        """Return the class head whose map the objects of ``instance_head`` vote on."""
        return next((head for head in self.heads if head.classifies == instance_head), None)

    def to_json(self) -> str:
        """Return the text of ``spec.json``."""
        data = asdict(self)
        for head, plain in zip(self.heads, data["heads"], strict=True):
            if head.rules is not None:
                plain["rules"] = {"by": _RULES_BY_TYPE[type(head.rules)], **plain["rules"]}
        return json.dumps(data, indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str) -> ModelSpec:
        """Read ``spec.json``.

        Raises:
            ModelBundleError: not JSON, a key missing or unknown, or heads that contradict
                each other.
        """
        try:
            data = parse_json(text)
            heads = tuple(head_from_json(dict(head)) for head in data.pop("heads"))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ModelBundleError(f"spec.json cannot be read: {error!r}") from error
        return _build(cls, {**data, "heads": heads}, "spec.json")


_RULES: dict[str, type[AnchorRules] | type[RunRules] | type[PeakRules]] = {
    "anchor": AnchorRules,
    "run": RunRules,
    "peak": PeakRules,
}
_RULES_BY_TYPE = {kind: name for name, kind in _RULES.items()}


def head_from_json(data: dict[str, Any]) -> HeadSpec:
    """Read one head as ``spec.json`` writes it; ``data`` is changed.

    Raises:
        ModelBundleError: a key missing or unknown.
    """
    rules = data.get("rules")
    if rules is not None:
        rules = dict(rules)
        by = rules.pop("by", None)
        if not isinstance(by, str) or by not in _RULES:
            msg = f"rules.by must be one of {sorted(_RULES)}, not {by!r}"
            raise ModelBundleError(msg)
        where = f"rules of head {data.get('name')!r}"
        data["rules"] = _build(_RULES[by], rules, where)
        large = [key for key, value in rules.items() if key.endswith("_um") and value > _MOST_UM]
        if large:
            raise ModelBundleError(f"{where}: {large} are more than {_MOST_UM:g} micrometres")
    return _build(HeadSpec, data, f"head {data.get('name')!r}")


def _build(kind: type[T], data: dict[str, Any], where: str) -> T:
    known = {field.name for field in fields(kind)}  # type: ignore[arg-type]
    unknown = sorted(set(data) - known)
    if unknown:
        msg = f"{where}: unknown keys {unknown}; known are {sorted(known)}"
        raise ModelBundleError(msg)
    odd = misfits(kind, data)
    if odd:
        said = ", ".join(f"{name} cannot be {data[name]!r:.60}" for name in odd)
        raise ModelBundleError(f"{where}: {said}")
    try:
        return kind(**data)
    except TypeError as error:
        raise ModelBundleError(f"{where}: {error}") from error
