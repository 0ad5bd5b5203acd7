"""The processes of a training run: one, or as many as ``torchrun`` started.

Every rank draws the same batches, computes its slots of them, and adds its gradients to the
others'; losses are divided by the sample counts of the whole batch, so the sum is the gradient
of the whole batch. BatchNorm's statistics are each rank's own while it learns, and averaged
when the weights are kept.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor, nn

__all__ = ["Ranks", "join_ranks"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Ranks:
    """Who this process is among those that train together."""

    rank: int
    """0 writes the files."""
    world: int
    """How many there are."""
    device: str
    """What this one computes on."""

    @property
    def first(self) -> bool:
        """Whether this is the process that writes."""
        return self.rank == 0

    def total(self, counts: Mapping[str, int], names: Sequence[str]) -> dict[str, int]:
        """Add up counts by name over all ranks; names nobody counted are left out."""
        if self.world == 1:
            return dict(counts)
        values = torch.tensor([counts.get(name, 0) for name in names], device=self.device)
        dist.all_reduce(values)
        summed = dict(zip(names, values.tolist(), strict=True))
        return {name: count for name, count in summed.items() if count}

    def add_gradients(self, network: nn.Module, active: Mapping[str, int]) -> None:
        """Give every rank the sum of all gradients.

        Args:
            network: after the backward pass.
            active: heads that any rank computed; the others have no gradient anywhere.
        """
        if self.world == 1:
            return
        gradients = []
        for name, parameter in network.named_parameters():
            part, _, rest = name.partition(".")
            idle = part == "heads" and rest.partition(".")[0] not in active
            if not parameter.requires_grad or idle:
                continue
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            gradients.append(parameter.grad)
        flat = torch.cat([gradient.flatten() for gradient in gradients])
        dist.all_reduce(flat)
        for gradient, summed in zip(
            gradients, torch.split(flat, [g.numel() for g in gradients]), strict=True
        ):
            gradient.copy_(summed.view_as(gradient))

    def average_statistics(self, network: nn.Module) -> None:
        """Give every rank the mean of all BatchNorm statistics."""
        if self.world == 1:
            return
        for buffer in _float_buffers(network):
            dist.all_reduce(buffer)
            buffer /= self.world

    def agree(self, *values: float) -> tuple[float, ...]:
        """Return the first rank's values on every rank."""
        if self.world == 1:
            return values
        shared = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.broadcast(shared, 0)
        return tuple(shared.tolist())

    def any(self, flag: bool) -> bool:
        """Tell whether any rank says yes."""
        if self.world == 1:
            return flag
        votes = torch.tensor(int(flag), device=self.device)
        dist.all_reduce(votes, dist.ReduceOp.MAX)
        return bool(votes.item())


@contextmanager
def join_ranks(device: str) -> Iterator[Ranks]:
    """Join the processes that ``torchrun`` started; alone without it.

    Args:
        device: as ``device.choose_device`` returns it; ``cuda`` becomes the rank's own card.
    """
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world == 1:
        yield Ranks(rank=0, world=1, device=device)
        return
    if device == "cuda":
        device = f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
        torch.cuda.set_device(device)
    # The others wait while the first rank pre-trains or validates.
    backend = "nccl" if device.startswith("cuda") else "gloo"
    dist.init_process_group(backend, timeout=timedelta(days=2))
    try:
        yield Ranks(rank=dist.get_rank(), world=world, device=device)
    finally:
        dist.destroy_process_group()


def _float_buffers(network: nn.Module) -> list[Tensor]:
    return [buffer for buffer in network.buffers() if buffer.is_floating_point()]
