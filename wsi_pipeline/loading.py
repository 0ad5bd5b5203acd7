"""How another process gets the network of a run: by a description that is small enough to send."""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from wsi_pipeline.errors import ModelBundleError

if TYPE_CHECKING:
    from wsi_pipeline.bundle import ModelBundle
    from wsi_pipeline.inference import TorchPredictor

__all__ = ["BundleLoader", "visible_alone"]

_VISIBLE = "CUDA_VISIBLE_DEVICES"


@dataclass(frozen=True, kw_only=True)
class BundleLoader:
    """Loads one very bundle; calls of equal loaders may share a network."""

    place: str
    """Its name, if it is of the zoo; else its folder."""
    digest: str
    """What it must be."""
    options: tuple[tuple[str, str | int | None], ...]
    """Of ``TorchPredictor.load``, but for the device."""
    alone: bool = False
    """Whether its process sees no other GPU than its own, which it calls ``cuda``."""

    @classmethod
    def of(
        cls, bundle: ModelBundle, options: Mapping[str, str | int | None], *, alone: bool = False
    ) -> BundleLoader:
        """Describe a bundle that is here, and how to load it."""
        return cls(
            place=bundle.name if bundle.in_zoo else str(bundle.path.absolute()),
            digest=bundle.digest,
            options=tuple((k, value) for k, value in sorted(options.items()) if k != "device"),
            alone=alone,
        )

    def __call__(self, device: str) -> TorchPredictor:
        """Load the network.

        Args:
            device: where it is to run; with ``alone``, what others call that place.

        Raises:
            ModelBundleError: the bundle is not here, or it is another one.
            JobError: the device is not here, or an option is impossible.
        """
        from wsi_pipeline.bundle import find_bundle
        from wsi_pipeline.inference import TorchPredictor

        bundle = find_bundle(self.place)
        if bundle.digest != self.digest:
            msg = (
                f"the run uses model {self.place} ({self.digest[:12]}), but on "
                f"{socket.gethostname()} that is another one ({bundle.digest[:12]}). Install the "
                "same there, or name a --model in a folder that all machines see."
            )
            raise ModelBundleError(msg)
        device = "cuda" if self.alone else device
        return TorchPredictor.load(bundle, device=device, **dict(self.options))  # type: ignore[arg-type]


def visible_alone(
    devices: Sequence[str], environment: Mapping[str, str] = os.environ
) -> dict[str, dict[str, str]]:
    """Return by GPU the variables that let a process see no other.

    A process that sees several holds memory on the first one, too, whichever it computes on. The
    one it sees is ``cuda`` to it.

    Args:
        devices: names such as ``cuda:2``, numbered as this process sees them.
        environment: of this process.
    """
    seen = [name.strip() for name in environment.get(_VISIBLE, "").split(",") if name.strip()]
    numbers = {device: int(device.partition(":")[2]) for device in devices}
    return {
        device: {_VISIBLE: seen[number] if seen else str(number)}
        for device, number in numbers.items()
    }
