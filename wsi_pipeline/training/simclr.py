"""Self-supervised pre-training of an encoder on unlabelled pixels: SimCLR.

::

    windows(step) -> two views of each -> encoder -> mean over the map -> projection -> z1, z2
                                                                                         |
    the two views of a window shall be more alike than views of different windows <- NT-Xent

Chen, Kornblith, Norouzi & Hinton, ICML 2020; with AdamW for LARS, which serves batches larger
than these. Every random draw is a function of (seed, step), so a run that was interrupted
ends with the weights of one that was not. The projection is thrown away at the end.
"""

from __future__ import annotations

import json
import math
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional

from wsi_pipeline.checkpoint import load_pickled
from wsi_pipeline.durable import disk_errors, durable_file
from wsi_pipeline.errors import Interrupted, RecipeError
from wsi_pipeline.network import Cerberus

__all__ = ["SimclrRules", "StepRecord", "Views", "Windows", "nt_xent", "pretrain"]

Windows = Callable[[int], Tensor]
"""The windows of a step, ``(B, S, S, 3)`` uint8 RGB; the same for the same step. It is called
in threads, ahead of time."""
Views = Callable[[Tensor, Tensor], Tensor]
"""Draw one view of each window: (windows on the device, ``(B,)`` int64 seeds on the CPU) to
``(B, 3, C, C)`` float32 0..255 RGB, C a multiple of 16. Equal seeds give equal views."""

ENCODER_FILE = "encoder.safetensors"
"""What a finished run leaves: the encoder's tensors by the network's names."""
_CHECKPOINT = "checkpoint.pt"
_LOG = "log.jsonl"


@dataclass(frozen=True, kw_only=True, slots=True)
class SimclrRules:
    """How an encoder is pre-trained."""

    steps: int = 20_000
    """Batches."""
    learning_rate: float = 1e-3
    """At its highest; it falls to 0 along a cosine."""
    warmup: int = 200
    """Steps over which the learning rate rises linearly from 0."""
    weight_decay: float = 1e-4
    """AdamW's, of matrices and kernels alone."""
    temperature: float = 0.1
    """Smaller values weigh the most similar other windows more; SimCLR's best on ImageNet."""
    projection: int = 128
    """Length of the vectors that are compared."""
    seed: int = 5
    """Of the projection and the views."""
    checkpoint_every: int = 500
    """Steps."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Of the encoder; the loss is computed in fp32."""

    def __post_init__(self) -> None:
        if min(self.steps, self.projection, self.checkpoint_every) < 1 or self.warmup < 0:
            msg = "SimCLR wants steps, projection and checkpoint_every >= 1 and warmup >= 0"
            raise RecipeError(msg)
        if self.learning_rate <= 0 or self.temperature <= 0 or self.weight_decay < 0:
            msg = "SimCLR wants learning_rate and temperature above 0 and weight_decay >= 0"
            raise RecipeError(msg)


@dataclass(frozen=True, kw_only=True, slots=True)
class StepRecord:
    """A line of the log."""

    step: int
    """Counted from 0."""
    loss: float
    """NT-Xent; ln(2 B - 1) is chance."""
    matched: float
    """Share of views that are most like the other one of their window; chance: 1 / (2 B - 1)."""
    learning_rate: float
    """Of this step."""


def nt_xent(z1_BD: Tensor, z2_BD: Tensor, temperature: float) -> Tensor:
    """Return the normalised temperature-scaled cross-entropy (equation 1 of the paper).

    Args:
        z1_BD: ``(B, D)`` vectors of one view of each window; B at least 2.
        z2_BD: the same of the other view.
        temperature: divides the cosine similarities.
    """
    return _entropy(_similarities(z1_BD, z2_BD) / temperature)


def pretrain(
    network: Cerberus,
    windows: Windows,
    views: Views,
    rules: SimclrRules,
    *,
    out: Path,
    device: str = "cpu",
    workers: int = 1,
    on_step: Callable[[StepRecord], None] = lambda _: None,
    stop: Callable[[], bool] = lambda: False,
) -> Path:
    """Train the encoder of a network on windows without labels.

    The folder ``out`` holds ``log.jsonl``, ``checkpoint.pt`` and at the end
    ``encoder.safetensors``. A checkpoint that is there is continued.

    Args:
        network: its ``encoder`` is trained in place and moved to the device.
        windows: what to learn from.
        views: how a window may look and still be the same.
        rules: how.
        out: where everything goes.
        device: as :func:`wsi_pipeline.device.choose_device` returns it.
        workers: threads that read windows ahead.
        on_step: told about each step.
        stop: asked before each step.

    Returns:
        The file of the encoder's tensors.

    Raises:
        RecipeError: the checkpoint is of other rules or of another encoder, the windows of a
            step are too few or too small, or the loss is no number any more.
        ModelBundleError: the checkpoint is damaged.
        Interrupted: ``stop`` said so; the same call continues.
        DiskFullError: no space.
    """
    out.mkdir(parents=True, exist_ok=True)
    run = _Run.start(network, rules, device=device)
    first = run.resume(out / _CHECKPOINT) if (out / _CHECKPOINT).is_file() else 0
    _keep_lines(out / _LOG, first)
    with _ahead(windows, range(first, rules.steps), workers) as batches:
        for step in range(first, rules.steps):
            if stop():
                run.save(out / _CHECKPOINT, step)
                msg = f"asked to stop before step {step}; the same command continues there"
                raise Interrupted(msg)
            record = run.step(step, next(batches), views)
            with disk_errors(out / _LOG), (out / _LOG).open("a", encoding="utf-8") as log:
                log.write(json.dumps(asdict(record)) + "\n")
            on_step(record)
            if (step + 1) % rules.checkpoint_every == 0 or step + 1 == rules.steps:
                run.save(out / _CHECKPOINT, step + 1)
    tensors = {
        f"encoder.{name}": tensor.detach().cpu().contiguous().clone()
        for name, tensor in network.encoder.state_dict().items()
        if not name.endswith(".num_batches_tracked")
    }
    with durable_file(out / ENCODER_FILE) as beside:
        save_file(tensors, beside, metadata={"format": "pt"})
        beside.chmod(0o644)  # it is written for its owner alone
    return out / ENCODER_FILE


@dataclass(frozen=True, kw_only=True, slots=True)
class _Run:
    """What a run changes as it goes on."""

    encoder: nn.Module
    projection: nn.Module
    optimiser: torch.optim.AdamW
    rules: SimclrRules
    device: str

    @classmethod
    def start(cls, network: Cerberus, rules: SimclrRules, *, device: str) -> _Run:
        encoder = network.encoder.to(device).train()
        width = list(encoder.parameters())[-1].shape[0]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(rules.seed)
            projection = nn.Sequential(
                nn.Linear(width, width),
                nn.ReLU(inplace=True),
                nn.Linear(width, rules.projection),
            )
        projection = projection.to(device).train()
        parameters = [*encoder.parameters(), *projection.parameters()]
        for parameter in parameters:
            parameter.requires_grad_(True)
        groups = [
            {"params": [p for p in parameters if p.ndim > 1], "weight_decay": rules.weight_decay},
            {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
        ]
        optimiser = torch.optim.AdamW(groups, lr=rules.learning_rate)
        return cls(
            encoder=encoder,
            projection=projection,
            optimiser=optimiser,
            rules=rules,
            device=device,
        )

    def step(self, step: int, windows_BSS3: Tensor, views: Views) -> StepRecord:
        """Learn from one batch."""
        batch = len(windows_BSS3)
        if batch < 2:
            raise RecipeError(f"SimCLR compares windows: step {step} has {batch}, 2 are needed")
        rate = _learning_rate(self.rules, step)
        for group in self.optimiser.param_groups:
            group["lr"] = rate
        windows_BSS3 = windows_BSS3.to(self.device)
        seeds_2B = _seeds(self.rules.seed, step, 2 * batch)
        x_BCHW = torch.cat(
            [views(windows_BSS3, seeds) for seeds in (seeds_2B[:batch], seeds_2B[batch:])]
        )
        with torch.autocast(
            torch.device(self.device).type,
            torch.bfloat16,
            enabled=self.rules.precision != "fp32",
        ):
            z_BD = self.projection(self.encoder(x_BCHW / 255)[-1].mean((2, 3)))
        similar_BB = _similarities(z_BD[:batch].float(), z_BD[batch:].float())
        loss = _entropy(similar_BB / self.rules.temperature)
        value = loss.item()
        if not math.isfinite(value):
            msg = (
                f"SimCLR: the loss of step {step} is {value}. "
                "Take a lower learning_rate or a longer warmup, and another folder."
            )
            raise RecipeError(msg)
        self.optimiser.zero_grad(set_to_none=True)
        torch.autograd.backward(loss)
        self.optimiser.step()
        matched = (similar_BB.argmax(1) == _partners(similar_BB)).float().mean().item()
        return StepRecord(step=step, loss=value, matched=matched, learning_rate=rate)

    def save(self, path: Path, step: int) -> None:
        """Write everything that the steps from ``step`` on depend on."""
        content = {
            "step": step,
            "rules": json.dumps(asdict(self.rules)),
            "encoder": self.encoder.state_dict(),
            "projection": self.projection.state_dict(),
            "optimiser": self.optimiser.state_dict(),
        }
        with durable_file(path) as beside:
            torch.save(content, beside)

    def resume(self, path: Path) -> int:
        """Go back to a checkpoint; return the step that comes next."""
        content = load_pickled(path)
        wanted = asdict(self.rules)
        try:
            before = json.loads(content["rules"])
            changed = sorted(key for key, value in wanted.items() if before.get(key) != value)
            if changed:
                msg = f"{path} is of other rules ({changed}); use them, or another folder"
                raise RecipeError(msg)
            self.encoder.load_state_dict(content["encoder"])
            self.projection.load_state_dict(content["projection"])
            self.optimiser.load_state_dict(content["optimiser"])
            return int(content["step"])
        except (RuntimeError, ValueError, KeyError, TypeError) as error:
            msg = f"{path} cannot be continued with this encoder; use another folder: {error}"
            raise RecipeError(msg) from error


@contextmanager
def _ahead(windows: Windows, steps: range, workers: int) -> Iterator[Iterator[Tensor]]:
    """Yield the windows of the steps in order, read ahead in threads."""
    with ThreadPoolExecutor(max(1, workers), thread_name_prefix="windows") as pool:
        pending: deque[Future[Tensor]] = deque()

        def read() -> Iterator[Tensor]:
            for step in steps:
                pending.append(pool.submit(windows, step))
                if len(pending) > workers:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()

        try:
            yield read()
        finally:
            # Only those that were never asked for are left: the run ended early.
            pool.shutdown(cancel_futures=True)


def _similarities(z1_BD: Tensor, z2_BD: Tensor) -> Tensor:
    """Return the ``(2B, 2B)`` cosines between all views; -inf of a view with itself."""
    z_BD = functional.normalize(torch.cat([z1_BD, z2_BD]), dim=1)
    return (z_BD @ z_BD.T).fill_diagonal_(-torch.inf)


def _entropy(logits_BB: Tensor) -> Tensor:
    return functional.cross_entropy(logits_BB, _partners(logits_BB))


def _partners(views_BB: Tensor) -> Tensor:
    """Return for each view the index of the other view of its window."""
    count = len(views_BB)
    return torch.arange(count, device=views_BB.device).roll(count // 2)


def _learning_rate(rules: SimclrRules, step: int) -> float:
    if step < rules.warmup:
        return rules.learning_rate * (step + 1) / rules.warmup
    share = (step - rules.warmup) / max(1, rules.steps - rules.warmup)
    return rules.learning_rate * 0.5 * (1 + math.cos(math.pi * share))


def _seeds(seed: int, step: int, count: int) -> Tensor:
    """Return ``(count,)`` int64 seeds that depend on nothing else."""
    return torch.from_numpy(np.random.default_rng((seed, step)).integers(2**62, size=count))


def _keep_lines(path: Path, count: int) -> None:
    """Cut a log back to the steps that the checkpoint knows of."""
    if not path.is_file():
        return
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    if len(lines) > count:
        with durable_file(path) as beside:
            beside.write_text("".join(lines[:count]), encoding="utf-8")
