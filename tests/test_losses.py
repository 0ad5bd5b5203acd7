import numpy as np
import pytest
import torch
from torch.nn import functional

from wsi_pipeline.errors import RecipeError
from wsi_pipeline.network import build_network
from wsi_pipeline.spec import AnchorRules, HeadSpec, ModelSpec, PeakRules, RunRules
from wsi_pipeline.training.batch import Batch
from wsi_pipeline.training.losses import HeadRules, check_head_rules, compute_losses
from wsi_pipeline.training.targets import between_weights, interior_and_contour

NUCLEI = HeadSpec(name="nuclei", kind="instance", object_kind="nucleus", rules=AnchorRules())
TYPES = HeadSpec(name="types", kind="class", classes=("none", "round", "long"), classifies="nuclei")
GLAND = HeadSpec(name="gland", kind="instance", object_kind="gland", rules=RunRules())
TISSUE = HeadSpec(name="tissue", kind="patch", stride=16, classes=("glass", "fat", "muscle"))
CELLS = HeadSpec(name="cells", kind="detect", object_kind="cell", rules=PeakRules(max_size_um=32))
SPEC = ModelSpec(
    name="t",
    architecture="cerberus",
    mpp=0.5,
    halo_px=32,
    heads=(NUCLEI, TYPES, GLAND, TISSUE, CELLS),
    options={"widths": [4, 6, 8, 10], "blocks": [1, 1, 1, 1], "head_width": 6, "patch_width": 6},
)
SIDE = 64


def squares(*boxes, side=SIDE):
    ids = torch.zeros(1, side, side, dtype=torch.int32)
    for number, (x, y, w, h) in enumerate(boxes, start=1):
        ids[0, y : y + h, x : x + w] = number
    return ids


def batch_of(labels, rows=None, n=1):
    return Batch(
        pixels=torch.rand(n, 3, SIDE, SIDE) * 255,
        rows=rows or {name: torch.arange(len(label)) for name, label in labels.items()},
        labels=labels,
        unknown={
            name: torch.zeros(len(label), SIDE, SIDE, dtype=torch.bool)
            for name, label in labels.items()
            if name == "cells"
        },
    )


def losses_of(name, logits, label, rules=None, batch=None):
    batch = batch or batch_of({name: label})
    found = compute_losses({name: logits}, batch, SPEC, {name: rules or HeadRules()}, {name: 1})
    return {key.split("/")[1]: float(value) for key, value in found.terms.items()}


def certain(target, classes):
    """Logits that say the target with great certainty."""
    return 40.0 * functional.one_hot(target.long(), classes).movedim(-1, 1).float()


def test_certain_and_right_costs_nothing_and_uniform_costs_the_logarithm_of_three():
    ids = squares((10, 10, 20, 20))
    inner = squares((11, 11, 18, 18))[0]
    contour = (squares((9, 9, 22, 22))[0] > 0).long() - (inner > 0).long()
    # the element is a 3 px cross: corners of the dilated square stay background
    for y, x in ((9, 9), (9, 30), (30, 9), (30, 30)):
        contour[y, x] = 0
    target = ((inner > 0).long() + 2 * contour)[None]
    right = losses_of("nuclei", certain(target, 3), ids, HeadRules(element_um=1.5))
    assert right["ce"] < 1e-5
    assert right["dice"] < 1e-3
    uniform = losses_of("nuclei", torch.zeros(1, 3, SIDE, SIDE), ids, HeadRules(between=0))
    assert uniform["ce"] == pytest.approx(np.log(3), rel=1e-5)
    # soft Dice of a constant third p, by hand: 1 - 2 p n / (p N + n)
    areas = [int((target == c).sum()) for c in (1, 2)]
    by_hand = [1 - (2 * n / 3 + 1e-3) / (SIDE**2 / 3 + n + 1e-3) for n in areas]
    assert uniform["dice"] == pytest.approx(np.mean(by_hand), rel=1e-5)


def test_a_pixel_between_two_objects_weighs_more():
    apart = squares((4, 4, 12, 12), (40, 40, 12, 12))
    close = squares((4, 4, 12, 12), (18, 4, 12, 12))
    logits = torch.zeros(1, 3, SIDE, SIDE)
    loss = {k: losses_of("nuclei", logits, v)["ce"] for k, v in (("a", apart), ("c", close))}
    assert loss["a"] == pytest.approx(np.log(3), rel=1e-4)
    assert loss["c"] > loss["a"] * 1.02
    flat = losses_of("nuclei", logits, close, HeadRules(between=0))
    assert flat["ce"] == pytest.approx(np.log(3), rel=1e-4)


@pytest.mark.parametrize("name", ["nuclei", "types"])
def test_unknown_pixels_count_for_nothing(name):
    torch.manual_seed(0)
    logits = torch.randn(1, 3, SIDE, SIDE, requires_grad=True)
    if name == "nuclei":
        label = squares((8, 8, 16, 16), (40, 8, 12, 12))
        label[0, 32:] = -1
    else:
        label = (squares((8, 8, 16, 16), (40, 8, 12, 12)) % 3).to(torch.uint8)
        label[0, 32:] = 255
    batch = batch_of({name: label})
    compute_losses({name: logits}, batch, SPEC, {}, {name: 1}).total.backward()
    assert logits.grad[0, :, 34:].abs().max() == 0
    assert logits.grad[0, :, 8:24, 8:24].abs().max() > 0
    other = logits.detach().clone()
    other[0, :, 34:] = torch.randn_like(other[0, :, 34:]) * 9
    assert losses_of(name, other, label) == pytest.approx(losses_of(name, logits.detach(), label))


def test_class_weights_are_normalised_and_the_background_of_a_class_head_is_free():
    label = torch.zeros(1, SIDE, SIDE, dtype=torch.uint8)
    label[0, :10, :10] = 1
    label[0, 20:25, :10] = 2
    torch.manual_seed(1)
    logits = torch.randn(1, 3, SIDE, SIDE)
    rules = HeadRules(class_weights={"round": 1.0, "long": 6.0})
    log = logits.log_softmax(1)[0]
    one, two = -log[1][label[0] == 1].sum(), -log[2][label[0] == 2].sum()
    by_hand = (one + 6 * two) / (100 + 6 * 50)
    assert losses_of("types", logits, label, rules)["ce"] == pytest.approx(float(by_hand), rel=1e-5)
    changed = logits.clone()
    changed[0, :, label[0] == 0] = 5.0
    assert losses_of("types", changed, label, rules) == pytest.approx(
        losses_of("types", logits, label, rules)
    )
    nothing = torch.zeros_like(label)
    assert losses_of("types", logits, nothing, rules) == {"ce": 0.0, "dice": 0.0}


def test_a_patch_counts_where_a_cell_sees_a_whole_patch():
    logits = torch.zeros(1, 3, 11, 11)
    logits[0, 2] = 9.0
    logits[0, :, 4:7, 4:7] = torch.tensor([0.0, 3.0, 0.0])[:, None, None]
    label = torch.tensor([1])
    by_hand = -torch.tensor([0.0, 3.0, 0.0]).log_softmax(0)[1]
    assert losses_of("tissue", logits, label)["ce"] == pytest.approx(float(by_hand), rel=1e-5)
    weighted = HeadRules(class_weights={"fat": 2.5})
    assert losses_of("tissue", logits, label, weighted)["ce"] == pytest.approx(2.5 * float(by_hand))


def test_an_output_coarser_than_its_map_is_enlarged_first():
    ids = squares((16, 16, 32, 32))
    torch.manual_seed(2)
    logits = torch.randn(1, 3, 32, 32)
    rules = HeadRules(element_um=2.5)
    enlarged = torch.nn.Upsample(scale_factor=2, mode="bilinear", align_corners=False)(logits)
    found = losses_of("gland", logits, ids, rules)
    assert found == pytest.approx(losses_of("gland", enlarged, ids, rules))
    assert found != pytest.approx(losses_of("gland", logits.repeat(1, 1, 2, 2), ids, rules))


def test_contours_are_not_learnt_where_the_recipe_says_so():
    ids = squares((10, 10, 20, 20))
    rules = HeadRules(element_um=1.5, contour=False)
    inner = (squares((11, 11, 18, 18)) > 0).long()
    assert losses_of("nuclei", certain(inner, 3), ids, rules)["ce"] < 1e-5
    assert losses_of("nuclei", certain(inner, 3), ids, HeadRules(element_um=1.5))["ce"] > 0.5


def test_weights_of_terms_heads_and_channels():
    ids = squares((10, 10, 20, 20))
    torch.manual_seed(3)
    logits = torch.randn(1, 3, SIDE, SIDE)
    terms = losses_of("nuclei", logits, ids, HeadRules())

    def total(**changes):
        rules = HeadRules(**changes)
        return float(
            compute_losses(
                {"nuclei": logits},
                batch_of({"nuclei": ids}),
                SPEC,
                {"nuclei": rules},
                {"nuclei": 2},
            ).total
        )

    assert total() == pytest.approx((terms["ce"] + terms["dice"]) / 2)
    assert total(weight=3.0) == pytest.approx(3 * (terms["ce"] + terms["dice"]) / 2)
    assert total(ce=0.0, dice=2.0) == pytest.approx(terms["dice"])
    heavy = losses_of("nuclei", logits, ids, HeadRules(channel_weights=(1, 1, 4)))
    assert heavy["ce"] > terms["ce"]
    assert heavy["dice"] == pytest.approx(terms["dice"])


def test_rules_for_heads_and_classes_that_are_not_there():
    check_head_rules({"types": HeadRules(class_weights={"long": 2.0})}, SPEC)
    with pytest.raises(RecipeError, match="the network's heads are"):
        check_head_rules({"lumen": HeadRules()}, SPEC)
    with pytest.raises(RecipeError, match=r"\['flat'\] are none of"):
        check_head_rules({"types": HeadRules(class_weights={"flat": 2.0})}, SPEC)
    for bad in ({"weight": -1}, {"ce": -1}, {"dice": -1}, {"between": -1}, {"element_um": 0}):
        with pytest.raises(RecipeError, match="negative"):
            HeadRules(**bad)


def labels_for(name):
    if name in ("nuclei", "gland"):
        return squares((8, 8, 20, 20), (40, 30, 16, 16))
    if name == "types":
        return (squares((8, 8, 20, 20), (40, 30, 16, 16))).to(torch.uint8)
    if name == "tissue":
        return torch.tensor([2])
    return torch.tensor([[[20.0, 20.0, 36.0, 36.0]]])


@pytest.mark.parametrize("name", [head.name for head in SPEC.heads])
def test_only_heads_with_labels_run_and_their_gradients_reach_the_encoder(name):
    torch.manual_seed(0)
    network = build_network(SPEC).train()
    before = {key: value.clone() for key, value in network.state_dict().items()}
    batch = batch_of({name: labels_for(name)}, rows={name: torch.tensor([1])}, n=3)
    logits = network(batch.pixels, batch.rows)
    assert list(logits) == [name]
    assert len(logits[name]) == 1
    compute_losses(logits, batch, SPEC, {}, {name: 1}).total.backward()
    torch.optim.AdamW(network.parameters(), lr=0.1, weight_decay=0.1).step()
    own = f"heads.{name}."
    for key, value in network.state_dict().items():
        idle = key.startswith("heads.") and not key.startswith(own)
        # a patch head takes the bottleneck itself, not its projection
        idle |= key.startswith("project.") and name == "tissue"
        changed = not torch.equal(value, before[key])
        if idle:
            assert not changed, key
        elif key.endswith(("weight", "running_mean")):
            assert changed, key
    grads = [p.grad for k, p in network.named_parameters() if k.startswith("encoder.stem")]
    assert all(grad is not None and grad.abs().sum() > 0 for grad in grads)


def test_a_sample_costs_the_same_in_any_batch():
    torch.manual_seed(4)
    labels = torch.cat([squares((8, 8, 20, 20)), squares((4, 30, 9, 9), (15, 30, 9, 9))])
    logits = torch.randn(2, 3, SIDE, SIDE)
    both = losses_of("nuclei", logits, labels)
    alone = [losses_of("nuclei", logits[i : i + 1], labels[i : i + 1]) for i in (0, 1)]
    for term in both:
        assert both[term] == pytest.approx(sum(own[term] for own in alone), rel=1e-5)


def test_means_are_over_the_pixels_that_are_known():
    ids = squares((10, 10, 20, 20))
    ids[0, 40:] = -1
    uniform = losses_of("nuclei", torch.zeros(1, 3, SIDE, SIDE), ids, HeadRules(between=0))
    assert uniform["ce"] == pytest.approx(np.log(3), rel=1e-5)


def test_dice_is_over_the_classes_that_a_sample_has():
    logits = torch.zeros(1, 3, SIDE, SIDE)
    nothing = losses_of("nuclei", logits, squares())
    assert nothing["dice"] == 0.0
    # one class of two: 1 - soft Dice of that one, a third everywhere it is looked at
    label = torch.zeros(1, SIDE, SIDE, dtype=torch.uint8)
    label[0, :10, :10] = 1
    by_hand = 1 - (2 * 100 / 3 + 1e-3) / (100 / 3 + 100 + 1e-3)
    assert losses_of("types", logits, label)["dice"] == pytest.approx(by_hand, rel=1e-5)


def test_the_element_is_odd_and_as_wide_as_the_border_between_objects():
    ids = squares((4, 4, 12, 12), (19, 4, 12, 12))
    torch.manual_seed(5)
    logits = torch.randn(1, 3, SIDE, SIDE)
    # 2.0 um are 4 px, and 4 px have no middle
    even, odd = (losses_of("nuclei", logits, ids, HeadRules(element_um=um)) for um in (2.0, 2.5))
    assert even == pytest.approx(odd)
    target = interior_and_contour(ids, 5, contour=True)
    weights = between_weights(ids, sigma_px=5, gain=10.0, inner=target == 1)
    by_hand = (functional.cross_entropy(logits, target, reduction="none") * weights).mean()
    assert odd["ce"] == pytest.approx(float(by_hand), rel=1e-5)


def test_heat_and_sizes_of_a_detect_head_are_weighed_apart():
    torch.manual_seed(6)
    logits = torch.randn(1, 3, SIDE, SIDE)
    batch = batch_of({"cells": labels_for("cells")})

    def total(rules):
        return compute_losses({"cells": logits}, batch, SPEC, {"cells": rules}, {"cells": 1})

    both = total(HeadRules())
    terms = {name: float(value) for name, value in both.terms.items()}
    assert float(both.total) == pytest.approx(sum(terms.values()), rel=1e-5)
    heat = float(total(HeadRules(dice=0)).total)
    assert heat == pytest.approx(terms["cells/heat"], rel=1e-5)
    rest = float(total(HeadRules(ce=0, dice=2)).total)
    assert rest == pytest.approx(2 * (sum(terms.values()) - terms["cells/heat"]), rel=1e-5)
