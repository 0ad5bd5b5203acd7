"""Hostile results of earlier runs: tables, stores of maps, records."""

from __future__ import annotations

import io
import json
import struct
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import shapely

from benchmarks.fuzz.models import HEADS
from benchmarks.fuzz.mutate import Rng, break_bytes, break_json_text, pick
from benchmarks.fuzz.trees import read_tree, write_tree
from wsi_pipeline.geometry import PixelGrid
from wsi_pipeline.spec import ModelSpec
from wsi_pipeline.store import PredictionBlock, PredictionStore
from wsi_pipeline.table import OBJECT_SCHEMA, ObjectWriter
from wsi_pipeline.tiling import TileGrid

__all__ = ["break_maps", "break_records", "break_table", "maps", "records", "tables"]


# --- tables


@cache
def tables() -> tuple[bytes, ...]:
    """Return good tables: one of some rows, one of none."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a.parquet"
        with ObjectWriter(path, metadata={"model": {"name": "m"}}, pixel_size=(0.5, 0.5)) as writer:
            writer.write(_rows(40))
        full = path.read_bytes()
        with ObjectWriter(path, metadata={}, pixel_size=(0.5, 0.5)):
            pass
        return full, path.read_bytes()


def _rows(count: int) -> pa.Table:
    x = np.arange(count, dtype=float)
    boxes = shapely.box(x, 0, x + 0.75, 1)
    sides = pa.StructArray.from_arrays(
        [pa.array(side) for side in shapely.bounds(boxes).T],
        fields=list(OBJECT_SCHEMA.field("bbox").type),
    )
    named = pa.DictionaryArray.from_arrays(pa.array(np.arange(count) % 2, pa.int32()), ["g", "n"])
    columns: dict[str, Any] = {}
    for field in OBJECT_SCHEMA:
        if pa.types.is_dictionary(field.type):
            columns[field.name] = named
        elif pa.types.is_integer(field.type):
            columns[field.name] = pa.array(np.arange(count), field.type)
        else:
            columns[field.name] = pa.array(x).cast(field.type) if field.name not in (
                "bbox", "geometry") else None  # fmt: skip
    columns |= {"bbox": sides, "geometry": pa.array(list(shapely.to_wkb(boxes)), pa.binary())}
    return pa.table(list(columns.values()), schema=OBJECT_SCHEMA)


def break_table(folder: Path, rng: Rng) -> str:
    """Write a hostile ``a.parquet``."""
    path, number = folder / "a.parquet", int(rng.integers(len(tables())))
    data, roll = tables()[number], rng.random()
    if roll < 0.35:
        data, done = break_bytes(data, rng, tables())
    elif roll < 0.6:
        # the footer, without moving it
        size = int.from_bytes(data[-8:-4], "little")
        changed, count = bytearray(data), pick(rng, (1, 1, 2, 8))
        for _ in range(count):
            place = len(data) - 8 - size + int(rng.integers(size))
            changed[place] ^= 1 << int(rng.integers(8))
        data, done = bytes(changed), f"{count} bits of the footer"
    else:
        data, done = _odd_table(data, rng)
    path.write_bytes(data)
    return f"table {number}: {done}"


def _odd_table(data: bytes, rng: Rng) -> tuple[bytes, str]:
    """Write the table again: whole, with other metadata, columns or geometries."""
    table = pq.read_table(io.BytesIO(data))
    keys = dict(table.schema.metadata or {})
    act = pick(rng, ("key", "key", "key", "drop", "cast", "geometry", "null", "rename", "bomb"))
    names = table.column_names
    name = pick(rng, names)
    if act == "key":
        key = pick(rng, (b"geo", b"geo", b"wsi_pipeline"))
        keys[key], done = break_json_text(keys[key].decode(), rng)
        act += f" {key.decode()}: {done}"
    elif act == "drop":
        table = table.drop_columns(name)
    elif act == "rename":
        table = table.rename_columns([f"{n}_" if n == name else n for n in names])
    elif act == "bomb":
        # dictionary pages make one value a billion bytes at no cost
        value = pa.array(["x" * 1_000_000]).dictionary_encode()
        many = pa.DictionaryArray.from_arrays(pa.array(np.zeros(20_000, np.int32)),
                                              value.dictionary.cast(pa.string()))  # fmt: skip
        table = pa.table({"kind": many, "geometry": pa.array([b""] * 20_000, pa.binary()),
                          "bbox": pa.array([1.0] * 20_000)})  # fmt: skip
    else:
        column: Any = {
            "cast": lambda: pa.array([str(n) for n in range(len(table))], pa.string()),
            "null": lambda: pa.nulls(len(table), pa.int8()),
            "geometry": lambda: pa.array([_odd_wkb(rng) for _ in range(len(table))], pa.binary()),
        }[act]()
        name = "geometry" if act == "geometry" else name
        table = table.set_column(names.index(name), name, column)
    buffer = io.BytesIO()
    pq.write_table(table.replace_schema_metadata(keys), buffer)
    return buffer.getvalue(), f"{act} {name}"


def _odd_wkb(rng: Rng) -> bytes:
    good = bytearray(shapely.to_wkb(shapely.box(0, 0, 1, 1)))
    struct.pack_into("<I", good, 5, pick(rng, (0, 1, 2**31, 2**32 - 1)))
    return pick(
        rng,
        (
            bytes(good),
            b"",
            b"\x01",
            shapely.to_wkb(shapely.Point(0, 0)),
            shapely.to_wkb(shapely.GeometryCollection()),
        ),
    )


# --- maps


@cache
def maps() -> dict[str, bytes]:
    """Return the files of a good store of maps."""
    spec = ModelSpec(name="m", architecture="none", mpp=0.5, halo_px=16, heads=HEADS, options={})
    grid = PixelGrid(origin=(0.0, 0.0), spacing=(2.0, 2.0), size=(200, 90))
    tiles = TileGrid.cover(grid, tile_px=64, halo_px=16)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a.zarr"
        store = PredictionStore.create(path, spec=spec, tiles=tiles, pixel_size=(0.25, 0.25),
                                       made={"job": "job"})  # fmt: skip
        for tile in tiles.tiles:
            arrays = {}
            for key, head in spec.maps.items():
                box = tile.write.coarsen(head.stride)
                channels = (len(head.prob_channels),) if key.endswith("/prob") else ()
                arrays[key] = np.full((*channels, box.height, box.width), 1, np.uint8)
            store.write(PredictionBlock(tile=tile, arrays=arrays))
        store.seal()
        return read_tree(path)


def break_maps(folder: Path, rng: Rng) -> str:
    """Write a hostile ``a.zarr``."""
    files = dict(maps())
    names = sorted(files)
    zarrs = [name for name in names if name.endswith("zarr.json")]
    done = []
    for _ in range(pick(rng, (1, 1, 2))):
        name = pick(rng, zarrs if rng.random() < 0.7 else names)
        if rng.random() < 0.05:
            files[name], what = b"", "emptied"
        elif name.endswith("zarr.json"):
            files[name], what = _break_record(files[name].decode(errors="replace"), rng)
        else:
            files[name], what = break_bytes(files[name], rng)
        done.append(f"{name}: {what}")
    if rng.random() < 0.05:
        del files[name]
        done.append("gone")
    write_tree(folder / "a.zarr", files)
    return ", ".join(done)


def _inside(content: Any, key: str) -> Any:
    return content.get(key) if isinstance(content, dict) else None


def _break_record(text: str, rng: Rng) -> tuple[bytes, str]:
    """Change zarr's own words, or the spec that they hold as a text."""
    try:
        content = json.loads(text)
    except (ValueError, RecursionError):  # it has been broken before
        return break_bytes(text.encode(), rng)
    own = _inside(_inside(content, "attributes"), "wsi_pipeline")
    if not _inside(own, "spec") or rng.random() < 0.4:
        return break_json_text(text, rng)
    key = pick(rng, ("spec", *own))
    if key == "spec":
        changed, done = break_json_text(own["spec"], rng)
        own["spec"] = changed.decode(errors="replace")
    else:
        changed, done = break_json_text(json.dumps({key: own[key]}), rng)
        try:
            own.update(json.loads(changed))
        except (ValueError, TypeError, RecursionError):
            return changed, done
    return json.dumps(content).encode(), f"{key}: {done}"


# --- records of runs


@cache
def records() -> dict[str, str]:
    """Return the records of a run of two slides: one failed, one is done."""
    slides = [{"path": f"/x/{name}.svs", "slide_id": name, "mpp": None, "mask": None}
              for name in ("a", "b")]  # fmt: skip
    run = {"slides": slides, "options": {"device": "cpu"}, "versions": {"python": "3"},
           "model": {"name": "m", "sha256": "0" * 64, "folder": "/x"}}  # fmt: skip
    report = {
        "slide_id": "a", "path": "/x/a.svs", "job_id": "j", "status": "failed",
        "error": {"code": "internal", "stage": "open", "message": "x"}, "warnings": [],
        "mpp": {"x": 0.5, "y": 0.5, "source": "argument"}, "tissue_mm2": 1.0,
        "counts": {"gland": 1}, "truncated": 0, "unreadable_fraction": 0.0,
        "seconds": {"open": 0.1, "total": 1.0}, "throughput": {"mm2_per_s": 1.0},
        "bottleneck": "open", "peak_rss_mb": 100.0, "device": "cpu", "precision": "fp32",
        "model": {"name": "m", "sha256": "0" * 64},
        "outputs": {"objects/a.parquet": {"bytes": 3, "sha256": "0" * 64}},
        "versions": {}, "started": "", "finished": "", "host": "h", "restarts": 0,
    }  # fmt: skip
    done = report | {"slide_id": "b", "status": "done", "error": None}
    line = json.dumps({"event": "start", "job_id": "j"}) + "\n"
    return {
        "run.json": json.dumps(run),
        "reports/a.json": json.dumps(report),
        "reports/b.json": json.dumps(done),
        "logs/a.jsonl": line * 3,
    }


def break_records(folder: Path, rng: Rng) -> str:
    """Write a results folder ``out`` with hostile records."""
    files = {name: text.encode() for name, text in records().items()}
    files["objects/b.parquet"] = b"PAR"
    name = pick(rng, sorted(records()))
    text = records()[name]
    if name.endswith(".jsonl"):
        files[name], done = break_bytes(text.encode(), rng)
    else:
        files[name], done = break_json_text(text, rng)
    write_tree(folder / "out", files)
    return f"{name}: {done}"
