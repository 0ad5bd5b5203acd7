"""Half precision near to float32: weights whose sums are kept, pixels that are exact."""

import pytest
import torch
from torch import nn

from wsi_pipeline.blocks import fold_batch_norms
from wsi_pipeline.half import to_half
from wsi_pipeline.lite import CerberusLite
from wsi_pipeline.network import Cerberus
from wsi_pipeline.spec import AnchorRules, HeadSpec

HALVES = torch.bfloat16, torch.float16
HEADS = (HeadSpec(name="nuclei", kind="instance", object_kind="nucleus", rules=AnchorRules()),)


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
