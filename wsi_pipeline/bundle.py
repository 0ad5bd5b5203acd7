"""Model bundles: find, verify, load, save, and import upstream's checkpoint.

A bundle is a folder::

    spec.json                      what the model is (ModelSpec)
    weights.safetensors            its tensors, or shards and their index; see weights.py
    card.md                        purpose, data, licence, limits, citation
    metrics.json, train.toml       scores, recipe (optional), pictures for the card
    golden.json                    what it says about two fixed tiles; see golden.py (optional)

and has no folders of its own. Its digest is the SHA-256 of ``spec.json`` and the weight files:
what decides the maps. Nothing in a bundle is ever unpickled.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from wsi_pipeline.checkpoint import read_cerberus
from wsi_pipeline.device import choose_device
from wsi_pipeline.durable import partial_path, publish_directory, remove_tree
from wsi_pipeline.errors import ModelBundleError
from wsi_pipeline.network import build_network
from wsi_pipeline.spec import ModelSpec
from wsi_pipeline.weights import halved, number_fault, read_weights, weight_map, write_weights

log = logging.getLogger(__name__)

__all__ = [
    "CARD",
    "DEFAULTS",
    "METRICS",
    "RECIPE",
    "ModelBundle",
    "check_target",
    "default_bundle",
    "find_bundle",
    "import_cerberus",
    "list_bundles",
    "open_bundle",
    "save_bundle",
]

DEFAULTS = {
    "cpu": ("cerberus-lite", "stain-baseline"),
    "cuda": ("cerberus-open", "cerberus-lite", "stain-baseline"),
}
"""By kind of device, what runs when no model is named: the first that is installed."""

_SPARE_NUMBERS = 1 << 22
"""What a network may have beyond its weights, so that missing ones can be named."""
_MAKERS = frozenset({torch.empty, torch.zeros, torch.ones})
"""How layers make their tensors: called with the sizes."""
_SPEC = "spec.json"
CARD, METRICS, RECIPE = "card.md", "metrics.json", "train.toml"


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelBundle:
    """A model on disk: read its spec at once, its weights when asked."""

    spec: ModelSpec
    """What the model promises."""
    path: Path
    """The folder."""
    digest: str
    """SHA-256 (hex) of the spec and the weights; equal digests give equal maps."""
    weight_map: Mapping[str, tuple[str, ...] | None]
    """Weight files by name; the tensors each must hold, None where no index says so."""

    @property
    def name(self) -> str:
        """The model's name."""
        return self.spec.name

    def load_network(self) -> nn.Module:
        """Build the network and fill it; on the CPU, in float32, in evaluation mode.

        Raises:
            ModelBundleError: a tensor is missing, unknown, of another shape, or holds what no
                weight can be (see ``weights.number_fault``); nothing is ever loaded in part.
        """
        tensors = read_weights(self.path, self.weight_map)
        # A spec may ask for a network of any size; the weights are what there is.
        with _Budget(2 * sum(tensor.numel() for tensor in tensors.values()) + _SPARE_NUMBERS):
            network = build_network(self.spec)
        _fill(network, tensors, where=str(self.path))
        return network.eval()

    @property
    def in_zoo(self) -> bool:
        """Whether it is what its name means, wherever this package is installed."""
        return _zoo().get(self.name) == self.path


def default_bundle(kind: str) -> str:
    """Return the name of the bundle that runs when none is named.

    CUDA devices run the wide network, others the narrow one, each if it is in the zoo; the
    baseline runs only where nothing learned is installed.

    Args:
        kind: of device: ``cuda``; any other counts as ``cpu``.
    """
    names = DEFAULTS.get(kind, DEFAULTS["cpu"])
    zoo = _zoo()
    return next((name for name in names if name in zoo), names[-1])


def find_bundle(name: str | Path | None = None, *, device: str = "auto") -> ModelBundle:
    """Find a bundle by its name in the model zoo, or by its folder.

    Args:
        name: a name of the zoo (these win over folders of that name in the working
            directory; write ``./name`` for the folder), a folder, or None for the default.
        device: what it is to run on, as of ``wsi-run``; decides the default alone.

    Raises:
        ModelBundleError: there is no such bundle (the message lists those there are), or
            it is incomplete.
        JobError: the default was asked for a device that is not here.
    """
    if name is None:
        name = default_bundle(choose_device(device).partition(":")[0])
    if isinstance(name, str) and name in (known := _zoo()):
        return open_bundle(known[name])
    if Path(name).is_dir():
        return open_bundle(Path(name))
    msg = f"there is no model bundle {str(name)!r}: neither a folder nor one of {sorted(_zoo())}"
    raise ModelBundleError(msg)


def list_bundles() -> tuple[ModelBundle, ...]:
    """Return the bundles of the model zoo by name."""
    return tuple(open_bundle(path) for _, path in sorted(_zoo().items()))


def open_bundle(path: Path) -> ModelBundle:
    """Open the bundle in a folder; its weights are hashed, not loaded.

    Raises:
        ModelBundleError: a file is missing or contradicts another.
    """
    try:
        text = (path / _SPEC).read_text(encoding="utf-8")
    except (OSError, UnicodeError) as error:
        raise ModelBundleError(f"{path} is no model bundle: {error}") from error
    files = weight_map(path)
    return ModelBundle(
        spec=ModelSpec.from_json(text), path=path, digest=_digest(path, files), weight_map=files
    )


def check_target(path: Path) -> None:
    """Refuse a name under which anything but a bundle lies: a new bundle would replace it.

    Args:
        path: nothing, an empty folder, or an older bundle (flat, and its spec can be read).

    Raises:
        ModelBundleError: there is something else, or a link to whatever.
    """
    if path.is_symlink():
        raise ModelBundleError(f"{path} is a link; name the folder itself")
    if not path.exists() or (path.is_dir() and not any(path.iterdir())):
        return
    try:
        ModelSpec.from_json((path / _SPEC).read_text(encoding="utf-8"))
        alone = not any(inner.is_dir() for inner in path.iterdir())
    except (OSError, UnicodeError, ModelBundleError):
        alone = False
    if not alone:
        raise ModelBundleError(f"{path} exists and is no model bundle; choose another --out")


def save_bundle(
    path: Path,
    spec: ModelSpec,
    weights: nn.Module | Mapping[str, Tensor],
    *,
    card: str,
    metrics: Mapping[str, Any] | None = None,
    recipe: str | None = None,
    pictures: Mapping[str, Path] | None = None,
    half: bool = False,
    finish: Callable[[ModelBundle], object] | None = None,
) -> ModelBundle:
    """Write a bundle: complete under its name, or not at all.

    Args:
        path: the folder; an older bundle there is replaced, anything else is not.
        spec: what the model is.
        weights: the network, or its tensors by name.
        card: text of ``card.md``.
        metrics: content of ``metrics.json``.
        recipe: text of ``train.toml``.
        pictures: files to copy, by their names in the bundle; the card may show them.
        half: keep kernels in half precision, as far as that is safe (``weights.halved``).
        finish: told the bundle before it gets its name, to add files to its folder; what it
            raises leaves everything as it was.

    Raises:
        ModelBundleError: the tensors do not fit the spec, or something else has the name.
        DiskFullError: no space.
    """
    state = weights.state_dict() if isinstance(weights, nn.Module) else weights
    tensors = {name: tensor for name, tensor in state.items() if not _is_counter(name)}
    path = _absolute(path)
    check_target(path)
    _fill(build_network(spec), tensors, where=f"bundle {spec.name!r}")
    texts = {_SPEC: spec.to_json(), CARD: card, RECIPE: recipe}
    if metrics is not None:
        texts[METRICS] = json.dumps(metrics, indent=2) + "\n"
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = partial_path(path)
    remove_tree(beside)
    beside.mkdir()
    try:
        _write_files(beside, texts, pictures or {})
        write_weights(beside, halved(tensors) if half else tensors)
        if finish is not None:
            finish(open_bundle(beside))
    except BaseException:
        remove_tree(beside)
        raise
    publish_directory(beside, path)
    return open_bundle(path)


def _write_files(
    folder: Path, texts: Mapping[str, str | None], pictures: Mapping[str, Path]
) -> None:
    for name, picture in pictures.items():
        shutil.copyfile(picture, folder / name)
    for name, text in texts.items():
        if text is not None:
            (folder / name).write_text(text, encoding="utf-8")


def import_cerberus(weights_path: Path, out_dir: Path) -> ModelBundle:
    """Convert a checkpoint of upstream's Cerberus (``weights.tar``) into a bundle.

    The heads, their channels and the widths are read off the tensors. The unused ImageNet
    classifier (``backbone.fc``) and the batch counters are left out; every other tensor
    finds its place or the import fails.

    Args:
        weights_path: what ``torch.save`` wrote; its ``desc`` holds the tensors.
        out_dir: the bundle's folder; its name becomes the model's.

    Raises:
        ModelBundleError: not such a checkpoint, one with missing or unexpected tensors, or
            something that is no bundle has the name.
        DiskFullError: no space.
    """
    out_dir = _absolute(out_dir)
    check_target(out_dir)
    checkpoint = read_cerberus(weights_path, name=out_dir.name)
    log.info(
        "%s: %d tensors taken, %d left out",
        weights_path,
        len(checkpoint.tensors),
        len(checkpoint.skipped),
    )
    with open(weights_path, "rb") as file:
        source = hashlib.file_digest(file, "sha256").hexdigest()
    card = _CERBERUS_CARD.format(name=out_dir.name, sha256=source)
    return save_bundle(out_dir, checkpoint.spec, checkpoint.tensors, card=card)


def _absolute(path: Path) -> Path:
    return Path(os.path.abspath(path))  # noqa: PTH100 - unlike resolve(), keeps links


def _zoo() -> dict[str, Path]:
    # Installed, the zoo is a sub-package; in a checkout it lies beside the package.
    package = Path(__file__).parent
    folders = (package / "models", package.parent / "models")
    zoo = next((folder for folder in folders if folder.is_dir()), None)
    if zoo is None:
        return {}
    # A hidden folder is a bundle that is being written.
    return {spec.parent.name: spec.parent for spec in zoo.glob(f"[!.]*/{_SPEC}")}


def _digest(path: Path, weight_map: Mapping[str, Any]) -> str:
    digest = hashlib.sha256()
    for name in (_SPEC, *sorted(weight_map)):
        with open(path / name, "rb") as file:
            digest.update(f"{name}\n".encode())
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def _is_counter(name: str) -> bool:
    # How many batches a normalisation saw in training: no part of the function computed.
    return name.endswith(".num_batches_tracked")


class _Budget(TorchFunctionMode):
    """Lets tensors of so many numbers be made within its block, and no more."""

    def __init__(self, numbers: int) -> None:
        super().__init__()
        self._left = numbers

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:  # noqa: ANN401 - whatever the function returns
        if func in _MAKERS and args:
            self._left -= math.prod(args[0] if isinstance(args[0], list | tuple) else args)
            if self._left < 0:
                raise ModelBundleError("the spec asks for a larger network than the weights are of")
        return func(*args, **(kwargs or {}))


def _fill(network: nn.Module, tensors: Mapping[str, Tensor], *, where: str) -> None:
    expected = {name: t for name, t in network.state_dict().items() if not _is_counter(name)}
    missing = sorted(set(expected) - set(tensors))
    unknown = sorted(set(tensors) - set(expected))
    if missing or unknown:
        msg = f"{where}: {_some('missing', missing)}; {_some('unexpected', unknown)}"
        raise ModelBundleError(msg)
    shapes = [
        f"{name} {tuple(tensors[name].shape)}, not {tuple(tensor.shape)}"
        for name, tensor in expected.items()
        if tensors[name].shape != tensor.shape
    ]
    if shapes:
        raise ModelBundleError(f"{where}: {_some('wrong shapes', shapes)}")
    found = ((name, number_fault(name, tensors[name], t.dtype)) for name, t in expected.items())
    faults = [f"{name} {fault}" for name, fault in found if fault]
    if faults:
        raise ModelBundleError(f"{where}: {_some('broken', faults)}")
    state = {name: tensor.to(expected[name].dtype) for name, tensor in tensors.items()}
    network.load_state_dict(state, strict=False)  # only the counters are absent


def _some(what: str, names: list[str]) -> str:
    shown = ", ".join(names[:8]) + (", ..." if len(names) > 8 else "")
    return f"{len(names)} tensors {what}" + (f": {shown}" if names else "")


_CERBERUS_CARD = """# {name}

Cerberus: nuclei, glands, lumina and tissue classes in H&E-stained colon, at 0.5 um a pixel.
Imported from upstream's checkpoint `weights.tar` (SHA-256 {sha256}).

- Licence of the weights: CC BY-NC-SA 4.0. Not for commercial use; share alike; cite the paper.
- Citation: Graham S. et al., "One model is all you need: multi-task learning enables
  simultaneous histology image segmentation and classification", Medical Image Analysis 2023.
- Not validated here; not for diagnosis.
- Left out on import: the unused ImageNet classifier and the batch counters.
"""
