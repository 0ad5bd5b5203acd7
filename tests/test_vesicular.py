"""Vesicular nuclei: only the drawn ones, pale inside their rim, towards what is around them."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy import ndimage
from training_fixtures import PINK, VIOLET

from wsi_pipeline.errors import RecipeError
from wsi_pipeline.spec import AnchorRules, HeadSpec, ModelSpec, RunRules
from wsi_pipeline.training import vesicular
from wsi_pipeline.training.augment import AugmentRules, augment
from wsi_pipeline.training.batch import Batch
from wsi_pipeline.training.vesicular import NOISE_BYTES, Vesicles, open_chromatin

SPEC = ModelSpec(
    name="m",
    architecture="cerberus",
    mpp=0.5,
    halo_px=0,
    options={},
    heads=(
        HeadSpec(name="nuclei", kind="instance", object_kind="nucleus", rules=AnchorRules()),
        HeadSpec(name="gland", kind="instance", object_kind="gland", rules=RunRules()),
        HeadSpec(name="type", kind="class", classes=("none", "a"), classifies="nuclei"),
    ),
)
RULES = replace(AugmentRules.off(), vesicular_p=1.0)


def discs(side=96, pitch=24, radius=8.3, first=1):
    """Ids of discs on a square lattice."""
    ids = np.zeros((side, side), np.int32)
    y, x = np.mgrid[:side, :side]
    middles = np.arange(pitch / 2, side, pitch)
    for number, (cy, cx) in enumerate((a, b) for a in middles for b in middles):
        ids[np.hypot(y - cy, x - cx) < radius] = first + number
    return ids


def stained(ids, ground=PINK, nucleus=VIOLET):
    """Nuclei of one colour on another, (3, H, W)."""
    colours = np.where((ids > 0)[..., None], nucleus, ground)
    return torch.from_numpy(np.moveaxis(colours, -1, 0).astype(np.float32))


def noise(count=1, seed=0):
    rng = np.random.default_rng(seed)
    return rng.integers(0, 256, (count, NOISE_BYTES), dtype=np.uint8)


def opened(ids, pixels=None, *, share=1.0, mpp=0.5, seed=0, drawn=None):
    """One crop with its nuclei opened; share 1 takes all."""
    x = (stained(ids) if pixels is None else pixels)[None]
    vesicles = Vesicles(share=np.array([share]), noise=noise(1, seed) if drawn is None else drawn)
    rows = torch.arange(1)
    return open_chromatin(x, torch.from_numpy(ids)[None], rows, vesicles, mpp=mpp)[0].numpy()


def windows(count=6, side=128):
    ids = torch.from_numpy(np.stack([discs(side, first=1 + 40 * n) for n in range(count)]))
    rng = np.random.default_rng(0)
    pixels = torch.stack([stained(own.numpy()) for own in ids]).permute(0, 2, 3, 1)
    grain = torch.from_numpy(rng.integers(-20, 21, pixels.shape))
    return Batch(
        pixels=(pixels + grain).clamp(0, 255).to(torch.uint8),
        rows={"nuclei": torch.arange(count)},
        labels={"nuclei": ids},
        unknown={},
    )


def part_of(batch, rows):
    return Batch(
        pixels=batch.pixels[rows],
        rows={"nuclei": torch.arange(len(rows))},
        labels={"nuclei": batch.labels["nuclei"][rows]},
        unknown={},
    )


def changed(before, after):
    """Where pixels differ, (B, H, W)."""
    return (before != after).any(axis=-3)


def test_only_pixels_of_drawn_nuclei_change_and_no_label_does():
    batch, seeds = windows(12), range(12)
    plain = augment(batch, SPEC, AugmentRules.off(), crop_px=64, seeds=seeds)
    crops = augment(batch, SPEC, RULES, crop_px=64, seeds=seeds)
    assert torch.equal(crops.labels["nuclei"], plain.labels["nuclei"])
    different = changed(plain.pixels.numpy(), crops.pixels.numpy())
    shares = []
    for where, ids in zip(different, plain.labels["nuclei"].numpy(), strict=True):
        assert not where[ids <= 0].any()
        per_nucleus = [where[ids == one].mean() for one in np.unique(ids[ids > 0])]
        # all of a nucleus or nothing of it (a pixel may happen to stay)
        assert all(part == 0 or part > 0.8 for part in per_nucleus)
        shares.append(np.mean([part > 0 for part in per_nucleus]))
    assert max(shares) > 0.6
    assert min(shares) < 0.5
    assert 0.35 < np.mean(shares) < 0.75


def test_as_many_crops_as_the_rule_says_and_the_others_stay_bit_for_bit():
    one = windows(1, 64)
    many = part_of(one, [0] * 400)
    plain = augment(many, SPEC, AugmentRules.off(), crop_px=48, seeds=range(400)).pixels
    crops = augment(many, SPEC, replace(RULES, vesicular_p=0.3), crop_px=48, seeds=range(400))
    assert abs(changed(plain.numpy(), crops.pixels.numpy()).any(axis=(1, 2)).mean() - 0.3) < 0.06


def test_a_crop_depends_on_its_seed_alone():
    batch = windows(6)
    rules = replace(AugmentRules(), vesicular_p=0.6)
    seeds = [21, 22, 23, 24, 25, 26]
    whole = augment(batch, SPEC, rules, crop_px=64, seeds=seeds)
    for order in ([4], [2, 5], [5, 4, 3, 2, 1, 0]):
        part = part_of(batch, order)
        crops = augment(part, SPEC, rules, crop_px=64, seeds=[seeds[n] for n in order])
        assert torch.equal(crops.pixels, whole.pixels[order])
    # and it comes after all other draws: those are what they were without it
    same = augment(batch, SPEC, replace(rules, vesicular_p=0.0), crop_px=64, seeds=seeds)
    ground = (whole.labels["nuclei"] == 0)[:, None]
    assert torch.equal(same.labels["nuclei"], whole.labels["nuclei"])
    soft = replace(rules, blur_p=0.0, sharpen_p=0.0)
    with_it, without = (
        augment(batch, SPEC, replace(soft, vesicular_p=p), crop_px=64, seeds=seeds).pixels
        for p in (1.0, 0.0)
    )
    assert torch.equal(with_it * ground, without * ground)
    assert not torch.equal(with_it, without)


def test_crops_without_the_label_stay_and_rows_find_their_crop():
    batch = windows(4)
    some = torch.tensor([1, 3])
    part = Batch(
        pixels=batch.pixels,
        rows={"nuclei": some},
        labels={"nuclei": batch.labels["nuclei"][some]},
        unknown={},
    )
    whole = augment(batch, SPEC, RULES, crop_px=64, seeds=range(4)).pixels
    plain = augment(batch, SPEC, AugmentRules.off(), crop_px=64, seeds=range(4)).pixels
    crops = augment(part, SPEC, RULES, crop_px=64, seeds=range(4)).pixels
    assert torch.equal(crops[[1, 3]], whole[[1, 3]])
    assert torch.equal(crops[[0, 2]], plain[[0, 2]])
    other = augment(part, SPEC, replace(RULES, vesicular_head="gland"), crop_px=64, seeds=range(4))
    assert torch.equal(other.pixels, plain)
    bare = Batch(pixels=batch.pixels, rows={}, labels={}, unknown={})
    assert torch.equal(augment(bare, SPEC, RULES, crop_px=64, seeds=range(4)).pixels, plain)


@pytest.mark.parametrize(("mpp", "radius"), [(0.5, 9.3), (0.25, 18.4), (1.0, 6.2)])
def test_the_rim_stays_dark_and_the_inside_goes_towards_the_ground(mpp, radius):
    ids = discs(192, 48, radius)
    seen = opened(ids, mpp=mpp)
    depth_um = (ndimage.distance_transform_edt(ids > 0) - 0.5) * mpp
    density = np.log(256 / (seen + 1)).sum(axis=0)
    nucleus, ground = (sum(math.log(256 / (v + 1)) for v in c) for c in (VIOLET, PINK))
    # The outermost 0.3 um are rim whatever is drawn, what lies 2 um deep is inside.
    assert (density[(ids > 0) & (depth_um < 0.3)] >= nucleus - 1e-3).all()
    deep = density[depth_um > 2.0]
    assert deep.min() > vesicular.CLEARNESS[0] * ground - 1e-3
    assert np.median(deep) < 0.75 * nucleus
    # how pale differs from nucleus to nucleus
    means = ndimage.mean(density, ids, np.unique(ids[ids > 0]))
    assert means.std() > 0.05 * nucleus


def drawn(chosen=0, pale=0, rim=0, last=0, texture=128):
    """Bytes that are the same for every nucleus, and no place for nucleoli at its own."""
    nuclei = np.tile(np.array([chosen, pale, rim, last], np.uint8), 256)
    return np.concatenate([nuclei, np.zeros(1024, np.uint8), np.full(1024, texture, np.uint8)])


@pytest.mark.parametrize(("mpp", "radius"), [(0.5, 12.3), (0.25, 24.4)])
@pytest.mark.parametrize(("pale", "rim", "last"), [(0, 0, 0), (255, 128, 63), (128, 255, 0)])
def test_a_nucleus_is_what_its_bytes_say_from_outline_to_middle(mpp, radius, pale, rim, last):
    ids = discs(192, 64, radius)
    seen = opened(ids, mpp=mpp, drawn=drawn(0, pale, rim, last)[None])
    depth_um = (ndimage.distance_transform_edt(ids > 0) - 0.5) * mpp
    rim_um = 0.5 + 0.5 * rim / 256
    inside = np.clip((depth_um - rim_um) / 0.5, 0, 1)
    share = (0.35 + 0.55 * pale / 256) * inside
    nucleus, ground = (np.log(256 / (np.array(own) + 1))[:, None, None] for own in (VIOLET, PINK))
    clear = 0.75 + 0.25 * last * 4 / 256  # no nucleoli below 64
    wanted = ((1 - share) * nucleus + share * clear * ground) * (1 + 0.15 * (1 - inside))
    error = np.abs(np.log(256 / (seen + 1)) - wanted)[:, ids > 0]
    assert error[:, (inside[ids > 0] == 1) & (depth_um[ids > 0] > 2)].max() < 0.02
    assert error.mean() < 0.03
    assert (nucleus - ground).min() > 0.2  # or these would be no errors


def test_texture_makes_an_inside_uneven_and_no_paler_than_asked():
    ids = discs(192, 64, 20.3)
    deep = ndimage.distance_transform_edt(ids > 0) > 8
    own = drawn(0, 255, 0, 0)
    own[2048:] = np.random.default_rng(0).integers(0, 256, 1024)
    seen = opened(ids, drawn=own[None])[0]
    assert seen[deep].std() > 12
    # from one grain (1 um, 2 px) to the next it varies, and slowly within
    across, lag = deep[:, :-6] & deep[:, 6:], (seen[:, :-6], seen[:, 6:])
    assert abs(np.corrcoef(lag[0][across], lag[1][across])[0, 1]) < 0.2
    near = deep[:, :-1] & deep[:, 1:]
    assert np.corrcoef(seen[:, :-1][near], seen[:, 1:][near])[0, 1] > 0.5
    ground = 256 * np.exp(-0.75 * np.log(256 / (PINK[0] + 1))) - 1
    assert seen[deep].max() < ground + 0.5
    assert opened(ids, drawn=drawn(0, 255, 0, 0)[None])[0][deep].std() < 1


def test_depth_is_nearly_the_distance_to_the_outline():
    ids = discs(96, 32, 11.5)
    ids[:, 44] = 0  # straight edges too
    ids[60:, 60:] = np.where(ids[60:, 60:] > 0, 99, 0)
    # the exact distance to the next pixel that is not of this nucleus, half a pixel less
    exact = np.zeros(ids.shape)
    for one in np.unique(ids[ids > 0]):
        exact += np.maximum(0, ndimage.distance_transform_edt(ids == one) - 0.5)
    found = vesicular._depth(torch.from_numpy(ids)[None], 4)[0].numpy()
    near = (exact > 0) & (exact < 4)
    assert np.abs(found - exact)[near].max() < 0.6
    assert np.abs(found - exact)[near].mean() < 0.12
    assert (found[ids == 0] == 0).all()
    assert found[exact > 5.5].min() > 3.9


def test_touching_nuclei_have_a_rim_each_and_the_crops_edge_is_none():
    ids = np.zeros((32, 32), np.int32)
    ids[8:24, :16], ids[8:24, 16:] = 1, 2
    depth = vesicular._depth(torch.from_numpy(ids)[None], 4)[0].numpy()
    assert depth[16, 15] == depth[16, 16] < 1
    assert depth[16, 10] > 3
    assert depth[16, 0] > 3  # nobody knows where it ends
    ids[ids == 2] = -1
    unknown = vesicular._depth(torch.from_numpy(ids)[None], 4)[0].numpy()
    assert (unknown[:, :15] == depth[:, :15]).all()
    assert (unknown[8:24, 15] < 1).all()
    assert (unknown[:, 17:] == 0).all()


def test_nuclei_open_to_the_colour_around_them():
    ids = discs(192, 24, 8.3)
    pixels = stained(ids, ground=(200, 120, 120))
    other = stained(ids, ground=(120, 120, 200))
    pixels[..., 96:] = other[..., 96:]
    seen = opened(ids, pixels)
    inside = (ndimage.distance_transform_edt(ids > 0) > 4) & (seen[1] > 60)
    far = np.arange(192)
    left, right = (inside & at for at in (far[None] < 60, far[None] > 132))
    assert left.sum() > 300 < right.sum()
    assert (seen[0] - seen[2])[left].mean() > 0  # red, though a nucleus is blue
    assert (seen[0] - seen[2])[right].mean() < -40


def test_unknown_pixels_and_nuclei_have_no_say_in_the_colour_around():
    ids = discs(96)
    ids[:, 40:56] = -1
    free = ndimage.binary_erosion(ids == 0, ndimage.generate_binary_structure(2, 1), border_value=1)
    pixels = stained(ids)
    noisy = pixels.clone()
    noisy[:, ~torch.from_numpy(free)] = torch.rand(3, int((~free).sum())) * 255
    around, known = (
        vesicular._density_around(x[None], torch.from_numpy(ids)[None], 8) for x in (pixels, noisy)
    )
    assert torch.equal(around[0], known[0])
    wanted = np.log(256 / (np.array(PINK) + 1.0))
    assert np.allclose(around[0][0].numpy(), wanted[:, None, None], atol=1e-4)


def test_the_colour_around_is_a_local_mean():
    ids = discs(256, 32, 9.0)
    rng = np.random.default_rng(2)
    pixels = ndimage.gaussian_filter(rng.normal(0, 900, (3, 256, 256)), (0, 20, 20)) + 160
    pixels = np.clip(pixels, 20, 250).astype(np.float32)
    found, known = vesicular._density_around(
        torch.from_numpy(pixels)[None], torch.from_numpy(ids)[None], 8
    )
    free = ndimage.binary_erosion(ids == 0, ndimage.generate_binary_structure(2, 1), border_value=1)
    blurred = [ndimage.gaussian_filter(plane * free, 16, mode="constant") for plane in pixels]
    wanted = np.array(blurred) / ndimage.gaussian_filter(free * 1.0, 16, mode="constant")
    colour = 256 * np.exp(-found[0].numpy()) - 1
    assert wanted.std() > 8  # or a global mean would do
    assert np.abs(colour - wanted)[:, 16:-16, 16:-16].max() < 4
    assert known.tolist() == [True]


def test_a_crop_that_is_all_nucleus_or_unknown_stays():
    ids = np.full((48, 48), -1, np.int32)
    ids[8:40, 8:40] = 3
    x = stained(ids)
    assert np.array_equal(opened(ids, x), x.numpy())


def spots_of(ids, seed):
    depth = vesicular._depth(torch.from_numpy(ids)[None], 4)
    drawn = torch.from_numpy(noise(1, seed))
    draws = vesicular._draws_of(torch.from_numpy(ids)[None], drawn[:, :1024])
    places = drawn[:, 1024:2048]
    spots = vesicular._nucleoli(torch.from_numpy(ids)[None], depth, draws, places, 0.5)
    return spots[0].numpy(), vesicular._nucleoli_wanted(draws)[0].numpy()


def test_no_nucleus_has_more_nucleoli_than_are_drawn_for_it():
    ids = discs(192, 48, 20.0)  # room for many
    counts = []
    for seed in range(6):
        spots, wanted = spots_of(ids, seed)
        depth = ndimage.distance_transform_edt(ids > 0)
        peaks = (spots == ndimage.maximum_filter(spots, 3)) & (spots > 0.6)
        assert depth[peaks].min() >= 2
        for one in np.unique(ids[ids > 0]):
            found = ndimage.label(peaks & (ids == one), np.ones((3, 3)))[1]
            assert found <= wanted[ids == one][0] <= 3
            counts.append((found, int(wanted[ids == one][0])))
    # and where there is room they come
    assert np.mean([found == asked for found, asked in counts]) > 0.8
    assert {asked for _, asked in counts} == {0, 1, 2, 3}


@pytest.mark.parametrize("mpp", [0.5, 0.25])
@pytest.mark.parametrize(("x", "y", "size"), [(0, 255, 0), (128, 0, 0), (64, 200, 255)])
def test_a_nucleolus_lies_where_its_bytes_say(x, y, size, mpp):
    ids = torch.ones((1, 64, 64), dtype=torch.int32)
    draws = torch.full((1, 64, 64), -1, dtype=torch.int32)  # three wanted
    places = torch.tensor([[x, y, size, 0] * 256], dtype=torch.uint8)
    spots = vesicular._nucleoli(ids, torch.full((1, 64, 64), 9.0), draws, places, mpp)[0].numpy()
    side, radius = 4 / mpp, (0.5 + 0.6 * size / 256) / mpp
    found, count = ndimage.label(spots, np.ones((3, 3)))
    assert count == 3
    middles = np.array(ndimage.center_of_mass(spots, found, [1, 2, 3]))
    wanted = radius - 0.5 + np.array([y, x]) / 256 * (side - 2 * radius)
    assert np.abs(middles % side - wanted).max() < 0.35  # the square's edge cuts a soft edge
    assert spots.sum() / 3 == pytest.approx(math.pi * radius**2, rel=0.3)


def test_nucleoli_are_darker_than_the_nucleus_was():
    ids = discs(96, 48, 20.0)
    darkest = []
    for seed in range(8):
        seen = opened(ids, seed=seed)
        spots, _ = spots_of(ids, seed)
        for one in np.unique(ids[ids > 0]):
            where = (spots == 1) & (ids == one)
            if where.any():
                darkest.append(seen[:, where])
    found = np.concatenate(darkest, axis=1)
    assert found.shape[1] > 40
    assert (found < np.array(VIOLET)[:, None]).all()


def test_rank_in_group_by_its_definition():
    rng = np.random.default_rng(4)
    group = rng.integers(-1, 6, (3, 40))
    order = rng.integers(0, 4, (3, 40))
    found = vesicular._rank_in_group(torch.from_numpy(group), torch.from_numpy(order)).numpy()
    for row in range(3):
        keys = list(zip(order[row], range(40), strict=True))
        for k in range(40):
            before = [j for j in range(40) if group[row, j] == group[row, k] and keys[j] < keys[k]]
            assert found[row, k] == len(before)


@pytest.mark.parametrize("size", [(31, 31), (29, 47), (16, 200), (300, 140)])
def test_crops_of_any_size(size):
    y, x = np.mgrid[: size[0], : size[1]]
    ids = ((np.hypot(y % 20 - 10, x % 20 - 10) < 7) * (1 + y // 20 * 20 + x // 20)).astype(np.int32)
    seen = opened(ids)
    assert seen.shape == (3, *size)
    assert np.isfinite(seen).all()
    assert 0 <= seen.min() <= seen.max() <= 255
    assert (changed(stained(ids).numpy(), seen) == (ids > 0)).mean() > 0.95


def test_bytes_that_are_drawn_decide():
    ids = discs()
    everywhere = np.full((1, NOISE_BYTES), 255, np.uint8)
    assert np.array_equal(opened(ids, share=0.9, drawn=everywhere), stained(ids).numpy())
    nowhere = np.zeros((1, NOISE_BYTES), np.uint8)
    assert changed(stained(ids).numpy(), opened(ids, share=0.2, drawn=nowhere))[ids > 0].all()
    assert not np.array_equal(opened(ids, seed=1), opened(ids, seed=2))


def test_rules_about_a_head_that_is_not_there_are_refused():
    with pytest.raises(RecipeError, match="vesicular_p must be at most 1"):
        AugmentRules(vesicular_p=1.5)
    AugmentRules(vesicular_head="nowhere").check_heads(SPEC)  # off: nobody asks
    RULES.check_heads(SPEC)
    replace(RULES, vesicular_head="gland").check_heads(SPEC)
    for name in ("nowhere", "type"):
        with pytest.raises(RecipeError, match=rf"'{name}' is no instance head.*nuclei.*gland"):
            replace(RULES, vesicular_head=name).check_heads(SPEC)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_gpu_opens_the_nuclei_that_a_cpu_opens():
    batch, rules = windows(), replace(RULES, vesicular_p=0.5)
    cpu = augment(batch, SPEC, rules, crop_px=64, seeds=range(6)).pixels
    gpu = augment(batch.to("cuda"), SPEC, rules, crop_px=64, seeds=range(6)).pixels
    assert torch.allclose(gpu.cpu(), cpu, atol=0.05)
