"""The training loop: from a recipe to a bundle.

::

    sources -> sampler -> windows -> device -> augment -> network(rows) -> losses -> backward
      patients  slots     threads              crops      labelled rows    a head each  |
                                                                                        v
    bundle <- best moving average <- validation <- moving average <- optimiser <- clip <- add ranks

Every random draw is a function of (seed, step), so a run that was interrupted and goes on
gives the weights of one that was not: on a CPU to the last bit, on CUDA up to the order in
which its kernels add.
"""

from __future__ import annotations

import copy
import logging
import math
import time
from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from wsi_pipeline.bundle import ModelBundle, open_bundle, save_bundle
from wsi_pipeline.device import choose_device, choose_precision
from wsi_pipeline.errors import Interrupted, RecipeError
from wsi_pipeline.spec import ModelSpec
from wsi_pipeline.training.augment import augment
from wsi_pipeline.training.batch import Batch
from wsi_pipeline.training.begin import Beginning, begin
from wsi_pipeline.training.card import write_card
from wsi_pipeline.training.evaluate import Evaluation, evaluate
from wsi_pipeline.training.loader import Loaded, load_batches
from wsi_pipeline.training.losses import Losses, compute_losses
from wsi_pipeline.training.predicted import ImagePredictor
from wsi_pipeline.training.pretraining import pretrain_encoder
from wsi_pipeline.training.ranks import Ranks, join_ranks
from wsi_pipeline.training.recipe import Recipe, Schedule, model_spec
from wsi_pipeline.training.sampler import Sampler
from wsi_pipeline.training.simclr import ENCODER_FILE
from wsi_pipeline.training.transfer import apply_freeze
from wsi_pipeline.training.workplace import Workplace

__all__ = ["Learner", "learning_rate", "train"]

log = logging.getLogger(__name__)

_SAVE_EVERY_S = 600.0
"""Checkpoints come with validations, and at least this often."""
_ROWS_EVERY = 20
"""Steps between two looks at the losses: each look waits for the device."""


def train(
    recipe: Recipe,
    out: Path,
    *,
    device: str = "auto",
    restart: bool = False,
    on_row: Callable[[Mapping[str, Any]], None] = lambda _: None,
    stop: Callable[[], bool] = lambda: False,
) -> ModelBundle:
    """Train a network and write its bundle.

    Until the bundle is complete, everything lies in ``<out>.training`` (checkpoint, log, curves,
    pictures); the same call goes on from there. The bundle has the weights of the best
    validation (of the end, if nothing validates).

    Args:
        recipe: what to do.
        out: the bundle's folder; its name becomes the model's.
        device: ``auto``, ``cpu``, ``cuda``, ``cuda:N``, ``mps``. Under ``torchrun`` every rank
            takes its own card.
        restart: throw away what an earlier run left in ``<out>.training``.
        on_row: called on the first rank with every line of the log.
        stop: asked after every step.

    Raises:
        RecipeError: the recipe makes no sense here, or is not the one that was begun.
        DatasetError: annotated images cannot be read.
        Interrupted: ``stop`` said so; everything up to here is in the checkpoint.
    """
    with join_ranks(choose_device(device)) as ranks:
        opened = Workplace.open(out, recipe.text, restart=restart, first=ranks.first, on_row=on_row)
        with closing(opened) as work:
            ranks.any(False)  # nobody looks for a checkpoint before the first has cleared up
            _train(recipe, out, work, ranks, stop)
            ranks.any(False)  # no rank leaves before the bundle is there
    return open_bundle(out)


def _train(
    recipe: Recipe, out: Path, work: Workplace, ranks: Ranks, stop: Callable[[], bool]
) -> None:
    encoder = _pretrained(recipe, out.name, work, ranks, stop)
    beginning = begin(
        recipe, name=out.name, device=ranks.device, world=ranks.world, encoder=encoder
    )
    learner = Learner(recipe, beginning.spec, beginning.network, ranks)
    if (saved := work.load_checkpoint()) is not None:
        learner.load(saved)
    else:
        work.write({"step": 0, "begin": beginning.describe()})
    finished = learner.step == recipe.schedule.steps or learner.exhausted
    if finished and (out / "spec.json").is_file():
        log.info("%s is finished", out)  # its card may have been written on meanwhile
        return
    _learn(learner, beginning, work, stop)
    if ranks.first:
        _publish(learner, beginning, work, out)


def _pretrained(
    recipe: Recipe, name: str, work: Workplace, ranks: Ranks, stop: Callable[[], bool]
) -> Path | None:
    """Pre-train the encoder if the recipe says so, on the first rank while the others wait."""
    if recipe.pretrain is None:
        return None
    folder = work.folder / "simclr"
    if ranks.first:
        pretrain_encoder(
            recipe.pretrain,
            model_spec(recipe, None, name=name),
            out=folder,
            device=ranks.device,
            on_row=work.on_row,
            stop=stop,
        )
    ranks.any(False)
    return folder / ENCODER_FILE


def _learn(
    learner: Learner, beginning: Beginning, work: Workplace, stop: Callable[[], bool]
) -> None:
    """Run the steps that are left, validating and saving on the way."""
    recipe, ranks = learner.recipe, learner.ranks
    batches = load_batches(
        beginning.sources,
        Sampler(beginning.sizes, recipe.batches, seed=recipe.seed),
        learner.spec,
        first_step=learner.step,
        workers=recipe.batches.workers,
        rank=ranks.rank,
        world=ranks.world,
    )
    if learner.step == 0 and ranks.first:
        for held in beginning.held_out:
            held.load()  # what cannot be read is said now, not at the first validation
    saved = time.monotonic()
    try:
        while learner.step < recipe.schedule.steps and not learner.exhausted:
            learner.learn(next(batches))
            if learner.step % _ROWS_EVERY == 0:
                work.write_all(learner.take_rows())
            last = learner.step == recipe.schedule.steps
            due = learner.step % recipe.validation.every == 0
            if due or last:
                _validate(learner, beginning, work)
            if due or last or time.monotonic() - saved > _SAVE_EVERY_S:
                _save(learner, work)
                saved = time.monotonic()
            if learner.step < recipe.schedule.steps and ranks.any(stop()):
                _save(learner, work)
                raise Interrupted(f"stopped after step {learner.step}; the same command goes on")
    finally:
        batches.close()  # type: ignore[attr-defined]  # a generator: its threads end here


def _validate(learner: Learner, beginning: Beginning, work: Workplace) -> None:
    """Score the moving average; keep it if it is the best so far."""
    work.write_all(learner.take_rows())
    score = math.nan
    if learner.ranks.first:
        found = _evaluate(learner, beginning)
        score = found.score if found else math.nan
        work.write(
            {"step": learner.step, "validation": found.scores() if found else {}, "score": score}
        )
        if found:
            work.draw_examples(learner.step, found.examples[: learner.recipe.validation.pictures])
    (score,) = learner.ranks.agree(score)
    if learner.note(score) and learner.ranks.first:
        work.save_best(learner.averaged_weights(), learner.step, score)


def _evaluate(learner: Learner, beginning: Beginning) -> Evaluation | None:
    if not beginning.held_out:
        return None
    network = copy.deepcopy(learner.averaged).eval()
    predictor = ImagePredictor(
        learner.spec, network, device=learner.ranks.device, precision=learner.precision
    )
    return evaluate(predictor, beginning.held_out, resamples=0, watching=True)


def _save(learner: Learner, work: Workplace) -> None:
    work.write_all(learner.take_rows())
    if learner.ranks.first:
        work.save_checkpoint(learner.state())
        work.draw_curves()


def _publish(learner: Learner, beginning: Beginning, work: Workplace, out: Path) -> None:
    weights, step = work.load_best()
    metrics = {
        "step": step,
        "steps": learner.step,
        "seed": learner.recipe.seed,
        **work.validation(step),
        "data": beginning.data,
        "note": "scores of the validation images while training; `wsi evaluate` gives intervals",
    }
    save_bundle(
        out,
        learner.spec,
        weights,
        card=write_card(learner.recipe, learner.spec, beginning, metrics),
        metrics=metrics,
        recipe=learner.recipe.text,
        pictures=work.pictures(step),
    )


@dataclass(kw_only=True)
class _Course:
    """How the run has gone so far; saved with the weights."""

    step: int = 0
    best: float = -math.inf
    stale: int = 0


class Learner:
    """A network that learns: one call of :meth:`learn` a batch."""

    def __init__(self, recipe: Recipe, spec: ModelSpec, network: nn.Module, ranks: Ranks) -> None:
        """Take a network on the rank's device.

        Args:
            recipe: its schedule, heads, augmentation and freeze policy hold.
            spec: the network's.
            network: with its starting weights.
            ranks: who learns together.
        """
        self.recipe = recipe
        self.spec = spec
        self.ranks = ranks
        self.network = network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.averaged: nn.Module = copy.deepcopy(self.network)
        self.precision: str = choose_precision(
            recipe.schedule.precision, ranks.device, architecture=spec.architecture
        )
        self._thaws = {int(s) for s in recipe.freeze.first_steps.values() if math.isfinite(s)}
        self._frozen = False  # whether what is to be frozen now is
        self._weights = _floats(self.network), _floats(self.averaged)
        self._optimiser = _optimiser(self.network, recipe.schedule)
        self._course = _Course()
        self._rows: list[tuple[int, float, Losses, dict[str, int]]] = []

    @property
    def step(self) -> int:
        """Batches learnt from."""
        return self._course.step

    @property
    def exhausted(self) -> bool:
        """Whether validation has not improved for as long as the recipe allows."""
        patience = self.recipe.validation.patience
        return bool(patience) and self._course.stale >= patience

    def learn(self, loaded: Loaded) -> Losses:
        """Take one step.

        Only the heads that are labelled in the batch run, each on its labelled samples; the
        parameters and BatchNorm statistics of the others stay as they are.
        """
        step, schedule = self._course.step, self.recipe.schedule
        # Dropout is all that draws from torch's own generator.
        torch.manual_seed((self.recipe.seed << 32) + step * self.ranks.world + self.ranks.rank)
        if step in self._thaws or not self._frozen:
            apply_freeze(self.network, self.recipe.freeze, step)
            self._frozen = True
        rate = learning_rate(schedule, step)
        for group in self._optimiser.param_groups:
            group["lr"] = rate
        crops = augment(
            loaded.windows.to(self.ranks.device),
            self.spec,
            self.recipe.augment,
            crop_px=loaded.crop_px,
            seeds=loaded.seeds,
            scales=loaded.scales,
        )
        self._optimiser.zero_grad(set_to_none=True)
        own = {name: len(rows) for name, rows in crops.rows.items()}
        counts = self.ranks.total(own, [head.name for head in self.spec.heads])
        losses = self._backward(crops, counts)
        self.ranks.add_gradients(self.network)
        if schedule.clip_norm:
            nn.utils.clip_grad_norm_(self.network.parameters(), schedule.clip_norm)
        self._optimiser.step()
        self.ranks.share_statistics(self.network, own, len(crops.pixels))
        self._average(step)
        self._course.step += 1
        self._rows.append((self._course.step, rate, losses, own))
        return losses

    def _backward(self, crops: Batch, counts: Mapping[str, int]) -> Losses:
        half = self.precision != "fp32"
        device_type = self.ranks.device.partition(":")[0]
        with torch.autocast(device_type, torch.bfloat16, enabled=half):
            logits = self.network(crops.pixels, crops.rows)
        losses = compute_losses(logits, crops, self.spec, self.recipe.heads, counts)
        if losses.total.requires_grad:  # not where a batch is all of frozen heads
            losses.total.backward()  # type: ignore[no-untyped-call]
        return losses.detached()

    @torch.no_grad()
    def _average(self, step: int) -> None:
        decay = min(self.recipe.schedule.ema, (1 + step) / (10 + step))
        own, average = self._weights
        torch._foreach_lerp_(average, own, 1 - decay)

    def note(self, score: float) -> bool:
        """Take note of a validation's score; tell whether its weights are to be kept."""
        nothing_yet = math.isinf(self._course.best)
        if score > self._course.best or (math.isnan(score) and nothing_yet):
            if not math.isnan(score):
                self._course.best = score
            self._course.stale = 0
            return True
        self._course.stale += 1
        return False

    def take_rows(self) -> list[dict[str, Any]]:
        """Return the log of the steps since the last call: means over this rank's samples.

        Raises:
            RecipeError: a loss is no longer a number.
        """
        rows = []
        for step, rate, losses, counts in self._rows:
            total = float(losses.total)
            means = {
                name: float(value) / counts[name.rpartition("/")[0]]
                for name, value in losses.terms.items()
            }
            if not math.isfinite(total):
                msg = f"step {step}: the losses are {means}; lower learning_rate in [schedule]"
                raise RecipeError(msg)
            rows.append(
                {"step": step, "lr": rate, "loss": total, "losses": means, "samples": counts}
            )
        self._rows.clear()
        return rows

    def averaged_weights(self) -> dict[str, Tensor]:
        """Return the moving average of the weights."""
        return {name: tensor.detach().cpu() for name, tensor in self.averaged.state_dict().items()}

    def state(self) -> dict[str, Any]:
        """Return all that :meth:`load` needs to go on as if nothing had happened."""
        return {
            "course": asdict(self._course),
            "network": self.network.state_dict(),
            "averaged": self.averaged.state_dict(),
            "optimiser": self._optimiser.state_dict(),
        }

    def load(self, state: Mapping[str, Any]) -> None:
        """Go on from a saved state.

        Raises:
            RecipeError: it is not of this network.
        """
        try:
            self._course = _Course(**state["course"])
            self.network.load_state_dict(state["network"])
            self.averaged.load_state_dict(state["averaged"])
            self._optimiser.load_state_dict(state["optimiser"])
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            reason = str(error).partition("\n")[0]
            msg = f"the checkpoint is not of this network ({reason}); say --restart to begin anew"
            raise RecipeError(msg) from error


def learning_rate(schedule: Schedule, step: int) -> float:
    """Return the learning rate of a step.

    Cerberus' schedule (Graham et al., 2023) is ``step`` with 1e-3 and one milestone; cosine is
    Loshchilov & Hutter (2017), down to a hundredth.
    """
    rate = schedule.learning_rate
    if step < schedule.warmup:
        return rate * (step + 1) / schedule.warmup
    if schedule.decay == "step":
        return rate * 0.1 ** sum(step >= milestone for milestone in schedule.milestones)
    share = (step - schedule.warmup) / max(1, schedule.steps - schedule.warmup)
    return rate * (0.01 + 0.99 * (1 + math.cos(math.pi * min(1.0, share))) / 2)


def _optimiser(network: nn.Module, schedule: Schedule) -> torch.optim.Optimizer:
    # Frozen and idle parameters have no gradient, and are left alone: moments, decay and all.
    if schedule.optimiser == "adam":
        return torch.optim.Adam(network.parameters(), lr=schedule.learning_rate)
    return torch.optim.AdamW(
        network.parameters(), lr=schedule.learning_rate, weight_decay=schedule.weight_decay
    )


def _floats(network: nn.Module) -> list[Tensor]:
    return [tensor for tensor in network.state_dict().values() if tensor.is_floating_point()]
