"""Every recipe that comes with the project learns, on real tiles wherever the data kit has some.

At small width and few steps: the loss falls, and the network beats chance by the margin that is
stated beside each. Chance is 0.5 for the balanced accuracy of pixels and 1 / classes for classes.
"""

import json
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from training_fixtures import write_discs, write_recipe

from wsi_pipeline.training.fit import train
from wsi_pipeline.training.recipe import read_recipe
from wsi_pipeline.training.scoring import score_bundle

ROOT = Path(__file__).parent.parent
RECIPES = ROOT / "workflows" / "recipes"
DATA = Path(os.environ.get("WSI_DATA", ROOT.parent / "shared" / "data"))
kit = pytest.mark.skipif(
    not (DATA / "glands_ebhi").is_dir(), reason=f"no data kit at {DATA} (set WSI_DATA)"
)

SMALL = [
    "model.options={widths=[8,12,16,24],blocks=[1,1,1,1],head_width=8,patch_width=16}",
    "schedule.steps=90",
    'schedule.optimiser="adamw"',
    "schedule.learning_rate=0.005",
    'schedule.decay="cosine"',
    "schedule.warmup=10",
    "schedule.ema=0.9",
    'schedule.precision="fp32"',  # the same on processors with and without bf16
    "batches.size=8",
    "batches.crop_px=64",
    "batches.workers=1",
    "validation.every=90",
    "validation.images=4",  # the scores below are of bundles
    "validation.pictures=1",
]
EBHI = 'layout="ebhi", path="$WSI_FEW", mpp=1.05'
DSB = f'{{layout="dsb2018", path="{DATA}/nuclei_dsb2018_CC0", mpp=0.25, task="nuclei"}}'
GLAND = f'{{{EBHI}, heads={{gland-class=""}}, options={{lumen=false}}, task="gland"}}'
LUMEN = f'{{{EBHI}, heads={{gland-class="", gland=""}}, task="lumen"}}'
PATIENTS = 6
"""Tiles a class of EBHI-Seg, each of another patient: reading all 999 takes too long."""
KATHER_CLASSES = {
    "adipose": "adipose", "background": "background", "debris": "debris",
    "lymphocytes": "inflammatory", "mucus": "mucous", "smooth muscle": "muscle",
    "normal mucosa": "normal epithelium", "stroma": "stroma",
    "tumour epithelium": "abnormal epithelium",
}  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def few(tmp_path_factory):
    """Link a few tiles of every class."""
    folder = tmp_path_factory.mktemp("ebhi")
    for images in sorted((DATA / "glands_ebhi").glob("*/image")):
        own = {path.name.partition("-")[0].upper(): path for path in sorted(images.iterdir())}
        for path in list(own.values())[:PATIENTS]:
            mask = path.parent.parent / "label" / f"{path.stem}.png"
            for source in (path, mask):
                link = folder / source.relative_to(DATA / "glands_ebhi")
                link.parent.mkdir(parents=True, exist_ok=True)
                link.symlink_to(source)
    return folder


@pytest.fixture(autouse=True)
def variables(few, monkeypatch, tmp_path):
    for name in ("WSI_DATASETS", "WSI_BUNDLE"):
        monkeypatch.setenv(name, str(tmp_path / "bundle"))
    monkeypatch.setenv("WSI_FEW", str(few))
    monkeypatch.setenv("WSI_DATA", str(DATA))


def kather(classes: bool) -> str:
    mapped = ", ".join(f'"{a}"="{b}"' for a, b in KATHER_CLASSES.items())
    names = f", classes={{tissue={{{mapped}}}}}" if classes else ""
    return (
        f'{{layout="kather", path="{DATA}/tissue_kather", task="tissue", crop_px=144, '
        f"split=false{names}}}"
    )


def learn(name, out, *overrides):
    """Train a recipe in small; return its losses by step."""
    recipe = read_recipe(RECIPES / f"{name}.toml", [*SMALL, *overrides])
    train(recipe, out, device="cpu")
    log = (out.with_name(out.name + ".training") / "log.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in log]
    return [row["losses"] for row in rows if "losses" in row]


def fell(losses, head, share=0.9):
    """Whether a head's loss ended below a share of what it began with."""
    own = [
        sum(v for k, v in row.items() if k.startswith(f"{head}/"))
        for row in losses
        if any(k.startswith(f"{head}/") for k in row)
    ]
    return np.mean(own[-8:]) < share * np.mean(own[:8])


def balanced(found, head):
    scores = found.heads[head]
    return (scores["pixel_recall"].value + scores["pixel_specificity"].value) / 2


def judged(out, at_most=24):
    return score_bundle(out, out / "train.toml", resamples=0, device="cpu", at_most=at_most)


@pytest.mark.real
@kit
@pytest.mark.parametrize(
    ("name", "head", "source", "margin"),
    [
        ("nuclei", "nuclei", DSB, 0.15),
        ("gland", "gland", GLAND, 0.1),
        ("lumen", "lumen", LUMEN, 0.2),
        ("ebhi-seg", "gland", GLAND, 0.1),
    ],
)
def test_single_tasks(name, head, source, margin, tmp_path):
    out = tmp_path / name
    losses = learn(name, out, f"source=[{source}]")
    assert fell(losses, head)
    assert balanced(judged(out), head) > 0.5 + margin


@pytest.mark.real
@kit
@pytest.mark.parametrize("name", ["cerberus", "cerberus-plus"])
def test_several_tasks_at_once(name, tmp_path):
    out = tmp_path / name
    losses = learn(
        name,
        out,
        f"source=[{DSB}, {GLAND}, {LUMEN}, {kather(classes=True)}]",
        "start={}",
        "schedule.steps=240",
        "validation.every=240",
        "batches.tasks={nuclei=0.4, gland=0.18, lumen=0.18, tissue=0.24}",
        # the kit's nuclei have no classes: a head that nobody labels would be refused
        f"model.heads={json.dumps(['nuclei', 'gland', 'lumen', 'tissue'])}"
        if name == "cerberus-plus"
        else 'model.heads=[{name="nuclei", kind="instance", object_kind="nucleus", '
        'rules={by="run", min_core_um2=2.0, grow_um=1.5}}, "gland", "lumen", "tissue"]',
        "heads={"
        + ", ".join(
            f"{head}={{contour={json.dumps(name == 'cerberus-plus')}, element_um={element_um}, "
            f"channel_weights=[1.0, {inner}, 1.0]}}"
            for head, element_um, inner in (
                ("nuclei", 1.5, 3.0),  # few pixels: so few steps would find none of them
                ("gland", 5.5, 1.0),
                ("lumen", 1.5, 3.0),
            )
        )
        + "}",
    )
    assert {key.split("/")[0] for row in losses for key in row} == {
        "nuclei", "gland", "lumen", "tissue",
    }  # fmt: skip
    for head in ("nuclei", "gland", "lumen", "tissue"):
        assert fell(losses, head, 0.97 if head == "tissue" else 0.9), head
    found = judged(out)
    for head, margin in (("nuclei", 0.1), ("gland", 0.05), ("lumen", 0.1)):
        assert balanced(found, head) > 0.5 + margin, head


@pytest.mark.real
@kit
def test_patch_classes(tmp_path):
    # 25 tiles of nine classes are too few to leave some out: it must at least know these
    out = tmp_path / "tissue"
    losses = learn(
        "tissue",
        out,
        f"source=[{kather(classes=False)}]",
        "batches.crop_px=144",
        "schedule.steps=180",
    )
    assert fell(losses, "tissue")
    found = score_bundle(out, out / "train.toml", part="train", resamples=0, device="cpu")
    assert found.heads["tissue"]["accuracy"].value > 1 / 9 + 0.25


@pytest.mark.real
@kit
def test_the_example_of_the_documentation(tmp_path):
    out = tmp_path / "small"
    few_tiles = 'source.1.path="$WSI_FEW"'
    losses = learn("small", out, few_tiles, "schedule.steps=100", "validation.every=50")
    for head in ("nuclei", "gland", "lumen"):
        assert fell(losses, head, 0.9), head
    assert (out / "examples.png").is_file()


def coloured_discs(folder, seed=0):
    """Write discs of two kinds, which differ in colour: their ids, and their classes."""
    write_discs(folder, 8, seed=seed)
    (folder / "classes").mkdir()
    for path in sorted((folder / "instances").glob("*.png")):
        ids = np.array(Image.open(path)).astype(np.int32)
        pixels = np.array(Image.open(folder / "images" / path.name)).astype(int)
        green = (ids > 0) & (ids % 2 == 0)
        pixels[green] += (-40, 60, -60)
        Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8)).save(
            folder / "images" / path.name
        )
        classes = np.where(ids > 0, np.where(green, 3, 2), 0).astype(np.uint8)
        Image.fromarray(classes).save(folder / "classes" / path.name)
    names = ("none", "neutrophil", "epithelial", "lymphocyte")
    (folder / "classes" / "classes.txt").write_text("\n".join(names) + "\n")
    return folder


def test_nuclear_subtypes_on_top_of_a_frozen_network(tmp_path):
    data = coloured_discs(tmp_path / "discs")
    recipe = write_recipe(tmp_path, data)
    first = [
        "schedule.steps=80",
        "validation.every=80",
        "batches.size=8",
        "model.options={widths=[8,12,16,24],blocks=[1,1,1,1],head_width=8}",
        'source.0.heads={nuclei-class=""}',
    ]
    train(read_recipe(recipe, first), tmp_path / "bundle", device="cpu")
    out = tmp_path / "subtypes"
    losses = learn(
        "subtyping",
        out,
        f'source=[{{layout="plain", path="{data}"}}]',
        "model.options={}",
        "split={validation=0.3}",
        "batches.crop_px=32",
        "schedule.steps=200",
        "validation.every=200",
        "schedule.learning_rate=0.01",
    )
    assert fell(losses, "nuclei-class")
    from safetensors.torch import load_file

    before = load_file(tmp_path / "bundle" / "weights.safetensors")
    after = load_file(out / "weights.safetensors")
    for name, tensor in before.items():
        assert (after[name] == tensor).all(), name
    found = judged(out)
    assert found.heads["nuclei-class"]["accuracy_of_found"].value > 0.5 + 0.3


XML = "<annotation>{}</annotation>"
OBJECT = (
    "<object><name>ring_cell_cancer</name><bndbox><xmin>{}</xmin><ymin>{}</ymin>"
    "<xmax>{}</xmax><ymax>{}</ymax></bndbox></object>"
)


def test_signet_rings_by_their_centres(tmp_path):
    rng = np.random.default_rng(0)
    folder = tmp_path / "DigestPath"
    y, x = np.mgrid[:192, :192]
    for number in range(10):
        part = "sig-train-pos" if number < 8 else "sig-train-neg"
        (folder / part).mkdir(parents=True, exist_ok=True)
        pixels = np.full((192, 192, 3), (226, 170, 200), np.float64)
        boxes = []
        for cx, cy in ((40, 40), (140, 50), (60, 140), (150, 150)) if number < 8 else ():
            cx, cy = cx + rng.uniform(-14, 14), cy + rng.uniform(-14, 14)
            pixels[np.hypot(x - cx, y - cy) < 16] = (240, 238, 244)
            pixels[np.hypot(x - cx - 10, y - cy) < 8] = (90, 50, 120)
            boxes.append(OBJECT.format(*(round(v) for v in (cx - 18, cy - 18, cx + 18, cy + 18))))
        noisy = np.clip(pixels + rng.normal(0, 6, pixels.shape), 0, 255).astype(np.uint8)
        stem = folder / part / f"2018-{number}_1_1"
        Image.fromarray(noisy).save(f"{stem}.jpeg", quality=95)
        if boxes:
            Path(f"{stem}.xml").write_text(XML.format("".join(boxes)))
    start = write_recipe(tmp_path, write_discs(tmp_path / "discs"))
    train(
        read_recipe(start, ["model.options={widths=[8,12,16,24],blocks=[1,1,1,1],head_width=8}"]),
        tmp_path / "bundle",
        device="cpu",
    )
    out = tmp_path / "rings"
    losses = learn(
        "signet-ring",
        out,
        f'source=[{{layout="digestpath", path="{folder}", options={{complete=true}}}}]',
        'freeze={thaw={"encoder"=20, "project"=20}}',
        "model.options={}",
        "schedule.steps=140",
        "validation.every=140",
        "split={validation=0.3}",
    )
    assert fell(losses, "signet-ring", 0.6)
    scores = judged(out).heads["signet-ring"]
    assert scores["ap"].value > 0.5  # chance, boxes anywhere, is below 0.05
    assert scores["froc"].value > 0.5
