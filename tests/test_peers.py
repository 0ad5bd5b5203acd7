"""The parts of the comparison with peers that need none of their environments."""

import json
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from benchmarks.peers import __main__ as peers
from benchmarks.peers.cerberus_objects import GLAND, LUMEN, describe, label_nuclei, label_regions
from benchmarks.peers.environment import wanted
from benchmarks.peers.hovernext import describe_own, label_pieces, overlapping
from benchmarks.peers.networks import make_network, make_spec, patch_class, patch_logits
from benchmarks.peers.patches import (
    KEPT_PX,
    MARGIN_PX,
    read_mask,
    tissue_mm2,
    wanted_patches,
)
from benchmarks.peers.process import RunFailedError, run_measured
from benchmarks.peers.seams import CORNERS, GRID, SeamTile, find_nuclei, tile_sets
from benchmarks.peers.tables import markdown, rest_seconds, summary, total_seconds, with_totals


def canvas(side=200):
    return np.zeros((side, side), np.float32)


def extent(labels):
    rows, columns = np.nonzero(labels)
    return (rows.min(), rows.max() + 1, columns.min(), columns.max() + 1)


# patches and mask


def test_patches_cover_the_slide_where_all_is_tissue():
    boxes = wanted_patches(np.ones((145, 300), bool), (300, 145))
    assert boxes[:, :2].tolist() == [[0, 0], [144, 0], [288, 0], [0, 144], [144, 144], [288, 144]]
    assert (boxes[:, 2:] - boxes[:, :2] == 144).all()


def test_a_patch_is_wanted_when_its_own_part_holds_tissue():
    mask = np.zeros((100, 100), bool)
    mask[20, 50] = True  # pixels 504..513 x 201..210 of a slide of 1008: the patch from (432, 144)
    assert wanted_patches(mask, (1008, 1008)).tolist() == [[432, 144, 576, 288]]


def test_a_mask_coarser_than_patches_keeps_all_patches_of_its_pixels():
    mask = np.array([[True, False]])
    boxes = wanted_patches(mask, (1152, 288))
    assert sorted(set(boxes[:, 0])) == [0, 144, 288, 432]
    assert len(boxes) == 8


def test_no_tissue_no_patches():
    assert wanted_patches(np.zeros((4, 4), bool), (300, 300)).shape == (0, 4)


def test_tissue_is_the_masks_share_of_the_slide():
    mask = np.zeros((2, 2), bool)
    mask[0, 0] = True
    assert tissue_mm2(mask, (4000, 2000)) == pytest.approx(0.5)


def test_mask_is_what_is_not_black(tmp_path):
    path = tmp_path / "mask.png"
    cv2.imwrite(str(path), np.array([[0, 1], [128, 255]], np.uint8))
    assert read_mask(path).tolist() == [[False, True], [True, True]]
    with pytest.raises(SystemExit, match=r"none\.png cannot be read"):
        read_mask(tmp_path / "none.png")


# the colour network


@pytest.fixture(scope="module")
def colours():
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand((1, 3, 24, 24), generator=generator) * 255
    return torch.nn.functional.interpolate(coarse, size=(768, 768), mode="bilinear")


def test_a_patch_and_a_tile_have_the_same_maps(colours):
    network = make_network("colour")
    with torch.inference_mode():
        patch = network(colours[..., 144:592, 160:608])
        tile = network(colours)
    for name in ("nuclei", "nuclei-class", "gland", "gland-class", "lumen"):
        scale = 448 // patch[name].shape[-1]
        kept = slice(MARGIN_PX // scale, (MARGIN_PX + KEPT_PX) // scale)
        rows = slice((MARGIN_PX + 144) // scale, (MARGIN_PX + 144 + KEPT_PX) // scale)
        columns = slice((MARGIN_PX + 160) // scale, (MARGIN_PX + 160 + KEPT_PX) // scale)
        torch.testing.assert_close(
            patch[name][..., kept, kept], tile[name][..., rows, columns], atol=1e-3, rtol=1e-3
        )


def test_the_networks_have_the_heads_that_the_engine_expects(colours):
    with torch.inference_mode():
        logits = make_network("colour")(colours[..., :448, :448])
    heads = make_spec("colour").heads
    assert {head.name: head.logit_channels for head in heads} == {
        name: map_.shape[1] for name, map_ in logits.items()
    }


@pytest.mark.parametrize("scale", [1, 2, 8])
def test_cropping_first_gives_what_cropping_last_gives(scale):
    logits = torch.rand((2, 3, 448 // scale, 448 // scale))
    whole = patch_logits(logits, first=0, size=448)
    kept = patch_logits(logits, first=MARGIN_PX, size=KEPT_PX)
    inside = slice(MARGIN_PX, MARGIN_PX + KEPT_PX)
    assert kept.shape == (2, 3, KEPT_PX, KEPT_PX)
    torch.testing.assert_close(kept, whole[..., inside, inside])


def test_the_class_of_a_patch_is_that_of_its_middle_cell():
    logits = torch.zeros((1, 4, 28, 28))
    logits[0, 2, 13, 13] = 1
    assert patch_class(logits).tolist() == [2]


# the original's objects: extents found by running the original on the same canvas


@pytest.mark.parametrize(
    ("rules", "stop", "scale", "expected"),
    [
        (GLAND, 110, 1, (56, 115)),
        (GLAND, 110, 0.5, (58, 112)),
        (LUMEN, 77, 1, (60, 78)),
        (LUMEN, 77, 0.5, (60, 77)),
    ],
)
def test_regions_are_widened_as_the_originals(rules, stop, scale, expected):
    inner = canvas()
    inner[60:stop, 60:stop] = 0.9
    assert extent(label_regions(inner, canvas(), rules, scale=scale)) == expected * 2


def test_a_region_at_the_border_is_not_widened_towards_it():
    inner = canvas()
    inner[10:60, 10:60] = 0.9
    assert extent(label_regions(inner, canvas(), GLAND, scale=1)) == (10, 65, 10, 65)


def test_nuclei_have_the_originals_extent():
    inner, contour = canvas(), canvas()
    inner[6:18, 6:18] = 0.9
    contour[18:20, 6:18] = 0.9
    inner[30:42, 30:42] = 0.9
    labels = label_nuclei(inner, contour)
    assert extent(labels == labels[10, 10]) == (7, 19, 7, 17)
    assert extent(labels == labels[35, 35]) == (31, 41, 31, 41)


def test_no_nucleus_without_a_core():
    assert not label_nuclei(canvas() + 0.3, canvas() + 0.4).any()


def test_records_say_where_and_what():
    labels = np.zeros((20, 30), np.int32)
    labels[4:10, 12:20] = 5
    types = np.zeros((20, 30), int)
    types[4:6, 12:20] = 3
    record = describe(labels, types)[5]
    assert record["box"].tolist() == [12, 4, 20, 10]
    assert record["centroid"].tolist() == [15.5, 6.5]
    assert record["contour"].min(0).tolist() == [12, 4]
    assert (record["type"], record["prob"]) == (3, pytest.approx(1 / 3))


# the original's seams


def test_a_slide_of_one_tile_has_one_tile():
    sets = tile_sets((4000, 3000))
    assert [len(tiles) for tiles in sets] == [1, 0, 0, 0]
    assert sets[GRID][0].flags == (False,) * 4


def test_four_sets_of_tiles():
    grid, vertical, horizontal, corners = tile_sets((2000, 1500), tile_px=1000)
    assert [tile.bounds for tile in grid] == [
        (0, 0, 1000, 1000), (1000, 0, 2000, 1000), (0, 1000, 1000, 1500), (1000, 1000, 2000, 1500)
    ]  # fmt: skip
    assert grid[0].flags == (False, True, False, True)
    assert [tile.bounds for tile in vertical] == [(936, 0, 1064, 1000), (936, 1000, 1064, 1500)]
    assert vertical[0].flags == (False, True, False, False)
    assert [tile.bounds for tile in horizontal] == [(0, 936, 1000, 1064), (1000, 936, 2000, 1064)]
    assert horizontal[1].flags == (False, False, True, False)
    assert [(tile.kind, tile.bounds) for tile in corners] == [(CORNERS, (872, 872, 1128, 1128))]


@pytest.mark.parametrize(("x", "y"), [(500, 500), (995, 500), (500, 990), (990, 992), (920, 400)])
def test_a_nucleus_is_found_once_wherever_the_seams_are(tmp_path, x, y):
    maps = np.zeros((1500, 1500, 2), np.float32)
    maps[y : y + 14, x : x + 14, 0] = 0.9
    np.save(tmp_path / "nuclei.npy", maps)
    np.save(tmp_path / "classes.npy", np.full((1500, 1500, 1), 2, np.float32))
    paths = (tmp_path / "nuclei.npy", tmp_path / "classes.npy")
    known: dict = {}
    for tiles in tile_sets((1500, 1500), tile_px=1000):
        for tile in tiles:
            found, replaced = find_nuclei(paths, tile, known)
            known = {k: v for k, v in {**known, **found}.items() if k not in replaced}
    [nucleus] = known.values()
    assert nucleus["box"].tolist() == [x + 1, y + 1, x + 13, y + 13]
    assert nucleus["type"] == 2


def test_a_corners_tile_replaces_what_its_middle_cuts(tmp_path):
    maps = np.zeros((256, 256, 2), np.float32)
    maps[100:120, 100:120, 0] = 0.9
    np.save(tmp_path / "nuclei.npy", maps)
    np.save(tmp_path / "classes.npy", np.zeros((256, 256, 1), np.float32))
    tile = SeamTile(kind=CORNERS, bounds=(0, 0, 256, 256), flags=(True,) * 4)
    known = {
        "cut": {"box": np.array([60, 100, 70, 110])},
        "within": {"box": np.array([100, 100, 119, 119])},
        "without": {"box": np.array([5, 5, 20, 20])},
    }
    _, replaced = find_nuclei((tmp_path / "nuclei.npy", tmp_path / "classes.npy"), tile, known)
    assert replaced == ["cut"]


# HoVer-NeXt's objects


def test_tiles_own_every_pixel_once():
    owned = np.zeros((5000, 3000), int)
    for tile in overlapping((5000, 3000)):
        owned[tile.own] += 1
        assert all(
            s.start <= o.start < o.stop <= s.stop for s, o in zip(tile.seen, tile.own, strict=True)
        )
    assert (owned == 1).all()


def test_touching_nuclei_are_parted_by_their_cores():
    inner, contour = canvas(60), canvas(60)
    inner[10:20, 10:20] = inner[10:20, 24:34] = 0.9
    contour[10:20, 20:24] = 0.9
    labels = label_pieces(inner, contour)
    assert len(np.unique(labels)) == 3
    assert (labels[10:20, 10:34] > 0).all()


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize(("start", "stop", "owner"), [(93, 106, 0), (95, 106, 1), (97, 106, 1)])
def test_a_nucleus_belongs_to_the_tile_of_its_centroid(turned, start, stop, owner):
    labels = np.zeros((100, 200), np.int32)
    labels[40:51, start:stop] = 1
    labels = labels.T if turned else labels
    classes = np.full(labels.shape, 4, np.uint8)
    tiles = overlapping(labels.shape, tile_px=100)
    found = [describe_own(labels[tile.seen], classes[tile.seen], tile) for tile in tiles]
    assert [len(nuclei) for nuclei in found] == [1 - owner, owner]
    centroid = ((start + stop - 1) / 2, 45.0)
    assert found[owner][0]["class"] == 4
    assert tuple(found[owner][0]["centroid"]) == (centroid[::-1] if turned else centroid)


# tables


def result(wall, rss=100, **more):
    return {"wall_s": wall, "cpu_s": wall, "peak_rss_mb": rss, "units": 10, "unit": "tile", **more}


def test_ratios_are_taken_within_a_round():
    rounds = [
        {"ours": result(1.0), "peer": result(10.0, 500)},
        {"ours": result(2.0), "peer": result(24.0, 500)},
        {"ours": result(4.0), "peer": result(20.0, 500)},
    ]
    row = summary(with_totals(rounds, {}), "ours")["peer"]
    assert row["total_s ratio"] == 10.0
    assert row["total_s ratios"] == [5.0, 12.0]
    assert row["peak_rss_mb ratio"] == 5.0
    assert row["total_s"] == 20.0


def test_what_does_one_stage_is_compared_with_that_stage():
    ours = result(10.0, stages_s={"predict": 8.0, "polygonize": 2.0})
    rounds = [{"ours": ours, "peer": result(5.0, beside="polygonize")}]
    row = summary(with_totals(rounds, {}), "ours")["peer"]
    assert row["total_s ratio"] == 2.5
    assert "peak_rss_mb ratio" not in row


def test_a_tool_that_failed_in_a_round_is_compared_in_the_others():
    rounds = [{"ours": result(1.0)}, {"ours": result(2.0), "peer": result(6.0)}]
    row = summary(with_totals(rounds, {}), "ours")["peer"]
    assert (row["rounds"], row["total_s ratio"]) == (1, 3.0)


def test_the_full_network_is_extrapolated_by_the_tools_own_patches():
    timed = result(30.0, seconds_a_unit=2.5, timed_units=4)
    assert total_seconds(timed, rest_s=5.0) == 30.0
    assert total_seconds(result(7.0), rest_s=5.0) == 7.0
    row = summary(with_totals([{"ours": timed}], {}), "ours")["ours"]
    assert {name for name in row if name.endswith("ratio")} == {"total_s ratio"}
    assert "(extrapolated)" in markdown(summary(with_totals([{"ours": timed}], {}), "ours"), "ours")


def test_the_rest_is_what_is_outside_of_prediction():
    whole = {"wall_s": 20.0, "stages_s": {"predict": 12.0, "write": 3.0}}
    assert rest_seconds(whole) == 8.0
    assert rest_seconds({"wall_s": 20.0, "stages_s": {"inference": 15.0, "nuclei": 5.0}}) == 5.0


def test_rests_are_those_of_the_colour_network(tmp_path):
    once = {"wall_s": 9.0, "stages_s": {"inference": 2.0}}
    ours = {"wall_s": 3.0, "stages_s": {"predict": 2.0}}
    rounds = [{"ours": ours, "original": once}, {"ours": ours}]
    path = tmp_path / "colour.json"
    path.write_text(json.dumps({"rounds": rounds}))
    assert peers.rests_from(path) == {
        "ours": 1.0,
        "ours-bf16": 1.0,
        "ours-int8": 1.0,
        "original": 7.0,
    }
    assert peers.rests_from(None) == {}


# the command


def test_a_run_is_measured_from_outside(tmp_path):
    path = tmp_path / "result.json"
    code = (
        "import json, time; kept = bytearray(b'x') * (150 << 20); time.sleep(1.2); "
        f"json.dump({{'wall_s': 1.0}}, open({str(path)!r}, 'w'))"
    )
    facts = run_measured([sys.executable, "-c", code], path, root=tmp_path)
    assert facts["wall_s"] == 1.0
    assert facts["process_wall_s"] > 1
    assert facts["peak_rss_mb"] >= 150  # of the parent, too, where that is larger
    assert 150 <= facts["peak_anonymous_mb"] < 600


def test_a_run_that_ends_without_a_result_says_why(tmp_path):
    path = tmp_path / "result.json"
    path.write_text("of an earlier run")
    words = [sys.executable, "-c", "raise SystemExit('no such slide')"]
    with pytest.raises(RunFailedError, match="ended with 1: no such slide"):
        run_measured(words, path, root=tmp_path)
    with pytest.raises(RunFailedError, match="ended with 0"):
        run_measured([sys.executable, "-c", ""], path, root=tmp_path)


def test_a_peer_without_its_environment_is_left_out(tmp_path, capsys):
    assert peers.python_of("tiatoolbox", None) is None
    assert peers.python_of("hovernext", tmp_path) is None
    said = capsys.readouterr().out
    assert "--environments" in said
    assert "python -m benchmarks.peers.environment" in said
    assert peers.python_of("ours", None) is not None


def test_the_full_network_is_timed_on_some_patches(tmp_path):
    slide = tmp_path / "a.svs"
    slide.touch()
    asked = ["--slide", str(slide), "--out", str(tmp_path), "--network", "full", "--limit", "4"]
    args = peers.parse(asked)
    words = peers.command("original", Path("python"), args)
    assert words[words.index("--limit") + 1] == "4"
    words = peers.command("ours", Path("python"), peers.parse([*asked, "--tiles", "3"]))
    assert words[words.index("--limit") + 1] == "3"
    args = peers.parse([*asked, "--whole"])
    assert "--limit" not in peers.command("ours", Path("python"), args)
    assert "--limit" in peers.command("tiatoolbox", Path("python"), args)


def test_a_missing_slide_is_told_before_anything_runs(tmp_path, capsys):
    with pytest.raises(SystemExit):
        peers.parse(["--slide", str(tmp_path / "no.svs"), "--out", str(tmp_path)])
    assert "there is no slide" in capsys.readouterr().err


def test_requirements_for_notebooks_and_extras_are_left_out():
    stated = ["torch<2.13.0,>=2.5.0", "zarr>=3", "sphinx<9", "pytest; extra == 'dev'", "joblib"]
    assert wanted(stated) == ["zarr>=3", "joblib"]


def test_figures_are_kept_after_each_round(tmp_path, monkeypatch, capsys):
    ran = []

    def run(command, path, *, root):
        ran.append(path.stem)
        if len(ran) == 4:
            raise KeyboardInterrupt
        return result(float(len(ran)), stages_s={})

    slide = tmp_path / "a.svs"
    slide.touch()
    monkeypatch.setattr(peers, "run_measured", run)
    monkeypatch.setattr("benchmarks.peers.mask.write_mask", lambda *_: 0.5)
    only = ["--only", "ours", "ours-bf16", "--once", "ours-bf16", "--json", str(tmp_path / "j")]
    words = ["x", "--slide", str(slide), "--out", str(tmp_path / "out"), "--rounds", "9", *only]
    monkeypatch.setattr("sys.argv", words)
    with pytest.raises(KeyboardInterrupt):
        peers.main()
    facts = json.loads((tmp_path / "j").read_text())
    assert [list(one) for one in facts["rounds"]] == [["ours", "ours-bf16"], ["ours"]]
    assert facts["tools"]["ours-bf16"]["total_s ratio"] == 2.0


def test_a_tool_that_fails_is_left_out_of_the_next_rounds(tmp_path, monkeypatch, capsys):
    def run(command, path, *, root):
        if path.stem == "ours-bf16":
            raise peers.RunFailedError("it has no memory")
        return result(1.0)

    slide = tmp_path / "a.svs"
    slide.touch()
    monkeypatch.setattr(peers, "run_measured", run)
    only = ["--only", "ours", "ours-bf16", "--rounds", "2"]
    args = peers.parse(["--slide", str(slide), "--out", str(tmp_path), *only])
    assert [list(one) for one in list(peers.run_rounds(args))[-1]] == [["ours"], ["ours"]]
    assert capsys.readouterr().out.count("it has no memory") == 1
