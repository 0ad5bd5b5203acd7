"""Targets against plain definitions, one object and one pixel at a time."""

from __future__ import annotations

import cv2
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage

from wsi_pipeline.training.targets import (
    at_scale,
    between_weights,
    class_targets,
    interior_and_contour,
)


def element(size):
    """The structuring elements that upstream uses, from OpenCV."""
    return cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (size, size))


def scene(seed, side=40, count=9, *, unknown=0.0, height=None):
    """Touching, overlapping-then-cut blobs with large ids."""
    rng = np.random.default_rng(seed)
    height = height or side
    ids = np.zeros((height, side), np.int32)
    yy, xx = np.mgrid[:height, :side]
    names = rng.permutation(count) * (2**24 // count) + rng.integers(1, 9)
    for name in names:
        x, y, a, b = *rng.uniform(0, side, 2), *rng.uniform(2, side / 5, 2)
        blob = ((xx - x) / a) ** 2 + ((yy - y) / b) ** 2 < 1
        ids[blob & (ids == 0)] = name
    if unknown:
        x, y = rng.integers(0, side - 8, 2)
        ids[y : y + 8, x : x + 8] = -1
        ids[rng.random(ids.shape) < unknown] = -1
    return ids


def per_object(ids, size):
    """Erosion and dilation of each object by OpenCV's element; outside does not erode."""
    inner, grown = np.zeros(ids.shape, bool), np.zeros(ids.shape, bool)
    for name in np.unique(ids[ids > 0]):
        mask = (ids == name).astype(np.uint8)
        inner |= cv2.erode(mask, element(size)) > 0
        grown |= cv2.dilate(mask, element(size)) > 0
    return np.where(inner, 1, np.where(grown, 2, 0))


def target(ids, size, **how):
    return interior_and_contour(torch.from_numpy(ids)[None], size, **how)[0].numpy()


@pytest.mark.parametrize("size", [1, 3, 5, 7, 11, 15])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_interior_and_contour_are_erosion_and_dilation_of_each_object(size, seed):
    ids = scene(seed, 80, height=51)
    found = target(ids, size)
    assert found.dtype == np.int64
    assert np.array_equal(found, per_object(ids, size))
    assert set(np.unique(found)) == ({0, 1} if size == 1 else {0, 1, 2})
    assert np.array_equal(target(ids, size, contour=False), found == 1)


def test_a_batch_is_its_samples():
    samples = np.stack([scene(seed, unknown=0.01) for seed in range(4)])
    whole = interior_and_contour(torch.from_numpy(samples), 5).numpy()
    assert np.array_equal(whole, np.stack([target(ids, 5) for ids in samples]))
    weights = between_weights(torch.from_numpy(samples), sigma_px=3.0)
    for ids, found in zip(samples, weights, strict=True):
        alone = between_weights(torch.from_numpy(ids)[None], sigma_px=3.0)[0]
        assert torch.equal(found, alone)


def test_upstreams_cross_by_hand():
    ids = np.zeros((6, 7), np.int32)
    ids[1:5, 2:7] = 9  # touches the right edge, which erodes nothing
    wanted = """
        0 0 2 2 2 2 2
        0 2 2 2 2 2 2
        0 2 2 1 1 1 1
        0 2 2 1 1 1 1
        0 2 2 2 2 2 2
        0 0 2 2 2 2 2
    """
    assert np.array_equal(target(ids, 3), np.array(wanted.split(), int).reshape(6, 7))


def test_even_elements_have_no_middle():
    with pytest.raises(ValueError, match="odd"):
        target(np.zeros((4, 4), np.int32), 4)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from([3, 5, 11]))
def test_unknown_pixels_make_unknown_what_they_could_change(seed, size):
    """Whatever is under the unknown pixels, a target that is known comes out the same."""
    ids = scene(seed, 24, 6, unknown=0.02)
    found, inner_only = target(ids, size), target(ids, size, contour=False)
    hidden = ids < 0
    assert (found[hidden] == -1).all()
    rng = np.random.default_rng(seed)
    changed = np.zeros(ids.shape, bool)
    full = per_object(np.where(hidden, 0, ids), size)
    fills = [0, 2**24, *np.unique(ids[ids > 0])[:4]]
    for fill in [*fills, None]:
        if fill is None:
            other = np.where(hidden, rng.choice(fills, ids.shape), ids)
        else:
            other = np.where(hidden, fill, ids)
        seen = per_object(other.astype(np.int32), size)
        known = found >= 0
        assert np.array_equal(seen[known], found[known])
        known = inner_only >= 0
        assert np.array_equal((seen == 1)[known], inner_only[known] == 1)
        changed |= seen != full
    # And it is not shy: what no unknown pixel reaches is known.
    reached = cv2.dilate(hidden.astype(np.uint8), element(size)) > 0
    assert (found[~reached] >= 0).all()
    assert not changed[~reached].any()


def test_an_object_against_the_unknown_is_unknown_there_and_certain_elsewhere():
    ids = np.zeros((7, 9), np.int32)
    ids[:, 2:6] = 4
    ids[:, 6:] = -1
    row = target(ids, 3)[3]
    assert row.tolist() == [0, 2, 2, 1, 1, -1, -1, -1, -1]
    assert target(ids, 3, contour=False)[3].tolist() == [0, 0, 0, 1, 1, -1, -1, -1, -1]


def weights_by_distance_maps(ids, sigma, gain=10.0):
    """The formula over one distance map an object."""
    names = np.unique(ids[ids > 0])
    if len(names) < 2:
        return np.ones(ids.shape)
    far = np.sort([ndimage.distance_transform_edt(ids != name) for name in names], axis=0)
    total = far[0] + far[1]
    extra = gain * np.exp(-((total / sigma) ** 2) / 2)
    return np.where(total > 3 * sigma + 1e-9, 1, 1 + extra)


@pytest.mark.parametrize("sigma", [1.0, 2.5, 3.0, 5.0, 11.0, 40.0])
@pytest.mark.parametrize("seed", range(4))
def test_between_weights_equal_distance_maps(sigma, seed):
    ids = scene(seed, 48, 12, unknown=0.01 * (seed % 2), height=37)
    found = between_weights(torch.from_numpy(ids)[None], sigma_px=sigma)
    assert found.dtype == torch.float32
    wanted = weights_by_distance_maps(ids, sigma)
    assert wanted.max() > 2
    assert np.allclose(found[0].numpy(), wanted, rtol=1e-4)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.integers(2, 30), st.sampled_from([1.0, 3.0, 7.0]))
def test_between_weights_of_scattered_pixels(seed, count, sigma):
    rng = np.random.default_rng(seed)
    ids = np.zeros((rng.integers(1, 30), rng.integers(1, 30)), np.int32)
    at = rng.integers(0, ids.size, count)
    ids.ravel()[at] = rng.integers(1, 6, count) * 2**21
    found = between_weights(torch.from_numpy(ids)[None], sigma_px=sigma)[0].numpy()
    assert np.allclose(found, weights_by_distance_maps(ids, sigma), rtol=1e-4)


def test_between_weights_by_hand():
    ids = torch.zeros((1, 3, 9), dtype=torch.int32)
    ids[0, :, :3] = 5
    ids[0, :, 6:] = 8
    row = between_weights(ids, sigma_px=3.0, gain=4.0)[0, 1]
    gap = 1 + 4 * np.exp(-((4 / 3.0) ** 2) / 2)  # 1 + 3, 2 + 2, 3 + 1, or 0 + 4 at the edges
    deeper = 1 + 4 * np.exp(-((5 / 3.0) ** 2) / 2)
    assert np.allclose(row[2:7], gap)
    assert np.allclose(row[[1, 7]], deeper)
    inner = torch.zeros_like(ids, dtype=torch.bool)
    inner[..., 2] = True
    spared = between_weights(ids, sigma_px=3.0, gain=4.0, inner=inner)[0, 1]
    assert spared[2] == 1
    assert torch.equal(spared[3:], row[3:])


@pytest.mark.parametrize("upright", [False, True])
def test_the_last_distance_that_counts_is_three_sigma(upright):
    for apart in (4, 5):
        ids = torch.zeros((1, 1, 6), dtype=torch.int32)
        ids[0, 0, 0], ids[0, 0, apart] = 1, 2
        ids = ids.mT.contiguous() if upright else ids
        weights = between_weights(ids, sigma_px=4 / 3).view(-1)
        wanted = 1 + 10 * np.exp(-4.5) if apart == 4 else 1.0
        assert np.allclose(weights[: apart + 1], wanted)


@pytest.mark.parametrize("fill", [0, -1, 3])
def test_fewer_than_two_objects_weigh_nothing(fill):
    ids = torch.full((2, 16, 16), fill, dtype=torch.int32)
    assert torch.equal(between_weights(ids, sigma_px=5.0), torch.ones(2, 16, 16))


def test_objects_of_other_samples_do_not_count():
    ids = torch.zeros((2, 4, 4), dtype=torch.int32)
    ids[0, -1], ids[1, 0] = 1, 2
    assert torch.equal(between_weights(ids, sigma_px=5.0), torch.ones(2, 4, 4))


@pytest.mark.parametrize("sigma", [0.0, -1.0, 151.0, float("nan")])
def test_impossible_sigmas_are_refused(sigma):
    with pytest.raises(ValueError, match="sigma"):
        between_weights(torch.zeros((1, 4, 4), dtype=torch.int32), sigma_px=sigma)


def test_class_targets():
    ids = torch.tensor([[0, 3, 255], [254, 255, 1]], dtype=torch.uint8)
    found = class_targets(ids)
    assert found.dtype == torch.int64
    assert found.tolist() == [[0, 3, -1], [254, -1, 1]]


@pytest.mark.parametrize("scale", [1, 2, 4, 16])
def test_at_scale_takes_the_middle_of_each_cell(scale):
    labels = torch.arange(2 * 32 * 48).view(2, 32, 48)
    found = at_scale(labels, scale)
    assert found.shape == (2, 32 // scale, 48 // scale)
    centre = (np.arange(48 // scale) + 0.5) * scale
    assert np.abs(found[0, 0].numpy() % 48 + 0.5 - centre).max() <= 0.5
    rows = (np.arange(32 // scale) + 0.5) * scale
    assert np.abs(found[0, :, 0].numpy() // 48 + 0.5 - rows).max() <= 0.5


def test_at_scale_refuses_what_does_not_divide():
    with pytest.raises(ValueError, match="cells of 4 px"):
        at_scale(torch.zeros(1, 10, 12), 4)
