"""SimCLR: its loss against two loops, its runs against one another, its windows' places."""

from __future__ import annotations

import json
import math
import os
import threading
from pathlib import Path

import numpy as np
import pytest
import tifffile
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from wsi_pipeline.errors import DatasetError, Interrupted, ModelBundleError, RecipeError
from wsi_pipeline.network import build_network
from wsi_pipeline.slide import Slide
from wsi_pipeline.spec import AnchorRules, HeadSpec, ModelSpec
from wsi_pipeline.training.pixels import ImageWindows, SlideWindows
from wsi_pipeline.training.simclr import SimclrRules, nt_xent, pretrain
from wsi_pipeline.training.transfer import Start, read_start, start_from

DATA = Path(os.environ.get("WSI_DATA", Path(__file__).parents[2] / "shared" / "data"))
SLIDE = DATA / "slides" / "CMU-1-Small-Region.svs"
NUCLEI = HeadSpec(name="nuclei", kind="instance", object_kind="nucleus", rules=AnchorRules())
SPEC = ModelSpec(
    name="narrow",
    architecture="cerberus",
    mpp=0.5,
    halo_px=16,
    heads=(NUCLEI,),
    options={"widths": [4, 4, 6, 8], "blocks": [1, 1, 1, 1], "head_width": 5},
)
RULES = SimclrRules(steps=6, warmup=2, checkpoint_every=4, projection=8, learning_rate=1e-2)


def build(seed=0):
    torch.manual_seed(seed)
    return build_network(SPEC)


def blobs(count=12, side=40):
    """Images that differ in colour and in the width of their stripes."""
    rng = np.random.default_rng(0)
    images = []
    for _ in range(count):
        wave = np.sin(np.arange(side) * rng.uniform(0.2, 2)) * rng.uniform(20, 60)
        image = rng.uniform(60, 200, 3) + wave[:, None, None] + np.zeros((side, side, 3))
        images.append(np.clip(image, 0, 255).astype(np.uint8))
    return images


WINDOWS = ImageWindows(blobs(), window_px=40, batch=6, seed=1)


def views(windows, seeds):
    """A crop and a brightness a window, of its seed alone."""
    found = []
    for window, seed in zip(windows, seeds.tolist(), strict=True):
        rng = np.random.default_rng(seed)
        x, y = rng.integers(8, size=2)
        crop = window[y : y + 32, x : x + 32].permute(2, 0, 1).float()
        found.append((crop * rng.uniform(0.8, 1.2)).clamp(0, 255))
    return torch.stack(found)


def run(out, *, network=None, windows=WINDOWS, rules=RULES, **how):
    network = network or build()
    records = []
    path = pretrain(network, windows, views, rules, out=out, on_step=records.append, **how)
    return load_file(path), records


# the loss


def naive(z1, z2, temperature):
    """Equation 1 of the paper: for each view, for each other view."""
    z = [*z1.tolist(), *z2.tolist()]
    count = len(z)

    def similarity(a, b):
        dot = sum(x * y for x, y in zip(a, b, strict=True))
        return dot / (math.hypot(*a) * math.hypot(*b))

    total = 0.0
    for i in range(count):
        partner = (i + count // 2) % count
        others = sum(math.exp(similarity(z[i], z[k]) / temperature) for k in range(count) if k != i)
        total -= math.log(math.exp(similarity(z[i], z[partner]) / temperature) / others)
    return total / count


@settings(deadline=None, max_examples=40)
@given(st.integers(2, 6), st.integers(1, 5), st.floats(0.1, 2), st.integers(0, 2**32 - 1))
def test_loss_is_the_papers(batch, width, temperature, seed):
    generator = torch.Generator().manual_seed(seed)
    z1, z2 = torch.randn(2, batch, width, generator=generator, dtype=torch.float64)
    found = nt_xent(z1, z2, temperature).item()
    assert found == pytest.approx(naive(z1, z2, temperature), rel=1e-6, abs=1e-9)


def test_loss_is_least_where_views_agree_and_windows_do_not():
    axes = torch.eye(4)
    best = nt_xent(axes, axes, 0.1)
    assert best < nt_xent(axes, axes.roll(1, 0), 0.1)
    assert best < nt_xent(torch.ones(4, 4), torch.ones(4, 4), 0.1)
    assert nt_xent(torch.ones(4, 4), torch.ones(4, 4), 0.1).item() == pytest.approx(math.log(7))
    assert torch.equal(best, nt_xent(3 * axes, 5 * axes, 0.1))


# the run


def test_loss_falls_and_views_find_each_other(tmp_path):
    rules = SimclrRules(steps=60, warmup=5, projection=8, learning_rate=1e-2)
    _, records = run(tmp_path, rules=rules)
    first, last = records[:10], records[-10:]
    assert np.mean([r.loss for r in last]) < 0.7 * np.mean([r.loss for r in first])
    assert np.mean([r.matched for r in last]) > np.mean([r.matched for r in first]) + 0.2


def test_result_is_the_trained_encoder_and_starts_a_network(tmp_path):
    network = build()
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    tensors, _ = run(tmp_path, network=network)
    after = network.state_dict()
    assert set(tensors) == {
        name
        for name in after
        if name.startswith("encoder.") and not name.endswith("num_batches_tracked")
    }
    for name, tensor in tensors.items():
        assert torch.equal(tensor, after[name])
        assert not torch.equal(tensor, before[name]), name
    for name in set(after) - set(tensors):
        if not name.startswith("encoder."):
            assert torch.equal(after[name], before[name])
    point = read_start(Start(simclr=tmp_path / "encoder.safetensors"))
    report = start_from(build(seed=3), SPEC, point)
    assert set(report.taken) == set(tensors)


@pytest.mark.parametrize("stop_at", [0, 1, 4, 5])
def test_interrupted_is_uninterrupted(tmp_path, stop_at):
    whole, records = run(tmp_path / "whole")
    asked = iter(range(100))
    with pytest.raises(Interrupted, match=f"before step {stop_at}"):
        run(tmp_path / "parts", stop=lambda: next(asked) == stop_at, workers=2)
    assert not (tmp_path / "parts" / "encoder.safetensors").exists()
    again, rest = run(tmp_path / "parts", network=build(seed=9))
    assert [r.step for r in rest] == list(range(stop_at, 6))
    assert rest == records[stop_at:]
    assert all(torch.equal(again[name], whole[name]) for name in whole)
    logs = [(tmp_path / name / "log.jsonl").read_bytes() for name in ("whole", "parts")]
    assert logs[0] == logs[1]


def test_a_killed_run_goes_on_from_its_last_checkpoint(tmp_path):
    whole, _ = run(tmp_path / "whole")

    def windows(step):
        if step == 5:
            raise OSError("the disk went away")
        return WINDOWS(step)

    with pytest.raises(OSError, match="went away"):
        run(tmp_path / "killed", windows=windows)
    log = tmp_path / "killed" / "log.jsonl"
    assert len(log.read_text().splitlines()) == 5
    again, rest = run(tmp_path / "killed", network=build(seed=9))
    assert [r.step for r in rest] == [4, 5]
    assert all(torch.equal(again[name], whole[name]) for name in whole)
    assert [json.loads(line)["step"] for line in log.read_text().splitlines()] == list(range(6))


def test_a_finished_run_is_not_run_again(tmp_path):
    first, _ = run(tmp_path)
    again, records = run(tmp_path, network=build(seed=9))
    assert records == []
    assert all(torch.equal(again[name], first[name]) for name in first)


def test_a_seed_is_a_run_and_workers_change_nothing(tmp_path):
    one, records = run(tmp_path / "1")
    two, same = run(tmp_path / "2", workers=3)
    other = SimclrRules(**{f: getattr(RULES, f) for f in RULES.__slots__} | {"seed": 6})
    _, different = run(tmp_path / "3", rules=other)
    assert records == same
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert records != different


def test_projection_does_not_depend_on_or_move_the_global_generator(tmp_path):
    network = build()
    torch.manual_seed(77)
    _, records = run(tmp_path / "1", network=network)
    after = torch.rand(1)
    torch.manual_seed(77)
    assert torch.equal(after, torch.rand(1))
    _, again = run(tmp_path / "2", network=build())
    assert records == again


def test_learning_rate_warms_up_and_falls_to_nothing(tmp_path):
    _, records = run(tmp_path)
    rates = [record.learning_rate for record in records]
    cosine = [0.01 * 0.5 * (1 + math.cos(math.pi * k / 4)) for k in range(4)]
    assert rates == pytest.approx([0.005, 0.01, *cosine])


def test_windows_are_asked_for_in_threads_and_once_each(tmp_path):
    asked = []

    def windows(step):
        asked.append((step, threading.current_thread().name))
        return WINDOWS(step)

    run(tmp_path, windows=windows, workers=2)
    assert sorted(step for step, _ in asked) == list(range(6))
    assert all(name.startswith("windows") for _, name in asked)


def test_bf16_runs(tmp_path):
    rules = SimclrRules(steps=2, projection=8, precision="bf16", warmup=0)
    tensors, records = run(tmp_path, rules=rules)
    assert all(math.isfinite(record.loss) for record in records)
    assert all(tensor.dtype == torch.float32 for tensor in tensors.values())


def test_checkpoints_of_other_rules_or_encoders_are_refused(tmp_path):
    run(tmp_path)
    other = SimclrRules(**{f: getattr(RULES, f) for f in RULES.__slots__} | {"temperature": 0.5})
    with pytest.raises(RecipeError, match=r"other rules \(\['temperature'\]\)"):
        run(tmp_path, rules=other)
    spec = {**SPEC.options, "widths": [4, 4, 6, 10]}
    wider = build_network(ModelSpec.from_json(SPEC.to_json().replace("8\n    ]", "10\n    ]")))
    assert dict(wider.named_parameters())["project.weight"].shape[1] == spec["widths"][3]
    with pytest.raises(RecipeError, match="cannot be continued with this encoder"):
        run(tmp_path, network=wider)
    (tmp_path / "checkpoint.pt").write_bytes(b"torn")
    with pytest.raises(ModelBundleError, match=r"checkpoint\.pt cannot be read"):
        run(tmp_path)


def test_a_loss_that_is_no_number_ends_the_run(tmp_path):
    network = build()
    with torch.no_grad():
        network.encoder.stem.conv.weight.fill_(torch.nan)
    with pytest.raises(RecipeError, match="loss of step 0 is nan"):
        run(tmp_path, network=network)


@pytest.mark.parametrize("change", [{"steps": 0}, {"temperature": 0}, {"learning_rate": -1}])
def test_senseless_rules_are_refused(change):
    with pytest.raises(RecipeError, match="SimCLR wants"):
        SimclrRules(**change)


def test_one_window_is_nothing_to_compare(tmp_path):
    with pytest.raises(RecipeError, match="step 0 has 1"):
        run(tmp_path, windows=ImageWindows(blobs(2), window_px=40, batch=1, seed=0))


# the windows


def test_image_windows_are_cut_from_different_images_and_are_a_function_of_the_step():
    images = [np.full((50, 60 + k, 3), k, np.uint8) for k in range(5)]
    images[3][10:20, 30:40] = 200
    windows = ImageWindows(images, window_px=48, batch=5, seed=2)
    batch = windows(7)
    assert batch.shape == (5, 48, 48, 3)
    assert batch.dtype == torch.uint8
    assert sorted(batch[:, 0, 0, 0].tolist()) == list(range(5))
    assert torch.equal(batch, windows(7))
    assert not torch.equal(batch, windows(8))
    assert not torch.equal(batch, ImageWindows(images, window_px=48, batch=5, seed=3)(7))


def test_image_windows_reach_every_edge():
    rows, columns = np.mgrid[:10, :12]
    image = np.stack([rows, columns, rows], -1).astype(np.uint8)
    windows = ImageWindows([image], window_px=8, batch=4, seed=0)
    corners = {tuple(w[0, 0, :2].tolist()) for step in range(60) for w in windows(step)}
    assert corners == {(y, x) for y in range(3) for x in range(5)}


@pytest.mark.parametrize("images", [[], [np.zeros((50, 40, 3), np.uint8)]])
def test_unfit_images_are_refused(images):
    with pytest.raises(DatasetError):
        ImageWindows(images, window_px=48, batch=2, seed=0)


PURPLE, PINK = (190, 90, 160), (230, 130, 170)


def stained(path, side, tissue, colour=PURPLE):
    """A slide of white glass with one rectangle of stained tissue (x0, y0, x1, y1)."""
    rng = np.random.default_rng(0)
    image = np.full((side, side, 3), 244, np.uint8)
    x0, y0, x1, y1 = tissue
    noise = rng.integers(-20, 20, (y1 - y0, x1 - x0, 1))
    image[y0:y1, x0:x1] = np.clip(np.array(colour) + noise, 0, 255)
    how = {"tile": (256, 256), "photometric": "rgb", "compression": "deflate"}
    tifffile.imwrite(path, image, resolution=(20_000, 20_000), resolutionunit="CENTIMETER", **how)


def test_slide_windows_lie_on_tissue_at_the_wanted_pixel_size(tmp_path):
    stained(tmp_path / "a.tiff", 1536, (400, 512, 1136, 1280))
    slides = {tmp_path / "a.tiff": None}
    with SlideWindows(slides, mpp=1.0, window_px=32, batch=40, seed=0) as windows:
        batch = windows(3)
        assert torch.equal(batch, windows(3))
        assert not torch.equal(batch, windows(4))
    assert batch.shape == (40, 32, 32, 3)
    assert batch.dtype == torch.uint8
    middle = batch[:, 14:18, 14:18].float().mean((1, 2))
    purple = (middle - torch.tensor(PURPLE)).abs().amax(1) < 30
    assert purple.float().mean() > 0.8  # the mask has a rim of 8 um
    with Slide.open(tmp_path / "a.tiff") as slide:
        assert slide.pixel_size.x == pytest.approx(0.5)


def test_slides_are_drawn_by_their_tissue(tmp_path):
    """Four times the tissue, four times the windows."""
    stained(tmp_path / "a.tiff", 1536, (256, 256, 1280, 1280))
    stained(tmp_path / "b.tiff", 1536, (600, 600, 1112, 1112), PINK)
    slides = {tmp_path / "a.tiff": 0.5, tmp_path / "b.tiff": 0.5}
    with SlideWindows(slides, mpp=0.5, window_px=16, batch=200, seed=0) as windows:
        drawn = torch.cat([windows(step) for step in range(5)])
    middle = drawn[:, 6:10, 6:10].float().mean((1, 2))
    seen = [
        ((middle - torch.tensor(colour)).abs().amax(1) < 20).sum().item()
        for colour in (PURPLE, PINK)
    ]
    assert sum(seen) > 800  # the others are of the rim
    assert seen[0] / sum(seen) == pytest.approx(4 / 5, abs=0.06)


def test_slides_without_tissue_are_refused(tmp_path):
    stained(tmp_path / "a.tiff", 512, (0, 0, 0, 0))
    with pytest.raises(DatasetError, match=r"no tissue on.*a\.tiff"):
        SlideWindows({tmp_path / "a.tiff": 0.5}, mpp=0.5, window_px=16, batch=1, seed=0)


@pytest.mark.real
@pytest.mark.skipif(not SLIDE.is_file(), reason=f"no {SLIDE} (set WSI_DATA to the data kit)")
def test_pretraining_on_a_real_slide_learns(tmp_path):
    rules = SimclrRules(steps=30, warmup=3, projection=8, learning_rate=1e-2)
    with SlideWindows({SLIDE: None}, mpp=0.5, window_px=40, batch=8, seed=0) as windows:
        _, records = run(tmp_path, windows=windows, rules=rules)
    assert np.mean([r.loss for r in records[-5:]]) < np.mean([r.loss for r in records[:5]]) - 0.3
