"""The folder of a training run: what lets it go on, and what one looks at meanwhile.

::

    <bundle>.training/
    ├── recipe.toml         what was begun
    ├── log.jsonl           a line a step (losses a head), a validation, the beginning
    ├── curves.png          the same, drawn
    ├── examples-000500.png validation images: truth and prediction
    ├── checkpoint.pt       everything to go on
    ├── best.safetensors    the weights that the bundle will have
    └── lock                held by the process that trains
"""

from __future__ import annotations

import fcntl
import json
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from wsi_pipeline.bundle import check_target
from wsi_pipeline.checkpoint import load_pickled
from wsi_pipeline.durable import disk_errors, durable_file, remove_tree
from wsi_pipeline.errors import ModelBundleError, RecipeError
from wsi_pipeline.training.pictures import LogRow, Panel, draw_curves, draw_examples

__all__ = ["Workplace"]

log = logging.getLogger(__name__)

_LOCK = "lock"


@dataclass(kw_only=True)
class Workplace:
    """The files of one run. Only the first rank writes; the others read the checkpoint."""

    folder: Path
    """``<bundle>.training``."""
    first: bool
    """Whether this process writes."""
    on_row: Callable[[Mapping[str, Any]], None]
    """Told every line of the log."""
    _rows: list[Mapping[str, Any]] = field(default_factory=list)
    _held: IO[str] | None = None

    @classmethod
    def open(
        cls,
        out: Path,
        recipe: str,
        *,
        restart: bool,
        first: bool,
        on_row: Callable[[Mapping[str, Any]], None],
    ) -> Workplace:
        """Open the folder beside a bundle's, or make it.

        Args:
            out: the bundle's folder.
            recipe: text of the recipe.
            restart: begin anew whatever is there.
            first: whether this process writes.
            on_row: told every line of the log.

        Raises:
            RecipeError: another recipe was begun there.
        """
        folder = out.with_name(out.name + ".training")
        work = cls(folder=folder, first=first, on_row=on_row)
        if not first:
            return work
        _check_out(out, known=folder.is_dir() or restart)
        folder.mkdir(parents=True, exist_ok=True)
        work._lock()
        if restart:
            work._clear()
        known = folder / "recipe.toml"
        # What failed before its first checkpoint has nothing to lose.
        begun = work._checkpoint.is_file() or (folder / "simclr").is_dir()
        if begun and known.is_file() and known.read_text(encoding="utf-8") != recipe:
            msg = (
                f"{folder} holds a run of another recipe (see its recipe.toml): go on with that "
                "one, choose another --out, or say --restart to throw it away"
            )
            work.close()
            raise RecipeError(msg)
        with durable_file(known) as beside:
            beside.write_text(recipe, encoding="utf-8")
        return work

    def _lock(self) -> None:
        """Keep a second run out, as long as this process lives.

        Raises:
            RecipeError: another process trains there.
        """
        self._held = (self.folder / _LOCK).open("w")
        try:
            fcntl.flock(self._held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            self.close()
            msg = f"another process trains in {self.folder}: wait for it, or choose another --out"
            raise RecipeError(msg) from error
        except OSError as error:  # a file system without locks
            log.warning("%s cannot be locked (%s): start no second run there", self.folder, error)

    def _clear(self) -> None:
        """Remove everything but the lock."""
        for path in self.folder.iterdir():
            if path.is_dir():
                remove_tree(path)
            elif path.name != _LOCK:
                path.unlink()

    def close(self) -> None:
        """Let another run in."""
        if self._held is not None:
            self._held.close()
            self._held = None

    def write(self, row: Mapping[str, Any]) -> None:
        """Add a line to the log; NaN becomes null."""
        if not self.first:
            return
        row = _plain(row)
        self._rows.append(row)
        with disk_errors(self._log), self._log.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        self.on_row(row)

    def write_all(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Add lines to the log."""
        for row in rows:
            self.write(row)

    def load_checkpoint(self) -> dict[str, Any] | None:
        """Return the saved state, None if there is none; the log is cut back to its step."""
        if not self._checkpoint.is_file():
            if self.first:
                self._log.unlink(missing_ok=True)
            return None
        try:
            state = load_pickled(self._checkpoint)
            step = int(state["course"]["step"])
        except (ModelBundleError, KeyError, TypeError) as error:
            reason = str(error).partition("\n")[0]
            msg = f"{self._checkpoint} cannot be read ({reason}); say --restart to begin anew"
            raise RecipeError(msg) from error
        if self.first:
            text = self._log.read_text(encoding="utf-8") if self._log.is_file() else ""
            lines = text.splitlines()
            self._rows = [row for row in map(_parse, lines) if row and row["step"] <= step]
            with durable_file(self._log) as beside:
                beside.write_text("".join(json.dumps(row) + "\n" for row in self._rows))
        return dict(state)

    def save_checkpoint(self, state: Mapping[str, Any]) -> None:
        """Save a state, whole or not at all."""
        with durable_file(self._checkpoint) as beside:
            torch.save(dict(state), beside)

    def save_best(self, weights: Mapping[str, Tensor], step: int, score: float) -> None:
        """Keep weights for the bundle."""
        tensors = {name: tensor.contiguous().clone() for name, tensor in weights.items()}
        with durable_file(self._best) as beside:
            save_file(tensors, beside, metadata={"step": str(step), "score": str(score)})

    def load_best(self) -> tuple[dict[str, Tensor], int]:
        """Return the kept weights and the step they are from.

        Raises:
            RecipeError: they are gone or damaged.
        """
        if not self._best.is_file():
            raise RecipeError(f"{self._best} is missing; say --restart to train anew")
        try:
            with safe_open(self._best, framework="pt") as file:
                step = int(file.metadata()["step"])
            return load_file(self._best), step
        except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
            msg = f"{self._best} cannot be read ({error}); say --restart to train anew"
            raise RecipeError(msg) from error

    def validation(self, step: int) -> dict[str, Any]:
        """Return the scores of a step's validation; empty where none were taken."""
        rows = [row for row in self._rows if row["step"] == step and "validation" in row]
        return {key: rows[-1][key] for key in ("score", "validation")} if rows else {}

    def draw_curves(self) -> None:
        """Draw the log."""
        draw_curves([_log_row(row) for row in self._rows], self.folder / "curves.png")

    def draw_examples(self, step: int, panels: Sequence[Panel]) -> None:
        """Draw some validation images."""
        if panels:
            draw_examples(panels, self._examples(step))

    def pictures(self, step: int) -> dict[str, Path]:
        """Return the pictures that go into the bundle, by their names there."""
        found = {"curves.png": self.folder / "curves.png", "examples.png": self._examples(step)}
        return {name: path for name, path in found.items() if path.is_file()}

    @property
    def _log(self) -> Path:
        return self.folder / "log.jsonl"

    @property
    def _checkpoint(self) -> Path:
        return self.folder / "checkpoint.pt"

    @property
    def _best(self) -> Path:
        return self.folder / "best.safetensors"

    def _examples(self, step: int) -> Path:
        return self.folder / f"examples-{step:06d}.png"


def _check_out(out: Path, *, known: bool) -> None:
    """Refuse a folder that is not this run's to replace, now rather than after the run."""
    try:
        check_target(out)
    except ModelBundleError as error:
        raise RecipeError(str(error)) from error
    if (out / "spec.json").is_file() and not known:
        msg = f"{out} is a bundle of another run: choose another --out, or say --restart"
        raise RecipeError(msg)


def _log_row(row: Mapping[str, Any]) -> LogRow:
    by_head: dict[str, float] = {}
    for name, value in row.get("losses", {}).items():
        head = name.rpartition("/")[0]
        by_head[head] = by_head.get(head, 0.0) + value
    scores = {
        f"{head} {name}": value
        for head, own in row.get("validation", {}).items()
        for name, value in own.items()
        if value is not None
    }
    return LogRow(
        step=row["step"],
        loss=row.get("loss"),
        losses=by_head,
        learning_rate=row.get("lr"),
        scores=scores,
    )


def _parse(line: str) -> dict[str, Any] | None:
    # A killed run may leave half a line.
    try:
        return dict(json.loads(line))
    except ValueError:
        return None


def _plain(value: Any) -> Any:  # noqa: ANN401 - JSON
    if isinstance(value, Mapping):
        return {str(key): _plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    if isinstance(value, float):
        return value if value == value and abs(value) != float("inf") else None
    return value
