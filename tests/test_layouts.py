"""Published layouts of nuclei and glands: miniatures with known truth, and what is refused."""

import pickle
from pathlib import Path

import numpy as np
import pytest
import scipy.io
from PIL import Image

from wsi_pipeline.errors import DatasetError
from wsi_pipeline.training.layouts import read_dataset
from wsi_pipeline.training.layouts.consep import CONSEP_CLASSES, read_consep
from wsi_pipeline.training.layouts.crag import read_crag
from wsi_pipeline.training.layouts.glas import read_glas
from wsi_pipeline.training.layouts.lizard import LIZARD_CLASSES, read_lizard
from wsi_pipeline.training.layouts.pannuke import read_pannuke

WIDTH, HEIGHT = 24, 16


def pixels(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (HEIGHT, WIDTH, 3), np.uint8)


def ids(*boxes: tuple[int, int, int, int]) -> np.ndarray:
    """Numbers 1, 2, ... in boxes (left, top, right, bottom)."""
    mask = np.zeros((HEIGHT, WIDTH), np.int32)
    for number, (left, top, right, bottom) in enumerate(boxes, start=1):
        mask[top:bottom, left:right] = number
    return mask


TWO = ids((2, 3, 7, 9), (12, 4, 20, 14))


def save(path: Path, array: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path)


def save_mat(path: Path, **arrays: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    scipy.io.savemat(path, arrays)


def parts(dataset) -> dict[str, str | None]:
    return {item.name: item.part for item in dataset.items}


GRADES = """name,patient ID, grade (GlaS), grade (Sirinukunwattana et al. 2015)
testA_1,4, benign, adenomatous
testB_1,5, malignant, moderately differentiated
train_1,4, benign, healthy
"""


def glas(folder: Path) -> None:
    for number, name in enumerate(("train_1", "testA_1", "testB_1")):
        save(folder / f"{name}.bmp", pixels(number))
        save(folder / f"{name}_anno.bmp", TWO.astype(np.uint8))
    (folder / "Grade.csv").write_text(GRADES)


def test_glas(tmp_path):
    glas(tmp_path)
    dataset = read_glas(tmp_path)
    assert parts(dataset) == {"train_1": "train", "testA_1": "test", "testB_1": "test"}
    assert {i.name: (i.patient, i.group) for i in dataset.items} == {
        "train_1": ("4", "benign"),
        "testA_1": ("4", "benign"),
        "testB_1": ("5", "malignant"),
    }
    assert dict(dataset.labels) == {"gland": ()}
    by_name = {item.name: item for item in dataset.items}
    image = pickle.loads(pickle.dumps(by_name["testA_1"].load))()
    assert image.name == "testA_1"
    assert image.mpp == 0.62005
    np.testing.assert_array_equal(image.image, pixels(1))
    np.testing.assert_array_equal(image.labels["gland"].ids, TWO)
    assert read_glas(tmp_path, mpp=0.6).items[0].load().mpp == 0.6


def test_glas_refuses(tmp_path):
    glas(tmp_path)
    (tmp_path / "Grade.csv").write_text(GRADES.replace("testB_1", "testB_9"))
    with pytest.raises(DatasetError, match=r"testB_1\.bmp has no row in .*Grade\.csv"):
        read_glas(tmp_path)
    (tmp_path / "Grade.csv").write_text(GRADES.replace("patient ID", "id"))
    with pytest.raises(DatasetError, match=r"Grade\.csv: columns 'name', 'patient ID'"):
        read_glas(tmp_path)
    (tmp_path / "Grade.csv").write_text("name,patient ID, grade (GlaS)\ntrain_1,1\n")
    with pytest.raises(DatasetError, match="in every row"):
        read_glas(tmp_path)
    (tmp_path / "Grade.csv").unlink()
    with pytest.raises(DatasetError, match=r"has no Grade\.csv; found: testA_1"):
        read_glas(tmp_path)
    glas(tmp_path)
    save(tmp_path / "other_1.bmp", pixels())
    save(tmp_path / "other_1_anno.bmp", pixels()[:, :, 0])
    with pytest.raises(DatasetError, match=r"other_1\.bmp is none of train, testA, testB"):
        read_glas(tmp_path)
    (tmp_path / "other_1_anno.bmp").unlink()
    with pytest.raises(DatasetError, match=r"without their label.*other_1\.bmp"):
        read_glas(tmp_path)
    with pytest.raises(DatasetError, match="is not a folder"):
        read_glas(tmp_path / "absent")


@pytest.mark.parametrize("mpp", [0.0, -1.0, float("nan"), float("inf")])
def test_mpp_is_a_positive_number(tmp_path, mpp):
    glas(tmp_path)
    with pytest.raises(DatasetError, match=r"from 0\.05 to 5"):
        read_glas(tmp_path, mpp=mpp)


def test_masks_that_do_not_fit(tmp_path):
    glas(tmp_path)
    mask = tmp_path / "train_1_anno.bmp"
    item = next(item for item in read_glas(tmp_path).items if item.name == "train_1")
    save(mask, TWO[:, :-1].astype(np.uint8))
    with pytest.raises(DatasetError, match=r"train_1_anno\.bmp.*23 x 16 px, the image 24 x 16"):
        item.load()
    save(mask, pixels())
    with pytest.raises(DatasetError, match=r"train_1_anno\.bmp: a mask of one channel"):
        item.load()
    mask.write_bytes(b"BM")
    with pytest.raises(DatasetError, match=r"train_1_anno\.bmp cannot be read as an image"):
        item.load()
    mask.unlink()
    with pytest.raises(DatasetError, match=r"train_1_anno\.bmp is missing"):
        item.load()


def crag(folder: Path, valid: str = "valid", labels: str = "Annotation") -> None:
    for part, stem in (("train", "train_1"), (valid, "test_1")):
        save(folder / part / "Images" / f"{stem}.png", pixels())
        save(folder / part / labels / f"{stem}.png", TWO.astype(np.uint8))
        save(folder / part / "Overlay" / f"{stem}.png", pixels())


@pytest.mark.parametrize(("valid", "labels"), [("valid", "Annotation"), ("test", "Annotations")])
def test_crag(tmp_path, valid, labels):
    crag(tmp_path, valid, labels)
    dataset = read_crag(tmp_path)
    assert parts(dataset) == {"train/train_1": "train", f"{valid}/test_1": "test"}
    image = dataset.items[-1].load()
    assert image.mpp == 0.55
    np.testing.assert_array_equal(image.labels["gland"].ids, TWO)


def test_crag_refuses(tmp_path):
    with pytest.raises(DatasetError, match="has no images in train"):
        read_crag(tmp_path)
    crag(tmp_path)
    (tmp_path / "valid" / "Annotation" / "test_1.png").unlink()
    with pytest.raises(DatasetError, match=r"without their label.*test_1\.png"):
        read_crag(tmp_path)


CLASSES = np.where(TWO == 1, 3, np.where(TWO == 2, 6, 0))


def lizard(folder: Path, *, nested: bool = True, label: dict | None = None) -> None:
    # Numbers out of order and one more than the map has, as in the publication.
    label = label or {
        "inst_map": TWO,
        "id": np.array([[2], [1], [7]]),
        "class": np.array([[6], [3], [1]]),
    }
    for number, stem in ((1, "consep_1"), (2, "dpath_1")):
        images = folder / f"Lizard_Images{number}"
        save((images / images.name if nested else images) / f"{stem}.png", pixels(number))
        save_mat(folder / "Lizard_Labels" / "Labels" / f"{stem}.mat", **label)
    table = "Filename,Source,Split\nconsep_1,consep,1\ndpath_1,dpath,3\n"
    (folder / "Lizard_Labels" / "info.csv").write_text(table)


@pytest.mark.parametrize("nested", [True, False])
def test_lizard(tmp_path, nested):
    lizard(tmp_path, nested=nested)
    dataset = read_lizard(tmp_path)
    assert parts(dataset) == {"consep_1": "train", "dpath_1": "test"}
    assert [item.group for item in dataset.items] == ["consep", "dpath"]
    assert dataset.labels["nuclei-class"] == LIZARD_CLASSES
    image = dataset.items[1].load()
    assert image.mpp == 0.5
    np.testing.assert_array_equal(image.image, pixels(2))
    np.testing.assert_array_equal(image.labels["nuclei"].ids, TWO)
    np.testing.assert_array_equal(image.labels["nuclei-class"].ids, CLASSES)


def label_of(classes=((3,), (6,)), numbers=((1,), (2,)), instances=TWO) -> dict:
    return {"inst_map": instances, "id": np.array(numbers), "class": np.array(classes)}


@pytest.mark.parametrize(
    ("label", "message"),
    [
        (label_of(classes=((3,), (7,))), r"out of range 1\.\.6: \[7\]"),
        (label_of(classes=((3,), (0,))), r"out of range 1\.\.6: \[0\]"),
        (label_of(classes=((3,),)), "2 values in 'id' but 1 in 'class'"),
        (label_of(numbers=((1,), (5,))), r"'id' does not list: \[2\]"),
        (label_of(instances=TWO[:-1]), "24 x 15 px, the image 24 x 16"),
        (label_of(instances=TWO + 0.5), "fractions"),
        (label_of(instances=-TWO), "negative"),
        (label_of(instances=np.array(["a", "b"])), "whole numbers wanted"),
        ({"inst_map": TWO, "class": np.ones((2, 1))}, r"no id; found: \['class', 'inst_map'\]"),
    ],
)
def test_lizard_refuses_labels(tmp_path, label, message):
    lizard(tmp_path, label=label)
    with pytest.raises(DatasetError, match=rf"consep_1\.mat.*{message}"):
        read_lizard(tmp_path).items[0].load()


def test_lizard_refuses_folders(tmp_path):
    lizard(tmp_path)
    table = tmp_path / "Lizard_Labels" / "info.csv"
    table.write_text("Filename,Source,Split\nconsep_1,consep,4\n")
    with pytest.raises(DatasetError, match=r"info\.csv: 'Split' must be 1, 2 or 3.*'4'"):
        read_lizard(tmp_path)
    table.write_text("Filename,Source,Split\nconsep_1,consep,1\n")
    with pytest.raises(DatasetError, match=r"dpath_1\.png has no row"):
        read_lizard(tmp_path)
    table.write_text("Filename,Source\nconsep_1,consep\n")
    with pytest.raises(DatasetError, match="columns 'Filename', 'Source' and 'Split'"):
        read_lizard(tmp_path)
    table.unlink()
    with pytest.raises(DatasetError, match="wanted, found 2, 2 and 0"):
        read_lizard(tmp_path)


def test_matlab_files_that_cannot_be_read(tmp_path):
    lizard(tmp_path)
    path = tmp_path / "Lizard_Labels" / "Labels" / "consep_1.mat"
    item = read_lizard(tmp_path).items[0]
    # The header of a file of version 7.3: text, then version 2 and the mark of byte order.
    path.write_bytes(b"MATLAB 7.3 MAT-file".ljust(124) + b"\x00\x02IM" + b"\x00" * 400)
    with pytest.raises(DatasetError, match=r"consep_1\.mat is a MATLAB file of version 7\.3"):
        item.load()
    path.write_bytes(b"no such thing" * 20)
    with pytest.raises(DatasetError, match=r"consep_1\.mat cannot be read as a MATLAB file"):
        item.load()
    path.unlink()
    with pytest.raises(DatasetError, match=r"consep_1\.mat is missing"):
        item.load()


def consep(folder: Path, types: np.ndarray = CLASSES) -> None:
    for part in ("Train", "Test"):
        stem = f"{part.lower()}_1"
        save(folder / part / "Images" / f"{stem}.png", pixels())
        label = {"inst_map": TWO.astype(float), "type_map": types.astype(float)}
        save_mat(folder / part / "Labels" / f"{stem}.mat", **label)


def test_consep(tmp_path):
    consep(tmp_path)
    dataset = read_consep(tmp_path)
    assert parts(dataset) == {"Train/train_1": "train", "Test/test_1": "test"}
    assert dataset.labels["nuclei-class"] == CONSEP_CLASSES
    image = dataset.items[0].load()
    assert image.mpp == 0.25
    np.testing.assert_array_equal(image.labels["nuclei"].ids, TWO)
    np.testing.assert_array_equal(image.labels["nuclei-class"].ids, CLASSES)


@pytest.mark.parametrize("beyond", [8, 255, 256])
def test_consep_refuses_classes_beyond_its_seven(tmp_path, beyond):
    consep(tmp_path, np.where(TWO == 1, beyond, 0))
    with pytest.raises(DatasetError, match=r"test_1\.mat: class ids .* out of range"):
        read_consep(tmp_path).items[0].load()


def test_consep_refuses_folders(tmp_path):
    with pytest.raises(DatasetError, match="has no images in Train, Test"):
        read_consep(tmp_path)
    consep(tmp_path)
    (tmp_path / "Train" / "Labels" / "train_1.mat").unlink()
    with pytest.raises(DatasetError, match=r"has no Labels/\*\.mat; found: Images, Labels"):
        read_consep(tmp_path)


NESTED = ("Fold {}/images/fold{}", "Fold {}/masks/fold{}")
FLAT = ("fold{}", "fold{}")
SPACED = ("Fold {}", "Fold {}")


def pannuke(folder: Path, layout=NESTED, folds=(1, 2, 3), count=2) -> np.ndarray:
    side = 32
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (count, side, side, 3)).astype(np.float64)
    masks = np.zeros((count, side, side, 6))
    masks[0, 2:8, 2:8, 0] = 4
    masks[0, 2:8, 12:18, 0] = 9
    masks[0, 20:28, 2:8, 4] = 4  # the number of another nucleus, in another channel
    masks[0, 7:9, 7:9, 1] = 11  # shares one pixel with the first
    masks[..., 5] = masks[..., :5].sum(axis=-1) == 0
    for fold in folds:
        for name, array, place in (
            ("images", images + 0, layout[0]),
            ("types", np.array(["Colon", "Bile-duct"] * count)[:count], layout[0]),
            ("masks", masks, layout[1]),
        ):
            path = folder / place.format(fold, fold) / f"{name}.npy"
            path.parent.mkdir(parents=True, exist_ok=True)
            np.save(path, array)
    return images


@pytest.mark.parametrize("layout", [NESTED, FLAT, SPACED])
def test_pannuke(tmp_path, layout):
    images = pannuke(tmp_path, layout)
    dataset = read_pannuke(tmp_path)
    assert len(dataset.items) == 6
    assert {(i.patient, i.part) for i in dataset.items} == {
        ("fold1", "train"),
        ("fold2", "validation"),
        ("fold3", "test"),
    }
    assert [i.group for i in dataset.items[:2]] == ["Colon", "Bile-duct"]
    image = pickle.loads(pickle.dumps(dataset.items[0].load))()
    assert image.mpp == 0.25
    np.testing.assert_array_equal(image.image, images[0])
    found, classes = image.labels["nuclei"].ids, image.labels["nuclei-class"].ids
    nuclei = {(int(found[y, x]), int(classes[y, x])) for y, x in np.argwhere(found > 0)}
    assert sorted(kind for _, kind in nuclei) == [1, 1, 2, 5]
    assert len({number for number, _ in nuclei}) == 4
    assert (found == found[7, 7]).sum() == 36  # the first channel keeps what it shares
    assert (found == found[8, 8]).sum() == 3
    assert ((found > 0) == (classes > 0)).all()
    assert not dataset.items[1].load().labels["nuclei"].ids.any()


def test_pannuke_one_fold_alone(tmp_path):
    folder = tmp_path / "Fold 2"
    pannuke(folder, ("images/fold{}", "masks/fold{}"), folds=(2,))
    assert {i.part for i in read_pannuke(folder).items} == {"validation"}
    assert len(read_dataset(folder).items) == 2


def test_pannuke_refuses(tmp_path):
    with pytest.raises(DatasetError, match=r"has no images\.npy"):
        read_pannuke(tmp_path)
    images = pannuke(tmp_path, FLAT, folds=(1,))
    path = tmp_path / "fold1" / "images.npy"
    np.save(path, images[:1])
    with pytest.raises(DatasetError, match="differ in length"):
        read_pannuke(tmp_path)
    np.save(path, images[..., :2])
    with pytest.raises(DatasetError, match=r"shape \(n, n, n, 3\) wanted, found \(2, 32, 32, 2\)"):
        read_pannuke(tmp_path)
    np.save(path, images * 2)
    with pytest.raises(DatasetError, match=r"images\.npy: .* from 0 to 255"):
        read_pannuke(tmp_path).items[0].load()
    path.write_bytes(b"no array")
    with pytest.raises(DatasetError, match=r"images\.npy cannot be read as a NumPy array"):
        read_pannuke(tmp_path)
    (tmp_path / "fold1" / "types.npy").unlink()
    with pytest.raises(DatasetError, match="without their label"):
        read_pannuke(tmp_path)
