"""Hostile masks, lists, bundles, checkpoints, tables, stores of maps and records of runs."""

from __future__ import annotations

import io
import json
import pickle
import struct
import tempfile
import zipfile
import zlib
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import shapely
import torch
from PIL import Image
from safetensors.torch import save

from benchmarks.fuzz.mutate import NUMBERS, Rng, break_bytes, break_json_text, pick
from benchmarks.fuzz.slides import deflate_bomb
from wsi_pipeline.bundle import save_bundle
from wsi_pipeline.checkpoint import cerberus_heads
from wsi_pipeline.geometry import PixelGrid
from wsi_pipeline.network import build_network
from wsi_pipeline.spec import AnchorRules, HeadSpec, ModelSpec, RunRules
from wsi_pipeline.store import PredictionBlock, PredictionStore
from wsi_pipeline.table import OBJECT_SCHEMA, ObjectWriter
from wsi_pipeline.tiling import TileGrid

__all__ = [
    "HEADS",
    "break_bundle",
    "break_checkpoint",
    "break_list",
    "break_maps",
    "break_mask",
    "break_records",
    "break_table",
    "prepare",
]

MASKED_SIZE = (1500, 1300)
"""Of the slide that the masks are for."""
HEADS = (
    HeadSpec(name="cells", kind="instance", object_kind="cell", rules=AnchorRules(), parent="dark"),
    HeadSpec(name="dark", kind="instance", object_kind="dark", rules=RunRules()),
    HeadSpec(name="area", kind="patch", classes=("pale", "deep"), stride=16),
)


def prepare() -> None:
    """Make all good inputs, so that no case has to."""
    for seeds in (_masks, _bundles, _checkpoints, _tables, _maps, _records):
        seeds()


def _write_tree(folder: Path, files: dict[str, bytes]) -> None:
    for name, data in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)


def _read_tree(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


# --- masks


@cache
def _masks() -> tuple[bytes, ...]:
    mask = np.zeros((130, 150), np.uint8)
    mask[30:90, 20:110] = 255
    grey = Image.fromarray(mask)
    pictures = [grey, grey.convert("1"), grey.convert("P"), grey.convert("RGBA"),
                grey.convert("LA"), Image.fromarray(mask.astype(np.uint16) * 257)]  # fmt: skip
    forms = [(picture, "PNG") for picture in pictures]
    forms += [(grey, name) for name in ("TIFF", "BMP", "JPEG", "GIF", "WEBP", "PPM", "TGA", "ICNS")]
    files = []
    for picture, form in forms:
        buffer = io.BytesIO()
        picture.save(buffer, form)
        files.append(buffer.getvalue())
    return tuple(files)


def break_mask(folder: Path, rng: Rng) -> str:
    """Write a hostile ``mask.png``."""
    path = folder / "mask.png"
    roll = rng.random()
    if roll < 0.25:
        width, height = (int(pick(rng, (0, 1, 150, 4097, 13_000, 30_000, 65_535, 2**31 - 1)))
                         for _ in "wh")  # fmt: skip
        bits, colour = pick(rng, ((1, 0), (8, 0), (16, 0), (8, 2), (16, 2), (8, 3), (8, 6), (3, 9)))
        content = pick(rng, (deflate_bomb(1024), zlib.compress(bytes(1000)), b"", b"\x78\x9c"))
        path.write_bytes(png(width, height, bits, colour, content))
        return f"PNG of {width} x {height}, {bits} bits, colour {colour}, {len(content)} bytes"
    if roll < 0.3:
        path.write_bytes(png(150, 130, 8, 0, zlib.compress(bytes(151 * 130)), text=64))
        return "PNG with a bomb of text"
    number = int(rng.integers(len(_masks())))
    data, done = break_bytes(_masks()[number], rng, _masks())
    if roll < 0.6:
        data = _with_checksums(data)
    path.write_bytes(data)
    return f"mask {number}: {done}"


def png(width: int, height: int, bits: int, colour: int, data: bytes, text: int = 0) -> bytes:
    """Return a PNG whose checksums are right, whatever its header says.

    Args:
        width: as the header says.
        height: as the header says.
        bits: a sample.
        colour: PNG colour type.
        data: compressed pixels.
        text: MiB of compressed text.
    """
    head = struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0)
    chunks = [(b"IHDR", head), (b"IDAT", data), (b"IEND", b"")]
    if text:
        chunks.insert(1, (b"zTXt", b"Comment\0\0" + deflate_bomb(text)))
    return b"\x89PNG\r\n\x1a\n" + b"".join(_chunk(*chunk) for chunk in chunks)


def _chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def _with_checksums(data: bytes) -> bytes:
    """Make the checksums of a damaged PNG right again, as far as its chunks can be followed."""
    out, at = bytearray(data), 8
    while data[:4] == b"\x89PNG" and at + 12 <= len(data):
        end = at + 8 + int.from_bytes(data[at : at + 4], "big")
        if end + 4 > len(data):
            break
        out[end : end + 4] = struct.pack(">I", zlib.crc32(data[at + 4 : end]))
        at = end + 4
    return bytes(out)


# --- lists

_CSV = b"path,slide_id,mpp,mask\na.svs,one,0.25,\nb.svs,two,,m.png\nc/d.tif,three,0.5,\n"
_TXT = b"a.svs\n# a comment\nb.svs\n\nc/d.tif\n"
_CELLS = ("", "nan", "inf", "-1", "0", "1e999", "../../x", "/etc/passwd", "\x00", '"',
          "a" * 200_000, "s3://x/y.svs", "file:///etc/passwd",
          ".hidden", "..", ".", "*", "[", "\u202e", "0,25",
          "CON", "a/b", "~", "${HOME}", "\ufeff", "1_0", "१")  # fmt: skip


def break_list(folder: Path, rng: Rng) -> str:
    """Write a hostile ``list.csv`` or ``list.txt``."""
    is_csv = rng.random() < 0.7
    path, data = (folder / "list.csv", _CSV) if is_csv else (folder / "list.txt", _TXT)
    roll = rng.random()
    if roll < 0.4:
        data, done = break_bytes(data, rng, (_TXT, _CSV))
    elif roll < 0.45:
        data, done = data + b'"' + b"x," * 100_000, "a quote that never ends"
    elif roll < 0.5:
        data, done = data.decode().encode(pick(rng, ("utf-16", "utf-32", "utf-8-sig"))), "recoded"
    elif roll < 0.53:
        data, done = data + b"".join(b"x%d.svs\n" % n for n in range(3000)), "3,000 lines"
    else:
        lines = [line.split(",") for line in data.decode().splitlines()]
        done = ""
        for _ in range(1 + int(rng.integers(3))):
            line, cell = pick(rng, lines), pick(rng, _CELLS)
            line[int(rng.integers(len(line)))] = cell
            done += f" {cell[:20]!r}"
        data = "\n".join(",".join(line) for line in lines).encode("utf-8", "surrogatepass")
    path.write_bytes(data)
    return f"{path.name}: {done}"


# --- bundles and checkpoints


@cache
def _bundles() -> tuple[dict[str, bytes], ...]:
    """Return the files of small bundles: one of each of our architectures, one in shards."""
    options: dict[str, dict[str, Any]] = {
        "cerberus": {"widths": [4, 4, 4, 4], "blocks": [1, 1, 1, 1], "head_width": 4,
                     "patch_width": 4},
        "cerberus-lite": {"widths": [4, 4, 4, 4], "blocks": [1, 1, 1, 1],
                          "decoder": [4, 4, 4, 4]},
    }  # fmt: skip
    bundles = []
    for architecture, given in options.items():
        heads = HEADS if architecture == "cerberus" else HEADS[:2]
        spec = ModelSpec(name="small", architecture=architecture, mpp=0.5, halo_px=32,
                         heads=heads, options=given)  # fmt: skip
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "small"
            save_bundle(path, spec, build_network(spec), card="x")
            bundles.append(_read_tree(path))
    bundles.append(_in_shards(bundles[0]))
    return tuple(bundles)


def _in_shards(files: dict[str, bytes]) -> dict[str, bytes]:
    from safetensors.torch import load

    tensors = load(files["weights.safetensors"])
    names = sorted(tensors)
    parts = {"weights-00001-of-00002.safetensors": names[::2],
             "weights-00002-of-00002.safetensors": names[1::2]}  # fmt: skip
    out = {name: data for name, data in files.items() if name != "weights.safetensors"}
    out |= {file: save({n: tensors[n] for n in some}) for file, some in parts.items()}
    where = {name: file for file, some in parts.items() for name in some}
    index = {"metadata": {"total_size": 0}, "weight_map": where}
    out["weights.safetensors.index.json"] = json.dumps(index).encode()
    return out


def break_bundle(folder: Path, rng: Rng) -> str:
    """Write a hostile ``bundle``."""
    number = int(rng.integers(len(_bundles())))
    files = dict(_bundles()[number])
    names = [name for name in files if name != "card.md"]
    name = pick(rng, (*names, "spec.json", "spec.json"))
    data = files[name]
    if name.endswith(".json"):
        files[name], done = break_json_text(data.decode(), rng)
    elif rng.random() < 0.5:
        files[name], done = _break_header(data, rng)
    else:
        files[name], done = break_bytes(data, rng)
    if rng.random() < 0.05:
        del files[name]
        done = "gone"
    _write_tree(folder / "bundle", files)
    return f"bundle {number}, {name}: {done}"


def _break_header(data: bytes, rng: Rng) -> tuple[bytes, str]:
    """Change the JSON header of a safetensors file."""
    size = int.from_bytes(data[:8], "little")
    header, done = break_json_text(data[8 : 8 + size].decode(), rng)
    length = len(header) if rng.random() < 0.8 else pick(rng, NUMBERS)
    return struct.pack("<Q", length & (2**64 - 1)) + header + data[8 + size :], f"header: {done}"


@cache
def _checkpoints() -> tuple[bytes, ...]:
    """Return checkpoints as upstream and torchvision write them: zip, legacy, deflated."""
    heads = tuple(h for h in cerberus_heads() if h.name in ("nuclei", "tissue"))
    heads = (HeadSpec(name="nuclei", kind="instance", object_kind="nucleus", rules=AnchorRules()),
             heads[1])  # fmt: skip
    spec = ModelSpec(name="x", architecture="cerberus", mpp=0.5, halo_px=160, heads=heads,
                     options={"widths": [4, 4, 4, 4], "blocks": [1, 1, 1, 1], "head_width": 4,
                              "patch_width": 4})  # fmt: skip
    state = {f"module.{_their_name(k)}": v for k, v in build_network(spec).state_dict().items()}
    files = []
    for content, is_zip in (({"desc": state}, True), ({"desc": state}, False), (state, True)):
        buffer = io.BytesIO()
        torch.save(content, buffer, _use_new_zipfile_serialization=is_zip)
        files.append(buffer.getvalue())
    return tuple(files)


def _their_name(name: str) -> str:
    """Return upstream's name of a tensor of ours."""
    import re

    for pattern, theirs in (
        (r"^encoder\.stem\.conv\.", "backbone.conv1."),
        (r"^encoder\.stem\.norm\.", "backbone.bn1."),
        (r"^encoder\.stages\.(\d)\.", lambda m: f"backbone.layer{int(m[1]) + 1}."),
        (r"\.shortcut\.conv\.", ".downsample.0."),
        (r"\.shortcut\.norm\.", ".downsample.1."),
        (r"^project\.", "conv_map."),
        (r"^heads\.nuclei\.stages\.(\d)\.(\d)\.", r"decoder_head.Nuclei.\1.block.\2."),
        (r"^heads\.nuclei\.output\.hidden\.", "output_head.Nuclei.INST.x.0.block.0."),
        (r"^heads\.nuclei\.output\.logits\.", "output_head.Nuclei.INST.x.1.conv."),
        (r"^heads\.tissue\.", "decoder_head.Patch-Class."),
        (r"\.norm(\d?)\.", r".bn\1."),
    ):
        name = re.sub(pattern, theirs, name)
    return name


class _Evil:
    def __reduce__(self) -> tuple[Any, ...]:
        return (exec, ("raise SystemExit(3)",))


def break_checkpoint(folder: Path, rng: Rng) -> str:
    """Write a hostile ``weights.tar``."""
    path = folder / "weights.tar"
    roll, number = rng.random(), int(rng.integers(len(_checkpoints())))
    data = _checkpoints()[number]
    if roll < 0.4:
        data, done = break_bytes(data, rng, _checkpoints())
    elif roll < 0.75 and zipfile.is_zipfile(io.BytesIO(data)):
        data, done = _break_zip(data, rng)
    elif roll < 0.8:
        data, done = pickle.dumps({"desc": {"x": _Evil()}}), "runs code"
    else:
        data, done = _hostile_pickle(rng)
    path.write_bytes(data)
    return f"checkpoint {number}: {done}"


def _break_zip(data: bytes, rng: Rng) -> tuple[bytes, str]:
    """Write the archive again with a changed, lost, doubled, renamed or swollen record."""
    records = {info: archive.read(info) for archive in [zipfile.ZipFile(io.BytesIO(data))]
               for info in archive.infolist()}  # fmt: skip
    victim = pick(rng, list(records))
    if rng.random() < 0.5:
        victim = next(info for info in records if info.filename.endswith("data.pkl"))
    act = pick(rng, ("change", "change", "drop", "double", "rename", "swell", "deflate"))
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for info, content in records.items():
            name, how = info.filename, zipfile.ZIP_STORED
            if info is victim:
                if act == "drop":
                    continue
                if act == "change":
                    content, _ = break_bytes(content, rng)
                if act == "rename":
                    name = pick(rng, ("../x", "/etc/x", "archive/data/999", "a" * 60_000))
                if act == "swell":
                    content, how = bytes(32 << 20), zipfile.ZIP_DEFLATED
                if act == "deflate":
                    how = zipfile.ZIP_DEFLATED
            for _ in range(2 if info is victim and act == "double" else 1):
                archive.writestr(name, content, how)
    return buffer.getvalue(), f"{act} {victim.filename}"


def _hostile_pickle(rng: Rng) -> tuple[bytes, str]:
    """Return a checkpoint whose pickle asks for too much or for nonsense."""
    texts = {
        "deep": b"\x80\x02" + b"(" * 50_000 + b".",
        "lists": b"\x80\x02" + b"]" * 10 + b"a" * 9 + b".",
        "no stop": b"\x80\x02}q\x00",
        "huge long": b"\x80\x02\x8b\xff\xff\xff\x7f1.",
        "huge text": b"\x80\x02X\xff\xff\xff\xff1.",
        "memo": b"\x80\x02j\xff\xff\xff\xff.",
        "global": b"\x80\x02cposix\nsystem\nX\x04\x00\x00\x00trueq\x00\x85R.",
        "storage": b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n(X\x01\x00\x00\x00aK\x00K\x00tR.",
        "empty": b"",
    }
    name = pick(rng, sorted(texts))
    if name == "empty" or rng.random() < 0.3:
        # a tensor that says to be larger than what is stored
        size = pick(rng, ((10**12,), (2**62,), (1, 2**40), (-1,), ()))
        tensor = torch.zeros(1).as_strided((1,), (1,))
        big = tensor.expand(*size) if size and min(size) > 0 and max(size) < 2**60 else tensor
        buffer = io.BytesIO()
        torch.save({"desc": {"module.backbone.conv1.weight": big}}, buffer)
        return buffer.getvalue(), f"a tensor of {size} numbers, one stored"
    buffer = io.BytesIO()
    if rng.random() < 0.5:
        return texts[name], f"pickle: {name}"
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("archive/data.pkl", texts[name])
        archive.writestr("archive/version", "3\n")
    return buffer.getvalue(), f"pickle in a zip: {name}"


# --- tables


@cache
def _tables() -> tuple[bytes, ...]:
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
    path, number = folder / "a.parquet", int(rng.integers(len(_tables())))
    data, roll = _tables()[number], rng.random()
    if roll < 0.35:
        data, done = break_bytes(data, rng, _tables())
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
def _maps() -> dict[str, bytes]:
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
        return _read_tree(path)


def break_maps(folder: Path, rng: Rng) -> str:
    """Write a hostile ``a.zarr``."""
    files = dict(_maps())
    names = sorted(files)
    records = [name for name in names if name.endswith("zarr.json")]
    done = []
    for _ in range(pick(rng, (1, 1, 2))):
        name = pick(rng, records if rng.random() < 0.7 else names)
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
    _write_tree(folder / "a.zarr", files)
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
def _records() -> dict[str, str]:
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
    files = {name: text.encode() for name, text in _records().items()}
    files["objects/b.parquet"] = b"PAR"
    name = pick(rng, sorted(_records()))
    text = _records()[name]
    if name.endswith(".jsonl"):
        files[name], done = break_bytes(text.encode(), rng)
    else:
        files[name], done = break_json_text(text, rng)
    _write_tree(folder / "out", files)
    return f"{name}: {done}"
