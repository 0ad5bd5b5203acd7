"""Hostile bundles and checkpoints."""

from __future__ import annotations

import io
import json
import pickle
import re
import struct
import tempfile
import zipfile
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load, save
from torch import nn

from benchmarks.fuzz.mutate import NUMBERS, Rng, break_bytes, break_json_text, pick
from benchmarks.fuzz.trees import read_tree, write_tree
from wsi_pipeline.bundle import save_bundle
from wsi_pipeline.checkpoint import cerberus_heads
from wsi_pipeline.network import build_network
from wsi_pipeline.spec import AnchorRules, HeadSpec, ModelSpec, RunRules

__all__ = ["HEADS", "break_bundle", "break_checkpoint", "bundles", "checkpoints"]

HEADS = (
    HeadSpec(name="cells", kind="instance", object_kind="cell", rules=AnchorRules(), parent="dark"),
    HeadSpec(name="dark", kind="instance", object_kind="dark", rules=RunRules()),
    HeadSpec(name="area", kind="patch", classes=("pale", "deep"), stride=16),
)


# --- bundles


@cache
def bundles() -> tuple[dict[str, bytes], ...]:
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
            save_bundle(path, spec, _network(spec), card="x")
            bundles.append(read_tree(path))
    bundles.append(_in_shards(bundles[0]))
    return tuple(bundles)


def _network(spec: ModelSpec) -> nn.Module:
    """Build a network of the same weights in every process, or no case could be made again."""
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(0)
        return build_network(spec)


def _in_shards(files: dict[str, bytes]) -> dict[str, bytes]:
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
    number = int(rng.integers(len(bundles())))
    files = dict(bundles()[number])
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
    write_tree(folder / "bundle", files)
    return f"bundle {number}, {name}: {done}"


def _break_header(data: bytes, rng: Rng) -> tuple[bytes, str]:
    """Change the JSON header of a safetensors file."""
    size = int.from_bytes(data[:8], "little")
    header, done = break_json_text(data[8 : 8 + size].decode(), rng)
    length = len(header) if rng.random() < 0.8 else pick(rng, NUMBERS)
    return struct.pack("<Q", length & (2**64 - 1)) + header + data[8 + size :], f"header: {done}"


# --- checkpoints


@cache
def checkpoints() -> tuple[bytes, ...]:
    """Return checkpoints as upstream and torchvision write them: zip, legacy, deflated."""
    heads = tuple(h for h in cerberus_heads() if h.name in ("nuclei", "tissue"))
    heads = (HeadSpec(name="nuclei", kind="instance", object_kind="nucleus", rules=AnchorRules()),
             heads[1])  # fmt: skip
    spec = ModelSpec(name="x", architecture="cerberus", mpp=0.5, halo_px=160, heads=heads,
                     options={"widths": [4, 4, 4, 4], "blocks": [1, 1, 1, 1], "head_width": 4,
                              "patch_width": 4})  # fmt: skip
    state = {f"module.{_their_name(k)}": v for k, v in _network(spec).state_dict().items()}
    files = []
    for content, is_zip in (({"desc": state}, True), ({"desc": state}, False), (state, True)):
        buffer = io.BytesIO()
        torch.save(content, buffer, _use_new_zipfile_serialization=is_zip)
        files.append(buffer.getvalue())
    return tuple(files)


def _their_name(name: str) -> str:
    """Return upstream's name of a tensor of ours."""
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
    roll, number = rng.random(), int(rng.integers(len(checkpoints())))
    data = checkpoints()[number]
    if roll < 0.4:
        data, done = break_bytes(data, rng, checkpoints())
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
