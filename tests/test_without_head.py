"""A head is taken out of a bundle; the others answer as before."""

import torch
from click.testing import CliRunner

from workflows.weights.without_head import without_head
from wsi_pipeline.bundle import open_bundle, save_bundle
from wsi_pipeline.network import build_network
from wsi_pipeline.spec import AnchorRules, HeadSpec, ModelSpec, RunRules

SPEC = ModelSpec(
    name="three",
    architecture="cerberus-lite",
    mpp=0.5,
    halo_px=32,
    options={
        "widths": [4, 4, 8, 8],
        "blocks": [1, 1, 1, 1],
        "decoder": [4, 4, 8, 8],
        "scales": {"nuclei": 2, "gland": 4, "gland-class": 8},
    },
    heads=(
        HeadSpec(name="nuclei", kind="instance", object_kind="nucleus", rules=AnchorRules()),
        HeadSpec(name="gland", kind="instance", stride=2, object_kind="gland", rules=RunRules()),
        HeadSpec(
            name="gland-class",
            kind="class",
            stride=2,
            classes=("none", "benign"),
            classifies="gland",
        ),
    ),
)


def written(folder):
    torch.manual_seed(1)
    save_bundle(folder, SPEC, build_network(SPEC), card="# three", metrics={}, recipe="seed = 1\n")
    return folder


def run(*arguments):
    return CliRunner().invoke(without_head, [str(argument) for argument in arguments])


def test_the_other_heads_answer_as_before(tmp_path):
    whole = written(tmp_path / "whole")
    result = run(whole, "gland-class", "--out", tmp_path / "less")
    assert result.exit_code == 0, result.output
    less = open_bundle(tmp_path / "less")
    assert [head.name for head in less.spec.heads] == ["nuclei", "gland"]
    pixels = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(2)) * 255
    with torch.inference_mode():
        before = open_bundle(whole).load_network()(pixels)
        after = less.load_network()(pixels)
    assert set(after) == {"nuclei", "gland"}
    assert all(torch.equal(before[name], after[name]) for name in after)


def test_a_head_that_is_not_there_or_that_others_need_stays(tmp_path):
    whole = written(tmp_path / "whole")
    assert "has no head 'lumen'" in run(whole, "lumen", "--out", tmp_path / "less").output
    assert (
        "gland-class cannot be without gland"
        in run(whole, "gland", "--out", tmp_path / "less").output
    )
    assert not (tmp_path / "less").exists()
