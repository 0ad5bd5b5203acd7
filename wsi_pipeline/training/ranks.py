"""The processes of a training run: one, or as many as ``torchrun`` started.

Every rank draws the same batches, computes its slots of them, and adds its gradients to the
others'; losses are divided by the sample counts of the whole batch, so the sum is the gradient
of the whole batch. BatchNorm normalises by each rank's own samples, and its running statistics are
averaged after every step. So all ranks hold the same network at all times, and any rank's
checkpoint is the run's.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import nn

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

    def add_gradients(self, network: nn.Module) -> None:
        """Give every rank the sum of all gradients.

        What has a gradient on no rank has none afterwards: an optimiser passes over it, as it
        does in a single process.

        Args:
            network: after the backward pass.
        """
        if self.world == 1:
            return
        parameters = list(network.parameters())
        used = torch.tensor([p.grad is not None for p in parameters], device=self.device)
        used = used.to(torch.uint8)
        dist.all_reduce(used, dist.ReduceOp.MAX)
        gradients = []
        for parameter, any_rank in zip(parameters, used.tolist(), strict=True):
            if any_rank:
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
                gradients.append(parameter.grad)
        flat = torch.cat([gradient.flatten() for gradient in gradients])
        dist.all_reduce(flat)
        for gradient, summed in zip(
            gradients, torch.split(flat, [g.numel() for g in gradients]), strict=True
        ):
            gradient.copy_(summed.view_as(gradient))

    def share_statistics(self, network: nn.Module, rows: Mapping[str, int], samples: int) -> None:
        """Give every rank the mean of all BatchNorm statistics after a step.

        Each rank counts by the samples it has seen: a head by its labelled ones, so that a
        rank that did not run it has no say. Without this, weights and statistics would be of
        the first rank's samples alone.

        Args:
            network: after the step.
            rows: labelled samples by head on this rank.
            samples: all of this rank's.
        """
        if self.world == 1:
            return
        buffers, weights = [], []
        for name, buffer in network.named_buffers():
            part, _, rest = name.partition(".")
            if buffer.is_floating_point():
                buffers.append(buffer)
                seen = rows.get(rest.partition(".")[0], 0) if part == "heads" else samples
                weights.append(torch.full((buffer.numel(),), float(seen)))
        if not buffers:
            return
        weight = torch.cat(weights).to(self.device)
        values = torch.cat([buffer.flatten() for buffer in buffers])
        both = torch.stack([values * weight, weight])
        dist.all_reduce(both)
        # Where nobody has seen anything, nobody's statistics have moved.
        mean = torch.where(both[1] > 0, both[0] / both[1].clamp(min=1), values)
        sizes = [buffer.numel() for buffer in buffers]
        for buffer, shared in zip(buffers, torch.split(mean, sizes), strict=True):
            buffer.copy_(shared.view_as(buffer))

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
    # An optimiser's first step imports this module. Its functions keep the group that there is then
    # as a default, whose threads would outlive it, and sometimes abort the process at its end.
    importlib.import_module("torch.distributed.nn.functional")
    # The others wait while the first rank pre-trains or validates.
    backend = "nccl" if device.startswith("cuda") else "gloo"
    dist.init_process_group(backend, timeout=timedelta(days=2))
    try:
        yield Ranks(rank=dist.get_rank(), world=world, device=device)
    finally:
        dist.destroy_process_group()
