"""Weights from a machine with a GPU that is lent for minutes: check, cost, train, release.

    python -m benchmarks.gpu_weights check cost --out FOLDER
    python -m benchmarks.gpu_weights train --out FOLDER --seconds 480 --set schedule.steps=9000
    python -m benchmarks.gpu_weights train release --out FOLDER ...  (the same: goes on, then ends)
    python -m benchmarks.gpu_weights check cost train release --device cpu --tiny  (a smoke test)

The steps run in the order in which they are named; one that fails ends the call.

check    the network on the device against float32 on the CPU, on one tile
cost     FLOPs and bytes of a training step, counted; the machine's own rates; the least time a
         step can take, said before it is measured; how many steps fit into ten minutes
train    the recipe, until --seconds after the call began; the next call with the same --work goes
         on. The length of the schedule is part of the recipe: give the same --set again. The last
         validation and the bundle come after the last step, whatever the time
release  half precision, files of at most 16 MiB, of the finished bundle or else of the moving
         average so far. Few files: weights, the rest of the bundle as bundle.tar (unpack it
         beside them), log and pictures as training.tar

Another recipe: --recipe workflows/weights/stage-5.toml --name cerberus-lite
--set 'start={model="cerberus-lite"}' continues the bundle that comes with the package. Where a
machine was lost, 'start={bundle="/FOLDER/cerberus-open"}' continues what was released.
"""

from __future__ import annotations

import argparse
import copy
import json
import tarfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.gpu import standardise
from benchmarks.step_cost import step_cost
from wsi_pipeline.bundle import ModelBundle, find_bundle, open_bundle, save_bundle
from wsi_pipeline.command import plain_errors
from wsi_pipeline.device import DTYPES, choose_device
from wsi_pipeline.errors import Interrupted, RecipeError
from wsi_pipeline.golden import golden_tiles, write_golden
from wsi_pipeline.learning import describe_row
from wsi_pipeline.network import build_network
from wsi_pipeline.release import release_bundle
from wsi_pipeline.training.begin import begin
from wsi_pipeline.training.fit import train
from wsi_pipeline.training.recipe import Recipe, read_recipe
from wsi_pipeline.training.transfer import Start
from wsi_pipeline.training.workplace import Workplace

Result = dict[str, Any]

RECIPE = Path(__file__).parent.parent / "workflows" / "weights" / "open.toml"
SETTINGS = (
    ("fp32", False, False),
    ("fp32", False, True),
    ("fp32", True, True),
    ("bf16", False, False),
    ("bf16", False, True),
)
"""Precision, whether convolutions may use TF32, whether channels are last."""
LIMITS = {"fp32": 1e-3, "fp32 TF32": 2e-2, "bf16": 1e-1}
"""Of the relative error of all logits: more than rounding does to a network of forty layers (with
random weights on a CPU 5e-6 and 3e-2), less than what a wrong stride or channel does."""
UNFINISHED = """# {name}

What a run that has not ended had learnt after {step} steps. Not judged: to go on from, not to use.
"""
"""Card of an unfinished run."""
SAID_EVERY = 100
"""Steps between two lines of the log that are printed."""
TINY = (
    "schedule.steps=4",
    "schedule.warmup=0",
    "batches.size=4",
    "batches.crop_px=64",
    "batches.workers=1",
    "validation.every=4",
    "validation.images=2",
    "validation.pictures=1",
)
"""Changes that make a recipe a matter of seconds on a CPU; so does a narrow network."""
NARROW = {
    "cerberus": "model.options={widths=[4,6,8,12],blocks=[1,1,1,1],head_width=6}",
    "cerberus-lite": "model.options={widths=[4,6,8,12],blocks=[1,1,1,1],decoder=[4,4,6,8]}",
}


def check(options: argparse.Namespace, recipe: Recipe) -> Result:
    """Compare the device's logits and probabilities with float32 on the CPU."""
    network, name = _network(options, recipe)
    tile = golden_tiles(0.5)["tissue"][: options.tile, : options.tile]
    pixels = torch.from_numpy(tile.copy()).permute(2, 0, 1)[None].float()
    if options.bundle is None:
        standardise(network, pixels)
    expected = _logits(network, pixels, "cpu", ("fp32", False, False))
    print(f"{name}, {len(tile)} px, against float32 on the CPU")
    print("setting                    logits, relative   probability, largest       mean")
    rows = []
    for setting in SETTINGS:
        row = differences(_logits(network, pixels, options.device, setting), expected)
        label, limit = named(setting)
        passed = row["relative"] <= limit  # NaN is not
        rows.append({"setting": label, **row, "passed": passed})
        print(
            f"{label:26} {row['relative']:16.1e} {row['largest']:22.5f} {row['mean']:10.6f}"
            + ("" if passed else f"   above {limit:g}")
        )
    passed = all(row["passed"] for row in rows)
    return {"tile": len(tile), "settings": rows, "passed": passed}


def _network(options: argparse.Namespace, recipe: Recipe) -> tuple[nn.Module, str]:
    if options.bundle is not None:
        bundle = find_bundle(options.bundle)
        return bundle.load_network(), bundle.name
    spec = begin(recipe, name=options.name, device="cpu").spec
    torch.manual_seed(0)
    return build_network(spec).eval(), f"{spec.architecture} with random weights"


@torch.inference_mode()
def _logits(
    network: nn.Module, pixels: Tensor, device: str, setting: tuple[str, bool, bool]
) -> dict[str, Tensor]:
    precision, tf32, last = setting
    order = torch.channels_last if last else torch.contiguous_format
    own = copy.deepcopy(network).to(device=device, dtype=DTYPES[precision])
    own = own.to(memory_format=order)  # type: ignore[call-overload]
    x = pixels.to(device=device, dtype=DTYPES[precision]).contiguous(memory_format=order)
    with torch.backends.cudnn.flags(
        enabled=True, benchmark=False, deterministic=True, allow_tf32=tf32
    ):
        return {name: value.float().cpu() for name, value in own(x).items()}


def named(setting: tuple[str, bool, bool]) -> tuple[str, float]:
    """Return what a setting is called, and how far off it may be."""
    precision, tf32, last = setting
    kind = f"{precision} TF32" if tf32 else precision
    return f"{kind} channels last" if last else kind, LIMITS[kind]


def differences(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> dict[str, float]:
    """Compare logits, and the probabilities that they give.

    Returns:
        ``relative``: norm of the difference over the norm of what is expected, over all heads;
        ``largest`` and ``mean``: absolute difference of probabilities.
    """
    apart = torch.cat([(found[name] - value).flatten() for name, value in expected.items()])
    whole = torch.cat([value.flatten() for value in expected.values()])
    gaps = torch.cat(
        [(found[n].softmax(1) - value.softmax(1)).abs().flatten() for n, value in expected.items()]
    )
    return {
        "relative": float(apart.double().norm() / whole.double().norm()),
        "largest": float(gaps.max()),
        "mean": float(gaps.double().mean()),
    }


def cost(options: argparse.Namespace, recipe: Recipe) -> Result:
    """Say what a training step takes at least, then measure it."""
    return step_cost(
        recipe,
        device=options.device,
        batches=options.batches,
        repeats=options.repeats,
        small=options.tiny,
    )


def train_until(options: argparse.Namespace, recipe: Recipe) -> Result:
    """Train until the time is up or the schedule ends; the next call goes on."""
    begun, end = time.monotonic(), options.begun + options.seconds
    last = recipe.schedule.steps
    learnt: list[int] = []

    def say(row: Mapping[str, Any]) -> None:
        if "losses" in row:
            learnt.append(row["step"])
        if "losses" not in row or row["step"] % SAID_EVERY == 0 or row["step"] == last:
            print(f"{row['step']}/{last} {describe_row(row)}", flush=True)

    finished = True
    try:
        train(
            recipe,
            options.work / options.name,
            device=options.device,
            on_row=say,
            stop=lambda: time.monotonic() > end,
        )
    except Interrupted as error:
        finished = False
        print(error)
    seconds = time.monotonic() - begun
    return {"finished": finished, "steps": len(learnt), "seconds": round(seconds, 1)}


def release(options: argparse.Namespace, recipe: Recipe) -> Result:
    """Write what was learnt, as few files of at most 16 MiB.

    Raises:
        RecipeError: nothing was learnt yet.
    """
    trained = options.work / options.name
    finished = (trained / "spec.json").is_file()
    bundle = open_bundle(trained) if finished else _so_far(options, recipe)
    target = options.work / "released" / options.name
    released = release_bundle(bundle, target, finish=write_golden)
    out = options.out / options.name
    out.mkdir(parents=True, exist_ok=True)
    for name in released.weight_map:
        (out / name).write_bytes((released.path / name).read_bytes())
    rest = {path.name: path for path in released.path.iterdir() if path.suffix != ".safetensors"}
    _write_tar(out / "bundle.tar", rest)
    training = trained.with_name(f"{trained.name}.training")
    pictures = sorted(training.glob("examples-*.png"))[-1:]
    told = [training / "log.jsonl", training / "curves.png", training / "recipe.toml", *pictures]
    _write_tar(out / "training.tar", {path.name: path for path in told if path.is_file()})
    size = sum((out / name).stat().st_size for name in released.weight_map)
    print(f"{out}: {len(released.weight_map)} weight files, {size / 2**20:.1f} MiB")
    return {"finished": finished, "digest": released.digest, "bytes": size}


def _so_far(options: argparse.Namespace, recipe: Recipe) -> ModelBundle:
    """Make a bundle of the moving average of a run that has not ended.

    Raises:
        RecipeError: nothing was saved yet.
    """
    trained = options.work / options.name
    work = Workplace(
        folder=trained.with_name(f"{trained.name}.training"), first=False, on_row=lambda _: None
    )
    saved = work.load_checkpoint()
    if saved is None:
        raise RecipeError(f"{work.folder} has no checkpoint: nothing was learnt yet")
    start = begin(recipe, name=options.name, device="cpu")
    step = saved["course"]["step"]
    metrics = {"step": step, "steps": step, "seed": recipe.seed, "data": start.data}
    return save_bundle(
        options.work / "so-far" / options.name,
        start.spec,
        saved["averaged"],
        card=UNFINISHED.format(name=options.name, step=step),
        metrics=metrics,
        recipe=recipe.text,
    )


def _write_tar(path: Path, files: Mapping[str, Path]) -> None:
    with tarfile.open(path, "w") as archive:
        for name, file in sorted(files.items()):
            archive.add(file, name)


STEPS: dict[str, Callable[[argparse.Namespace, Recipe], Result]] = {
    "check": check,
    "cost": cost,
    "train": train_until,
    "release": release,
}


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("steps", nargs="+", choices=STEPS, metavar="STEP", help=", ".join(STEPS))
    parser.add_argument("--recipe", type=Path, default=RECIPE)
    parser.add_argument("--set", dest="overrides", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--name", default="cerberus-open", help="of the bundle")
    parser.add_argument("--work", type=Path, default=Path("build/weights"), help="kept for later")
    parser.add_argument("--out", type=Path, default=Path("build/out"), help="what is to be kept")
    parser.add_argument("--seconds", type=float, default=480, help="of the call, for training")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--bundle", help="checked instead of random weights")
    parser.add_argument("--tile", type=int, default=384, help="pixels a side that are checked")
    parser.add_argument("--batches", type=int, default=4, help="that are counted and timed")
    parser.add_argument("--repeats", type=int, default=5, help="of each measurement")
    parser.add_argument("--tiny", action="store_true", help="seconds on a CPU; learns nothing")
    options = parser.parse_args(arguments)
    if options.tiny:
        options.tile, options.batches, options.repeats = 64, 2, 1
    return options


def read(options: argparse.Namespace) -> Recipe:
    """Read the recipe, with what the command line changes."""
    recipe = read_recipe(options.recipe, options.overrides)
    if not options.tiny:
        return recipe
    # What goes on from given weights has their width.
    fresh = recipe.start == Start() and recipe.model.architecture in NARROW
    narrow = [NARROW[recipe.model.architecture]] if fresh else []  # type: ignore[index]
    return read_recipe(options.recipe, [*TINY, *narrow, *options.overrides])


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse(arguments)
    options.begun = time.monotonic()
    with plain_errors():
        options.device = choose_device(options.device)
        recipe = read(options)
        report: Result = {"torch": torch.__version__, "recipe": options.recipe.name}
        options.out.mkdir(parents=True, exist_ok=True)
        for step in options.steps:
            print(f"== {step}", flush=True)
            report[step] = STEPS[step](options, recipe)
            text = json.dumps(report, indent=2) + "\n"
            (options.out / "report.json").write_text(text, encoding="utf-8")
            if not report[step].get("passed", True):
                raise SystemExit(f"{step}: the device computes something else than the CPU")


if __name__ == "__main__":
    main()
