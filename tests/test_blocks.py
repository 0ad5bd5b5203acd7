"""Convolutions that add and rectify in one pass give what the separate steps give."""

import pytest
import torch
from torch import nn
from torch.nn import functional

from wsi_pipeline import blocks
from wsi_pipeline.blocks import BasicBlock, conv_unit, fold_batch_norms, rectified, summed

CASES = [(3, 8, 3, 2), (8, 8, 3, 1), (8, 24, 1, 1), (5, 7, 3, 1)]


def some(*shape, seed=0, dtype=torch.float32):
    values = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    return values.to(dtype).contiguous(memory_format=torch.channels_last)


def convolution(width_in, width, kernel, stride, dtype):
    torch.manual_seed(3)
    conv = nn.Conv2d(width_in, width, kernel, stride, padding=kernel // 2)
    return conv.to(dtype).to(memory_format=torch.channels_last)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", CASES)
def test_one_pass_is_the_separate_steps(case, dtype):
    conv, x = convolution(*case, dtype), some(2, case[0], 20, 12, dtype=dtype)
    with torch.inference_mode():
        exact = functional.conv2d(
            x.float(), conv.weight.float(), conv.bias.float(), conv.stride, conv.padding
        )
        plus = some(*exact.shape, seed=1, dtype=dtype)
        found = {
            "rectified": rectified(conv, nn.Identity(), x),
            "with a sum": rectified(conv, nn.Identity(), x, plus_BCHW=plus.clone()),
            "summed": summed(conv, x, plus.clone()),
        }
    wanted = {
        "rectified": exact.relu(),
        "with a sum": (exact + plus.float()).relu(),
        "summed": exact + plus.float(),
    }
    atol = 1e-5 if dtype is torch.float32 else 4e-2
    for name, own in found.items():
        assert own.dtype is dtype
        torch.testing.assert_close(own.float(), wanted[name], atol=atol, rtol=1e-2, msg=name)


def test_an_input_and_a_sum_are_left_as_they_were():
    conv, x, plus = convolution(8, 8, 3, 1, torch.float32), some(1, 8, 16, 16), some(1, 8, 16, 16)
    before = x.clone(), plus.clone()
    with torch.inference_mode():
        rectified(conv, nn.Identity(), x, plus_BCHW=plus)
    assert torch.equal(x, before[0])
    assert torch.equal(plus, before[1])


@pytest.mark.parametrize("make", [lambda: BasicBlock(8, 16, stride=2), lambda: conv_unit(8, 16)])
def test_a_folded_block_computes_the_same_function(make):
    torch.manual_seed(5)
    block = make()
    x = some(2, 8, 32, 32)
    block.train()(x)  # so that the normalisations have statistics
    block.eval()
    with torch.inference_mode():
        before = block(x)
        fold_batch_norms(block)
        torch.testing.assert_close(block(x), before, atol=1e-4, rtol=1e-4)


def test_gradients_go_the_separate_way():
    conv, x = convolution(8, 8, 3, 1, torch.float32), some(1, 8, 16, 16)
    rectified(conv, nn.Identity(), x).sum().backward()
    assert conv.weight.grad.abs().sum() > 0


def test_without_onednn_the_steps_are_separate(monkeypatch):
    conv, x = convolution(8, 8, 3, 1, torch.float32), some(1, 8, 16, 16)
    with torch.inference_mode():
        fused = rectified(conv, nn.Identity(), x)
        monkeypatch.setattr(blocks, "_ONEDNN", False)
        monkeypatch.setattr(blocks, "_fused", None)  # calling it would fail
        torch.testing.assert_close(rectified(conv, nn.Identity(), x), fused, atol=1e-5, rtol=1e-5)
