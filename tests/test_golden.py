"""Golden tiles: every bundle still says what it said, and a bundle that does not is found out."""

from __future__ import annotations

import json
import re
import shutil

import numpy as np
import pytest
import torch
from test_lite import GLAND, KINDS, NUCLEI, build, lite
from torch import nn

from wsi_pipeline import golden
from wsi_pipeline.bundle import default_bundle, find_bundle, list_bundles, open_bundle, save_bundle
from wsi_pipeline.errors import JobError, ModelBundleError
from wsi_pipeline.golden import (
    TOLERANCES,
    check_golden,
    compare,
    golden_tiles,
    observe,
    precisions,
    read_golden,
    write_golden,
)

ZOO = [bundle.name for bundle in list_bundles()]
CPU = [(name, how) for name in ZOO for how in precisions(find_bundle(name).spec, "cpu")]
CUDA = [(name, how) for name in ZOO for how in precisions(find_bundle(name).spec, "cuda")]


@pytest.mark.parametrize(("name", "precision"), CPU)
def test_every_bundle_says_what_it_said(name, precision):
    assert check_golden(find_bundle(name), device="cpu", precision=precision) == []


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize(("name", "precision"), CUDA)
def test_every_bundle_says_the_same_on_a_gpu(name, precision):
    assert check_golden(find_bundle(name), device="cuda", precision=precision) == []


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    spec = lite((NUCLEI, KINDS, GLAND), scales={"gland": 4})
    folder = tmp_path_factory.mktemp("zoo") / "cerberus-lite"
    bundle = save_bundle(folder, spec, build(spec), card="# cerberus-lite\n")
    write_golden(bundle)
    return bundle


@pytest.fixture(scope="module", params=["tiny", default_bundle("cpu")])
def known(request, tiny):
    """A bundle and what is expected of it: one that is always the same, and the default."""
    bundle = tiny if request.param == "tiny" else find_bundle(request.param)
    return bundle, read_golden(bundle)["tiles"]


def test_the_tiles_show_what_they_should():
    tiles = golden_tiles(0.5)
    assert {name: tile.shape for name, tile in tiles.items()} == {
        "tissue": (384, 384, 3),
        "blank": (192, 192, 3),
    }
    objects = observe_baseline()["tissue"]["objects"]
    assert objects["nucleus"] > 200
    assert objects["gland"] >= 2
    assert objects["lumen"] >= 3
    blank = tiles["blank"].astype(int)
    assert (blank.max(2) - blank.min(2)).max() < 30, "grey: glass and black ink, no tissue"
    assert (blank.mean(2) > 230).mean() > 0.5
    assert (blank.mean(2) < 80).mean() > 0.2


def observe_baseline():
    bundle = find_bundle("stain-baseline")
    return observe(bundle.spec, bundle.load_network())


def test_the_tiles_are_drawn_the_same_again():
    first = golden_tiles(0.5)
    golden_tiles.cache_clear()
    again = golden_tiles(0.5)
    assert all(np.array_equal(first[name], again[name]) for name in first)
    assert not np.array_equal(golden_tiles(0.25)["tissue"], first["tissue"])


def test_statistics_are_those_of_the_maps(tiny):
    """Against numpy on the maps, for a map whose side is no multiple of 8, and for classes."""
    plane = np.random.default_rng(0).random((27, 16))
    found = golden._statistics(plane)
    assert found["mean"] == pytest.approx(plane.mean(), abs=1e-6)
    assert found["share"] == pytest.approx((plane > 0.5).mean(), abs=1e-6)
    edges = [0, 3, 6, 10, 13, 16, 20, 23, 27]
    for i in range(8):
        for j in range(8):
            cell = plane[edges[i] : edges[i + 1], 2 * j : 2 * j + 2]
            assert found["cell"][i][j] == pytest.approx(cell.mean(), abs=1e-5)
    maps = read_golden(tiny)["tiles"]["tissue"]["maps"]
    assert set(maps) == {
        *(f"{head}/prob/inner" for head in ("nuclei", "gland")),
        *(f"{head}/prob/contour" for head in ("nuclei", "gland")),
        *(f"kinds/class/{name}" for name in KINDS.classes),
    }
    shares = [maps[f"kinds/class/{name}"]["mean"] for name in KINDS.classes]
    assert sum(shares) == pytest.approx(1, abs=1e-5)
    assert len([share for share in shares if share > 0.01]) > 1


class Altered(nn.Module):
    """A network with something wrong about it."""

    def __init__(self, network, before=None, after=None):
        super().__init__()
        self.network, self.before, self.after = network, before, after

    def forward(self, x_BCHW):
        logits = self.network(self.before(x_BCHW) if self.before else x_BCHW)
        return {n: self.after(n, map_) if self.after else map_ for n, map_ in logits.items()}


def swapped(name, logits):
    """Inner and contour of one head, mistaken for each other."""
    return logits[:, [0, 2, 1]] if name == "nuclei" else logits


FAULTS = {
    "input 0..1": {"before": lambda x: x / 255},
    "input 1 % brighter": {"before": lambda x: x * 1.01},
    "BGR": {"before": lambda x: x.flip(1)},
    "upside down": {"before": lambda x: x.flip(2), "after": lambda _, map_: map_},
    "channels swapped": {"after": swapped},
    "logits 2 % larger": {"after": lambda _, map_: map_ * 1.02},
    "one pixel aside": {"after": lambda _, map_: map_.roll(1, -1)},
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_network_with_a_fault_is_found_out(known, fault):
    bundle, tiles = known
    network = Altered(bundle.load_network(), **FAULTS[fault]).eval()
    assert compare(tiles, observe(bundle.spec, network)), fault


def test_without_a_fault_none_is_found(known):
    bundle, tiles = known
    assert compare(tiles, observe(bundle.spec, Altered(bundle.load_network()).eval())) == []


@pytest.mark.parametrize(("place", "factor"), [(0, 1.03), (-1, 1.3)])
def test_altered_weights_are_found_out_by_what_they_say(known, place, factor):
    """One tensor, a little larger: seen in the statistics, whatever the digest says.

    The last one makes logits, and where a network is sure, larger logits change little.
    """
    bundle, tiles = known
    network = bundle.load_network()
    kernels = [t for t in network.state_dict().values() if t.ndim >= 2]
    kernels[place].mul_(factor)
    assert compare(tiles, observe(bundle.spec, network))


def test_a_single_bit_of_a_weight_file_is_found_out(tiny, tmp_path):
    how = {"device": "cpu", "precision": "fp32"}
    shutil.copytree(tiny.path, tmp_path / "cerberus-lite")
    assert check_golden(open_bundle(tmp_path / "cerberus-lite"), **how) == []
    weights = tmp_path / "cerberus-lite" / "weights.safetensors"
    content = bytearray(weights.read_bytes())
    content[-4] ^= 1  # the lowest bit of a number
    weights.write_bytes(content)
    (fault,) = check_golden(open_bundle(tmp_path / "cerberus-lite"), **how)
    assert "weights have changed" in fault


@pytest.mark.parametrize("precision", TOLERANCES)
@pytest.mark.parametrize("statistic", ["mean", "share", "cell"])
def test_each_precision_has_its_tolerance(tiny, precision, statistic):
    tiles = read_golden(tiny)["tiles"]
    allowed = getattr(TOLERANCES[precision], statistic)
    for times, faults in ((0.9, 0), (1.1, 1)):
        found = json.loads(json.dumps(tiles))
        own = found["blank"]["maps"]["gland/prob/contour"]
        if statistic == "cell":
            own["cell"][0][7] -= times * allowed
        else:
            own[statistic] -= times * allowed
        assert len(compare(tiles, found, precision)) == faults


def test_half_precision_is_not_float32(tiny):
    found = observe(tiny.spec, tiny.load_network(), precision="bf16")
    assert compare(read_golden(tiny)["tiles"], found, "fp32")


def test_every_statistic_is_compared(tiny):
    tiles = read_golden(tiny)["tiles"]

    def changed(change):
        found = json.loads(json.dumps(tiles))
        change(found["tissue"])
        return compare(tiles, found)

    inner = "nuclei/prob/inner"
    assert changed(lambda tile: None) == []
    for name in ("mean", "share"):
        (fault,) = changed(lambda tile, n=name: tile["maps"][inner].update({n: 0.9}))
        assert f"{inner} {name}" in fault
    (fault,) = changed(lambda tile: tile["maps"][inner]["cell"][7].__setitem__(3, 0.99))
    assert f"{inner} cell" in fault
    nan = float("nan")
    assert changed(lambda tile: tile["maps"][inner].update(mean=nan))
    assert changed(lambda tile: tile.update(colour=[nan, nan, nan]))
    assert changed(lambda tile: tile["objects"].update(nucleus=nan))
    (fault,) = changed(lambda tile: tile["objects"].update(nucleus=10_000))
    assert "10000 of kind nucleus" in fault
    (fault,) = changed(lambda tile: tile["maps"].pop(inner))
    assert "maps" in fault
    (fault,) = changed(lambda tile: tile.update(colour=[1, 2, 3]))
    assert "drawn differently" in fault
    one_more = tiles["tissue"]["objects"]["nucleus"] + 1
    assert changed(lambda tile: tile["objects"].update(nucleus=one_more)) == []


def spoilt(tiny, folder, change):
    """A copy of the bundle whose golden.json was changed."""
    shutil.copytree(tiny.path, folder / "cerberus-lite")
    bundle = open_bundle(folder / "cerberus-lite")
    content = json.loads((bundle.path / "golden.json").read_text())
    change(content)
    (bundle.path / "golden.json").write_text(json.dumps(content))
    return bundle


FP32 = {"device": "cpu", "precision": "fp32"}
INNER = "nuclei/prob/inner"


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda d: d.update(tiles={}), r"tiles \['tissue', 'blank'\], not \[\]"),
        (lambda d: d["tiles"].pop("blank"), r"tiles .*, not \['tissue'\]"),
        (lambda d: d["tiles"].update(x=d["tiles"]["blank"]), r"tiles .*, not .*'x'"),
        (lambda d: d["tiles"]["tissue"].update(objects={}), r"tissue: objects .*, not \[\]"),
        (lambda d: d["tiles"]["tissue"]["objects"].update(x=1), r"tissue: objects .*'x'"),
        (lambda d: d["tiles"]["tissue"].update(maps={}), r"tissue: maps .*, not \[\]"),
    ],
)
def test_golden_tiles_that_leave_something_out_do_not_pass(tiny, tmp_path, change, says):
    (fault,) = check_golden(spoilt(tiny, tmp_path, change), **FP32)
    assert re.match(says, fault)


@pytest.mark.parametrize(
    "change",
    [
        lambda d: d.update(tiles=[]),
        lambda d: d["tiles"].update(blank=None),
        lambda d: d["tiles"]["blank"].pop("objects"),
        lambda d: d["tiles"]["blank"].pop("colour"),
        lambda d: d["tiles"]["blank"].update(colour=[float("nan")] * 3),
        lambda d: d["tiles"]["blank"].update(colour=[]),
        lambda d: d["tiles"]["blank"]["objects"].update(nucleus=float("nan")),
        lambda d: d["tiles"]["blank"]["objects"].update(nucleus=float("inf")),
        lambda d: d["tiles"]["blank"]["objects"].update(nucleus="3"),
        lambda d: d["tiles"]["blank"]["objects"].update(nucleus=10**400),
        lambda d: d["tiles"]["blank"]["maps"][INNER].pop("mean"),
        lambda d: d["tiles"]["blank"]["maps"][INNER].update(mean=float("nan")),
        lambda d: d["tiles"]["blank"]["maps"][INNER].update(share="0.5"),
        lambda d: d["tiles"]["blank"]["maps"][INNER].update(share=True),
        lambda d: d["tiles"]["blank"]["maps"][INNER].update(cell=0.0),
        lambda d: d["tiles"]["blank"]["maps"][INNER].update(cell=[[0.0] * 8] * 7),
        lambda d: d["tiles"]["blank"]["maps"][INNER].update(cell=[[0.0] * 8] * 7 + [[0.0]]),
    ],
)
def test_golden_tiles_without_a_number_cannot_be_read(tiny, tmp_path, change):
    with pytest.raises(ModelBundleError, match=r"golden\.json cannot be read"):
        check_golden(spoilt(tiny, tmp_path, change), **FP32)


def test_a_precision_that_nothing_is_expected_in_is_refused(tiny):
    baseline = find_bundle("stain-baseline")
    with pytest.raises(JobError, match="stain-baseline is not held to bf16 on cpu: choose fp32"):
        check_golden(baseline, device="cpu", precision="bf16")
    with pytest.raises(JobError, match="not held to fp16 on cpu: choose fp32 or bf16"):
        check_golden(tiny, device="cpu", precision="fp16")


def test_golden_tiles_are_written_alike_and_missed_aloud(tiny, tmp_path):
    before = (tiny.path / "golden.json").read_bytes()
    write_golden(tiny)
    assert (tiny.path / "golden.json").read_bytes() == before
    bundle = save_bundle(tmp_path / "x", tiny.spec, tiny.load_network(), card="")
    assert read_golden(bundle) is None
    with pytest.raises(ModelBundleError, match="has no golden"):
        check_golden(bundle)
    (bundle.path / "golden.json").write_text("{}")
    with pytest.raises(ModelBundleError, match="cannot be read"):
        check_golden(bundle)


def test_every_bundle_of_the_zoo_has_golden_tiles():
    for bundle in list_bundles():
        assert read_golden(bundle)["sha256"] == bundle.digest, bundle.name
