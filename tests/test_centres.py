"""What detect heads learn: hand-worked values, a plain second implementation, and learning."""

import math

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from object_maps import MemoryStore, model
from torch import nn

from wsi_pipeline.errors import RecipeError
from wsi_pipeline.instances import extract_objects
from wsi_pipeline.spec import AnchorRules, HeadSpec, PeakRules
from wsi_pipeline.table import OBJECT_SCHEMA
from wsi_pipeline.training import centres
from wsi_pipeline.training.centres import centre_loss, centre_targets

RULES = PeakRules(max_size_um=32.0)
HEAD = HeadSpec(name="ring", kind="detect", object_kind="signet-ring", rules=RULES)
NAN = [math.nan] * 4


def boxes_of(*samples):
    return torch.tensor(samples, dtype=torch.float32).reshape(len(samples), -1, 4)


def all_known(count, height, width=None):
    return torch.zeros((count, height, width or height), dtype=torch.bool)


def plain_heat(boxes, height, width):
    """One Gaussian after the other; widths by bisection instead of the formula."""
    heat = np.zeros((height, width))
    for left, top, right, bottom in boxes[~np.isnan(boxes[:, 0])]:
        x, y = math.floor((left + right) / 2), math.floor((top + bottom) / 2)
        if not (0 <= x < width and 0 <= y < height):
            continue
        w, h = right - left, bottom - top
        low, high = 0.0, min(w, h)
        for _ in range(60):
            r = (low + high) / 2
            common = (w - r) * (h - r)
            low, high = (r, high) if common / (2 * w * h - common) > 0.3 else (low, r)
        spread = (2 * r + 1) / 6
        yy, xx = np.mgrid[:height, :width]
        bell = np.exp(-((xx - x) ** 2 + (yy - y) ** 2) / (2 * spread**2))
        heat = np.maximum(heat, bell)
    return heat


def plain_terms(logits, boxes, unknown, mpp):
    """One sample, pixel by pixel and box by box, in double precision."""
    p = 1 / (1 + np.exp(-logits.astype(float)))
    height, width = unknown.shape
    truth = plain_heat(boxes, height, width)
    heat, size, count = 0.0, 0.0, 0
    for y in range(height):
        for x in range(width):
            hot, t = p[0, y, x], truth[y, x]
            if unknown[y, x]:
                continue
            if t == 1:
                heat -= (1 - hot) ** 2 * math.log(hot)
            else:
                heat -= (1 - t) ** 4 * hot**2 * math.log(1 - hot)
    for left, top, right, bottom in boxes:
        x, y = (left + right) / 2, (top + bottom) / 2
        if not (0 <= x < width and 0 <= y < height) or unknown[math.floor(y), math.floor(x)]:
            continue
        count += 1
        for channel, side in ((1, right - left), (2, bottom - top)):
            share = min(1.0, side * mpp / RULES.max_size_um)
            size += abs(p[channel, math.floor(y), math.floor(x)] - share)
    return heat / max(1, count), 3.0 * size / max(1, count)


# ---- targets ------------------------------------------------------------------------


def test_targets_worked_by_hand():
    # 20 x 12 px at 0.5 um: 10 x 6 um, shares of 32 um. Centre (20.5, 16).
    targets = centre_targets(
        boxes_of([10.5, 10, 30.5, 22], NAN).reshape(1, 2, 4), all_known(1, 40, 50), RULES, mpp=0.5
    )
    assert targets.pixel.tolist() == [[16 * 50 + 20, 0]]
    assert targets.counted.tolist() == [[True, False]]
    assert targets.share[0, :, 0].tolist() == [10 / 32, 6 / 32]
    assert targets.heat.shape == (1, 40, 50)
    assert targets.heat[0, 16, 20] == 1
    assert (targets.heat == 1).sum() == 1
    # (20 - r)(12 - r) = 0.6 / 1.3 * 240 has the solution r = 4.6420.
    reach = (32 - math.sqrt(32**2 - 4 * 240 * 0.7 / 1.3)) / 2
    assert (20 - reach) * (12 - reach) == pytest.approx(0.6 / 1.3 * 240)
    spread = (2 * reach + 1) / 6
    assert targets.heat[0, 16, 23] == pytest.approx(math.exp(-9 / (2 * spread**2)))
    assert targets.heat[0, 14, 19] == pytest.approx(math.exp(-5 / (2 * spread**2)))


def test_centres_outside_the_crop_do_not_count_and_boxes_may_reach_beyond_it():
    outside = [[-12, 4, 10, 10], [4, 28, 10, 37], [28, 4, 36, 8], [4, -9, 8, 8.9], NAN]
    inside = [[-12, 4, 12.1, 10], [28, 4, 35.9, 8]]
    targets = centre_targets(boxes_of([*outside, *inside]), all_known(1, 32), RULES, mpp=1.0)
    assert targets.counted.tolist() == [[False] * 5 + [True] * 2]
    assert targets.pixel[0, 5:].tolist() == [7 * 32 + 0, 6 * 32 + 31]
    assert targets.share[0, 0, 5].item() == pytest.approx(24.1 / 32)
    alone = centre_targets(boxes_of(inside), all_known(1, 32), RULES, mpp=1.0)
    assert torch.equal(targets.heat, alone.heat)
    assert not targets.heat.isnan().any()


def test_a_box_larger_than_the_largest_size_has_share_one():
    targets = centre_targets(boxes_of([[0, 0, 60, 20]]), all_known(1, 64), RULES, mpp=1.0)
    assert targets.share[0, :, 0].tolist() == [1.0, 20 / 32]


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10**6), chunk=st.sampled_from([1, 5000, 1 << 24]))
def test_heat_is_the_largest_of_all_gaussians(seed, chunk):
    rng = np.random.default_rng(seed)
    corner = rng.uniform(-10, 40, (3, 7, 2))
    boxes = np.concatenate([corner, corner + rng.uniform(0.5, 25, (3, 7, 2))], axis=2)
    boxes[0, 4:] = boxes[2] = np.nan
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(centres, "_CHUNK_VALUES", chunk)
        targets = centre_targets(
            torch.tensor(boxes, dtype=torch.float32), all_known(3, 29, 37), RULES, mpp=0.5
        )
    expected = [plain_heat(sample, 29, 37) for sample in boxes.astype(np.float32)]
    np.testing.assert_allclose(targets.heat.numpy(), expected, atol=2e-5)
    assert not targets.heat[2].any()


# ---- loss ---------------------------------------------------------------------------


def test_a_loss_worked_by_hand():
    # One pixel, p = 1/2 everywhere: 1/4 ln 2 for the heat, with a centre and without.
    logits = torch.zeros(2, 3, 1, 1)
    boxes = boxes_of([[-7.5, -3.5, 8.5, 4.5]], [NAN])  # 16 x 8 px of 1 um: shares 1/2 and 1/4
    terms = centre_loss(logits, boxes, all_known(2, 1), HEAD, mpp=1.0)
    assert set(terms) == {"heat", "size"}
    assert terms["heat"].tolist() == pytest.approx([math.log(2) / 4] * 2)
    assert terms["size"].tolist() == pytest.approx([3.0 * (0.0 + 0.25), 0.0])


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 10**6))
def test_terms_agree_with_a_plain_implementation_sample_by_sample(seed):
    rng = np.random.default_rng(seed)
    logits = rng.normal(0, 2, (3, 3, 16, 16)).astype(np.float32)
    corner = rng.uniform(-5, 16, (3, 4, 2))
    boxes = np.concatenate([corner, corner + rng.uniform(1, 20, (3, 4, 2))], axis=2)
    boxes = boxes.astype(np.float32)
    boxes[0, 2:] = boxes[1] = np.nan
    unknown = rng.random((3, 16, 16)) < 0.3
    terms = centre_loss(*map(torch.tensor, (logits, boxes, unknown)), HEAD, mpp=0.5)
    for i in range(3):
        heat, size = plain_terms(logits[i], boxes[i], unknown[i], 0.5)
        assert terms["heat"][i].item() == pytest.approx(heat, rel=1e-3)
        assert terms["size"][i].item() == pytest.approx(size, rel=1e-4, abs=1e-6)


def test_unknown_pixels_and_objects_there_have_no_gradient():
    torch.manual_seed(1)
    logits = torch.randn(1, 3, 24, 24, requires_grad=True)
    unknown = all_known(1, 24)
    unknown[:, :, 12:] = True
    boxes = boxes_of([[2, 2, 10, 10], [14, 14, 22, 22]])
    terms = centre_loss(logits, boxes, unknown, HEAD, mpp=0.5)
    (terms["heat"] + terms["size"]).sum().backward()
    assert (logits.grad[..., 12:] == 0).all()
    assert (logits.grad[:, 0, :, :12] != 0).all()
    sizes = logits.grad[0, 1:]
    assert torch.nonzero(sizes).tolist() == [[0, 6, 6], [1, 6, 6]]
    whole = centre_loss(logits, boxes, torch.ones_like(unknown), HEAD, mpp=0.5)
    assert whole["heat"].item() == whole["size"].item() == 0


def test_no_boxes_at_all():
    logits = torch.randn(2, 3, 16, 16)
    none = centre_loss(logits, torch.zeros(2, 0, 4), all_known(2, 16), HEAD, mpp=0.5)
    absent = centre_loss(logits, boxes_of([NAN], [NAN]), all_known(2, 16), HEAD, mpp=0.5)
    for term in ("heat", "size"):
        assert torch.equal(none[term], absent[term])
    assert none["heat"].gt(0).all()
    empty = centre_loss(logits[:0], torch.zeros(0, 3, 4), all_known(0, 16), HEAD, mpp=0.5)
    assert empty["heat"].shape == empty["size"].shape == (0,)


def test_maps_coarser_than_the_crop():
    torch.manual_seed(2)
    logits = torch.randn(1, 3, 16, 16)
    boxes = boxes_of([[8, 10, 20, 26], [1, 1, 9, 9]])
    unknown = all_known(1, 32)
    unknown[0, 31, 31] = True
    coarse = all_known(1, 16)
    coarse[0, 15, 15] = True  # a pixel that is known in part is not known
    fine = centre_loss(logits, boxes, unknown, HEAD, mpp=0.5)
    expected = centre_loss(logits, boxes / 2, coarse, HEAD, mpp=1.0)
    for term in ("heat", "size"):
        assert torch.equal(fine[term], expected[term])


def test_half_precision_logits_are_compared_in_full():
    logits = torch.randn(1, 3, 16, 16).bfloat16()
    boxes = boxes_of([[2, 2, 10, 10]])
    terms = centre_loss(logits, boxes, all_known(1, 16), HEAD, mpp=0.5)
    full = centre_loss(logits.float(), boxes, all_known(1, 16), HEAD, mpp=0.5)
    for term, loss in terms.items():
        assert loss.dtype == torch.float32
        assert torch.equal(loss, full[term])


def test_extreme_logits_stay_finite():
    logits = torch.full((1, 3, 16, 16), 200.0, requires_grad=True)
    terms = centre_loss(logits, boxes_of([[2, 2, 10, 10]]), all_known(1, 16), HEAD, mpp=0.5)
    sum(loss.sum() for loss in terms.values()).backward()
    assert all(loss.isfinite().all() for loss in terms.values())
    assert logits.grad.isfinite().all()


def test_other_heads_have_no_boxes():
    nuclei = HeadSpec(name="n", kind="instance", object_kind="nucleus", rules=AnchorRules())
    with pytest.raises(RecipeError, match="'n' is of kind 'instance'"):
        centre_loss(torch.zeros(1, 3, 8, 8), boxes_of([NAN]), all_known(1, 8), nuclei, mpp=0.5)


# ---- learning -----------------------------------------------------------------------


def discs(seed, count=4, side=64):
    """Grey images with white discs of 8 to 16 px, apart from each other, and their boxes."""
    rng = np.random.default_rng(seed)
    images, boxes = np.full((count, side, side), -1.0), []
    yy, xx = np.mgrid[:side, :side]
    for image in images:
        for x, y in rng.permutation([(a, b) for a in (14, 34, 52) for b in (14, 34, 52)])[:5]:
            r = rng.integers(4, 9)
            image[np.hypot(xx + 0.5 - x, yy + 0.5 - y) < r] = 1.0
            boxes.append([x - r, y - r, x + r, y + r])
    pixels = torch.tensor(images, dtype=torch.float32)[:, None]
    return pixels, torch.tensor(np.array(boxes, np.float32)).reshape(count, 5, 4)


def test_a_few_steps_find_discs_and_their_sizes():
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Conv2d(1, 12, 9, padding=4), nn.ReLU(), nn.Conv2d(12, 12, 9, padding=4), nn.ReLU(),
        nn.Conv2d(12, 3, 1),
    )  # fmt: skip
    nn.init.constant_(network[-1].bias[:1], -4.6)
    optimizer = torch.optim.Adam(network.parameters(), lr=5e-3)
    losses = []
    for step in range(120):
        pixels, boxes = discs(step)
        terms = centre_loss(network(pixels), boxes, all_known(4, 64), HEAD, mpp=1.0)
        loss = (terms["heat"] + terms["size"]).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert np.mean(losses[-10:]) < 0.5 * np.mean(losses[:10])
    # What the pipeline makes of an image that it has not seen.
    pixels, boxes = discs(1000, count=1)
    with torch.no_grad():
        maps = network(pixels)[0].sigmoid().mul(255).add(0.5).to(torch.uint8).numpy()
    store = MemoryStore(
        spec=model(HEAD, mpp=1.0),
        size=(64, 64),
        arrays={"ring/prob": maps},
        spacing=(1.0, 1.0),
        pixel_size=(1.0, 1.0),
    )
    batches = extract_objects(store, slide_id="s").batches
    rows = pa.Table.from_batches(list(batches), OBJECT_SCHEMA).to_pylist()
    found = np.array([list(row["bbox"].values()) for row in rows])
    truth = boxes[0].numpy()
    assert found.shape == truth.shape
    middles = [(b[:, :2] + b[:, 2:]) / 2 for b in (found, truth)]
    distance = np.hypot(*np.moveaxis(middles[0][:, None] - middles[1], -1, 0))
    assert sorted(distance.argmin(1)) == [0, 1, 2, 3, 4]
    assert distance.min(1).max() <= 3
    sides = [(b[:, 2:] - b[:, :2]) for b in (found, truth)]
    assert np.abs(sides[0] - sides[1][distance.argmin(1)]).mean() < 3
