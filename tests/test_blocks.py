"""Convolutions that add and rectify in one pass give what the separate steps give."""

from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional

from wsi_pipeline import blocks
from wsi_pipeline.blocks import (
    BasicBlock,
    conv_unit,
    cropped,
    enlarged,
    fold_batch_norms,
    in_strips,
    rectified,
    stage_margins,
    summed,
)

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


@pytest.mark.parametrize("shape", [(1, 5, 1, 1), (2, 3, 4, 7), (1, 64, 9, 16)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_doubling_by_rows_and_columns_is_bilinear(shape, dtype):
    x = some(*shape, dtype=dtype)
    exact = functional.interpolate(x.float(), scale_factor=2, mode="bilinear", align_corners=False)
    with torch.inference_mode():
        found = blocks._doubled(x)
    assert found.dtype is dtype
    assert found.is_contiguous(memory_format=torch.channels_last)
    atol = 1e-6 if dtype is torch.float32 else 3e-2
    torch.testing.assert_close(found.float(), exact, atol=atol, rtol=1e-2)


@pytest.mark.parametrize(("shape", "parts"), [((4, 16, 5, 6), 4), ((1, 16, 5, 6), 4)])
def test_what_is_too_large_for_cuda_is_enlarged_in_parts(monkeypatch, shape, parts):
    x = some(*shape).contiguous(memory_format=torch.channels_last)
    expected = enlarged(x, 2)
    calls = []
    interpolate = functional.interpolate
    monkeypatch.setattr(
        blocks.functional, "interpolate", lambda *a, **k: calls.append(a) or interpolate(*a, **k)
    )
    monkeypatch.setattr(blocks, "_MOST_ENLARGED", expected.numel() // parts)
    found = enlarged(x, 2)
    assert len(calls) == parts
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


def test_only_bf16_without_gradients_is_doubled_by_rows_and_columns(monkeypatch):
    monkeypatch.setattr(blocks, "_doubled", lambda _: "by rows and columns")
    half, full = some(1, 3, 4, 4, dtype=torch.bfloat16), some(1, 3, 4, 4)
    with torch.inference_mode():
        assert enlarged(half, 2) == "by rows and columns"
        assert enlarged(half, 4).shape == (1, 3, 16, 16)
        assert enlarged(full, 2).shape == (1, 3, 8, 8)
    assert enlarged(half, 2).shape == (1, 3, 8, 8)


def test_a_margin_is_cut_off():
    fine, coarse = some(1, 2, 64, 32), some(1, 2, 16, 8)
    assert torch.equal(cropped(fine, 8, 1), fine[:, :, 8:56, 8:24])
    assert torch.equal(cropped(coarse, 8, 4), coarse[:, :, 2:14, 2:6])
    assert cropped(fine, 0, 1) is fine


@given(st.integers(0, 300), st.integers(0, 3), st.integers(1, 4), st.integers(1, 4))
def test_stages_leave_out_what_no_finer_one_looks_at(margin, first, count, reach):
    scales = [1 << first + index for index in range(count)]
    wanted = margin
    for scale, (begin, cut) in zip(scales, stage_margins(margin, scales, reach=reach), strict=True):
        assert begin % (2 * scale) == 0  # whole pixels of the coarser map
        assert begin // scale + cut == wanted // scale
        assert begin == 0 or cut >= reach
        assert wanted - begin < (reach + 2) * scale  # and no more than that
        wanted = begin


def joined(coarse, fine):
    return enlarged(coarse, 2) + fine


@pytest.mark.parametrize("cut", [0, 3])
@pytest.mark.parametrize("strip_bytes", [1, 8 * 12 * 4 * 20])
def test_strips_give_the_whole(strip_bytes, cut, monkeypatch):
    first, second = convolution(8, 8, 3, 1, torch.float32), convolution(8, 4, 3, 1, torch.float32)
    rows = [[], []]

    def step(number, x):
        rows[number].append(x.shape[2])
        return (first, second)[number](x).relu()

    steps = [(partial(step, 0), 1), (partial(step, 1), 1), (torch.neg, 0)]
    coarse, fine = some(1, 8, 35, 6), some(1, 8, 70, 12, seed=1)
    with torch.inference_mode():
        whole = -second(first(joined(coarse, fine)).relu()).relu()
        monkeypatch.setattr(blocks, "_STRIP_BYTES", strip_bytes)
        strips = in_strips(joined, steps, coarse, fine, cut=cut)
    height = 70 - 2 * cut
    assert len(rows[0]) == len(rows[1]) == -(-height // (20 if strip_bytes > 1 else 16))
    # No step is given more rows than the next one looks at.
    assert sum(rows[1]) <= height + 2 * len(rows[1])
    assert sum(rows[0]) <= height + 4 * len(rows[0])
    wanted = whole[:, :, cut : 70 - cut, cut : 12 - cut]
    torch.testing.assert_close(strips, wanted, atol=1e-6, rtol=1e-5)


def test_what_learns_is_not_cut_into_strips(monkeypatch):
    monkeypatch.setattr(blocks, "_STRIP_BYTES", 1)
    seen = []

    def join(coarse, fine):
        seen.append(fine.shape[2])
        return fine

    found = in_strips(join, [(torch.neg, 0)], some(1, 8, 35, 6), some(1, 8, 70, 12), cut=1)
    assert seen == [70]
    assert found.shape == (1, 8, 68, 10)


def test_a_head_without_samples_has_nothing_to_cut():
    with torch.inference_mode():
        found = in_strips(joined, [(torch.neg, 0)], some(0, 8, 4, 4), some(0, 8, 8, 8))
    assert found.shape == (0, 8, 8, 8)
