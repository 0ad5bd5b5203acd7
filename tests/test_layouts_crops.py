"""Own crops as training data: pixels, labels and what is unknown."""

import pickle

import numpy as np
import pytest
import shapely
from crop_fixtures import make_crop, outline, square
from slide_fixtures import picture, write_slide

from wsi_pipeline.curation.crops import write_crop
from wsi_pipeline.errors import DatasetError
from wsi_pipeline.geometry import Box
from wsi_pipeline.training.annotation import IGNORE_ID
from wsi_pipeline.training.layouts import read_dataset
from wsi_pipeline.training.layouts.crops import read_crops_labels
from wsi_pipeline.training.split import k_folds, split_items

TRIANGLE = shapely.Polygon([(200, 150), (240, 150), (200, 199)])
RING = square(150, 100, 40).difference(square(160, 110, 16))


@pytest.fixture(scope="module")
def slides(tmp_path_factory):
    folder = tmp_path_factory.mktemp("slides")
    write_slide(folder / "s.svs", picture(512, 384))
    write_slide(folder / "t.svs", picture(512, 384, seed=1))
    return folder


@pytest.fixture
def folder(tmp_path):
    first = make_crop(
        outline(3, square(110, 70)),
        outline(8, TRIANGLE),
        outline(9, RING, "gland"),
        outline(10, shapely.box(196, 146, 210, 220), "ignore", label="nuclei"),
        outline(11, shapely.box(280, 60, 300, 80), "ignore"),
        labels=("nuclei", "gland"),
    )
    other = make_crop(
        outline(1, square(30, 310), "lumen"),
        id="d", slide="t.svs", box=Box.from_edges(20, 300, 120, 384), labels=("lumen",),
        part="validation",
    )  # fmt: skip
    for crop in (first, other):
        write_crop(crop, tmp_path / "crops" / f"{crop.id}.geojson")
    return tmp_path


def holds(polygon, shape, left, top):
    """Pixels of 2 x 2 whose centre a polygon holds, one by one."""
    mask = np.zeros(shape, bool)
    for y, x in np.ndindex(shape):
        mask[y, x] = polygon.contains(shapely.Point(left + 2 * x + 1, top + 2 * y + 1))
    return mask


def test_crops_are_found_by_what_their_folder_holds(folder, slides):
    data = read_dataset(folder, slides=str(slides))
    assert data.name == "crops"
    assert data.labels == {"nuclei": (), "gland": (), "lumen": ()}
    facts = [(item.name, item.patient, item.part, item.group) for item in data.items]
    assert facts == [("c", "s", "train", "s"), ("d", "t", "validation", "t")]
    assert len(read_crops_labels(folder / "crops", slides=slides).items) == 2
    assert len(read_crops_labels(folder / "crops" / "d.geojson", slides=slides).items) == 1


def test_pixels_and_labels_of_a_crop_and_its_surroundings(folder, slides):
    item = read_crops_labels(folder, slides=slides, context_um=10.0).items[0]
    image = pickle.loads(pickle.dumps(item)).load()
    # the crop has 100 x 80 pixels of 0.5 um, the border 20 on each side
    assert image.mpp == 0.5
    assert image.image.shape == (120, 140, 3)
    mean = picture(512, 384).reshape(192, 2, 256, 2, 3).mean(axis=(1, 3))[10:130, 30:170]
    assert np.abs(image.image - mean).mean() < 3
    assert set(image.labels) == {"nuclei", "gland"}

    shape, corner = (120, 140), (60, 20)
    inside = np.zeros(shape, bool)
    inside[20:100, 20:120] = True
    nobody = holds(shapely.box(280, 60, 300, 80), shape, *corner)
    nuclei = image.labels["nuclei"].ids
    unknown = ~inside | nobody | holds(shapely.box(196, 146, 210, 220), shape, *corner)
    assert ((nuclei == IGNORE_ID) == unknown).all()
    small, triangle = (holds(own, shape, *corner) & ~unknown for own in (square(110, 70), TRIANGLE))
    assert small.sum() == 100
    assert ((nuclei > 0) == (small | triangle)).all()
    assert len(np.unique(nuclei[small])) == len(np.unique(nuclei[triangle])) == 1
    assert len(np.unique(nuclei[nuclei > 0])) == 2
    gland = image.labels["gland"].ids
    assert ((gland == IGNORE_ID) == (~inside | nobody)).all()
    assert ((gland > 0) == holds(RING, shape, *corner)).all()


def test_the_border_ends_with_the_slide_and_may_be_none(folder, slides):
    first, second = read_crops_labels(folder, slides=slides).items
    # 60 to 220 with 128 px of level 0 around: 60 px are missing above
    assert first.load().image.shape == ((220 + 128) // 2, (300 + 128) // 2, 3)
    image = second.load().image
    # 20 to 120 and 300 to 384, with 128 px of level 0 around, on a slide of 512 x 384
    assert image.shape == ((384 - 172) // 2, 248 // 2, 3)
    bare = read_crops_labels(folder, slides=slides, context_um=0.0).items[1].load()
    assert bare.image.shape == (42, 50, 3)
    assert not (bare.labels["lumen"].ids == IGNORE_ID).any()
    assert bare.labels["lumen"].ids.sum() == 100


def test_pixels_of_other_sizes_are_asked_for_and_told(folder, slides):
    image = read_crops_labels(folder, slides=slides, context_um=0.0, read_mpp=0.7).items[0].load()
    assert image.mpp == pytest.approx(0.7)
    ids = image.labels["gland"].ids
    assert (ids > 0).sum() * 0.7**2 == pytest.approx(RING.area * 0.25**2, rel=0.1)
    # a pixel that is half in the crop counts by its centre
    assert image.image.shape == (58, 73, 3)
    assert (ids != IGNORE_ID).sum() * 0.7**2 == pytest.approx(50 * 40, rel=0.03)


def test_parts_are_kept_and_a_slide_is_one_patient(folder, slides):
    more = make_crop(id="e", box=Box.from_edges(320, 60, 420, 160), part="validation")
    write_crop(more, folder / "crops" / "e.geojson")
    items = read_crops_labels(folder, slides=slides).items
    parts = split_items(items, validation=0.3)
    assert {name: [item.name for item in own] for name, own in parts.items()} == {
        "train": ["c"],
        "validation": ["d", "e"],
    }
    for fold in k_folds(items, folds=2):
        assert {i.patient for i in fold["train"]}.isdisjoint(i.patient for i in fold["test"])


def test_slides_must_be_there_and_be_named(folder, slides, tmp_path, monkeypatch):
    with pytest.raises(DatasetError, match="A recipe says so: options"):
        read_dataset(folder)
    with pytest.raises(DatasetError, match="NO_SUCH/slides' names an environment variable that is"):
        read_dataset(folder, slides="$NO_SUCH/slides")
    monkeypatch.setenv("SOME_SLIDES", str(slides))
    assert read_dataset(folder, slides="$SOME_SLIDES").items[0].load().mpp == 0.5
    (tmp_path / "some").mkdir()
    with pytest.raises(DatasetError, match=r"crop c is of the slide s\.svs, which is not in"):
        read_dataset(folder, slides=tmp_path / "some")
    with pytest.raises(DatasetError, match="every crop says its own"):
        read_dataset(folder, mpp=0.5, slides=slides)
    with pytest.raises(DatasetError, match="context_um must be 0 or more"):
        read_dataset(folder, slides=slides, context_um=-1)
    for wrong in (0, -0.5, float("nan"), float("inf")):
        with pytest.raises(DatasetError, match="read_mpp must be more than 0"):
            read_dataset(folder, slides=slides, read_mpp=wrong)


def test_labels_choose_crops_and_heads(folder, slides):
    data = read_dataset(folder, slides=slides, labels=["nuclei", "lumen"])
    assert set(data.labels) == {"nuclei", "lumen"}
    assert [item.name for item in data.items] == ["c", "d"]
    data = read_dataset(folder, slides=slides, labels=["gland"])
    every = read_crops_labels(folder, slides=slides).items[0].load()
    own = data.items[0].load()
    assert set(own.labels) == {"gland"}
    assert (own.labels["gland"].ids == every.labels["gland"].ids).all()
    assert [item.name for item in data.items] == ["c"]
    for wrong in (["nucleus"], "nuclei", ["gland", "glands"]):
        with pytest.raises(DatasetError, match="labels must be a list of some of nuclei, gland"):
            read_dataset(folder, slides=slides, labels=wrong)
    one = folder / "crops" / "d.geojson"
    with pytest.raises(DatasetError, match=r"no crop has the labels \['gland'\], only \['lumen'\]"):
        read_crops_labels(one, slides=slides, labels=["gland"])


def test_what_does_not_fit_its_slide_is_refused(folder, slides, tmp_path):
    wrong = tmp_path / "slides"
    wrong.mkdir()
    write_slide(wrong / "s.svs", picture(500, 384))
    write_slide(wrong / "t.svs", picture(512, 384), spoil=[(1, 5)])
    first, second = read_crops_labels(folder, slides=wrong).items
    with pytest.raises(DatasetError, match="500 x 384 px, but the crop was drawn on one of 512"):
        first.load()
    with pytest.raises(DatasetError, match=r"crop d: parts of .*t\.svs cannot be decoded"):
        second.load()
    (wrong / "t.svs").write_bytes(b"nothing")
    with pytest.raises(DatasetError, match=r"crop d: .*t\.svs"):
        second.load()
