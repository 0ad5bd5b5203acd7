"""Where the pixel size comes from, in which order, and what is refused."""

import pytest

from wsi_pipeline.errors import ImplausiblePixelSizeError, MissingPixelSizeError
from wsi_pipeline.slide.pixel_size import PixelSize, find_pixel_size, objective_power

EVERYTHING = {
    "aperio.MPP": "0.2517",
    "aperio.AppMag": "20",
    "openslide.mpp-x": "0.3",
    "openslide.mpp-y": "0.31",
    "tiff.XResolution": "20000",
    "tiff.YResolution": "10000",
    "tiff.ResolutionUnit": "centimeter",
}


def without(*keys):
    return {key: value for key, value in EVERYTHING.items() if key not in keys}


MPP = ("openslide.mpp-x", "openslide.mpp-y")
TAGS = ("tiff.XResolution", "tiff.YResolution")


@pytest.mark.parametrize(
    ("properties", "argument", "expected"),
    [
        (EVERYTHING, 0.4, PixelSize(x=0.4, y=0.4, source="argument")),
        (EVERYTHING, None, PixelSize(x=0.2517, y=0.2517, source="aperio.MPP")),
        (without("aperio.MPP"), None, PixelSize(x=0.3, y=0.31, source="openslide.mpp-x")),
        (without("aperio.MPP", *MPP), None, PixelSize(x=0.5, y=1.0, source="tiff.XResolution")),
        (
            without("aperio.MPP", *MPP, *TAGS),
            None,
            PixelSize(x=0.5, y=0.5, source="objective-power"),
        ),
    ],
)
def test_the_first_to_say_so_decides(properties, argument, expected):
    assert find_pixel_size(properties, name="a.svs", argument=argument) == expected


@pytest.mark.parametrize(("power", "mpp"), [("40", 0.25), ("20.0", 0.5), ("10", 1.0)])
def test_an_objective_stands_for_its_customary_size(power, mpp):
    found = find_pixel_size({"openslide.objective-power": power}, name="a")
    assert (found.x, found.y) == (mpp, mpp)
    assert objective_power({"openslide.objective-power": power}) == float(power)


@pytest.mark.parametrize(
    "properties",
    [
        {},
        {"aperio.AppMag": "63"},
        {"aperio.MPP": "unknown"},
        {"tiff.XResolution": "1", "tiff.YResolution": "1", "tiff.ResolutionUnit": "none"},
        {"tiff.XResolution": "40000", "tiff.YResolution": "40000"},
        {"tiff.XResolution": "0", "tiff.YResolution": "0", "tiff.ResolutionUnit": "inch"},
        {"openslide.mpp-x": "0.5"},
    ],
)
def test_nothing_is_guessed(properties):
    with pytest.raises(MissingPixelSizeError, match=r"a\.svs.*aperio\.MPP.*--mpp") as caught:
        find_pixel_size(properties, name="a.svs")
    assert caught.value.code == "missing_mpp"


@pytest.mark.parametrize("value", ["0.049", "5.01", "0", "-0.25", "1000"])
def test_an_absurd_size_is_refused_and_named(value):
    with pytest.raises(ImplausiblePixelSizeError, match=rf"{float(value):g} x .*aperio\.MPP"):
        find_pixel_size({"aperio.MPP": value, "aperio.AppMag": "40"}, name="a.svs")


@pytest.mark.parametrize("value", [0.05, 5.0])
def test_the_limits_are_plausible(value):
    assert find_pixel_size({}, name="a", argument=value).x == value


def test_an_absurd_argument_is_refused_too():
    with pytest.raises(ImplausiblePixelSizeError, match="argument"):
        find_pixel_size(EVERYTHING, name="a", argument=50)
