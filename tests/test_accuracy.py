"""The baseline on synthetic slides: what the whole chain gets right, at any pixel size."""

import numpy as np
import pytest
import shapely

import wsi_pipeline as wsi
from benchmarks.accuracy import f1, match, near_lattice, score
from wsi_pipeline.synth import write_slide


@pytest.fixture(scope="module", params=[0.25, 0.37, 0.5])
def scores(request, tmp_path_factory):
    mpp = request.param
    folder = tmp_path_factory.mktemp("accuracy")
    slide = folder / "s.svs"
    side = round(600 / mpp)
    write_slide(slide, width=side, height=side, mpp=mpp, seed=21)
    (report,) = wsi.run([slide], folder / "out", model="stain-baseline", tile_size=256)
    assert report.done, report.reason
    return score(slide, folder / "out" / "objects" / "s.parquet", mpp)


def test_nuclei_are_found_where_they_are(scores):
    assert scores["truth"] > 300
    assert scores["f1"] >= 0.90
    assert abs(scores["bias_x_um"]) < 0.25
    assert abs(scores["bias_y_um"]) < 0.25


def test_no_nucleus_is_doubled_or_cut_at_a_tile_border(scores):
    assert scores["truth_at_borders"] > 50
    assert scores["f1_at_borders"] >= scores["f1"] - 0.04
    assert scores["overlapping_pairs"] == 0


def test_the_judge_itself_can_fail():
    squares = np.array([shapely.box(x, 0, x + 10, 10) for x in range(0, 100, 20)])
    assert len(match(squares, squares)) == 5
    assert len(match(squares, shapely.transform(squares, lambda xy: xy + np.array([3, 0])))) == 5
    assert len(match(squares, shapely.transform(squares, lambda xy: xy + np.array([4, 0])))) == 0
    assert f1(4, 5, 5) == pytest.approx(0.8)
    assert near_lattice(np.array([[99.0, 50.0], [50.0, 50.0]]), 100, 5).tolist() == [True, False]
