"""Rounded weights: neighbours of what they were, and sums of kernels that are kept."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from wsi_pipeline.kept_sums import rounded_to_format, rounded_to_levels

HALVES = torch.bfloat16, torch.float16

kernels = arrays(
    np.float32,
    st.tuples(st.integers(1, 3), st.integers(1, 3), st.integers(1, 3), st.integers(1, 3)),
    elements=st.floats(-8, 8, width=32),
)


@given(kernels, st.sampled_from(HALVES))
def test_every_weight_is_a_neighbour_and_sums_are_kept_as_well_as_by_rounding(values, dtype):
    exact = torch.from_numpy(values)
    found, plain = rounded_to_format(exact, dtype), exact.to(dtype).float()
    assert torch.equal(found.to(dtype).float(), found)  # the format has them
    high = torch.nextafter(plain.to(dtype), torch.tensor(torch.inf, dtype=dtype)).float()
    low = torch.nextafter(plain.to(dtype), torch.tensor(-torch.inf, dtype=dtype)).float()
    assert (((found >= exact) & (low < exact)) | ((found <= exact) & (high > exact))).all()
    assert torch.equal(found[plain == exact], exact[plain == exact])

    def off(rounded):
        return (rounded.double() - exact.double()).sum((2, 3)).abs()

    assert (off(found) <= off(plain) + 1e-6).all()
    assert ((found != plain).flatten(2).sum(2) <= 1).all()


@pytest.mark.parametrize("dtype", HALVES)
def test_sums_of_kernels_are_much_nearer_than_by_rounding(dtype):
    exact = torch.randn(64, 64, 3, 3, generator=torch.Generator().manual_seed(0))

    def off(rounded):
        return float((rounded - exact).sum((2, 3)).abs().mean())

    assert off(rounded_to_format(exact, dtype)) < 0.3 * off(exact.to(dtype).float())


def test_kernels_keep_their_sums():
    torch.manual_seed(0)
    weights = torch.randn(16, 24, 3, 3).mul(40).clamp(-126, 126)
    found = rounded_to_levels(weights).float()
    assert (found - weights).abs().max() < 1
    surplus = (found - weights).sum((2, 3))
    assert surplus.abs().max() <= 0.5 + 1e-4
    nearest = weights.round()
    assert (nearest - weights).sum((2, 3)).abs().max() > 1, "nothing to do for these"
    # No more weights than needed leave their nearest level, and those that lie between two.
    moved = (found != nearest).flatten(2)
    away = (weights - nearest).abs().flatten(2)
    needed = (nearest - weights).sum((2, 3)).round().abs()
    assert torch.equal(moved.sum(2), needed.long())
    assert away[moved].mean() > 0.3


def test_a_kernel_of_one_weight_goes_to_its_nearest_level():
    weights = torch.tensor([0.49, -0.51, 126.7, -127.0, 1.5]).view(5, 1, 1, 1)
    assert rounded_to_levels(weights).flatten().tolist() == [0, -1, 127, -127, 2]
