"""Outlines, masks a nucleus, and boxes: published layouts; which layout a folder is in."""

import os
import pickle
from pathlib import Path

import numpy as np
import pytest
import shapely
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from wsi_pipeline.errors import DatasetError
from wsi_pipeline.training.layouts import LAYOUTS, read_dataset
from wsi_pipeline.training.layouts.digestpath import read_digestpath
from wsi_pipeline.training.layouts.dsb2018 import read_dsb2018
from wsi_pipeline.training.layouts.monuseg import read_monuseg
from wsi_pipeline.training.layouts.reading import files, read_ids, read_rgb

DATA = Path(os.environ.get("WSI_DATA", Path(__file__).parents[2] / "shared" / "data"))
WIDTH, HEIGHT = 24, 16
BARCODE = "TCGA-18-5592-01Z-00-DX1"
SQUARES = [[(2, 3), (7, 3), (7, 9), (2, 9)], [(12, 4), (20, 4), (20, 14), (12, 14)]]


def save(path: Path, array: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path)


def pixels(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (HEIGHT, WIDTH, 3), np.uint8)


def squares(dtype=np.int32) -> np.ndarray:
    mask = np.zeros((HEIGHT, WIDTH), dtype)
    mask[3:9, 2:7] = 1
    mask[4:14, 12:20] = 2
    return mask


def image_scope(outlines) -> str:
    regions = "".join(
        f'<Region Id="{n}"><Vertices>'
        + "".join(f'<Vertex X="{x}" Y="{y}" Z="0"/>' for x, y in outline)
        + "</Vertices></Region>"
        for n, outline in enumerate(outlines)
    )
    inside = f'<Annotation Id="1"><Regions>{regions}</Regions></Annotation>'
    return f'<Annotations MicronsPerPixel="0.252000">{inside}</Annotations>'


def monuseg(folder: Path, outlines=SQUARES, *, flat: bool = False) -> Path:
    images = folder if flat else folder / "Tissue Images"
    labels = folder if flat else folder / "Annotations"
    save(images / f"{BARCODE}.tif", pixels())
    labels.mkdir(exist_ok=True)
    (labels / f"{BARCODE}.xml").write_text(image_scope(outlines))
    return labels / f"{BARCODE}.xml"


def masks_of_numbers(folder: Path) -> None:
    save(folder / "images" / f"{BARCODE}.png", pixels())
    save(folder / "instances" / f"{BARCODE}.png", squares(np.uint16) * 300)


@pytest.mark.parametrize("flat", [False, True])
def test_monuseg_outlines(tmp_path, flat):
    monuseg(tmp_path, flat=flat)
    (item,) = read_dataset(tmp_path).items
    assert (item.name, item.patient, item.part) == (BARCODE, "TCGA-18-5592", None)
    image = pickle.loads(pickle.dumps(item.load))()
    assert image.mpp == 0.25
    np.testing.assert_array_equal(image.image, pixels())
    np.testing.assert_array_equal(image.labels["nuclei"].ids, squares())


def test_monuseg_masks(tmp_path):
    masks_of_numbers(tmp_path)
    image = read_monuseg(tmp_path, mpp=0.24).items[0].load()
    assert image.mpp == 0.24
    np.testing.assert_array_equal(image.labels["nuclei"].ids, squares() * 300)


def test_of_overlapping_outlines_the_first_keeps_the_pixels(tmp_path):
    corner = [(6, 8), (9, 8), (9, 11), (6, 11)]
    beyond = [(-5, 12), (3, 12), (3, 30), (-5, 30)]
    line, speck = [(1, 1), (9, 1)], [(20.6, 1.6), (20.8, 1.6), (20.8, 1.8)]
    monuseg(tmp_path, [SQUARES[0], line, corner, speck, beyond])
    expected = np.zeros((HEIGHT, WIDTH), np.int32)
    expected[12:16, 0:3] = 5
    expected[8:11, 6:9] = 3
    expected[3:9, 2:7] = 1
    found = read_monuseg(tmp_path).items[0].load().labels["nuclei"].ids
    np.testing.assert_array_equal(found, expected)


@settings(max_examples=25, deadline=None)
@given(
    radii=st.lists(st.floats(1, 12), min_size=3, max_size=12),
    x=st.floats(-2, 26),
    y=st.floats(-2, 18),
)
def test_an_outline_covers_the_pixels_whose_centre_it_contains(tmp_path_factory, radii, x, y):
    folder = tmp_path_factory.mktemp("outline")
    angles = np.arange(len(radii)) * 2 * np.pi / len(radii) + 0.1
    outline = np.stack([x + radii * np.cos(angles), y + radii * np.sin(angles)], axis=1)
    monuseg(folder, [outline.tolist()])
    found = read_monuseg(folder).items[0].load().labels["nuclei"].ids
    rows, columns = np.mgrid[:HEIGHT, :WIDTH]
    centres = shapely.points(columns + 0.5, rows + 0.5)
    area = shapely.Polygon(outline)
    decided = shapely.distance(area.exterior, centres) > 1e-6
    np.testing.assert_array_equal((found > 0)[decided], shapely.contains(area, centres)[decided])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("<Annotations><Region>", "cannot be read as XML"),
        ("", "cannot be read as XML"),
        ("<Annotations/>", "holds no Region"),
        (image_scope([[("one", 1), (2, 2), (3, 1)]]), "Region 1 lacks X or Y as a number"),
        (image_scope(SQUARES).replace('Y="3"', ""), "Region 1 lacks X or Y as a number"),
    ],
)
def test_monuseg_refuses_outlines(tmp_path, text, message):
    path = monuseg(tmp_path)
    path.write_text(text)
    with pytest.raises(DatasetError, match=rf"{BARCODE}\.xml.*{message}"):
        read_monuseg(tmp_path).items[0].load()


def test_monuseg_refuses_folders(tmp_path):
    with pytest.raises(DatasetError, match=r"has no \*\.xml and no \*\.tif; found: nothing"):
        read_monuseg(tmp_path)
    path = monuseg(tmp_path)
    path.unlink()
    with pytest.raises(DatasetError, match=rf"without their label.*{BARCODE}\.tif"):
        read_monuseg(tmp_path)


def dsb2018(folder: Path) -> None:
    mask = squares()
    for name in ("00ae65", "0a7d30"):
        opaque = np.full((HEIGHT, WIDTH, 1), 255, np.uint8)
        rgba = np.concatenate([pixels(), opaque], axis=2)
        save(folder / name / "images" / f"{name}.png", rgba)
        for number in (1, 2):
            save(folder / name / "masks" / f"{number}ab.png", np.uint8(255) * (mask == number))


def test_dsb2018(tmp_path):
    dsb2018(tmp_path)
    dataset = read_dsb2018(tmp_path, mpp=0.4)
    assert [(item.name, item.patient) for item in dataset.items] == [
        ("00ae65", "00ae65"),
        ("0a7d30", "0a7d30"),
    ]
    image = pickle.loads(pickle.dumps(dataset.items[0].load))()
    assert image.mpp == 0.4
    np.testing.assert_array_equal(image.image, pixels())
    np.testing.assert_array_equal(image.labels["nuclei"].ids, squares())


def test_of_overlapping_masks_the_first_keeps_the_pixels(tmp_path):
    dsb2018(tmp_path)
    save(tmp_path / "00ae65" / "masks" / "2ab.png", np.full((HEIGHT, WIDTH), 255, np.uint8))
    found = read_dsb2018(tmp_path, mpp=0.4).items[0].load().labels["nuclei"].ids
    np.testing.assert_array_equal(found, np.where(squares() == 1, 1, 2))


def test_dsb2018_masks_of_numbers(tmp_path):
    masks_of_numbers(tmp_path)
    image = read_dsb2018(tmp_path, mpp=0.4).items[0].load()
    np.testing.assert_array_equal(image.labels["nuclei"].ids, squares() * 300)


def test_dsb2018_refuses(tmp_path):
    with pytest.raises(DatasetError, match="neither <id>/images nor instances"):
        read_dsb2018(tmp_path, mpp=0.4)
    dsb2018(tmp_path)
    with pytest.raises(DatasetError, match="does not state how large a pixel is"):
        read_dsb2018(tmp_path)
    item = read_dsb2018(tmp_path, mpp=0.4).items[0]
    save(tmp_path / "00ae65" / "masks" / "1ab.png", squares(np.uint8)[:, 1:])
    with pytest.raises(DatasetError, match=r"1ab\.png is \(23, 16\) px .* its image \(24, 16\)"):
        item.load()
    for path in (tmp_path / "00ae65" / "masks").iterdir():
        path.unlink()
    with pytest.raises(DatasetError, match="00ae65: one image and its masks wanted, found 1 and 0"):
        read_dsb2018(tmp_path, mpp=0.4)


CASE = "2018_64982_1-3_2019-02-25 21_57_36-lv0-33516-59515-2003-2010"
NEGATIVE = "D20190481111_2019-06-10 09_22_49-lv0-61840-23896-2000-2000"


def voc(*boxes) -> str:
    sides = ("xmin", "ymin", "xmax", "ymax")
    objects = "".join(
        "<object><name>ring_cell_cancer</name><bndbox>"
        + "".join(f"<{side}>{value}</{side}>" for side, value in zip(sides, box, strict=True))
        + "</bndbox></object>"
        for box in boxes
    )
    return f"<annotation><size><width>24</width></size>{objects}</annotation>"


def digestpath(folder: Path, text: str = voc((2, 3, 7, 9), (12, 4, 20, 14))) -> None:
    save(folder / "sig-train-pos" / f"{CASE}.jpeg", pixels())
    save(folder / "sig-train-neg" / f"{NEGATIVE}.jpeg", pixels())
    (folder / "sig-train-pos" / f"{CASE}.xml").write_text(text)


def test_digestpath(tmp_path):
    digestpath(tmp_path)
    dataset = read_digestpath(tmp_path)
    negative, positive = dataset.items
    assert (negative.name, negative.group) == (f"sig-train-neg/{NEGATIVE}", "negative")
    assert (positive.patient, negative.patient) == ("2018_64982", "D20190481111")
    image = pickle.loads(pickle.dumps(positive.load))()
    assert image.mpp == 0.25
    label = image.labels["signet-ring"]
    np.testing.assert_array_equal(label.boxes, [[2, 3, 7, 9], [12, 4, 20, 14]])
    np.testing.assert_array_equal(label.ignore, squares() == 0)
    label = negative.load().labels["signet-ring"]
    assert label.boxes.shape == (0, 4)
    assert label.ignore is None
    label = read_digestpath(tmp_path, complete=True).items[1].load().labels["signet-ring"]
    assert label.ignore is None


@pytest.mark.parametrize(
    ("slide", "patient"),
    [
        ("2019-32176-1-1-1_2019-05-28_11_43_23-lv0-1-2-3-4", "2019-32176"),
        ("G1900703-2_2019-04-30 09_53_59-lv0-1-2-3-4", "G1900703"),
        ("something else", "something else"),
    ],
)
def test_digestpath_patient_is_the_case(tmp_path, slide, patient):
    save(tmp_path / "sig-train-neg" / f"{slide}.jpeg", pixels())
    assert read_digestpath(tmp_path).items[0].patient == patient


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("<annotation>", "cannot be read as XML"),
        (voc((2, 3, "", 9)), "lacks one of xmin, ymin, xmax, ymax as a number"),
        (voc((2, 3, 7, 9)).replace("ymin", "top"), "lacks one of"),
        (voc((7, 3, 2, 9)), "left < right"),
    ],
)
def test_digestpath_refuses_boxes(tmp_path, text, message):
    digestpath(tmp_path, text)
    with pytest.raises(DatasetError, match=rf"2003-2010\.xml.*{message}"):
        read_digestpath(tmp_path).items[1].load()


def test_digestpath_refuses_folders(tmp_path):
    with pytest.raises(DatasetError, match="neither sig-train-pos nor sig-train-neg"):
        read_digestpath(tmp_path)
    digestpath(tmp_path)
    (tmp_path / "sig-train-pos" / f"{CASE}.xml").unlink()
    with pytest.raises(DatasetError, match="without their label"):
        read_digestpath(tmp_path)
    (tmp_path / "empty" / "sig-train-pos").mkdir(parents=True)
    with pytest.raises(DatasetError, match="holds no image"):
        read_digestpath(tmp_path / "empty")


@pytest.mark.parametrize("dtype", [np.bool_, np.uint8, np.uint16, np.int32])
def test_masks_of_every_depth(tmp_path, dtype):
    mask = squares().astype(dtype)
    save(tmp_path / "mask.tif", mask)
    np.testing.assert_array_equal(read_ids(tmp_path / "mask.tif"), mask.astype(np.int32) * 1)


def test_images_of_other_depths_are_refused_and_grey_is_repeated(tmp_path):
    save(tmp_path / "deep.png", squares(np.uint16))
    with pytest.raises(DatasetError, match=r"deep\.png: an 8-bit RGB image wanted"):
        read_rgb(tmp_path / "deep.png")
    save(tmp_path / "grey.png", squares(np.uint8))
    assert (read_rgb(tmp_path / "grey.png") == squares()[:, :, None]).all()
    path = tmp_path / "cut.png"
    save(path, np.random.default_rng(0).integers(0, 256, (99, 99, 3), np.uint8))
    path.write_bytes(path.read_bytes()[:9000])
    with pytest.raises(DatasetError, match=r"cut\.png is damaged"):
        read_rgb(path)


def test_hidden_files_are_no_data(tmp_path):
    save(tmp_path / "a.png", pixels())
    (tmp_path / "._a.png").write_bytes(b"")
    assert [path.name for path in files(tmp_path, "*.png", "a*")] == ["a.png"]


def mark(pattern: str) -> str:
    """A path that matches a pattern."""
    for from_, to in (("[Ll]", "L"), ("[Ii]", "I"), ("*", "x")):
        pattern = pattern.replace(from_, to)
    return pattern


@pytest.mark.parametrize(
    ("name", "index"),
    [(name, index) for name, layout in LAYOUTS.items() for index in range(len(layout.marks))],
)
def test_marks_tell_layouts_apart(tmp_path, name, index):
    for pattern in LAYOUTS[name].marks[index]:
        path = tmp_path / mark(pattern)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    assert [other for other, layout in LAYOUTS.items() if layout.fits(tmp_path)] == [name]


def test_every_mark_of_a_set_is_needed(tmp_path):
    (tmp_path / "Grade.csv").touch()
    (tmp_path / "Tissue Images").mkdir()
    assert [name for name, layout in LAYOUTS.items() if layout.fits(tmp_path)] == []


def test_layouts_that_cannot_be_told(tmp_path):
    with pytest.raises(DatasetError, match="is in no known layout") as caught:
        read_dataset(tmp_path)
    for name, layout in LAYOUTS.items():
        assert f"  {name}: {layout.looks_for}" in str(caught.value)
    digestpath(tmp_path)
    monuseg(tmp_path)
    with pytest.raises(DatasetError, match="could be any of monuseg, digestpath; name the layout"):
        read_dataset(tmp_path)
    assert read_dataset(tmp_path, "digestpath", mpp=0.3).items[0].load().mpp == 0.3
    found = read_dataset(tmp_path, "digestpath", complete=True).items[1].load()
    assert found.labels["signet-ring"].ignore is None
    with pytest.raises(DatasetError, match=r"no option \['whole'\]; it has options complete"):
        read_dataset(tmp_path, "digestpath", whole=True)
    with pytest.raises(DatasetError, match="it has no options"):
        read_dataset(tmp_path, "monuseg", complete=True)
    with pytest.raises(DatasetError, match="there is no layout 'nonsense'; there are glas, "):
        read_dataset(tmp_path, "nonsense")
    with pytest.raises(DatasetError, match="does not exist"):
        read_dataset(tmp_path / "absent")


def kit(name: str) -> Path:
    if not (DATA / name).is_dir():
        pytest.skip(f"no {DATA / name} (set WSI_DATA to the data kit)")
    return DATA / name


@pytest.mark.real
@pytest.mark.parametrize(
    ("name", "layout"),
    [("tissue_kather", "kather"), ("glands_ebhi", "ebhi"), ("glands_pt1", "pt1")],
)
def test_kit_is_recognised(name, layout):
    assert read_dataset(kit(name), mpp=0.5).name == layout


@pytest.mark.real
def test_kit_monuseg():
    dataset = read_dataset(kit("nuclei_monuseg_NC"), "monuseg")
    assert len(dataset.items) == 6
    assert "TCGA-NH-A8F7" in {item.patient for item in dataset.items}
    image = dataset.items[0].load()
    assert image.image.shape == (1000, 1000, 3)
    assert len(np.unique(image.labels["nuclei"].ids)) > 100


@pytest.mark.real
def test_kit_dsb2018():
    dataset = read_dataset(kit("nuclei_dsb2018_CC0"), "dsb2018", mpp=0.35)
    assert len(dataset.items) == 79
    image = dataset.items[0].load()
    assert image.image.shape[:2] == image.labels["nuclei"].ids.shape
    assert image.labels["nuclei"].ids.max() > 1
