"""The bundles of the zoo: complete, installed, as their table and cards say; the baseline."""

from __future__ import annotations

import dataclasses
import json
import re
from configparser import ConfigParser
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.zoo_table import README, updated, zoo_section
from wsi_pipeline.bundle import find_bundle, list_bundles
from wsi_pipeline.geometry import Box
from wsi_pipeline.synth.world import World

SIDE = 640


@cache
def scene(seed=4):
    """A tile of simple tissue: RGB, and where the nuclei, the gland and its lumen are.

    One crypt (pale lumen, ring of nuclei side by side) in pink stroma with lone round
    nuclei; Beer and Lambert's law with the usual stain vectors.
    """
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:SIDE, :SIDE] + 0.5
    haematoxylin = np.full((SIDE, SIDE), 0.05)
    eosin = np.full((SIDE, SIDE), 0.45)
    radius = np.hypot(x - 320, y - 320)
    gland, lumen = radius < 100, radius < 40
    haematoxylin[gland], eosin[gland] = 0.25, 0.35
    wall = (radius > 72) & (radius < 92)
    haematoxylin[wall] = 0.95
    haematoxylin[lumen], eosin[lumen] = 0.0, 0.0
    centres = []
    for _ in range(3000):
        centre = rng.uniform(20, SIDE - 20, 2)
        clear = all(np.hypot(*(centre - other)) > 28 for other in centres)
        if clear and np.hypot(*(centre - 320)) > 125:
            centres.append(centre)
    nuclei = np.zeros((SIDE, SIDE), np.int32)
    for label, centre in enumerate(centres, 1):
        nuclei[np.hypot(x - centre[0], y - centre[1]) < 7] = label
    haematoxylin[nuclei > 0] = 1.1
    od = haematoxylin[..., None] * [0.65, 0.70, 0.29] + eosin[..., None] * [0.07, 0.99, 0.11]
    image = 245 * np.exp(-od) + rng.normal(0, 2, od.shape)
    return np.clip(image + 0.5, 0, 255).astype(np.uint8), nuclei, np.array(centres), gland, lumen


def maps_of(network, image):
    x = torch.from_numpy(image).permute(2, 0, 1)[None].float()
    with torch.inference_mode():
        return {name: map_.softmax(1)[0].numpy() for name, map_ in network(x).items()}


@pytest.fixture(scope="module")
def baseline():
    return find_bundle("stain-baseline")


@pytest.fixture(scope="module")
def network(baseline):
    return baseline.load_network()


def test_every_bundle_of_the_zoo_is_whole():
    bundles = list_bundles()
    assert bundles
    for bundle in bundles:
        assert bundle.path.name == bundle.name
        card = (bundle.path / "card.md").read_text()
        assert card.startswith(f"# {bundle.name}\n")
        for picture in re.findall(r"!\[[^]]*\]\(([^)]*)\)", card):
            assert (bundle.path / picture).is_file(), f"{bundle.name}: {picture}"
        assert json.loads((bundle.path / "metrics.json").read_text())
        assert bundle.name in (bundle.path.parent / "README.md").read_text()
        bundle.load_network()


def test_the_table_of_the_zoo_is_what_the_bundles_say():
    text = README.read_text(encoding="utf-8")
    section = zoo_section(list_bundles())
    assert updated(text, section) == text, "run python benchmarks/zoo_table.py"
    for bundle in list_bundles():
        assert f"[{bundle.name}]({bundle.name}/card.md)" in section


def test_scores_of_other_weights_do_not_get_into_the_table(baseline, tmp_path):
    other = dataclasses.replace(baseline, digest="0" * 64)
    with pytest.raises(SystemExit, match="of other weights"):
        zoo_section((other,))
    metrics = json.loads((baseline.path / "metrics.json").read_text())
    found = metrics["evaluations"]["MoNuSeg"]["heads"]["nuclei"]["pq"]
    cells = zoo_section((baseline,)).splitlines()[2].split(" | ")
    assert cells[8] == f"{found['value']:.3f} ({found['low']:.3f} - {found['high']:.3f}), MoNuSeg"
    assert cells[9] == "not measured"


def test_every_file_of_the_zoo_is_installed():
    """What package_data names, against what lies in the folders: nothing hidden, no deeper."""
    config = ConfigParser()
    config.read(README.parents[1] / "setup.cfg")
    patterns = config["options.package_data"]["wsi_pipeline.models"].split()
    files = [p.relative_to(README.parent) for p in README.parent.rglob("*") if p.is_file()]
    assert any(path.name == "golden.json" for path in files)
    for path in files:
        matched = [p for p in patterns if path.match(p) and len(Path(p).parts) == len(path.parts)]
        assert matched, f"{path} would not be installed"
        assert not any(part.startswith(".") for part in path.parts), path


@pytest.mark.parametrize("name", [bundle.name for bundle in list_bundles()])
def test_a_halo_is_wide_enough(name):
    """What a tile shows is what the slide shows, up to its edges, where seams would be.

    A cerberus-lite whose gland and lumen heads had learnt for 2,400 steps was up to 0.3 apart
    with a halo of 64 px, 0.07 with 96, and 0.02 with 112.
    """
    bundle = find_bundle(name)
    network, halo, side = bundle.load_network(), bundle.spec.halo_px, 96
    world = World.make(seed=1, mpp=bundle.spec.mpp, size=(4096, 4096))
    margin = max(208, halo)
    box = Box(x=1000, y=700, width=side + 2 * margin, height=side + 2 * margin)
    image = world.draw(box, world.scene(box))
    inner = slice(margin - halo, margin + side + halo)
    whole, part = maps_of(network, image), maps_of(network, image[inner, inner])
    for head, map_ in part.items():
        scale = image.shape[0] // whole[head].shape[1]
        kept = slice(halo // scale, (halo + side) // scale)
        place = slice(margin // scale, (margin + side) // scale)
        apart = np.abs(map_[:, kept, kept] - whole[head][:, place, place])
        assert apart.max() <= 0.1, f"{head}: {apart.max():.3f} with a halo of {halo} px"


def test_the_card_says_what_the_baseline_is(baseline):
    card = (baseline.path / "card.md").read_text()
    assert "no learned weights" in card
    assert "BSD-3-Clause" in card
    assert "Not for" in card
    assert f"{baseline.spec.halo_px} pixels" in card
    assert baseline.spec.instance_heads == baseline.spec.heads
    metrics = json.loads((baseline.path / "metrics.json").read_text())
    real = metrics["evaluations"]["MoNuSeg"]["heads"]["nuclei"]["pq"]
    for number in real.values():
        assert f"{number:.3f}" in card


def test_it_finds_what_is_in_the_scene(network):
    image, nuclei, centres, gland, lumen = scene()
    maps = maps_of(network, image)
    assert len(centres) > 50
    _, inner, contour = maps["nuclei"]
    for label, (x, y) in enumerate(centres, 1):
        assert inner[int(y), int(x)] > 0.5, label
        rows, columns = np.nonzero(nuclei == label)
        y0, x0 = rows.min() - 4, columns.min() - 4
        window = np.s_[y0 : rows.max() + 5, x0 : columns.max() + 5]
        weight = inner[window] + 0.5 * contour[window]
        yy, xx = np.mgrid[: weight.shape[0], : weight.shape[1]] + 0.5
        offset = np.hypot((weight * xx).sum() / weight.sum() + x0 - x,
                          (weight * yy).sum() / weight.sum() + y0 - y)  # fmt: skip
        assert offset < 0.5, "centroid bias in pixels"
    stroma = (nuclei == 0) & ~gland
    assert (inner[stroma] > 0.5).mean() < 0.01
    assert inner[lumen].max() < 0.5
    for name, truth in (("gland", gland), ("lumen", lumen)):
        _, inner, contour = maps[name]
        found = inner + (contour if name == "gland" else 0) > 0.5
        truth = truth[::2, ::2]
        assert (found & truth).sum() / (found | truth).sum() > 0.75, name


def test_probabilities_are_probabilities(network):
    image, *_ = scene()
    for map_ in maps_of(network, image).values():
        assert np.isfinite(map_).all()
        assert map_.sum(0) == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("offset", [(0, 0), (64, 96)])
def test_a_tile_with_its_halo_sees_what_the_slide_sees(baseline, network, offset):
    """The interior of a tile equals the same place of a larger image, everywhere."""
    image, *_ = scene()
    image = np.tile(image, (2, 2, 1))[:1280, :1280]
    image = np.random.default_rng(0).integers(0, 20, image.shape, np.uint8) + image // 2 + 90
    halo, side = baseline.spec.halo_px, 128
    whole = maps_of(network, image)
    y, x = 384 + offset[0], 384 + offset[1]
    window = image[y - halo : y + side + halo, x - halo : x + side + halo]
    part = maps_of(network, window)
    for name, map_ in part.items():
        scale = window.shape[0] // map_.shape[1]
        kept = map_[
            :, halo // scale : (halo + side) // scale, halo // scale : (halo + side) // scale
        ]
        place = whole[name][:, y // scale : (y + side) // scale, x // scale : (x + side) // scale]
        assert np.abs(kept - place).max() < 1 / 255, name


def test_glass_is_empty(network):
    glass = np.full((256, 256, 3), 244, np.uint8)
    for name, map_ in maps_of(network, glass).items():
        assert map_[1:].max() < 0.01, name
