"""Weights on disk: half precision where it is safe, small files, the standard index."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from safetensors import safe_open
from test_lite import GLAND, NUCLEI, build, lite

from wsi_pipeline import weights as module
from wsi_pipeline.bundle import open_bundle, save_bundle
from wsi_pipeline.errors import ModelBundleError
from wsi_pipeline.release import release_bundle
from wsi_pipeline.weights import HALF_ERROR, halved, read_weights, weight_map, write_weights


def kernel(*shape, scale=1.0, seed=0):
    random = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=random) * scale


def back(folder):
    return read_weights(folder, weight_map(folder))


def test_kernels_are_halved_and_what_scales_a_channel_is_not():
    tensors = {
        "conv.weight": kernel(8, 4, 3, 3),
        "linear.weight": kernel(8, 4),
        "conv.bias": kernel(8),
        "norm.running_var": torch.tensor([1e-9, 70_000.0]),
        "counter": torch.tensor(7),
    }
    out = halved(tensors)
    assert {name: t.dtype for name, t in out.items()} == {
        "conv.weight": torch.float16,
        "linear.weight": torch.float16,
        "conv.bias": torch.float32,
        "norm.running_var": torch.float32,
        "counter": torch.int64,
    }
    assert out.keys() == tensors.keys()
    for name, tensor in tensors.items():
        expected = tensor.numpy().astype(np.float16 if tensor.ndim > 1 else tensor.numpy().dtype)
        np.testing.assert_array_equal(out[name].numpy(), expected)


@pytest.mark.parametrize(
    ("row", "stays"),
    [
        (kernel(9), False),
        (torch.zeros(9), False),  # exact
        (kernel(9, scale=1e-4), False),
        (kernel(9, scale=1e-6), True),  # float16 has three bits left there
        (kernel(9, scale=1e-9), True),  # rounded to nothing
        (torch.tensor([65_504.0] * 9), False),
        (torch.tensor([65_520.0] + [1.0] * 8), True),  # infinite in float16
        (torch.tensor([1.0] * 8 + [1e-6]), False),  # small beside others of the channel: no harm
        (torch.tensor([float("nan")] * 9), True),
    ],
)
def test_a_kernel_that_float16_cannot_hold_stays(row, stays):
    """Decided by the worst output channel; all its neighbours are well behaved."""
    tensor = torch.cat([kernel(5, 9), row[None]]).reshape(6, 1, 3, 3)
    (out,) = halved({"k": tensor}).values()
    assert out.dtype == (torch.float32 if stays else torch.float16)
    if not stays:
        rows = tensor.double().flatten(1).numpy()
        error = np.linalg.norm(rows.astype(np.float16) - rows, axis=1)
        assert (error <= HALF_ERROR * np.linalg.norm(rows, axis=1)).all()


def test_one_file_where_all_fits(tmp_path):
    tensors = {"b": kernel(3, 4), "a": kernel(5)}
    write_weights(tmp_path, tensors)
    assert [p.name for p in tmp_path.iterdir()] == ["weights.safetensors"]
    assert (tmp_path / "weights.safetensors").stat().st_mode & 0o777 == 0o644
    found = back(tmp_path)
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())


def test_shards_are_small_and_indexed_as_is_usual(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "SHARD_BYTES", 20_000)
    tensors = {f"t{n:02d}.weight": kernel(n + 1, 100, seed=n) for n in range(20)}
    write_weights(tmp_path, tensors)
    index = json.loads((tmp_path / "weights.safetensors.index.json").read_text())
    count = len(set(index["weight_map"].values()))
    assert count > 3
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in tensors.values())
    names = [f"weights-{n:05d}-of-{count:05d}.safetensors" for n in range(1, count + 1)]
    assert sorted(p.name for p in tmp_path.glob("*.safetensors")) == names
    for file in names:
        assert (tmp_path / file).stat().st_size <= 20_000
        with safe_open(tmp_path / file, framework="np") as content:
            assert set(content.keys()) == {t for t, at in index["weight_map"].items() if at == file}
    found = back(tmp_path)
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())
    with pytest.raises(ModelBundleError, match=r"'big' takes 24,000 bytes; .* 20,000"):
        write_weights(tmp_path / "none", {"big": kernel(60, 100)})


def test_files_are_as_full_as_they_may_be_and_not_fuller(tmp_path):
    """Whatever the names and numbers of tensors: the estimate of the header is never too low."""
    tensors = {f"{'deep.' * 30}{n}": kernel(40, 100, seed=n) for n in range(1100)}
    write_weights(tmp_path, tensors)
    sizes = [p.stat().st_size for p in sorted(tmp_path.glob("*.safetensors"))]
    assert len(sizes) == 2
    assert 15.5 * 2**20 < max(sizes) <= 16 * 2**20


def test_bytes_depend_on_the_tensors_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "SHARD_BYTES", 8_000)
    tensors = {f"t{n}": kernel(3, 100, seed=n) for n in range(9)}
    other = {name: tensors[name].t().contiguous().t() for name in reversed(tensors)}
    for name, content in (("a", tensors), ("b", other)):
        (tmp_path / name).mkdir()
        write_weights(tmp_path / name, content)
    assert files(tmp_path / "a") == files(tmp_path / "b")


def files(folder):
    return {p.name: p.read_bytes() for p in folder.iterdir()}


@pytest.fixture
def trained(tmp_path):
    spec = lite((NUCLEI, GLAND))
    for name in ("curves.png", "examples.png"):
        (tmp_path / name).write_bytes(b"a picture")
    bundle = save_bundle(
        tmp_path / "trained",
        spec,
        build(spec),
        card="# trained\n\n![Learning curves](curves.png)\n",
        metrics={"pq": 0.5},
        recipe="steps = 1\n",
        pictures={name: tmp_path / name for name in ("curves.png", "examples.png")},
    )
    (bundle.path / "golden.json").write_text("of other weights")
    return bundle


def test_a_release_computes_what_was_trained(trained, tmp_path):
    released = release_bundle(trained, tmp_path / "cerberus-tiny")
    assert released.name == "cerberus-tiny"
    assert released.spec.heads == trained.spec.heads
    assert {p.name for p in released.path.iterdir()} == {
        "spec.json", "weights.safetensors", "card.md", "metrics.json", "train.toml", "curves.png",
    }  # fmt: skip
    assert (released.path / "curves.png").read_bytes() == b"a picture"
    assert json.loads((released.path / "metrics.json").read_text()) == {
        "released_from": {"name": "cerberus-lite", "sha256": trained.digest},
        "pq": 0.5,
    }
    stored = read_weights(released.path, released.weight_map)
    kinds = {t.ndim > 1: t.dtype for t in stored.values()}
    assert kinds == {True: torch.float16, False: torch.float32}
    before, after = trained.load_network(), released.load_network()
    for name, tensor in after.state_dict().items():
        assert tensor.dtype in (torch.float32, torch.int64)
        if name in stored:
            torch.testing.assert_close(tensor, before.state_dict()[name], rtol=1e-3, atol=1e-6)
    image = torch.rand(1, 3, 64, 64) * 255
    with torch.no_grad():
        expected, found = before(image), after(image)
    for name, logits in expected.items():
        assert 0 < (found[name] - logits).abs().max() < 0.05


def test_a_release_is_the_same_bytes_again(trained, tmp_path):
    release_bundle(trained, tmp_path / "one" / "x")
    release_bundle(open_bundle(trained.path), tmp_path / "two" / "x")
    assert files(tmp_path / "one" / "x") == files(tmp_path / "two" / "x")
    # A release of a release loses nothing more.
    again = release_bundle(open_bundle(tmp_path / "one" / "x"), tmp_path / "three" / "x")
    assert files(again.path) == files(tmp_path / "one" / "x")


def test_a_release_takes_another_card_and_other_scores(trained, tmp_path):
    """And the pictures that the card shows, beside it or in the bundle; no others."""
    card = tmp_path / "written" / "small.md"
    card.parent.mkdir()
    card.write_text("# x\n![](good.png) and ![bad cases](examples.png), [not](curves.png)\n")
    with pytest.raises(ModelBundleError, match=r"shows good\.png, which is in none"):
        release_bundle(trained, tmp_path / "x", card=card)
    assert not (tmp_path / "x").exists()
    (card.parent / "good.png").write_bytes(b"good")
    released = release_bundle(trained, tmp_path / "x", card=card, metrics={"pq": 1})
    assert (released.path / "card.md").read_text() == card.read_text()
    assert json.loads((released.path / "metrics.json").read_text())["pq"] == 1
    pictures = {p.name: p.read_bytes() for p in released.path.glob("*.png")}
    assert pictures == {"good.png": b"good", "examples.png": b"a picture"}


@pytest.mark.parametrize(
    "shown",
    [
        "![](a.png)",
        "![a [b] c](a.png)",
        "[![in a link](a.png)](https://example.org)",
        "![two\nlines](a.png)",
        "![x](./a.png)",
        "![x]( a.png )",
        '![x](a.png "a title")',
        "![x](<a.png> 'a title')",
        '<img alt="x" src="a.png">',
        "<IMG\n  SRC='./a.png' width=10/>",
        "<img src=a.png>",
        "![x](%61.png)",
    ],
)
def test_a_picture_comes_along_however_it_is_shown(trained, tmp_path, shown):
    (tmp_path / "a.png").write_bytes(b"a picture")
    card = tmp_path / "card.md"
    card.write_text(f"# x\n\n{shown}\n")
    released = release_bundle(trained, tmp_path / "x", card=card)
    assert [p.name for p in released.path.glob("*.png")] == ["a.png"]


@pytest.mark.parametrize(
    ("shown", "says"),
    [
        ("![x](pictures/a.png)", r"shows pictures/a\.png, but a bundle has no folders"),
        ("![x](../a.png)", r"shows \.\./a\.png, but"),
        ('<img src="/pictures/a.png">', r"shows /pictures/a\.png, but"),
        ("![x][ref]\n\n[ref]: a.png", r"shows !\[x\] by reference"),
        ("![ref]\n\n[ref]: a.png", r"shows !\[ref\] by reference"),
        ('<img src="b.png">', r"shows b\.png, which is in none"),
    ],
)
def test_a_picture_that_cannot_come_along_is_named(trained, tmp_path, shown, says):
    (tmp_path / "pictures").mkdir()
    for folder in (tmp_path, tmp_path / "pictures"):
        (folder / "a.png").write_bytes(b"a picture")
    card = tmp_path / "pictures" / "card.md"
    card.write_text(f"# x\n\n{shown}\n")
    with pytest.raises(ModelBundleError, match=says):
        release_bundle(trained, tmp_path / "x", card=card)
    assert not (tmp_path / "x").exists()


def test_a_picture_on_the_web_stays_there(trained, tmp_path):
    card = tmp_path / "card.md"
    card.write_text("![x](https://example.org/a.png) <img src='data:image/png;base64,AAAA'>\n")
    released = release_bundle(trained, tmp_path / "x", card=card)
    assert not list(released.path.glob("*.png"))


@pytest.mark.parametrize("text", ["[1]", "7", "{", "[" * 100_000])
def test_scores_that_are_none_are_named(trained, tmp_path, text):
    (trained.path / "metrics.json").write_text(text)
    with pytest.raises(ModelBundleError, match=r"metrics\.json (cannot be read|is no JSON object)"):
        release_bundle(trained, tmp_path / "x")
    assert not (tmp_path / "x").exists()


def test_broken_weights_are_not_released(trained, tmp_path):
    tensors = read_weights(trained.path, trained.weight_map)
    name = next(name for name, tensor in tensors.items() if tensor.ndim == 4)
    tensors[name][0, 0, 0, 0] = float("nan")
    (trained.path / "weights.safetensors").unlink()
    write_weights(trained.path, tensors)
    with pytest.raises(ModelBundleError, match=f"{name} holds NaN"):
        release_bundle(open_bundle(trained.path), tmp_path / "x")
    assert not [path for path in tmp_path.iterdir() if path.name in ("x", ".x.partial")]


def test_a_release_replaces_neither_itself_nor_goes_without_a_card(trained, tmp_path):
    with pytest.raises(ModelBundleError, match="the bundle itself"):
        release_bundle(trained, trained.path / ".." / "trained")
    (tmp_path / "detour").symlink_to(tmp_path)
    with pytest.raises(ModelBundleError, match="the bundle itself"):
        release_bundle(trained, tmp_path / "detour" / "trained")
    assert open_bundle(trained.path).digest == trained.digest
    (trained.path / "card.md").unlink()
    with pytest.raises(ModelBundleError, match=r"has no card\.md"):
        release_bundle(trained, tmp_path / "x")
    assert not (tmp_path / "x").exists()
