"""Real pixels through the baseline: objects that do not depend on how they were cut."""

import os
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import shapely

import wsi_pipeline as wsi
from benchmarks.parity import panoptic_quality
from wsi_pipeline.instances import extract_objects
from wsi_pipeline.store import PredictionStore
from wsi_pipeline.table import ObjectWriter, read_objects

DATA = Path(os.environ.get("WSI_DATA", Path(__file__).parents[2] / "shared" / "data"))
SLIDE = DATA / "slides" / "CMU-1-Small-Region.svs"

pytestmark = [
    pytest.mark.real,
    pytest.mark.skipif(not SLIDE.is_file(), reason=f"no {SLIDE} (set WSI_DATA to the data kit)"),
]


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    out = tmp_path_factory.mktemp("real")
    for tile in (512, 1024):
        (report,) = wsi.run([SLIDE], out / str(tile), model="stain-baseline", tile_size=tile)
        assert report.done, report.reason
    return out


def table_bytes(store, path, **how) -> bytes:
    extraction = extract_objects(store, slide_id="a", **how)
    with ObjectWriter(path, metadata={}, pixel_size=store.pixel_size) as writer:
        for batch in extraction.batches:
            writer.write(batch)
    return path.read_bytes()


def test_table_bytes_do_not_depend_on_windows_halos_or_threads(results, tmp_path):
    store = PredictionStore.open(results / "1024" / "maps" / f"{SLIDE.stem}.zarr")
    reference = table_bytes(store, tmp_path / "t.parquet", window_px=4096, halo_px=0)
    assert len(pd.read_parquet(tmp_path / "t.parquet")) > 3000
    for window_px, halo_px, workers in (
        (2048, 64, 1),
        (1024, 32, 2),
        (1000, 16, 1),
        (512, 32, 3),
        (333, 24, 2),
        (200, 8, 1),
    ):
        how = {"window_px": window_px, "halo_px": halo_px, "workers": workers}
        assert table_bytes(store, tmp_path / "t.parquet", **how) == reference, how


@pytest.mark.parametrize("kind", ["nucleus", "gland", "lumen"])
def test_objects_agree_between_tile_sizes(results, kind):
    small, large = (
        np.asarray(
            read_objects(results / str(t) / "objects" / f"{SLIDE.stem}.parquet", kind=kind).geometry
        )
        for t in (512, 1024)
    )
    assert panoptic_quality(small, large) >= 0.99


def test_objects_lie_on_the_tissue(results):
    table = read_objects(results / "1024" / "objects" / f"{SLIDE.stem}.parquet")
    tissue = read_objects(results / "1024" / "tissue" / f"{SLIDE.stem}.parquet", kind="outline")
    region = shapely.union_all(tissue.geometry.values)
    shapely.prepare(region)
    points = shapely.points(table.centroid_x, table.centroid_y)
    # Maps are blanked by pixel centres, so a centroid may lie a pixel beyond the outline.
    assert shapely.dwithin(region, points, 10.0).mean() == 1.0
    assert shapely.is_valid(table.geometry.values).all()
    assert shapely.is_ccw(shapely.get_exterior_ring(table.geometry.values)).all()
