"""Half precision near to float32: weights whose sums are kept, pixels that are exact."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from torch import nn

from wsi_pipeline.blocks import fold_batch_norms
from wsi_pipeline.half import rounded_kernels, to_half
from wsi_pipeline.lite import CerberusLite
from wsi_pipeline.network import Cerberus
from wsi_pipeline.spec import AnchorRules, HeadSpec

HALVES = torch.bfloat16, torch.float16
HEADS = (HeadSpec(name="nuclei", kind="instance", object_kind="nucleus", rules=AnchorRules()),)

kernels = arrays(
    np.float32,
    st.tuples(st.integers(1, 3), st.integers(1, 3), st.integers(1, 3), st.integers(1, 3)),
    elements=st.floats(-8, 8, width=32),
)


@given(kernels, st.sampled_from(HALVES))
def test_every_weight_is_a_neighbour_and_sums_are_kept_as_well_as_by_rounding(values, dtype):
    exact = torch.from_numpy(values)
    found, plain = rounded_kernels(exact, dtype), exact.to(dtype).float()
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

    assert off(rounded_kernels(exact, dtype)) < 0.3 * off(exact.to(dtype).float())


@pytest.mark.parametrize("make", [CerberusLite, Cerberus])
def test_a_network_computes_what_it_did(make):
    torch.manual_seed(1)
    how = {"widths": (8, 8, 8, 8), "blocks": (1, 1, 1, 1)}
    how |= {"decoder": (8, 8, 8, 8)} if make is CerberusLite else {"head_width": 8}
    network = make(HEADS, **how).eval()
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 2)
    fold_batch_norms(network)
    x = torch.randint(0, 256, (1, 3, 64, 64)).float()
    with torch.no_grad():
        expected = network(x)["nuclei"]
        to_half(network, torch.bfloat16)
        found = network(x)["nuclei"]
    assert 0 < (found - expected).abs().max() < 0.05 * expected.abs().max()
    for conv in (m for m in network.modules() if isinstance(m, nn.Conv2d)):
        assert torch.equal(conv.weight.bfloat16().float(), conv.weight)
    assert torch.equal(network.shares(x.bfloat16()).float() * 256, x)  # pixels lose nothing
