from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage as ndi

from wsi_pipeline.geometry import Box
from wsi_pipeline.instances.runs import Runs

settings.register_profile("compiled", deadline=None)  # the first call compiles
settings.load_profile("compiled")

seeds = st.integers(0, 2**32 - 1)


def image_of(seed):
    rng = np.random.default_rng(seed)
    return np.ascontiguousarray(rng.integers(0, 3, (13, 17)).astype(np.uint8))


def pieces(image, side):
    for y in range(0, image.shape[0], side):
        for x in range(0, image.shape[1], side):
            part = Runs.of_image(np.ascontiguousarray(image[y : y + side, x : x + side]))
            yield part.places + np.array([[y], [x], [x]], np.int32), part.values


@given(seeds, st.integers(1, 20))
def test_pieces_join_to_the_runs_of_the_whole(seed, side):
    image = image_of(seed)
    whole = Runs.of_image(image)
    joined = Runs.join(image.shape[1], list(pieces(image, side))[::-1])
    assert np.array_equal(joined.places, whole.places)
    assert np.array_equal(joined.values, whole.values)
    assert np.array_equal(joined.starts, whole.starts)


@settings(max_examples=40)
@given(seeds)
def test_lookups_read_the_image(seed):
    image = image_of(seed)
    runs = Runs.of_image(image)
    yy, xx = np.indices(image.shape)
    assert np.array_equal(runs.at(xx.ravel(), yy.ravel()), image.ravel())
    places, values = runs.window(Box(x=4, y=2, width=7, height=5))
    painted = np.zeros_like(image)
    for (y, x0, x1), value in zip(places.T, values, strict=True):
        painted[y, x0:x1] = value
    expected = np.zeros_like(image)
    expected[2:7, 4:11] = image[2:7, 4:11]
    assert np.array_equal(painted, expected)
    starts = np.arange(13) * 17 + 3
    met = runs.overlaps(starts, starts + 2)
    assert np.array_equal(met, image[:, 3:5].any(axis=1))


@given(seeds)
def test_by_value_and_components(seed):
    image = image_of(seed)
    runs = Runs.of_image(image)
    labels, count = runs.components()
    assert count == ndi.label(image == 1)[1] + ndi.label(image == 2)[1]
    places, ends = runs.relabel(labels).by_value()
    sizes = np.diff(ends, prepend=0)
    assert np.array_equal(sizes, np.bincount(labels, minlength=count + 1)[1:])
    keys = np.repeat(np.arange(count), sizes) * 10**6 + places[0] * 1000 + places[1]
    assert (np.diff(keys) > 0).all()


def test_no_runs():
    runs = Runs.join(5, [])
    assert len(runs) == 0
    assert runs.at(np.array([1]), np.array([2])).tolist() == [0]
    assert runs.overlaps(np.array([1]), np.array([2])).tolist() == [False]
    assert runs.components()[1] == 0
