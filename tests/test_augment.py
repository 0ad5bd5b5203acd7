"""Augmentation: exact where it can be, aligned everywhere, and a function of the seed alone."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from wsi_pipeline.errors import RecipeError
from wsi_pipeline.spec import AnchorRules, HeadSpec, ModelSpec, PeakRules
from wsi_pipeline.stain import STAINS
from wsi_pipeline.training import augment as augment_module
from wsi_pipeline.training.augment import AugmentRules, augment
from wsi_pipeline.training.batch import Batch
from wsi_pipeline.training.recolour import Look, light_map, recolour, stain_map
from wsi_pipeline.training.warp import warp

SPEC = ModelSpec(
    name="m",
    architecture="cerberus",
    mpp=0.5,
    halo_px=0,
    options={},
    heads=(
        HeadSpec(name="nuclei", kind="instance", object_kind="nucleus", rules=AnchorRules()),
        HeadSpec(name="type", kind="class", classes=("none", "a", "b"), classifies="nuclei"),
        HeadSpec(name="tissue", kind="patch", classes=("x", "y")),
        HeadSpec(name="signet", kind="detect", object_kind="cell", rules=PeakRules()),
    ),
)
OFF = AugmentRules.off()


def windows(count=3, side=64, seed=0, *, boxes=None):
    """Random windows with every kind of label; ids up to 2^24, some unknown."""
    rng = np.random.default_rng(seed)
    ids = rng.integers(2**24 - 50, 2**24, (count, side, side), dtype=np.int32)
    ids[rng.random(ids.shape) < 0.1] = -1
    classes = rng.choice(np.array([0, 1, 2, 255], np.uint8), (count, side, side))
    if boxes is None:
        boxes = np.full((count, 2, 4), np.nan, np.float32)
    rows = torch.arange(count)
    return Batch(
        pixels=torch.from_numpy(rng.integers(0, 256, (count, side, side, 3), dtype=np.uint8)),
        rows=dict.fromkeys(("nuclei", "type", "tissue", "signet"), rows),
        labels={
            "nuclei": torch.from_numpy(ids),
            "type": torch.from_numpy(classes),
            "tissue": torch.from_numpy(rng.integers(0, 2, count)),
            "signet": torch.from_numpy(np.asarray(boxes, np.float32)),
        },
        unknown={"signet": torch.from_numpy(rng.random((count, side, side)) < 0.3)},
    )


def rotation(degrees, scale=1.0):
    angle = math.radians(degrees)
    return scale * np.array(
        [[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]]
    )


def warped(batch, matrix, crop, shift=(0.0, 0.0)):
    count = len(batch.pixels)
    return warp(
        batch,
        SPEC,
        matrix=np.repeat(np.asarray(matrix, float)[None], count, 0),
        shift_px=np.repeat(np.asarray(shift, float)[None], count, 0),
        crop_px=crop,
    )


def middle(array, crop):
    start = (array.shape[1] - crop) // 2
    return array[:, start : start + crop, start : start + crop]


def hwc(pixels):
    return pixels.permute(0, 2, 3, 1).numpy()


@pytest.mark.parametrize(("side", "crop"), [(64, 32), (60, 28), (65, 31), (50, 50), (896, 448)])
def test_rules_that_are_off_cut_the_middle_bit_for_bit(side, crop):
    batch = windows(2, side)
    crops = augment(batch, SPEC, OFF, crop_px=crop, seeds=[3, 4])
    assert crops.pixels.shape == (2, 3, crop, crop)
    assert crops.pixels.dtype == torch.float32
    assert crops.pixels.is_contiguous(memory_format=torch.channels_last)
    assert np.array_equal(hwc(crops.pixels), middle(batch.pixels.numpy(), crop))
    for name in ("nuclei", "type"):
        assert torch.equal(crops.labels[name], middle(batch.labels[name], crop))
        assert crops.labels[name].dtype == batch.labels[name].dtype
    assert torch.equal(crops.unknown["signet"], middle(batch.unknown["signet"], crop))
    assert torch.equal(crops.labels["tissue"], batch.labels["tissue"])


@pytest.mark.parametrize("turns", [0, 1, 2, 3])
@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize(("side", "crop"), [(64, 32), (58, 44), (33, 33)])
def test_quarter_turns_and_flips_equal_numpys(turns, flip, side, crop):
    batch = windows(2, side)
    matrix = rotation(-90 * turns) @ np.diag([-1.0 if flip else 1.0, 1.0])
    crops = warped(batch, matrix, crop)

    def expected(array):
        cut = middle(array, crop)
        cut = np.flip(cut, 2) if flip else cut
        return np.rot90(cut, turns, axes=(1, 2))

    assert np.array_equal(hwc(crops.pixels), expected(batch.pixels.numpy()))
    for name in ("nuclei", "type"):
        assert np.array_equal(crops.labels[name].numpy(), expected(batch.labels[name].numpy()))
    unknown = expected(batch.unknown["signet"].numpy())
    assert np.array_equal(crops.unknown["signet"].numpy(), unknown)


def test_whole_pixel_shifts_are_exact_and_beyond_the_window_is_unknown_and_mirrored():
    batch = windows(1, 16)
    crops = warped(batch, np.eye(2), 16, shift=(3, -2))
    image, ids = batch.pixels.numpy()[0], batch.labels["nuclei"].numpy()[0]
    padded = np.pad(image, ((2, 2), (3, 3), (0, 0)), mode="symmetric")
    assert np.array_equal(hwc(crops.pixels)[0], padded[4:20, 0:16])
    wanted = np.full((16, 16), -1, np.int32)
    wanted[:14, 3:] = ids[2:, :13]
    assert np.array_equal(crops.labels["nuclei"].numpy()[0], wanted)
    beyond = np.ones((16, 16), bool)
    beyond[:14, 3:] = False
    assert (crops.labels["type"].numpy()[0][beyond] == 255).all()
    assert crops.unknown["signet"].numpy()[0][beyond].all()
    assert not crops.unknown["signet"].numpy()[0][~beyond].all()


def reference(image, matrix, shift, crop):
    """Bilinear by its definition, one pixel at a time, NaN beyond the outer pixel centres."""
    side = len(image)
    inverse = np.linalg.inv(matrix)
    out = np.full((crop, crop, 3), np.nan)
    for y in range(crop):
        for x in range(crop):
            at = inverse @ (np.array([x, y]) - (crop - 1) / 2 - shift) + (side - 1) / 2
            x0, y0 = np.floor(at).astype(int)
            if 0 <= x0 < side - 1 and 0 <= y0 < side - 1:
                a, b = at - (x0, y0)
                top = (1 - a) * image[y0, x0] + a * image[y0, x0 + 1]
                low = (1 - a) * image[y0 + 1, x0] + a * image[y0 + 1, x0 + 1]
                out[y, x] = (1 - b) * top + b * low
    return out


@settings(max_examples=15, deadline=None)
@given(st.floats(-180, 180), st.floats(0.6, 1.8), st.floats(-0.3, 0.3), st.floats(-3, 3))
def test_any_affine_is_bilinear_between_pixel_centres(degrees, scale, lean, shift):
    batch = windows(1, 24)
    matrix = rotation(degrees, scale) @ np.array([[1, lean], [0, 1]])
    crops = warped(batch, matrix, 12, shift=(shift, -shift))
    image = batch.pixels.numpy()[0].astype(float)
    wanted = reference(image, matrix, np.array([shift, -shift]), 12)
    inside = np.isfinite(wanted)
    assert np.abs(hwc(crops.pixels)[0][inside] - wanted[inside]).max() < 0.05


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**40), st.integers(8, 24), st.integers(8, 24))
def test_pixels_labels_and_boxes_of_a_drawn_square_stay_together(seed, x, y):
    side, width, height = 48, 14, 10
    image = np.zeros((1, side, side, 3), np.uint8)
    image[0, y : y + height, x : x + width] = 200
    inside = image[..., 0] > 0
    batch = Batch(
        pixels=torch.from_numpy(image),
        rows=dict.fromkeys(("nuclei", "type", "signet"), torch.arange(1)),
        labels={
            "nuclei": torch.from_numpy(inside.astype(np.int32) * 7),
            "type": torch.from_numpy(inside.astype(np.uint8)),
            "signet": torch.tensor([[[x, y, x + width, y + height]]], dtype=torch.float32),
        },
        unknown={"signet": torch.from_numpy(inside)},
    )
    rules = dataclasses.replace(
        OFF,
        rotate_deg=180.0,
        flip_p=0.5,
        scale_min=0.7,
        scale_max=1.4,
        shear_deg=8.0,
        anisotropy=0.2,
        shift=0.1,
    )
    crops = augment(batch, SPEC, rules, crop_px=32, seeds=[seed])
    bright = crops.pixels[0, 0].numpy()
    ids = crops.labels["nuclei"][0].numpy()
    # The nearest pixel weighs a quarter or more of what is interpolated, the others the rest.
    assert (bright[ids == 7] >= 49).all()
    assert (bright[ids == 0] <= 151).all()
    known = ids >= 0
    assert np.array_equal((crops.labels["type"][0].numpy() == 1)[known], (ids == 7)[known])
    assert np.array_equal(crops.unknown["signet"][0].numpy()[known], (ids == 7)[known])
    if (ids == 7).sum() > 60 and known.all() and not (ids[[0, -1]] > 0).any():
        left, top, right, bottom = crops.labels["signet"][0, 0].numpy()
        rows, columns = np.nonzero(ids == 7)
        if columns.min() > 0 and columns.max() < 31:
            assert abs(columns.mean() + 0.5 - (left + right) / 2) < 0.6
            assert abs(rows.mean() + 0.5 - (top + bottom) / 2) < 0.6


@settings(max_examples=30, deadline=None)
@given(st.floats(-180, 180), st.floats(0.6, 1.6), st.floats(-0.4, 0.4), st.booleans())
def test_a_box_becomes_that_of_its_turned_ellipse(degrees, scale, lean, flip):
    box = np.array([30.0, 18.0, 44.0, 26.0])
    boxes = np.array([[box, [np.nan] * 4]], np.float32)
    matrix = rotation(degrees, scale) @ np.array([[1, lean], [0, 1]])
    matrix = matrix @ np.diag([-1.0 if flip else 1.0, 1.0])
    moved = warped(windows(1, 64, boxes=boxes), matrix, 32, shift=(1.5, -2)).labels["signet"]
    angle = np.linspace(0, 2 * np.pi, 20_001)
    ellipse = np.stack([37 + 7 * np.cos(angle), 22 + 4 * np.sin(angle)])
    points = matrix @ (ellipse - 32) + 16 + np.array([[1.5], [-2]])
    wanted = [*points.min(axis=1), *points.max(axis=1)]
    assert np.allclose(moved[0, 0].numpy(), wanted, atol=2e-3)
    assert moved[0, 1].isnan().all()


def test_labels_of_some_samples_follow_their_own_sample():
    batch = windows(4, 32)
    some = torch.tensor([1, 3])
    boxes = torch.tensor([[[4, 4, 9, 9.0]], [[5, 6, 12, 20.0]]])
    part = Batch(
        pixels=batch.pixels,
        rows={"nuclei": some, "signet": some},
        labels={"nuclei": batch.labels["nuclei"][some], "signet": boxes},
        unknown={"signet": batch.unknown["signet"][some]},
    )
    rules, seeds = AugmentRules(), [5, 6, 7, 8]
    every = augment(batch, SPEC, rules, crop_px=16, seeds=seeds)
    crops = augment(part, SPEC, rules, crop_px=16, seeds=seeds)
    assert torch.equal(crops.labels["nuclei"], every.labels["nuclei"][some])
    assert torch.equal(crops.unknown["signet"], every.unknown["signet"][some])
    alone = Batch(
        pixels=batch.pixels[3:],
        rows={"signet": torch.arange(1)},
        labels={"signet": boxes[1:]},
        unknown={"signet": batch.unknown["signet"][3:]},
    )
    single = augment(alone, SPEC, rules, crop_px=16, seeds=[8])
    assert torch.equal(crops.labels["signet"][1], single.labels["signet"][0])


def test_a_sample_depends_on_its_seed_alone():
    batch = windows(6, 64)
    rules = dataclasses.replace(AugmentRules(), noise_p=1.0, blur_p=0.5, sharpen_p=0.5)
    seeds = [11, 12, 13, 14, 15, 16]
    whole = augment(batch, SPEC, rules, crop_px=32, seeds=seeds)
    for order in ([4], [2, 5], [5, 4, 3, 2, 1, 0]):
        rows = torch.arange(len(order))
        part = Batch(
            pixels=batch.pixels[order],
            rows={"nuclei": rows},
            labels={"nuclei": batch.labels["nuclei"][order]},
            unknown={},
        )
        crops = augment(part, SPEC, rules, crop_px=32, seeds=[seeds[n] for n in order])
        assert torch.equal(crops.pixels, whole.pixels[order])
        assert torch.equal(crops.labels["nuclei"], whole.labels["nuclei"][order])
    other = augment(batch, SPEC, rules, crop_px=32, seeds=[seed + 100 for seed in seeds])
    assert not any(torch.equal(a, b) for a, b in zip(other.pixels, whole.pixels, strict=True))


CHANGES = {
    "rotate_deg": 20.0,
    "flip_p": 0.0,
    "scale_min": 0.9,
    "scale_max": 1.1,
    "anisotropy": 0.3,
    "shear_deg": 0.0,
    "shift": 0.2,
    "vesicular_p": 0.0,
    "vesicular_head": "other",
    "stain_h": 0.1,
    "stain_e": 0.1,
    "stain_rest": 0.0,
    "stain_jitter": 0.0,
    "stain_offset": 0.2,
    "brightness": 0.0,
    "contrast": 0.0,
    "grey_p": 0.9,
    "grey_max": 0.2,
    "blur_p": 0.0,
    "blur_max_px": 3.0,
    "sharpen_p": 0.0,
    "sharpen_max": 3.0,
    "noise_p": 0.0,
    "noise_max": 20.0,
}


def test_every_rule_matters():
    assert set(CHANGES) == {field.name for field in dataclasses.fields(AugmentRules)}
    batch, seeds = windows(8, 32), list(range(8))
    batch.labels["nuclei"][:, ::8] = 0  # ground between nuclei, with pixels that touch none
    batch.labels["nuclei"][:, 1::8] = 0
    batch.labels["nuclei"][:, 2::8] = 0
    busy = dataclasses.replace(
        AugmentRules(), grey_p=0.5, blur_p=0.4, sharpen_p=0.4, noise_p=0.5, vesicular_p=0.5
    )
    usual = augment(batch, SPEC, busy, crop_px=16, seeds=seeds).pixels
    for name, value in CHANGES.items():
        rules = dataclasses.replace(busy, **{name: value})
        pixels = augment(batch, SPEC, rules, crop_px=16, seeds=seeds).pixels
        assert not torch.equal(pixels, usual), name


def geometry(rules, count=4000, scales=None):
    draws = augment_module._draw(range(count))
    return augment_module._affines(draws, rules, scales or [None] * count)


def test_geometry_fills_its_ranges_and_no_more():
    rules = dataclasses.replace(OFF, scale_min=0.5, scale_max=2.0)
    matrix, _ = geometry(rules)
    scale = np.sqrt(np.abs(np.linalg.det(matrix)))
    assert 0.5 <= scale.min() < 0.51
    assert 1.97 < scale.max() <= 2.0
    assert abs(np.median(scale) - 1) < 0.05  # log-uniform: as often below 1 as above

    matrix, _ = geometry(dataclasses.replace(OFF, rotate_deg=30.0))
    angle = np.degrees(np.arctan2(matrix[:, 1, 0], matrix[:, 0, 0]))
    assert -30 <= angle.min() < -29.5
    assert 29.5 < angle.max() <= 30
    assert np.allclose(matrix @ np.swapaxes(matrix, 1, 2), np.eye(2))

    matrix, _ = geometry(dataclasses.replace(OFF, flip_p=0.25))
    assert abs((matrix[:, 0, 0] < 0).mean() - 0.25) < 0.03
    assert abs((matrix[:, 1, 1] < 0).mean() - 0.25) < 0.03
    assert abs((matrix[:, [0, 1], [0, 1]] < 0).all(axis=1).mean() - 0.0625) < 0.02

    matrix, _ = geometry(dataclasses.replace(OFF, anisotropy=0.2))
    ratio = matrix[:, 0, 0] / matrix[:, 1, 1]
    assert 1 / 1.2 <= ratio.min() < 0.84
    assert 1.195 < ratio.max() <= 1.2 + 1e-9

    matrix, _ = geometry(dataclasses.replace(OFF, shear_deg=10.0))
    lean = np.degrees(np.arctan(matrix[:, 0, 1]))
    assert -10 <= lean.min() < -9.9
    assert 9.9 < lean.max() <= 10 + 1e-9

    matrix, shift = geometry(dataclasses.replace(OFF, shift=0.1))
    assert np.array_equal(matrix, np.broadcast_to(np.eye(2), matrix.shape))
    assert shift.min() < -0.099
    assert 0.099 < shift.max() <= 0.1


def test_a_source_has_scales_of_its_own():
    rules = dataclasses.replace(OFF, scale_min=0.5, scale_max=2.0)
    scales = [None, (0.8, 1.25), (1.5, 1.5)] * 1000
    matrix, _ = geometry(rules, 3000, scales)
    scale = np.sqrt(np.abs(np.linalg.det(matrix)))
    assert scale[::3].min() < 0.52 < 1.95 < scale[::3].max()
    assert 0.8 <= scale[1::3].min() < 0.81 < 1.24 < scale[1::3].max() <= 1.25 + 1e-9
    assert np.allclose(scale[2::3], 1.5)
    # those of a sample do not move the others, and its place between the limits stays
    assert np.array_equal(matrix[::3], geometry(rules, 3000)[0][::3])
    usual = np.sqrt(np.abs(np.linalg.det(geometry(rules, 3000)[0])))[1::3]
    share = np.log(scale[1::3] / 0.8) / np.log(1.25 / 0.8)
    assert np.allclose(share, np.log(usual / 0.5) / np.log(4))


def test_a_crop_depends_on_its_seed_and_its_sources_scales():
    batch, rules = windows(3, 64), AugmentRules()
    usual = augment(batch, SPEC, rules, crop_px=32, seeds=[1, 2, 3]).pixels
    own = (rules.scale_min, rules.scale_max)
    same = augment(batch, SPEC, rules, crop_px=32, seeds=[1, 2, 3], scales=[own, None, own])
    assert torch.equal(same.pixels, usual)
    mixed = augment(batch, SPEC, rules, crop_px=32, seeds=[1, 2, 3], scales=[None, (2, 2), None])
    assert torch.equal(mixed.pixels[[0, 2]], usual[[0, 2]])
    assert not torch.equal(mixed.pixels[1], usual[1])
    alone = Batch(pixels=batch.pixels[1:2], rows={}, labels={}, unknown={})
    crop = augment(alone, SPEC, rules, crop_px=32, seeds=[2], scales=[(2, 2)])
    assert torch.equal(crop.pixels[0], mixed.pixels[1])


def look(count=1, **changes):
    values = {
        "stain": None,
        "light": None,
        "focus_px": np.ones(count),
        "detail": np.ones(count),
        "max_focus_px": 2.0,
        "noise": np.zeros(count),
        "noise_key": np.arange(count),
        **changes,
    }
    return Look(**values)


def crop_of(colour, side=8):
    return torch.tensor(colour, dtype=torch.float32)[None, :, None, None].expand(1, 3, side, side)


def test_stain_map_scales_each_stain_by_beer_and_lambert():
    h, e = (np.array(row) / np.linalg.norm(row) for row in STAINS)
    rest = np.cross(h, e) / np.linalg.norm(np.cross(h, e))
    density = 0.6 * h + 0.3 * e + 0.05 * rest
    wanted = 1.5 * 0.6 * h + (0.5 * 0.3 + 0.1) * e + 2 * 0.05 * rest
    seen = recolour(
        crop_of(256 * np.exp(-density) - 1),
        look(
            stain=stain_map(
                gain=np.array([[1.5, 0.5, 2.0]]),
                offset=np.array([[0, 0.1, 0]]),
                jitter=np.zeros((1, 2, 3)),
            )
        ),
    )
    assert np.allclose(seen[0, :, 3, 3].numpy(), 256 * np.exp(-wanted) - 1, atol=1e-3)


def test_stain_jitter_turns_the_colour_of_a_stain_and_keeps_its_amount():
    h = np.array(STAINS[0]) / np.linalg.norm(STAINS[0])
    jitter = np.array([[[0.1, -0.1, 0.2], [0, 0, 0]]])
    new = (h + jitter[0, 0]) / np.linalg.norm(h + jitter[0, 0])
    affine = stain_map(gain=np.ones((1, 3)), offset=np.zeros((1, 3)), jitter=jitter)
    seen = recolour(crop_of(256 * np.exp(-0.7 * h) - 1), look(stain=affine))
    assert np.allclose(seen[0, :, 0, 0].numpy(), 256 * np.exp(-0.7 * new) - 1, atol=1e-3)


def test_light_map_by_hand():
    def seen(contrast=1.0, brightness=0.0, grey=0.0):
        affine = light_map(*(np.array([v]) for v in (contrast, brightness, grey)))
        return recolour(crop_of((200.0, 100.0, 50.0)), look(light=affine))[0, :, 0, 0].numpy()

    assert np.allclose(seen(), [200, 100, 50], atol=1e-4)
    assert np.allclose(seen(contrast=1.2), [214.5, 94.5, 34.5], atol=1e-3)
    assert np.allclose(seen(brightness=0.1), [225.5, 125.5, 75.5], atol=1e-3)
    luma = 0.299 * 200 + 0.587 * 100 + 0.114 * 50
    assert np.allclose(seen(grey=1.0), [luma] * 3, atol=1e-3)
    assert np.allclose(seen(contrast=3.0, brightness=0.5), [255, 172.5, 22.5], atol=1e-2)


def test_blur_is_gaussian_and_sharpening_its_opposite():
    x = torch.full((2, 3, 25, 25), 100.0)
    x[..., 12, 12] += 50
    seen = recolour(
        x, look(2, focus_px=np.array([1.5, 1.0]), detail=np.array([0.0, 1.5]), max_focus_px=2.0)
    )
    steps = np.arange(-6, 7)
    taps = np.exp(-(steps**2) / (2 * 1.5**2))
    taps /= taps.sum()
    spot = seen[0, 1, 6:19, 6:19].numpy() - 100
    assert np.allclose(spot, 50 * np.outer(taps, taps), atol=1e-3)
    soft = np.exp(-(np.arange(-6, 7) ** 2) / 2)
    soft = 50 * np.outer(soft, soft) / soft.sum() ** 2
    sharp = np.zeros((13, 13))
    sharp[6, 6] = 50
    sharp += 0.5 * (sharp - soft)
    assert np.allclose(seen[1, 1, 6:19, 6:19].numpy() - 100, sharp, atol=1e-3)


def test_noise_is_nearly_normal_and_independent():
    x = torch.full((2, 3, 128, 128), 128.0)
    seen = recolour(x, look(2, noise=np.array([5.0, 9.0]), noise_key=np.array([7, 2**32 - 1])))
    noise = (seen - 128).numpy()
    assert np.allclose(noise.mean(axis=(1, 2, 3)), 0, atol=0.15)
    assert np.allclose(noise.std(axis=(1, 2, 3)), [5, 9], rtol=0.02)
    assert abs(((noise[0] / 5) ** 4).mean() - 2.7) < 0.1  # four bytes: 3 - 1.2 / 4
    flat = noise[0].ravel()
    for lag in (1, 2, 128, 128 * 128):
        assert abs(np.corrcoef(flat[:-lag], flat[lag:])[0, 1]) < 0.02
    assert abs(np.corrcoef(noise[0].ravel(), noise[1].ravel())[0, 1]) < 0.02


def test_the_papers_rules_keep_its_ranges():
    rules = AugmentRules.paper()
    matrix, _ = geometry(rules, 200)
    scale = np.sqrt(np.abs(np.linalg.det(matrix)))
    assert 0.9 <= scale.min() <= scale.max() <= 1.1
    crops = augment(windows(4, 64), SPEC, rules, crop_px=32, seeds=range(4))
    assert 0 <= crops.pixels.min() <= crops.pixels.max() <= 255


@pytest.mark.parametrize(
    ("changes", "names"),
    [
        ({"flip_p": 1.5}, "flip_p"),
        ({"vesicular_p": 1.01}, "vesicular_p"),
        ({"noise_max": -1.0}, "noise_max"),
        ({"contrast": math.nan}, "contrast"),
        ({"shear_deg": "2"}, "shear_deg"),
        ({"scale_min": 1.4}, "scale_min"),
        ({"scale_min": 0.3}, "scale_min"),
        ({"blur_p": 0.6, "sharpen_p": 0.6}, "blur_p"),
        ({"rotate_deg": 360}, "rotate_deg"),
    ],
)
def test_rules_that_make_no_sense_are_refused(changes, names):
    with pytest.raises(RecipeError, match=names):
        AugmentRules(**changes)


def test_wrong_use_is_refused():
    with pytest.raises(ValueError, match="as many seeds"):
        augment(windows(2), SPEC, OFF, crop_px=32, seeds=[1])
    with pytest.raises(ValueError, match="as many seeds and scales, not 2 and 1"):
        augment(windows(2), SPEC, OFF, crop_px=32, seeds=[1, 2], scales=[None])
    with pytest.raises(ValueError, match="about their middle"):
        augment(windows(2), SPEC, OFF, crop_px=31, seeds=[1, 2])
