"""The verbs that correct a crop, one by one and by what must hold for any of them."""

import math
import re

import numpy as np
import pytest
import shapely
from crop_fixtures import make_crop, outline, square
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from shapely.ops import split as halves

from wsi_pipeline.curation.corrections import apply_corrections
from wsi_pipeline.curation.crops import Round, read_crop, write_crop
from wsi_pipeline.curation.pieces import cut, ellipse, smooth
from wsi_pipeline.errors import DatasetError

# The crop's corner is at (100, 60), and a ruler pixel has 2 x 2 of level 0.
LABELS = ("nuclei", "gland")


def crop(*more):
    return make_crop(
        outline(1, square(120, 80)),  # ruler 10-20, 10-20
        outline(2, square(140, 80)),  # ruler 20-30, 10-20: touches 1
        outline(3, square(200, 150)),  # ruler 50-60, 45-55
        outline(4, square(240, 100, 40), "gland"),  # ruler 70-90, 20-40
        *more,
        labels=LABELS,
    )


def corrected(text, before=None):
    return apply_corrections(before or crop(), text, by="me").crop


def shapes(crop):
    return {own.id: own.polygon for own in crop.outlines}


def ruler(x0, y0, x1, y1):
    """A rectangle of ruler pixels, in level-0 pixels."""
    return shapely.box(100 + 2 * x0, 60 + 2 * y0, 100 + 2 * x1, 60 + 2 * y1)


def refused(text, before=None):
    with pytest.raises(DatasetError) as caught:
        corrected(text, before)
    return str(caught.value)


# -- the text --------------------------------------------------------------------------------


def test_a_round_is_noted_and_the_rest_stays():
    before = crop()
    done = apply_corrections(before, "# a note\n\ndelete 3   # debris\ngrow 1 2 -1\n", by="me")
    assert done.counts == {"delete": 1, "grow": 1}
    assert done.crop.history[:-1] == before.history
    how = "corrected by hand: 1 delete, 1 grow"
    assert done.crop.history[-1] == Round(round=1, by="me", how=how)
    assert (done.crop.box, done.crop.labels, done.crop.id) == (before.box, LABELS, "c")
    assert {own.id: own.source for own in done.crop.outlines} == {
        1: "hand",
        2: "hand",
        4: "model m",
    }
    assert set(shapes(before)) == {1, 2, 3, 4}  # untouched itself


def test_every_wrong_line_is_named_and_nothing_is_applied():
    said = refused("delete 1\ndelete 9\nfoo 1\n\ngrow 2 x\nsplit 3 0,0\n")
    assert "nothing was applied" in said
    assert [int(n) for n in re.findall(r"line (\d+)", said)] == [2, 3, 5, 6]
    assert "there is no object 9" in said
    assert "unknown verb 'foo'; there are delete, delete-in, add" in said
    assert "'x' is no number" in said


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("delete", "ids are wanted"),
        ("delete 1 1", "each once"),
        ("delete -1", "'-1' is no id"),
        ("delete-in 0 0 5 5", "no object has its centre in there"),
        ("delete-in 5 5 0 0", "x0 < x1"),
        ("delete-in 0 0 5", "x0 y0 x1 y1"),
        ("delete-in 0 0 50 50 lumen", "'lumen' is no kind of this crop"),
        ("add nucleus 1,1 2,2", "3 points"),
        ("add nucleus 1,1 1,1 2,2", "3 different points"),
        ("add cell 1,1 9,1 9,9", "'cell' is no kind"),
        ("add nucleus 1,1 9, 1 9,9", "'9,' is no point"),
        ("add nucleus 1,1 nan,1 9,9", "is no point"),
        (f"add nucleus 1,1 {'9' * 305},1 9,9", "larger number than 1,000,000"),
        (f"ellipse nucleus 9,9 {'9' * 305} 4 0", "larger number than 1,000,000"),
        (f"delete {'9' * 5000}", "is no id"),
        ("add nucleus 10,10 20,20 20,10 10,20", "crosses itself"),
        ("add nucleus -20,-20 -9,-20 -9,-9", "nothing of at least 2 um2"),
        ("add nucleus 40,5 41,5 41,6", "nothing of at least 2 um2"),
        ("ellipse nucleus 40,10 9 45", "two full axes and an angle"),
        ("ellipse nucleus 40,10 9 0 45", "longer than 0"),
        ("redraw 9 1,1 9,1 9,9", "there is no object 9"),
        ("redraw 1 1,1 9,1", "3 points"),
        ("split 1 0,0 5,0", "cuts nothing"),
        ("split 1 0,12 0,12", "two points of the line are the same"),
        ("merge 1", "2 or more ids"),
        ("merge 1 3", "more than 1.5 um apart"),
        ("merge 1 4", "different kinds"),
        ("grow 1", "by how many"),
        ("grow 1 0", "by how many"),
        ("grow 1 -20", "object 1: nothing"),
        ("kind 1", "ids and a kind"),
        ("kind 1 cell", "'cell' is no kind"),
        ("ignore 0 0 9", "x0 y0 x1 y1"),
        ("ignore 0 0 9 9 nucleus", "'nucleus' is no label"),
        ("ignore-polygon 0,0 9,9 9,0 0,9", "crosses itself"),
        ("ignore-polygon 0,0 9,9 gland", "3 points"),
    ],
)
def test_lines_that_make_no_sense_are_refused(line, words):
    said = refused(line)
    assert words in said
    assert "line 1 (" in said


def test_nothing_to_correct_is_a_round_too(tmp_path):
    after = corrected("# all is well\n")
    assert after.outlines == crop().outlines
    assert after.history[-1].how == "corrected by hand: nothing"
    # and reading and writing adds nothing
    write_crop(after, tmp_path / "c.geojson")
    again = corrected("", read_crop(tmp_path / "c.geojson"))
    assert again.outlines == after.outlines


# -- verbs -----------------------------------------------------------------------------------


def test_delete():
    assert set(shapes(corrected("delete 1 4"))) == {2, 3}


def test_delete_in_takes_objects_by_their_centres_and_leaves_regions():
    assert set(shapes(corrected("delete-in 0 0 18 40"))) == {2, 3, 4}
    assert set(shapes(corrected("delete-in 12 12 24 40"))) == {2, 3, 4}
    assert set(shapes(corrected("delete-in 0 0 90 40"))) == {3}
    assert set(shapes(corrected("delete-in 0 0 90 40 nucleus"))) == {3, 4}
    after = corrected("ignore 0 0 40 40\ndelete-in 0 0 90 80")
    assert [(own.id, own.kind) for own in after.outlines] == [(5, "ignore")]


def test_ids_of_deleted_objects_do_not_come_back():
    after = corrected("delete 4\nellipse nucleus 80,10 10 10 0")
    assert set(shapes(after)) == {1, 2, 3, 5}
    again = corrected("delete 5\nellipse nucleus 80,10 10 10 0", after)
    assert set(shapes(again)) == {1, 2, 3, 6}


def test_add_draws_a_curve_through_the_points():
    after = corrected("add gland 20,50 30,48.5 35,60 28,70 18,65")
    new = after.outlines[-1]
    assert (new.id, new.kind, new.source, new.label) == (5, "gland", "hand", None)
    for x, y in [(20, 50), (30, 48.5), (35, 60), (28, 70), (18, 65)]:
        assert new.polygon.exterior.distance(shapely.Point(100 + 2 * x, 60 + 2 * y)) < 0.15
    assert len(new.polygon.exterior.coords) > 30


def test_what_is_drawn_beyond_the_crop_is_clipped():
    after = corrected("add nucleus -10,60 10,60 10,90 -10,90")
    shape = shapes(after)[5]
    assert shape.bounds[0] == 100  # the crop's edges
    assert shape.bounds[3] == 220
    assert shape.covers(shapely.box(101, 185, 118, 219))


@pytest.mark.parametrize(
    ("angle", "tip"), [(0, (60, 40)), (90, (50, 30)), (45, (57.07, 32.93)), (-45, (57.07, 47.07))]
)
def test_angles_of_ellipses_turn_counter_clockwise_on_the_screen(angle, tip):
    shape = shapes(corrected(f"ellipse gland 50,40 20 6 {angle}\ndelete 4"))[5]
    assert shape.area / 4 == pytest.approx(math.pi * 10 * 3, rel=0.01)
    assert shape.centroid.distance(shapely.Point(200, 140)) < 0.1
    assert shape.exterior.distance(shapely.Point(100 + 2 * tip[0], 60 + 2 * tip[1])) < 0.2


def test_redraw_keeps_the_id():
    after = corrected("redraw 3 70,60 80,60 80,70 70,70")
    assert set(shapes(after)) == {1, 2, 3, 4}
    assert shapes(after)[3].centroid.distance(shapely.Point(250, 190)) < 1
    assert after.outlines[2].source == "hand"


def test_new_outlines_win_over_their_neighbours():
    done = apply_corrections(crop(), "ellipse nucleus 15,15 60 4 90", by="me")
    after = shapes(done.crop)
    assert after[5].bounds == pytest.approx((126, 60, 134, 150), abs=0.2)
    assert after[1].intersection(after[5]).area < 1e-6
    # 1 was cut in two: the rest keeps its id, what else there is gets one
    assert set(after) == {1, 2, 3, 4, 5, 6}
    assert after[6].area == pytest.approx(after[1].area, rel=0.2)
    assert done.notes == ("line 1: object 1 fell apart; a piece of it is 6 now",)


def test_an_object_of_which_little_is_left_was_replaced():
    done = apply_corrections(crop(), "add nucleus 9,9 21,9 21,19 9,19", by="me")
    assert set(shapes(done.crop)) == {2, 3, 4, 5}
    assert done.notes == ("line 1: object 1 was replaced: little of it was left uncovered",)
    assert shapes(done.crop)[2].equals(shapes(crop())[2]) is False  # its edge gave way


def test_an_object_that_loses_most_of_itself_was_replaced_too():
    # of 10 x 10, a strip of 2.8 or of 4 is left
    text = "ellipse nucleus {0},15 {1} {1} 0\n"
    gone = shapes(corrected(text.format(-82.8, 200)))
    assert set(gone) == {2, 3, 4, 5}
    stays = shapes(corrected(text.format(-84, 200)))
    assert stays[1].area == pytest.approx(4 * 10 * 4, rel=0.06)


def test_slivers_of_neighbours_go():
    # 10 x 20: the upper half is covered, but for a rim of 0.4 px at the left
    before = make_crop(outline(1, ruler(10, 10, 20, 30)), labels=LABELS)
    turn = " ".join(f"{x},{y}" for x, y in [(10.4, 10), (15, 10), (20, 10), (20, 15), (20, 20),
                                            (15, 20), (10.4, 20), (10.4, 15)])  # fmt: skip
    new = shapes(corrected(f"add nucleus {turn}", before))
    rim = shapely.box(120, 82, 120.5, 96)
    assert rim.area * 0.25**2 < 2 < shapely.box(120, 82, 121, 130).area * 0.25**2
    assert not new[1].intersects(rim)
    assert new[1].covers(ruler(10.5, 21, 19.5, 29.5))
    assert new[1].is_valid


def test_outlines_that_give_way_are_by_hand_from_then_on():
    facts = {own.id: own.source for own in corrected("ellipse nucleus 25,19 5 8 0").outlines}
    assert facts == {1: "model m", 2: "hand", 3: "model m", 4: "model m", 5: "hand"}
    # what is cut by an outline that only became another kind was cut by hand, too
    over = crop(outline(5, ruler(25, 12, 35, 25), "gland", source="model k"))
    after = corrected("kind 5 nucleus", over).outlines
    assert {own.id: own.source for own in after} == {
        1: "model m", 2: "hand", 3: "model m", 4: "model m", 5: "model k",
    }  # fmt: skip


def test_pieces_of_an_outline_that_gave_way_are_by_hand():
    bar = make_crop(outline(1, ruler(10, 10, 60, 20)), labels=LABELS)
    after = corrected("ellipse nucleus 35,15 6 30 0", bar)
    assert len(after.outlines) == 3
    assert {own.source for own in after.outlines} == {"hand"}


def test_other_kinds_do_not_give_way():
    after = shapes(corrected("ellipse nucleus 80,30 10 10 0"))
    assert after[4].equals(shapes(crop())[4])


def test_split_cuts_along_the_line_beyond_its_ends():
    done = apply_corrections(crop(), "split 3 53,49 53,50", by="me")
    after = shapes(done.crop)
    assert after[3].equals(ruler(53, 45, 60, 55))
    assert after[5].equals(ruler(50, 45, 53, 55))
    assert done.notes == ("line 1: a piece of object 3 is object 5 now",)
    bent = shapes(corrected("split 3 40,48 55,48 55,80"))
    assert bent[5].equals(ruler(50, 48, 55, 55))
    three = shapes(corrected("split 4 65,25 80,25 80,15 85,15 85,25 95,25"))
    assert sum(shape.area for number, shape in three.items() if number >= 4) == 1600


def test_merge_joins_neighbours_and_small_gaps():
    after = shapes(corrected("merge 2 1"))
    assert set(after) == {2, 3, 4}
    assert after[2].equals(ruler(10, 10, 30, 20))
    gap = outline(5, shapely.box(161.6, 80, 181.6, 100))  # 0.8 ruler px to the right of 2
    joined = shapes(corrected("merge 2 5", crop(gap)))[2]
    assert joined.geom_type == "Polygon"
    assert joined.covers(shapely.Point(160.8, 90))
    assert joined.area == pytest.approx(800 + 32, rel=0.01)


def test_grow_stops_at_neighbours_and_the_crop_and_shrink_leaves_its_edge():
    after = shapes(corrected("grow 1 3"))
    assert after[2].equals(shapes(crop())[2])
    assert after[1].bounds == (114, 74, 146, 106)  # round 2, above and below it
    assert after[1].intersection(after[2]).area < 1e-6
    edge = crop(outline(5, ruler(0, 60, 10, 80)))
    assert shapes(corrected("grow 5 2", edge))[5].bounds == (100, 176, 124, 220)
    assert shapes(corrected("grow 5 -2", edge))[5].equals(ruler(0, 62, 8, 80))


def test_kind_makes_other_objects_and_regions_of_unknown():
    after = corrected("kind 3 gland\nkind 1 4 ignore")
    facts = {own.id: (own.kind, own.label, own.source) for own in after.outlines}
    assert facts == {
        1: ("ignore", "nuclei", "model m"),
        2: ("nucleus", None, "model m"),
        3: ("gland", None, "model m"),
        4: ("ignore", "gland", "model m"),
    }
    assert corrected("kind 1 nucleus", after).outlines[0].label is None


def test_ignore_marks_regions_and_takes_nothing_away():
    after = corrected(
        "ignore 5 5 25 25\nignore-polygon 0,70 20,70 20,90 gland\nignore 5 5 9 9 nuclei"
    )
    regions = {own.id: own for own in after.outlines if own.kind == "ignore"}
    assert regions[5].polygon.equals(ruler(5, 5, 25, 25))
    assert regions[5].label is None
    assert regions[6].label == "gland"
    assert regions[6].polygon.equals(
        shapely.Polygon([(100, 200), (140, 200), (140, 220), (120, 220)])
    )
    assert (regions[7].label, regions[7].source) == ("nuclei", "hand")
    assert shapes(after)[1].equals(shapes(crop())[1])
    assert set(shapes(corrected("delete 5 6 7", after))) == {1, 2, 3, 4}


# -- what must hold for any -------------------------------------------------------------------

ROUGH = 0.3
"""What rounding to a tenth of a pixel may change in an outline, in pixels along it."""


@st.composite
def blobs(draw, centre=(200.0, 140.0), low=8.0, high=38.0):
    """A star-shaped outline of level-0 pixels."""
    count = draw(st.integers(5, 14))
    radii = draw(st.lists(st.floats(low, high), min_size=count, max_size=count))
    turn = np.linspace(0, 2 * np.pi, count, endpoint=False)
    points = np.stack([np.cos(turn), np.sin(turn)], axis=1) * np.array(radii)[:, None] + centre
    shape = shapely.Polygon(points.round(1))
    assume(shape.is_valid and shape.area > 200)
    return shape


@given(blobs(), st.floats(0, math.pi), st.floats(-10, 10))
@settings(deadline=None, max_examples=50)
def test_split_conserves_area(shape, angle, offset):
    before = make_crop(outline(1, shape))
    along = np.array([math.cos(angle), math.sin(angle)])
    middle = np.array([50.0, 40.0]) + offset * along[::-1] * (1, -1)
    (x0, y0), (x1, y1) = middle - 2 * along, middle + 2 * along
    try:
        after = corrected(f"split 1 {x0:.4f},{y0:.4f} {x1:.4f},{y1:.4f}", before)
    except DatasetError:
        # the line misses, or cuts off less than 2 um2
        reach = shapely.LineString(100 * np.array([-along, along]) + middle * 2 + (100, 60))
        assert min(piece.area for piece in halves(shape, reach).geoms) < 33 or not reach.intersects(
            shape
        )
        return
    pieces = [own.polygon for own in after.outlines]
    assert len(pieces) >= 2
    length = sum(piece.length for piece in pieces)
    assert abs(sum(piece.area for piece in pieces) - shape.area) < ROUGH * length
    whole = shapely.union_all(pieces)
    assert whole.buffer(ROUGH).covers(shape)
    assert shape.buffer(ROUGH).covers(whole)
    assert pieces[0].area >= max(piece.area for piece in pieces) - 1  # the largest keeps the id


@given(blobs(), st.floats(-3, 6).filter(lambda by: abs(by) > 0.3))
@settings(deadline=None, max_examples=50)
def test_grow_is_monotone_and_as_far_as_it_says(shape, by):
    before = make_crop(outline(1, shape))
    try:
        after = corrected(f"grow 1 {by:.3f}", before)
    except DatasetError:
        pieces = shapely.get_parts(shape.buffer(2 * by))
        assert max((piece.area for piece in pieces), default=0) < 33  # 2 um2 are 32 px
        return
    whole = shapely.union_all([own.polygon for own in after.outlines])
    large, small = (whole, shape) if by > 0 else (shape, whole)
    assert large.buffer(ROUGH).covers(small)
    if by > 0:
        assert whole.symmetric_difference(shape.buffer(2 * by)).area < 0.05 * whole.area
    else:
        assert shape.buffer(2 * by + ROUGH).buffer(ROUGH).covers(whole)


@given(blobs(), st.floats(1, 5))
@settings(deadline=None, max_examples=50)
def test_more_growth_is_more(shape, by):
    before = make_crop(outline(1, shape))
    less, more = (shapes(corrected(f"grow 1 {d:.3f}", before))[1] for d in (by, by + 0.5))
    assert more.buffer(ROUGH).covers(less)
    assert more.area > less.area


@given(st.lists(blobs(), min_size=1, max_size=4), blobs(centre=(210.0, 150.0)))
@settings(deadline=None, max_examples=50)
def test_a_new_object_has_all_it_asked_for_and_nobody_overlaps(others, shape):
    before = make_crop(labels=LABELS)
    for other in [*others, shape]:
        points = " ".join(
            f"{(x - 100) / 2:.3f},{(y - 60) / 2:.3f}" for x, y in other.exterior.coords[:-1]
        )
        before = corrected(f"add nucleus {points}", before)  # a crop refuses real overlaps
    polygons = [own.polygon for own in before.outlines]
    wanted = smooth(np.array(shape.exterior.coords[:-1])).intersection(before.rectangle)
    newest = shapely.union_all([p for p in polygons if p.intersects(wanted.buffer(-1))])
    assert newest.buffer(ROUGH).covers(wanted)
    union = shapely.union_all(polygons).area
    assert sum(p.area for p in polygons) - union < ROUGH * sum(p.length for p in polygons)


@given(blobs(), blobs(centre=(215.0, 140.0)))
@settings(deadline=None, max_examples=50)
def test_merging_undoes_splitting(shape, line):
    x, y = (shape.centroid.x - 100) / 2, (shape.centroid.y - 60) / 2
    assume(line.area > 0)
    before = make_crop(outline(1, shape))
    try:
        parts = corrected(f"split 1 {x:.3f},{y - 3:.3f} {x:.3f},{y + 3:.3f}", before)
    except DatasetError:
        return
    after = corrected("merge " + " ".join(str(own.id) for own in parts.outlines), parts)
    (whole,) = after.outlines
    assert whole.id == 1
    assert whole.polygon.buffer(ROUGH).covers(shape)
    # what is narrower than 1.5 um may be closed
    assert shape.buffer(3.2).buffer(-2.8).covers(whole.polygon)


@given(blobs())
def test_curves_pass_through_their_points_and_stay_near(shape):
    points = np.array(shape.exterior.coords[:-1])
    curve = smooth(points)
    assert curve.is_valid
    assert max(curve.exterior.distance(shapely.Point(p)) for p in points) < 1e-9
    longest = np.linalg.norm(points - np.roll(points, 1, axis=0), axis=1).max()
    assert curve.hausdorff_distance(shape) < 0.5 * longest


def test_curves_do_not_depend_on_where_they_begin():
    points = np.array([[0.0, 0], [10, -3], [22, 4], [15, 20], [3, 14]])
    first = smooth(points)
    assert smooth(np.roll(points, 2, axis=0)).symmetric_difference(first).area < 1e-9
    assert smooth(points[::-1]).symmetric_difference(first).area < 1e-9


def test_curves_are_centripetal():
    """Against Barry and Goldman's recursion, a point at a time."""
    points = np.array([[0.0, 0], [10, -3], [11, 4], [30, 20], [3, 14]])

    def value(low, high, t, knots, place):
        if low == high:
            return place[low]
        left, right = value(low, high - 1, t, knots, place), value(low + 1, high, t, knots, place)
        a, b = (knots[1], knots[2]) if high - low == 3 else (knots[low], knots[high])
        return ((b - t) * left + (t - a) * right) / (b - a)

    curve = np.array(smooth(points).exterior.coords)[:-1]
    for start in range(5):
        place = np.array([points[(start + k) % 5] for k in (-1, 0, 1, 2)])
        steps = np.linalg.norm(np.diff(place, axis=0), axis=1) ** 0.5
        knots = np.concatenate([[0.0], np.cumsum(steps)])
        for n in range(8):
            t = knots[1] + (knots[2] - knots[1]) * n / 8
            assert curve[8 * start + n] == pytest.approx(value(0, 3, t, knots, place))


def test_curves_through_points_of_a_circle_are_round():
    turn = np.linspace(0, 2 * np.pi, 8, endpoint=False)
    curve = smooth(10 * np.stack([np.cos(turn), np.sin(turn)], axis=1))
    radii = np.linalg.norm(np.array(curve.exterior.coords), axis=1)
    assert radii.min() > 9.85
    assert radii.max() < 10.15


def test_an_ellipse_fulfils_its_equation():
    points = np.array(ellipse(np.array([5.0, 7.0]), (12.0, 4.0), 30).exterior.coords) - (5, 7)
    angle = math.radians(30)
    along = points @ np.array([math.cos(angle), -math.sin(angle)])
    across = points @ np.array([math.sin(angle), math.cos(angle)])
    assert (along / 6) ** 2 + (across / 2) ** 2 == pytest.approx(1.0)


def test_small_pieces_of_a_cut_stay_with_their_neighbour():
    pieces = cut(shapely.box(0, 0, 100, 10), np.array([[1.0, 0.0], [1.0, 10.0]]), 50.0)
    assert [piece.area for piece in pieces] == [1000]
    with pytest.raises(DatasetError, match="crosses itself"):
        cut(shapely.box(0, 0, 9, 9), np.array([[1.0, 0], [1, 5], [4, 2], [0, 2]]), 1.0)
