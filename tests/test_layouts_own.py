"""Layouts read from miniature folders: Kather, EBHI-Seg, GG-pT1, plain, tables of objects."""

import json
import os
import pickle
from pathlib import Path

import geopandas as gpd
import numpy as np
import pytest
import shapely
from PIL import Image
from shapely.geometry import Polygon, box
from slide_fixtures import picture, write_slide

from wsi_pipeline.errors import DatasetError
from wsi_pipeline.training.annotation import IGNORE_CLASS, IGNORE_ID
from wsi_pipeline.training.layouts.ebhi import EBHI_CLASSES, derive_lumina, read_ebhi
from wsi_pipeline.training.layouts.kather import KATHER_CLASSES, read_kather
from wsi_pipeline.training.layouts.plain import read_plain
from wsi_pipeline.training.layouts.pt1 import read_pt1
from wsi_pipeline.training.layouts.tables import read_objects_labels

DATA = Path(os.environ.get("WSI_DATA", Path(__file__).parents[2] / "shared" / "data"))


def kit(name):
    folder = DATA / name
    if not folder.is_dir():
        pytest.skip(f"no {folder} (set WSI_DATA to the data kit)")
    return folder


def save(path, array):
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".npy":
        np.save(path, array)
    else:
        Image.fromarray(np.asarray(array)).save(path)
    return path


def rgb(height=20, width=30, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


# -- Kather ----------------------------------------------------------------------------------


def test_kather_sets_are_train_and_test(tmp_path):
    for name in ("NCT-CRC-HE-100K/ADI/ADI-AAA", "NCT-CRC-HE-100K/TUM/TUM-TCGA-BBB",
                 "CRC-VAL-HE-7K/MUS/MUS-TCGA-CCC"):  # fmt: skip
        save(tmp_path / f"{name}.tif", rgb())
    data = read_kather(tmp_path)
    assert data.labels == {"tissue": KATHER_CLASSES}
    facts = {(i.name, i.patient, i.part, i.group) for i in data.items}
    assert facts == {
        ("NCT-CRC-HE-100K/ADI-AAA", "ADI-AAA", "train", "adipose"),
        ("NCT-CRC-HE-100K/TUM-TCGA-BBB", "TCGA-BBB", "train", "tumour epithelium"),
        ("CRC-VAL-HE-7K/MUS-TCGA-CCC", "TCGA-CCC", "test", "smooth muscle"),
    }
    image = pickle.loads(pickle.dumps(data.items[0])).load()
    assert (image.labels["tissue"].id, image.mpp) == (5, 0.5)


def test_kather_ids_are_alphabetical(tmp_path):
    codes = ["TUM", "STR", "NORM", "MUS", "MUC", "LYM", "DEB", "BACK", "ADI"]
    for code in codes:
        save(tmp_path / code / f"{code}-X.png", rgb())
    items = {i.name: i for i in read_kather(tmp_path, mpp=0.6).items}
    ids = [items[f"{code}-X"].load().labels["tissue"].id for code in sorted(codes)]
    assert ids == list(range(9))
    assert items["TUM-X"].load().mpp == 0.6


def test_kather_that_is_none(tmp_path):
    with pytest.raises(DatasetError, match="neither folders nor images named after the classes"):
        read_kather(tmp_path)
    save(tmp_path / "CAT-1.png", rgb())
    with pytest.raises(DatasetError, match=r"CAT-1.png: the name begins with none of ADI, BACK"):
        read_kather(tmp_path)
    for form in ("", "-NONORM"):
        save(tmp_path / f"NCT-CRC-HE-100K{form}/ADI/ADI-A.tif", rgb())
    with pytest.raises(DatasetError, match="one set twice"):
        read_kather(tmp_path)


@pytest.mark.real
def test_kather_kit():
    data = read_kather(kit("tissue_kather"))
    assert len(data.items) == 25
    assert {i.group for i in data.items} == set(KATHER_CLASSES)
    for item in data.items[:3]:
        label = item.load().labels["tissue"]
        assert label.classes[label.id] == item.group


# -- EBHI-Seg --------------------------------------------------------------------------------


def ebhi_tile(folder, name, mask, image=None):
    image = np.full((*mask.shape, 3), 120, np.uint8) if image is None else image
    save(folder / "image" / f"{name}.png", image)
    save(folder / "label" / f"{name}.png", mask)


def test_ebhi_folders_patients_and_classes(tmp_path):
    mask = np.full((30, 30), 255, np.uint8)
    mask[:, 15] = 0
    for n, folder in enumerate(("Adenocarcinoma", "High-grade IN", "Low-grade_IN", "normal",
                                "Polyp", "Serrated  Adenoma")):  # fmt: skip
        ebhi_tile(tmp_path / folder, f"GTxc{n}-1-400-001", mask)
    data = read_ebhi(tmp_path, mpp=1.0)
    assert data.labels == {"gland": (), "gland-class": EBHI_CLASSES, "lumen": ()}
    assert {i.group for i in data.items} == set(EBHI_CLASSES[1:])
    assert {i.patient for i in data.items} == {f"GTXC{n}" for n in range(6)}
    item = next(i for i in data.items if i.group == "low-grade IN")
    labels = pickle.loads(pickle.dumps(item)).load().labels
    assert (labels["gland"].ids[:, :15] == 1).all()
    assert (labels["gland"].ids[:, 16:] == 2).all()
    assert (labels["gland-class"].ids == np.where(mask > 0, 3, 0)).all()
    assert set(read_ebhi(tmp_path, mpp=1.0, lumen=False).items[0].load().labels) == {
        "gland",
        "gland-class",
    }


def test_ebhi_rules_are_in_micrometres(tmp_path):
    mask = np.zeros((200, 200), np.uint8)
    mask[10:110, 10:110] = 255
    mask[20:90, 20:90] = 0  # 70 x 70 px
    mask[150:157, 150:158] = 1  # 56 px
    ebhi_tile(tmp_path / "Polyp", "A-1", mask)
    whole, fine = (
        read_ebhi(tmp_path, mpp=mpp).items[0].load().labels["gland"].ids for mpp in (1.0, 1.04)
    )
    assert (whole[10:110, 10:110] == 1).all()  # a hole of 4900 um2 is filled
    assert (whole[150:157, 150:158] == 0).all()  # an object of 56 um2 is dropped
    assert (fine[20:90, 20:90] == 0).all()  # 5300 um2
    assert (fine[150:157, 150:158] == 2).all()  # 60.6 um2


def test_ebhi_bays_at_the_edge_are_no_holes(tmp_path):
    mask = np.ones((60, 60), np.uint8)
    mask[0:20, 20:40] = 0
    ebhi_tile(tmp_path / "Polyp", "A-1", mask)
    assert (read_ebhi(tmp_path, mpp=1.0).items[0].load().labels["gland"].ids == mask).all()


def test_ebhi_gland_that_touches_by_a_corner_is_another(tmp_path):
    mask = np.zeros((40, 40), np.uint8)
    mask[5:20, 5:20] = mask[20:35, 20:35] = 9
    ebhi_tile(tmp_path / "Polyp", "A-1", mask)
    assert read_ebhi(tmp_path, mpp=1.0).items[0].load().labels["gland"].ids.max() == 2


def crypt(mpp, white=240):
    """A gland of 60 um with a lumen of 20 um, a goblet cell near its wall, glass outside."""
    y, x = (np.mgrid[: round(100 / mpp), : round(100 / mpp)] + 0.5) * mpp
    glands = (np.hypot(x - 50, y - 50) < 30).astype(np.int32)
    image = np.full((*x.shape, 3), 110, np.uint8)
    lumen, goblet = np.hypot(x - 50, y - 50) < 10, np.hypot(x - 50, y - 74) < 3
    glass = y < 8
    image[lumen | goblet | glass] = white
    return image, glands, lumen, goblet, glass


@pytest.mark.parametrize("mpp", [0.5, 1.05])
def test_derived_lumen_is_bright_and_deep(mpp):
    image, glands, lumen, goblet, glass = crypt(mpp)
    ids = derive_lumina(image, glands, mpp)
    assert ids.max() == 1
    found, sure = ids == 1, lumen.sum()
    assert (found & lumen).sum() / sure > 0.85
    assert not (found & ~lumen).sum() > 0.1 * sure
    assert (ids[goblet] == 0).all()
    assert (ids[glass][:3] == IGNORE_ID).all()


def test_derived_lumen_needs_white_room_and_depth():
    image, glands, lumen, _, _ = crypt(0.5, white=180)
    ids = derive_lumina(image, glands, 0.5)
    assert ids.max() <= 0
    assert (ids[lumen] == IGNORE_ID).mean() > 0.8  # a dim tile says nothing of its bright pixels
    image, glands, lumen, _, _ = crypt(0.5)
    assert derive_lumina(image, np.zeros_like(glands), 0.5).max() <= 0
    shifted = np.roll(glands, 70, axis=1)  # the bright disc is at the wall now
    assert derive_lumina(image, shifted, 0.5).max() <= 0
    assert derive_lumina(image, np.ones_like(glands), 0.5).max() >= 1  # all gland: no wall


def test_mucin_along_the_wall_is_background():
    image, glands, _, _, _ = crypt(0.5, white=110)
    depth = 30 - np.hypot(*((np.mgrid[:200, :200] + 0.5) * 0.5 - 50))
    band = (depth > 2.5) & (depth < 5.5)
    image[band] = image[:4] = 240
    ids = derive_lumina(image, glands, 0.5)
    assert band.sum() * 0.25 > 400
    assert ids.max() <= 0
    assert (ids[glands > 0] == 0).all()


@pytest.mark.parametrize(
    ("spoil", "how", "message"),
    [
        (lambda f: None, {}, "does not state how large a pixel is.*1.05"),
        (lambda f: (f / "Polyp/label/A-1.png").unlink(), {"mpp": 1.0}, "A-1.png"),
        (lambda f: (f / "Polyp").rename(f / "Poly"), {"mpp": 1.0}, "no images in folders named"),
    ],
)
def test_ebhi_folders_that_do_not_fit(tmp_path, spoil, how, message):
    for name in ("A-1", "B-1"):
        ebhi_tile(tmp_path / "Polyp", name, np.ones((30, 30), np.uint8))
    spoil(tmp_path)
    with pytest.raises(DatasetError, match=message):
        read_ebhi(tmp_path, **how)


def test_ebhi_mask_of_another_size(tmp_path):
    ebhi_tile(tmp_path / "Polyp", "A-1", np.ones((30, 30), np.uint8), rgb(30, 31))
    with pytest.raises(DatasetError, match=r"label.A-1.png: .*'gland' is 30 x 30 px, the image 31"):
        read_ebhi(tmp_path, mpp=1.0).items[0].load()


@pytest.mark.real
def test_ebhi_kit():
    data = read_ebhi(kit("glands_ebhi"), mpp=1.05)
    assert len(data.items) == 999
    assert {i.group for i in data.items} == set(EBHI_CLASSES[1:])
    assert 160 < len({i.patient for i in data.items}) <= 178
    assert all(i.patient == i.patient.upper() for i in data.items)
    images = [item.load() for item in data.items[::100]]
    assert sum(image.labels["gland"].ids.max() for image in images) > 20
    assert sum(image.labels["lumen"].ids.max() for image in images) > 5
    for image in images:
        lumen, gland = (image.labels[head].ids for head in ("lumen", "gland"))
        assert (gland[lumen > 0] > 0).all()


# -- GG-pT1 ----------------------------------------------------------------------------------


def test_pt1_knows_nothing_beyond_the_gland(tmp_path):
    mask = np.zeros((20, 30), np.uint8)
    mask[5:15, 8:20] = 255
    for n, finding in ((0, "normal"), (3, "abnormal")):
        save(tmp_path / "img7" / f"img7_{n}_{finding}-image.jpg", rgb())
        save(tmp_path / "img7" / f"img7_{n}_{finding}-gt.png", mask)
    data = read_pt1(tmp_path, mpp=0.5)
    assert data.labels == {"gland": (), "gland-class": ("none", "normal", "dysplastic")}
    assert [(i.name, i.patient, i.group) for i in data.items] == [
        ("img7_0_normal", "img7", "normal"),
        ("img7_3_abnormal", "img7", "dysplastic"),
    ]
    labels = data.items[1].load().labels
    assert (labels["gland"].ids == np.where(mask, 1, IGNORE_ID)).all()
    assert (labels["gland-class"].ids == np.where(mask, 2, IGNORE_CLASS)).all()


def test_pt1_that_does_not_fit(tmp_path):
    with pytest.raises(DatasetError, match="has no img"):
        read_pt1(tmp_path, mpp=0.5)
    save(tmp_path / "img7" / "img7_0_normal-image.jpg", rgb())
    save(tmp_path / "img7" / "img7_0_normal-gt.png", np.zeros((20, 31), np.uint8))
    with pytest.raises(DatasetError, match=r"how large a pixel is.*0\.5"):
        read_pt1(tmp_path)
    with pytest.raises(DatasetError, match=r"normal-gt.png: .*31 x 20 px, the image 30 x 20"):
        read_pt1(tmp_path, mpp=0.5).items[0].load()
    save(tmp_path / "img7" / "img7_1_normal-image.jpg", rgb())
    with pytest.raises(DatasetError, match=r"img7_1_normal-image.jpg"):
        read_pt1(tmp_path, mpp=0.5)


@pytest.mark.real
def test_pt1_kit():
    data = read_pt1(kit("glands_pt1"), mpp=0.5)
    assert len(data.items) == 286
    assert {i.patient for i in data.items} == {f"img{n}" for n in range(11)}
    for item in data.items[::60]:
        assert set(np.unique(item.load().labels["gland"].ids)) == {IGNORE_ID, 1}


# -- plain -----------------------------------------------------------------------------------

IDS = np.arange(600, dtype=np.uint16).reshape(20, 30) % 7
KINDS = (np.arange(600).reshape(20, 30) % 3).astype(np.uint8)


@pytest.fixture
def plain(tmp_path):
    save(tmp_path / "images" / "a.png", rgb())
    save(tmp_path / "images" / "b.tif", rgb(seed=1))
    save(tmp_path / "instances" / "a.png", IDS)
    save(tmp_path / "instances" / "gland" / "b.npy", IDS.astype(np.int64))
    save(tmp_path / "classes" / "a.tif", KINDS)
    (tmp_path / "classes" / "classes.txt").write_text("none\nround\nlong\n")
    (tmp_path / "dataset.toml").write_text("mpp = 0.25\n")
    return tmp_path


def test_plain_reads_what_is_there(plain):
    save(plain / "ignore" / "a.png", (IDS == 3).astype(np.uint8))
    save(plain / "ignore" / "nuclei-class" / "a.png", (IDS == 4).astype(np.uint8) * 255)
    (plain / "images.csv").write_text(
        "image,patient,part,group,mpp\na.png,P1,test,colon,\nb,,,,1.5\n"
    )
    (plain / "patches.csv").write_text("image,tissue\na,tumour\nb,\n")
    data = read_plain(plain)
    assert data.labels == {
        "nuclei": (),
        "gland": (),
        "nuclei-class": ("none", "round", "long"),
        "tissue": ("tumour",),
    }
    a, b = data.items
    assert (a.name, a.patient, a.part, a.group) == ("a", "P1", "test", "colon")
    assert (b.name, b.patient, b.part, b.group) == ("b", "b", None, None)
    a, b = (pickle.loads(pickle.dumps(item)).load() for item in data.items)
    assert (a.mpp, b.mpp) == (0.25, 1.5)
    assert set(a.labels) == {"nuclei", "nuclei-class", "tissue"}
    assert (a.labels["nuclei"].ids == np.where(IDS == 3, IGNORE_ID, IDS.astype(int))).all()
    unknown = (IDS == 3) | (IDS == 4)
    assert (a.labels["nuclei-class"].ids == np.where(unknown, IGNORE_CLASS, KINDS)).all()
    assert a.labels["tissue"].id == 0
    assert set(b.labels) == {"gland"}
    assert (b.labels["gland"].ids == IDS).all()
    assert {item.load().mpp for item in read_plain(plain, mpp=0.3).items} == {0.3}


def test_plain_toml_names_heads_and_classes(plain):
    (plain / "classes" / "classes.txt").unlink()
    (plain / "dataset.toml").write_text(
        'mpp = 1\ninstances = "cells"\nclasses = "shape"\n[names]\nshape = ["no", "x", "y"]\n'
    )
    assert read_plain(plain).labels == {"cells": (), "gland": (), "shape": ("no", "x", "y")}


def test_plain_heads_have_folders_and_names_of_their_own(plain):
    save(plain / "classes" / "gland-class" / "b.png", KINDS)
    (plain / "classes" / "gland-class" / "classes.txt").write_text("none\nbenign\nmalignant\n")
    data = read_plain(plain)
    assert data.labels["gland-class"] == ("none", "benign", "malignant")
    assert set(data.items[1].load().labels) == {"gland", "gland-class"}


def write(path, text):
    path.write_text(text)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda f: (f / "dataset.toml").unlink(), r"a.png: how large is a pixel\? .*dataset.toml"),
        (lambda f: write(f / "dataset.toml", "mpp = -1"), "from 0.05 to 5"),
        (lambda f: write(f / "dataset.toml", "mpp = 'x'"), "not of the right type"),
        (lambda f: write(f / "dataset.toml", "mmp = 1"), "unknown key 'mmp'; known are mpp"),
        (lambda f: write(f / "dataset.toml", "mpp = "), "no TOML"),
        (lambda f: save(f / "instances" / "c.png", IDS), "c.png has no image of that name"),
        (lambda f: save(f / "instances" / "a.npy", IDS), "bear one name: keep one"),
        (lambda f: save(f / "instances" / "nuclei" / "a.npy", IDS), "are for one head"),
        (lambda f: save(f / "images" / "c.png", rgb()), "c.png has no mask and no class"),
        (lambda f: save(f / "images" / "a.tif", rgb()), "bear one name: keep one"),
        (lambda f: (f / "classes" / "classes.txt").unlink(), "no names; write them into .*classes"),
        (
            lambda f: write(f / "images.csv", "image,patients\na,b\n"),
            r"unknown columns \['patients",
        ),
        (lambda f: write(f / "images.csv", "image\nc\n"), "line 2: 'c' is not in images/"),
        (lambda f: write(f / "images.csv", "image\na\na.png\n"), "line 3: 'a.png' stands there tw"),
        (lambda f: write(f / "images.csv", "image,part\na\n"), "line 2: as many fields"),
        (lambda f: write(f / "images.csv", "image,mpp\na,big\n"), "'big' is no number"),
    ],
)
def test_plain_folders_that_do_not_fit(plain, spoil, message):
    spoil(plain)
    with pytest.raises(DatasetError, match=message):
        read_plain(plain)


@pytest.mark.parametrize(
    ("name", "mask", "message"),
    [
        ("instances/a.png", IDS[:, 1:], r"instances.a.png: the mask is 29 x 20 px, its image 30 x"),
        ("classes/a.tif", KINDS + 1, r"a.tif: class ids 3 are out of range: 3 classes are named"),
        ("instances/gland/b.npy", IDS - 0.5, r"b.npy: whole numbers"),
        ("ignore/b.png", KINDS[1:], r"b.png: the mask is 30 x 19 px"),
        ("instances/a.png", rgb(), r"a.png: a mask of one channel"),
    ],
)
def test_plain_masks_that_do_not_fit(plain, name, mask, message):
    save(plain / name, mask)
    item = next(i for i in read_plain(plain).items if i.name == Path(name).stem)
    with pytest.raises(DatasetError, match=message):
        item.load()


@pytest.mark.real
def test_plain_kit():
    data = read_plain(kit("nuclei_monuseg_NC"), mpp=0.25)
    image = data.items[0].load()
    assert image.image.shape == (1000, 1000, 3)
    assert image.labels["nuclei"].ids.max() > 100


# -- tables of objects -----------------------------------------------------------------------

TRIANGLE = Polygon([(100, 100), (180, 100), (100, 180)])
RING = box(300, 40, 380, 120).difference(box(320, 60, 360, 100))
POLYGONS = [TRIANGLE, box(250, 10, 262, 30), RING, box(104, 104, 120, 120), box(4, 8, 24, 40)]


@pytest.fixture(scope="module")
def slide(tmp_path_factory):
    folder = tmp_path_factory.mktemp("slides")
    return write_slide(folder / "s[1].svs", picture(512, 384))  # 0.25 micrometres a pixel


@pytest.fixture
def run(tmp_path, slide):
    """A results folder whose table was edited and saved by geopandas."""
    rows = {
        "kind": ["nucleus", "nucleus", "gland", "nucleus", "ring"],
        "class": ["b", None, None, "a", None],
    }
    (tmp_path / "objects").mkdir()
    frame = gpd.GeoDataFrame(rows, geometry=POLYGONS)
    frame.to_parquet(tmp_path / "objects" / f"{slide.stem}.parquet")
    (tmp_path / "reports").mkdir()
    (tmp_path / "reports" / f"{slide.stem}.json").write_text(json.dumps({"path": str(slide)}))
    return tmp_path


def drawn(polygon, height, width, *, left=0, top=0, scale=2):
    """Pixels whose centre a polygon holds, one by one."""
    mask = np.zeros((height, width), bool)
    for y, x in np.ndindex(mask.shape):
        mask[y, x] = polygon.contains(
            shapely.Point((left + x + 0.5) * scale, (top + y + 0.5) * scale)
        )
    return mask


def test_tables_become_masks_of_pixel_centres(run, slide):
    data = read_objects_labels(run)
    assert data.labels == {
        "gland": (),
        "nuclei": (),
        "nuclei-class": ("none", "a", "b"),
        "ring": (),
    }
    (item,) = data.items
    assert item.patient == slide.stem
    image = pickle.loads(pickle.dumps(item)).load()
    assert image.mpp == 0.5
    assert image.image.shape == (192, 256, 3)
    whole = picture(512, 384)
    mean = whole.reshape(192, 2, 256, 2, 3).mean(axis=(1, 3))
    assert np.abs(image.image - mean).mean() < 3
    triangle, small = drawn(TRIANGLE, 192, 256), drawn(box(104, 104, 120, 120), 192, 256)
    plain = drawn(box(250, 10, 262, 30), 192, 256)
    nuclei, classes = image.labels["nuclei"].ids, image.labels["nuclei-class"].ids
    assert ((nuclei > 0) == (triangle | small | plain)).all()
    assert len(np.unique(nuclei)) == 4
    assert (classes[triangle & ~small] == 2).all()
    assert (classes[small] == 1).all()  # the smaller one is on top
    assert (classes[plain] == IGNORE_CLASS).all()
    assert (classes[nuclei == 0] == 0).all()
    assert (image.labels["gland"].ids == drawn(RING, 192, 256)).all()


def test_windows_tile_the_slide_where_objects_are(run):
    items = {i.name: i for i in read_objects_labels(run, window_um=32.0).items}
    wanted = {
        f"{x},{y}"
        for x in range(0, 256, 64)
        for y in range(0, 192, 64)
        if any(box(2 * x, 2 * y, 2 * x + 128, 2 * y + 128).intersects(p.envelope) for p in POLYGONS)
    }
    assert {name.partition("@")[2] for name in items} == wanted
    assert 2 < len(wanted) < 12
    for item in items.values():
        image = item.load()
        left, top = (int(n) for n in item.name.partition("@")[2].split(","))
        assert image.image.shape == (64, 64, 3)
        wanted = drawn(RING, 64, 64, left=left, top=top)
        assert ((image.labels["gland"].ids > 0) == wanted).all()


def test_edges_have_no_slivers(run):
    shapes = [i.load().image.shape[:2] for i in read_objects_labels(run, window_um=40.0).items]
    assert {side for shape in shapes for side in shape} == {85, 86, 96}


def test_kinds_can_be_chosen_or_be_boxes(run):
    data = read_objects_labels(run, kinds=["ring", "gland"], boxes=["ring"])
    assert data.labels == {"gland": (), "ring": ()}
    labels = data.items[0].load().labels
    assert labels["ring"].boxes.tolist() == [[2, 4, 12, 20]]
    assert labels["ring"].ignore is None
    with pytest.raises(DatasetError, match=r"no object of the kinds \['cell'\]"):
        read_objects_labels(run, kinds=["cell"])


@pytest.mark.parametrize("suffix", [".parquet", ".geojson"])
def test_beyond_the_regions_nothing_is_known(run, slide, suffix):
    (run / "regions").mkdir()
    region = Polygon([(60, 60), (170, 60), (170, 200), (60, 120)])
    frame = gpd.GeoDataFrame(geometry=[region, box(440, 330, 480, 360)])
    path = run / "regions" / f"{slide.stem}{suffix}"
    frame.to_parquet(path) if suffix == ".parquet" else path.write_text(frame.to_json())
    (item,) = read_objects_labels(run, boxes=["ring"]).items
    labels = item.load().labels
    known = drawn(region, 192, 256) | drawn(box(440, 330, 480, 360), 192, 256)
    assert ((labels["nuclei"].ids == IGNORE_ID) == ~known).all()
    assert (labels["nuclei-class"].ids[~known] == IGNORE_CLASS).all()
    assert (labels["ring"].ignore == ~known).all()
    # the second region holds no object, and is background that somebody looked at
    windows = {i.name.partition("@")[2] for i in read_objects_labels(run, window_um=32.0).items}
    assert "192,128" in windows
    assert "128,0" not in windows


def test_a_slide_is_labelled_for_the_kinds_of_its_table(run, slide):
    other = write_slide(run / "t.svs", picture(256, 256))
    frame = gpd.GeoDataFrame({"kind": ["gland"], "class": [None]}, geometry=[box(10, 10, 60, 60)])
    frame.to_parquet(run / "objects" / "t.parquet")
    (run / "reports" / "t.json").write_text(json.dumps({"path": str(other)}))
    items = {i.patient: i for i in read_objects_labels(run).items}
    assert set(items["t"].load().labels) == {"gland"}


def test_slides_can_lie_elsewhere(run, slide):
    (run / "reports" / f"{slide.stem}.json").unlink()
    with pytest.raises(DatasetError, match=r"where is its slide.*name the folder of the slides"):
        read_objects_labels(run)
    assert read_objects_labels(run, slides=slide.parent).items[0].load().mpp == 0.5
    table = run / "objects" / f"{slide.stem}.parquet"
    assert len(read_objects_labels(table, slides=slide.parent).items) == 1
    with pytest.raises(DatasetError, match="no file named"):
        read_objects_labels(run, slides=run)
    (item,) = read_objects_labels(run, slides=slide.parent, mpp=0.5).items
    assert item.load().image.shape == (384, 512, 3)


def test_tables_that_do_not_fit(run, slide):
    path = run / "objects" / f"{slide.stem}.parquet"
    frame = gpd.read_parquet(path)
    frame.drop(columns="class").to_parquet(path)
    with pytest.raises(DatasetError, match=r"has no columns \['class'\]"):
        read_objects_labels(run)
    frame.geometry = [shapely.Point(1, 2), *frame.geometry[1:]]
    frame.to_parquet(path)
    with pytest.raises(DatasetError, match="1 rows hold no polygon, the first is row 0"):
        read_objects_labels(run)
    path.unlink()
    with pytest.raises(DatasetError, match="holds no table"):
        read_objects_labels(run)
