"""Bundles on disk, and upstream's checkpoint against an independent forward pass."""

from __future__ import annotations

import json
import pickle

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional as F  # noqa: N812

from wsi_pipeline import bundle as bundle_module
from wsi_pipeline.bundle import (
    find_bundle,
    import_cerberus,
    list_bundles,
    open_bundle,
    save_bundle,
)
from wsi_pipeline.checkpoint import read_cerberus
from wsi_pipeline.errors import ModelBundleError
from wsi_pipeline.network import build_network
from wsi_pipeline.spec import AnchorRules, HeadSpec, ModelSpec

DECODERS = {"Gland": 3, "Gland#TYPE": 3, "Lumen": 3, "Nuclei": 3, "Nuclei#TYPE": 7}
OUTPUTS = {"Gland": "INST", "Gland#TYPE": "TYPE", "Lumen": "INST", "Nuclei": "INST",
           "Nuclei#TYPE": "TYPE"}  # fmt: skip
OURS = {"Gland": "gland", "Gland#TYPE": "gland-class", "Lumen": "lumen", "Nuclei": "nuclei",
        "Nuclei#TYPE": "nuclei-class", "Patch-Class": "tissue"}  # fmt: skip


class Upstream:
    """A random checkpoint with upstream's keys, and a forward pass that knows only the keys."""

    def __init__(self, widths=(64, 128, 256, 512), blocks=(3, 4, 6, 3), hidden=96, patch=256):
        self.blocks = blocks
        self.state: dict[str, torch.Tensor] = {}
        self.random = torch.Generator().manual_seed(7)
        stem, middle, deep, last = widths
        self.conv("backbone.conv1", stem, 3, 7, bias=False)
        self.norm("backbone.bn1", stem)
        width_in = stem
        for n, (width, count) in enumerate(zip(widths, blocks, strict=True), 1):
            for b in range(count):
                at = f"backbone.layer{n}.{b}"
                self.conv(f"{at}.conv1", width, width_in, 3, bias=False)
                self.norm(f"{at}.bn1", width)
                self.conv(f"{at}.conv2", width, width, 3, bias=False)
                self.norm(f"{at}.bn2", width)
                if b == 0 and n > 1:
                    self.conv(f"{at}.downsample.0", width, width_in, 1, bias=False)
                    self.norm(f"{at}.downsample.1", width)
                width_in = width
        self.conv("backbone.fc", 1000, last, None)
        self.conv("conv_map", deep, last, 1, bias=False)
        stages = ((deep, deep, middle), (middle, middle, stem), (stem,) * 3, (stem,) * 3)
        for name, channels in DECODERS.items():
            for s, (a, b, c) in enumerate(stages):
                for u, (w_in, w_out) in enumerate(((a, b), (b, c))):
                    self.conv(f"decoder_head.{name}.{s}.block.{u}.conv", w_out, w_in, 3)
                    self.norm(f"decoder_head.{name}.{s}.block.{u}.bn", w_out)
            out = f"output_head.{name}.{OUTPUTS[name]}.x"
            self.conv(f"{out}.0.block.0.conv", hidden, stem, 1)
            self.norm(f"{out}.0.block.0.bn", hidden)
            self.conv(f"{out}.1.conv", channels, hidden, 1)
        at = "decoder_head.Patch-Class"
        self.norm(f"{at}.bn1", last)
        self.conv(f"{at}.conv1", patch, last, 1)
        self.norm(f"{at}.bn2", patch)
        self.conv(f"{at}.conv2", 9, patch, 1)

    def conv(self, key, w_out, w_in, kernel, *, bias=True):
        shape = (w_out, w_in) if kernel is None else (w_out, w_in, kernel, kernel)
        spread = (1 / (w_in * (kernel or 1) ** 2)) ** 0.5
        self.state[f"{key}.weight"] = torch.randn(shape, generator=self.random) * spread
        if bias:
            self.state[f"{key}.bias"] = torch.randn(w_out, generator=self.random) * 0.1

    def norm(self, key, width):
        rand = torch.rand((4, width), generator=self.random)
        self.state[f"{key}.weight"] = 0.5 + rand[0]
        self.state[f"{key}.bias"] = rand[1] - 0.5
        self.state[f"{key}.running_mean"] = rand[2] - 0.5
        self.state[f"{key}.running_var"] = 0.5 + rand[3]
        self.state[f"{key}.num_batches_tracked"] = torch.tensor(17)

    def save(self, path, **changes):
        content = {"desc": {f"module.{k}": v for k, v in self.state.items()}, "optimizer": {}}
        torch.save({**content, **changes}, path)
        return path

    def _conv(self, x, key, **options):
        return F.conv2d(x, self.state[f"{key}.weight"], self.state.get(f"{key}.bias"), **options)

    def _norm(self, x, key):
        s = self.state
        return F.batch_norm(x, s[f"{key}.running_mean"], s[f"{key}.running_var"],
                            s[f"{key}.weight"], s[f"{key}.bias"], eps=1e-5)  # fmt: skip

    @torch.no_grad()
    def forward(self, image):
        x = torch.relu(self._norm(self._conv(image / 255, "backbone.conv1", padding=3),
                                  "backbone.bn1"))  # fmt: skip
        maps = [x]
        x = F.max_pool2d(x, 3, 2, 1)
        for n, count in enumerate(self.blocks, 1):
            for b in range(count):
                at, stride = f"backbone.layer{n}.{b}", 2 if b == 0 and n > 1 else 1
                y = self._conv(x, f"{at}.conv1", stride=stride, padding=1)
                y = torch.relu(self._norm(y, f"{at}.bn1"))
                y = self._norm(self._conv(y, f"{at}.conv2", padding=1), f"{at}.bn2")
                if f"{at}.downsample.0.weight" in self.state:
                    x = self._conv(x, f"{at}.downsample.0", stride=stride)
                    x = self._norm(x, f"{at}.downsample.1")
                x = torch.relu(x + y)
            maps.append(x)
        x0, layer1, layer2, layer3, layer4 = maps
        out = {}
        for name in DECODERS:
            t = self._conv(layer4, "conv_map")
            for s, skip in enumerate((layer3, layer2, layer1, x0)):
                t = F.interpolate(t, scale_factor=2, mode="bilinear", align_corners=False) + skip
                for u in range(2):
                    at = f"decoder_head.{name}.{s}.block.{u}"
                    t = self._conv(t, f"{at}.conv", padding=1)
                    t = torch.relu(self._norm(t, f"{at}.bn"))
            at = f"output_head.{name}.{OUTPUTS[name]}.x"
            t = self._conv(t, f"{at}.0.block.0.conv")
            out[name] = self._conv(torch.relu(self._norm(t, f"{at}.0.block.0.bn")), f"{at}.1.conv")
        at, middle = "decoder_head.Patch-Class", int((layer4.shape[2] - 9) * 0.5)
        t = layer4[:, :, middle : middle + 9, middle : middle + 9].mean((2, 3), keepdim=True)
        t = self._conv(torch.relu(self._norm(t, f"{at}.bn1")), f"{at}.conv1")
        out["Patch-Class"] = self._conv(torch.relu(self._norm(t, f"{at}.bn2")), f"{at}.conv2")
        return out


@pytest.fixture(scope="module")
def narrow():
    return Upstream(widths=(4, 6, 8, 10), blocks=(1, 2, 1, 1), hidden=5, patch=7)


def test_imported_upstream_computes_the_same(tmp_path):
    """All six heads of a full-size checkpoint agree on a 448-pixel input."""
    upstream = Upstream()
    assert len(upstream.state) == 558
    learned = {k: v for k, v in upstream.state.items() if v.is_floating_point()}
    learned = {k: v.numel() for k, v in learned.items() if "running_" not in k}
    assert sum(learned.values()) == 28_377_284
    bundle = import_cerberus(upstream.save(tmp_path / "weights.tar"), tmp_path / "imported")
    network = bundle.load_network()
    assert sum(p.numel() for p in network.parameters()) == 27_864_284
    assert not network.training
    image = torch.randint(0, 256, (1, 3, 448, 448), generator=torch.Generator().manual_seed(1))
    expected = upstream.forward(image.float())
    with torch.no_grad():
        found = network(image.float())
    assert set(found) == set(OURS.values())
    for theirs, ours in OURS.items():
        logits = found[ours]
        if ours == "tissue":
            assert logits.shape == (1, 9, 28, 28)
            logits = logits[:, :, 13:14, 13:14]
        assert expected[theirs].std() > 1e-3 or theirs == "Patch-Class"
        torch.testing.assert_close(logits, expected[theirs], atol=1e-5, rtol=1e-5, msg=ours)


def test_import_reads_widths_and_heads_off_the_tensors(tmp_path, narrow):
    bundle = import_cerberus(narrow.save(tmp_path / "w.tar"), tmp_path / "small")
    assert bundle.spec.options == {
        "widths": [4, 6, 8, 10], "blocks": [1, 2, 1, 1], "head_width": 5, "patch_width": 7,
    }  # fmt: skip
    assert bundle.name == "small"
    assert [h.name for h in bundle.spec.instance_heads] == ["nuclei", "gland", "lumen"]
    assert bundle.spec.class_head("nuclei").classes[2] == "epithelial"
    assert bundle.spec.patch_head.stride == 16
    assert bundle.spec.halo_px >= 152
    assert "CC BY-NC-SA" in (bundle.path / "card.md").read_text()
    tensors = load_file(bundle.path / "weights.safetensors")
    checkpoint = read_cerberus(tmp_path / "w.tar", name="x")
    assert len(tensors) + len(checkpoint.skipped) == len(narrow.state)
    assert all("fc" in key or "num_batches" in key for key in checkpoint.skipped)


def test_import_without_prefix_fc_or_some_heads(tmp_path, narrow):
    wanted = ("backbone.fc", "decoder_head.Gland", "output_head.Gland", "decoder_head.Patch")
    state = {k: v for k, v in narrow.state.items() if not k.startswith(wanted)}
    torch.save({"desc": state}, tmp_path / "w.tar")
    spec = import_cerberus(tmp_path / "w.tar", tmp_path / "few").spec
    assert [head.name for head in spec.heads] == ["nuclei", "nuclei-class", "lumen"]
    assert spec.head("lumen").parent is None


@pytest.mark.parametrize(
    ("key", "action", "says"),
    [
        ("backbone.layer2.1.conv2.weight", "drop", "missing: encoder.stages.1.1.conv2.weight"),
        ("conv_map.weight", "drop", "missing: project.weight"),
        ("output_head.Nuclei#TYPE.TYPE.x.1.conv.weight", "drop", "lacks"),
        ("backbone.layer5.0.conv1.weight", "add", "unexpected tensors: backbone.layer5"),
        ("decoder_head.Stroma.0.block.0.conv.weight", "add", "unexpected: heads.Stroma"),
        ("output_head.Gland.TYPE.x.1.conv.bias", "add", "one place"),
        ("conv_map.weight", "reshape", "wrong shapes: project.weight"),
    ],
)
def test_import_takes_every_tensor_or_fails(tmp_path, narrow, key, action, says):
    state = dict(narrow.state)
    if action == "drop":
        del state[key]
    else:
        state[key] = torch.zeros(2, 3)
    torch.save({"desc": state}, tmp_path / "w.tar")
    with pytest.raises(ModelBundleError, match=says):
        import_cerberus(tmp_path / "w.tar", tmp_path / "out")
    assert not list(tmp_path.glob("*out*")), "nothing half-made is left"


class Bomb:
    def __reduce__(self):
        return (pytest.fail, ("a pickle was executed",))


def test_import_unpickles_nothing(tmp_path):
    path = tmp_path / "w.tar"
    torch.save({"desc": {"x": Bomb()}}, path)
    with pytest.raises(ModelBundleError, match="tensors alone"):
        import_cerberus(path, tmp_path / "out")
    path.write_bytes(pickle.dumps({"desc": Bomb()}))
    with pytest.raises(ModelBundleError, match="tensors alone"):
        import_cerberus(path, tmp_path / "out")
    torch.save({"state_dict": {}}, path)
    with pytest.raises(ModelBundleError, match="'desc'; found \\['state_dict'\\]"):
        import_cerberus(path, tmp_path / "out")


SPEC = ModelSpec(
    name="tiny",
    architecture="cerberus",
    mpp=0.5,
    halo_px=16,
    heads=(HeadSpec(name="nuclei", kind="instance", object_kind="nucleus", rules=AnchorRules()),),
    options={"widths": [4, 4, 4, 4], "blocks": [1, 1, 1, 1], "head_width": 4},
)


@pytest.fixture
def tiny(tmp_path):
    torch.manual_seed(3)
    network = build_network(SPEC)
    return save_bundle(tmp_path / "tiny", SPEC, network, card="a card", metrics={"pq": 1})


def test_saved_bundle_loads_equal(tiny):
    torch.manual_seed(3)
    network = build_network(SPEC).eval()
    image = torch.rand(1, 3, 32, 48) * 255
    with torch.no_grad():
        torch.testing.assert_close(tiny.load_network()(image), network(image), rtol=0, atol=0)
    assert open_bundle(tiny.path).spec == SPEC
    assert json.loads((tiny.path / "metrics.json").read_text()) == {"pq": 1}
    assert {p.name for p in tiny.path.parent.iterdir()} == {"tiny"}


def test_digest_is_that_of_spec_and_weights(tiny, tmp_path):
    again = save_bundle(tmp_path / "again", SPEC, tiny.load_network(), card="another card")
    assert again.digest == tiny.digest
    weights = load_file(tiny.path / "weights.safetensors")
    weights["project.weight"] += 1
    assert save_bundle(tmp_path / "b", SPEC, weights, card="").digest != tiny.digest
    spec = tiny.path / "spec.json"
    spec.write_text(spec.read_text().replace('"halo_px": 16', '"halo_px": 32'))
    assert open_bundle(tiny.path).digest != again.digest


def test_shards_and_half_precision(tiny, tmp_path):
    tensors = load_file(tiny.path / "weights.safetensors")
    halves = {name: t.to(torch.float16) for name, t in tensors.items()}
    names = sorted(halves)
    parts = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    folder = tmp_path / "sharded"
    folder.mkdir()
    for file, part in parts.items():
        save_file({n: halves[n] for n in part}, folder / file)
    index = {"weight_map": {n: file for file, part in parts.items() for n in part}}
    (folder / "weights.safetensors.index.json").write_text(json.dumps(index))
    (folder / "spec.json").write_text(SPEC.to_json())
    network = open_bundle(folder).load_network()
    for name, parameter in network.named_parameters():
        assert parameter.dtype == torch.float32
        assert torch.equal(parameter, halves[name].float()), name
    save_file({n: halves[n] for n in parts["b.safetensors"][1:]}, folder / "b.safetensors")
    with pytest.raises(ModelBundleError, match="does not hold"):
        open_bundle(folder).load_network()
    index["weight_map"][names[0]] = "../tiny/weights.safetensors"
    (folder / "weights.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ModelBundleError, match="no file of the bundle"):
        open_bundle(folder)


@pytest.mark.parametrize("file", ["spec.json", "weights.safetensors"])
def test_incomplete_bundles_are_refused(tiny, file):
    content = (tiny.path / file).read_bytes()
    (tiny.path / file).write_bytes(content[: len(content) // 2])
    with pytest.raises(ModelBundleError):
        open_bundle(tiny.path).load_network()
    (tiny.path / file).unlink()
    with pytest.raises(ModelBundleError):
        open_bundle(tiny.path)


def test_save_refuses_tensors_that_do_not_fit(tiny, tmp_path):
    tensors = load_file(tiny.path / "weights.safetensors")
    tensors.pop("project.weight")
    with pytest.raises(ModelBundleError, match=r"missing: project\.weight"):
        save_bundle(tmp_path / "x", SPEC, tensors, card="")
    assert not list(tmp_path.glob("*x*"))


def tree(folder):
    """Everything below a folder: what files hold, where links lead, None for a folder."""
    return {
        str(path.relative_to(folder)): path.readlink()
        if path.is_symlink()
        else path.read_bytes()
        if path.is_file()
        else None
        for path in sorted(folder.rglob("*"))
    }


def alien(place):
    place.mkdir()
    (place / "spec.json").write_text('{"spec_dir": "spec", "spec_files": ["**/*.js"]}')


def with_a_folder(place):
    place.mkdir()
    (place / "spec.json").write_text(SPEC.to_json())
    (place / "results").mkdir()


def of_other_things(place):
    place.mkdir()
    (place / "thesis.txt").write_text("years of work")


@pytest.mark.parametrize(
    "lay",
    [
        of_other_things,
        alien,
        with_a_folder,
        lambda place: place.write_text("a table"),
        lambda place: place.symlink_to("tiny"),
        lambda place: place.symlink_to("nowhere"),
    ],
)
def test_nothing_but_a_bundle_is_replaced(tiny, tmp_path, narrow, lay):
    lay(tmp_path / "taken")
    narrow.save(tmp_path / "w.tar")
    before = tree(tmp_path)
    says = "taken (exists and is no model bundle|is a link)"
    with pytest.raises(ModelBundleError, match=says):
        save_bundle(tmp_path / "taken", SPEC, tiny.load_network(), card="")
    with pytest.raises(ModelBundleError, match=says):
        import_cerberus(tmp_path / "w.tar", tmp_path / "taken")
    assert tree(tmp_path) == before


def test_an_older_bundle_and_an_empty_folder_are_replaced(tiny, tmp_path):
    (tmp_path / "empty").mkdir()
    (tiny.path / "golden.json").write_text("of the older one")
    for path in (tiny.path, tmp_path / "empty"):
        save_bundle(path, SPEC, tiny.load_network(), card="newer")
        assert (path / "card.md").read_text() == "newer"
        assert not (path / "golden.json").exists()


def test_what_goes_wrong_at_the_end_leaves_everything_as_it_was(tiny, tmp_path):
    before = tree(tmp_path)

    def fail(bundle):
        assert bundle.digest == open_bundle(bundle.path).digest
        assert (bundle.path / "card.md").read_text() == "newer"
        raise RuntimeError

    with pytest.raises(RuntimeError):
        save_bundle(tiny.path, SPEC, tiny.load_network(), card="newer", finish=fail)
    assert tree(tmp_path) == before
    finished = save_bundle(
        tmp_path / "x",
        SPEC,
        tiny.load_network(),
        card="",
        finish=lambda bundle: (bundle.path / "more.json").write_text("{}"),
    )
    assert (finished.path / "more.json").read_text() == "{}"


def test_no_picture_writes_over_the_spec(tiny, tmp_path):
    (tmp_path / "picture").write_text("no spec")
    saved = save_bundle(
        tmp_path / "x",
        SPEC,
        tiny.load_network(),
        card="",
        pictures={"spec.json": tmp_path / "picture"},
    )
    assert saved.spec == SPEC


def spoilt(tensor, value):
    tensor = tensor.clone()
    tensor.view(-1)[-1] = value
    return tensor


@pytest.mark.parametrize(
    ("kind", "change", "says"),
    [
        ("project.weight", lambda t: spoilt(t, float("nan")), "holds NaN"),
        ("project.weight", lambda t: spoilt(t, float("-inf")), "holds NaN or infinite"),
        ("project.weight", lambda t: spoilt(t.double(), 1e300), "holds NaN or infinite"),
        ("project.weight", lambda t: t.to(torch.int64), "is torch.int64, not torch.float32"),
        ("running_var", lambda t: spoilt(t, -1e-3), "holds negative variances"),
        ("running_mean", lambda t: spoilt(t, float("nan")), "holds NaN"),
    ],
)
def test_broken_weights_are_refused(tiny, tmp_path, kind, change, says):
    """By all that loads them and by all that writes them."""
    tensors = load_file(tiny.path / "weights.safetensors")
    name = next(name for name in tensors if name.endswith(kind))
    tensors[name] = change(tensors[name])
    save_file(tensors, tiny.path / "weights.safetensors")
    with pytest.raises(ModelBundleError, match=rf"broken: {name} {says}"):
        open_bundle(tiny.path).load_network()
    with pytest.raises(ModelBundleError, match=rf"broken: {name} {says}"):
        save_bundle(tmp_path / "x", SPEC, tensors, card="")
    assert not list(tmp_path.glob("*x*"))


@pytest.mark.parametrize("text", ["[]", "3", '{"weight_map": []}', "[" * 100_000])
def test_an_index_that_is_none_is_named(tiny, text):
    (tiny.path / "weights.safetensors.index.json").write_text(text)
    with pytest.raises(ModelBundleError, match=r"index\.json cannot be read"):
        open_bundle(tiny.path)


def test_find_by_name_or_folder(tiny, monkeypatch):
    known = "stain-baseline"
    assert find_bundle(known).name == known
    assert find_bundle(known).in_zoo
    assert find_bundle(str(tiny.path)).digest == find_bundle(tiny.path).digest == tiny.digest
    assert not tiny.in_zoo
    assert known in [bundle.name for bundle in list_bundles()]
    with pytest.raises(ModelBundleError, match=f"'no-such'.*{known}"):
        find_bundle("no-such")
    # A folder of the working directory does not hide the zoo's model; a path names it.
    monkeypatch.chdir(tiny.path.parent)
    tiny.path.rename(tiny.path.with_name(known))
    assert find_bundle(known).digest != tiny.digest
    assert find_bundle(f"./{known}").digest == tiny.digest
    assert not find_bundle(f"./{known}").in_zoo


def test_installed_zoo_wins_over_checkout(tiny, tmp_path, monkeypatch):
    installed = tmp_path / "site-packages" / "wsi_pipeline"
    installed.mkdir(parents=True)
    tiny.path.rename(installed / "other-name")
    (installed / "models").mkdir()
    (installed / "other-name").rename(installed / "models" / "tiny")
    monkeypatch.setattr(bundle_module, "__file__", str(installed / "bundle.py"))
    assert [bundle.name for bundle in list_bundles()] == ["tiny"]
    # What is being written there is no bundle yet.
    (installed / "models" / ".new.partial").mkdir()
    (installed / "models" / ".new.partial" / "spec.json").write_text(SPEC.to_json())
    assert [bundle.name for bundle in list_bundles()] == ["tiny"]
