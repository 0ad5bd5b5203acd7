"""What plain values come out of pickles, and that nothing else does."""

import collections
import io
import pickle
import pickletools
import struct
import zlib
from contextlib import suppress

import joblib
import numpy as np
import pytest
from hostile import Bomb, bomb_bytes, goes_off
from hypothesis import given, settings
from hypothesis import strategies as st

from wsi_pipeline.errors import TableError, WsiPipelineError
from wsi_pipeline.plain_pickle import read_plain_pickle

ARRAYS = {
    "f64": np.linspace(0, 1, 7).reshape(7, 1),
    "i32_F": np.asfortranarray(np.arange(12, dtype=np.int32).reshape(4, 3)),
    "big_endian": np.arange(3, dtype=">i4"),
    "strided": np.arange(20)[::3],
    "bool": np.array([True, False]),
    "text": np.array(["a", "bcd"]),
    "bytes": np.array([b"xy", b"z"]),
    "empty": np.zeros((0, 2), np.float32),
    "scalar_array": np.array(5.0),
    "half": np.array([1.5], np.float16),
}
VALUES = {
    **ARRAYS,
    "numbers": [0, 255, 256, 65536, -1, 1 << 40, -(1 << 70), 2.5, True, False, None],
    "tuples": ((), (1,), (1, 2), (1, 2, 3), (1, 2, 3, 4)),
    "sets": {1, "two"},
    "texts": ["", "ä€\U0001f600", "x" * 300],
    "raw": [b"", b"abc", b"y" * 300],
    "ordered": collections.OrderedDict(a=[1], b={}),
    "numpy_numbers": [np.int64(-3), np.float32(0.5), np.bool_(True)],
    7: {"nested": [[[]], {}]},
}
VALUES["twice"] = [VALUES["numbers"], VALUES["numbers"]]


def same(found, wanted):
    if isinstance(wanted, np.ndarray):
        return (
            found.shape == wanted.shape
            and found.dtype == wanted.dtype.newbyteorder("=")
            and np.array_equal(found, wanted)
        )
    if isinstance(wanted, dict):
        return list(found) == list(wanted) and all(same(found[k], wanted[k]) for k in wanted)
    if isinstance(wanted, list | tuple):
        pairs = zip(found, wanted, strict=True)
        return type(found) is type(wanted) and all(same(a, b) for a, b in pairs)
    if isinstance(wanted, np.generic):
        return found == wanted.item() and type(found) is type(wanted.item())
    return found == wanted and type(found) is type(wanted)


@pytest.fixture
def file(tmp_path):
    return tmp_path / "value.dat"


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize("way", ["pickle", "joblib", "zlib", "gzip", "gzipped pickle"])
def test_plain_values_come_out_as_they_went_in(file, protocol, way):
    if way == "pickle":
        file.write_bytes(pickle.dumps(VALUES, protocol))
    elif way == "gzipped pickle":
        file.write_bytes(zlib.compress(pickle.dumps(VALUES, protocol)))
    else:
        joblib.dump(VALUES, file, protocol=protocol, compress=0 if way == "joblib" else (way, 3))
    assert same(read_plain_pickle(file), VALUES)


def test_joblib_files_from_before_arrays_were_aligned(file, monkeypatch):
    # Upstream's joblib (1.1 and older) writes no filling bytes.
    monkeypatch.setattr(
        joblib.numpy_pickle.NumpyArrayWrapper,
        "safe_get_numpy_array_alignment_bytes",
        lambda self: None,
    )
    begin = joblib.numpy_pickle.NumpyArrayWrapper.__init__

    def old(self, *args, **kwargs):
        begin(self, *args, **kwargs)
        del self.numpy_array_alignment_bytes

    monkeypatch.setattr(joblib.numpy_pickle.NumpyArrayWrapper, "__init__", old)
    joblib.dump(VALUES, file, protocol=3)
    assert same(read_plain_pickle(file), VALUES)


def test_an_array_that_is_shared_is_the_array_in_both_places(file):
    array = np.arange(3)
    file.write_bytes(pickle.dumps([array, array], 4))
    first, second = read_plain_pickle(file)
    assert first is second
    assert first.tolist() == [0, 1, 2]


plain = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False)
    | st.text()
    | st.binary(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner) | st.lists(inner).map(tuple),
    max_leaves=20,
)


@settings(deadline=None, max_examples=100)
@given(value=plain, protocol=st.integers(2, 5))
def test_any_plain_value_comes_out_as_it_went_in(tmp_path_factory, value, protocol):
    file = tmp_path_factory.getbasetemp() / "any.dat"
    file.write_bytes(pickle.dumps(value, protocol))
    assert same(read_plain_pickle(file), value)


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_a_pickle_that_runs_code_runs_nothing(tmp_path, file, protocol):
    marker = tmp_path / "marker"
    data = bomb_bytes(marker, protocol)
    assert goes_off(data, marker)
    for written in (data, zlib.compress(data)):
        file.write_bytes(written)
        with pytest.raises(TableError, match=r"refused: it asks for '(io|_io)\.open'"):
            read_plain_pickle(file)
    joblib.dump([np.zeros(2), Bomb(marker)], file)
    with pytest.raises(TableError, match=r"only plain arrays and containers"):
        read_plain_pickle(file)
    # An array of objects is a pickle within the pickle.
    joblib.dump({"a": np.array([Bomb(marker)], object)}, file)
    with pytest.raises(TableError, match=r"'O8' values; only numbers and texts"):
        read_plain_pickle(file)
    assert not marker.exists()


def program(*parts):
    """A pickle by hand: opcodes by pickletools' names, everything else as it is."""
    codes = {op.name: op.code.encode("latin1") for op in pickletools.opcodes}
    return b"".join(codes[p] if isinstance(p, str) else p for p in (*parts, "STOP"))


def name(module, attribute):
    return b"c" + module + b"\n" + attribute + b"\n"


RECONSTRUCT = name(b"numpy.core.multiarray", b"_reconstruct")
NDARRAY = name(b"numpy", b"ndarray")
SHORT = struct.Struct("<B").pack
DTYPE_U1 = name(b"numpy", b"dtype") + b"\x8c\x02u1\x89\x88\x87R"
VAST = b"\x8a\x08" + struct.pack("<q", 1 << 40)
WRAPPER = name(b"joblib.numpy_pickle", b"NumpyArrayWrapper")


@pytest.mark.parametrize(
    ("data", "says"),
    {
        "system": (program(name(b"posix", b"system"), b"\x8c\x02id", "TUPLE1", "REDUCE"), "system"),
        "dotted": (program(name(b"numpy", b"ndarray.tofile")), "ndarray.tofile"),
        "loader": (program(name(b"numpy", b"load")), "numpy.load"),
        "eval": (program(name(b"builtins", b"eval")), "builtins.eval"),
        "stack": (program(b"\x8c\x02os", b"\x8c\x06system", "STACK_GLOBAL"), "os.system"),
        "escape": (program(name(b"os", b"\x1b[2J")), r"os.\\x1b"),
        "vast array": (
            program(RECONSTRUCT, NDARRAY, VAST, "TUPLE1", b"C\x01b", "TUPLE3", "REDUCE"),
            "calls a array",
        ),
        "made instance": (program(NDARRAY, VAST, "TUPLE1", "NEWOBJ"), "calls a ndarray"),
        "called array": (program(NDARRAY, VAST, "TUPLE1", "REDUCE"), "calls a ndarray"),
        "dtype of objects": (
            program(name(b"numpy", b"dtype"), b"\x8c\x02O8\x89\x88\x87R"), "'O8' values",
        ),
        "large elements": (
            program(name(b"numpy", b"dtype"), b"\x8c\x0aV999999999\x89\x88\x87R"), "values",
        ),
        "persistent": (program(b"\x8c\x01x", "BINPERSID"), "instruction 0x51"),
        "extension": (program("EXT1", b"\x01"), "instruction 0x82"),
        "instance": (program("MARK", b"ios\nsystem\n"), "instruction 0x69"),
        "buffers": (program("NEXT_BUFFER"), "instruction 0x97"),
        "old": (b"(dp0\nS'a'\np1\nI1\ns.", "instruction 0x64"),
        "long text": (program("BINUNICODE8", struct.pack("<Q", 1 << 62)), "would take more than"),
        "long bytes": (program("BINBYTES", b"\xff\xff\xff\x7f"), "too early"),
        "tuple key": (program("EMPTY_DICT", b"K\x01K\x02\x86", "NONE", "SETITEM"), "type tuple"),
        "float key": (
            program("EMPTY_DICT", "BINFLOAT", b"\0" * 8, "NONE", "SETITEM"), "type float",
        ),
        "huge key": (program("EMPTY_DICT", VAST, "NONE", "SETITEM"), "huge number"),
        "tuple member": (program("EMPTY_SET", "MARK", b"K\x01\x85", "ADDITEMS"), "type tuple"),
        "state of a dict": (program("EMPTY_DICT", "EMPTY_DICT", "BUILD"), "fills a dict"),
        "no end": (b"\x80\x04K\x01", "ends too early"),
        "empty": (b"", "ends too early"),
        "nothing": (b"\x80\x04.", "damaged"),
        "bzip2": (b"BZh91AY&SY", "packed by bzip2"),
        "picture": (b"\x89PNG\r\n\x1a\n", "damaged|refused"),
        "unmarked": (program("APPENDS"), "damaged"),
        "missing memory": (program(b"h\x05"), "damaged"),
        "torn zlib": (zlib.compress(pickle.dumps([1] * 1000))[:-30], "damaged"),
    }.values(),
)  # fmt: skip
def test_hostile_programs_are_refused_by_name(file, data, says):
    file.write_bytes(data)
    with pytest.raises(TableError, match=says) as caught:
        read_plain_pickle(file)
    assert str(file) in str(caught.value)
    assert str(caught.value).isprintable()


def wrapper(shape, dtype=DTYPE_U1):
    state = [b"\x8c\x05shape", shape, b"\x8c\x05dtype", dtype, b"\x8c\x05order", b"\x8c\x01C"]
    return program(WRAPPER, "EMPTY_TUPLE", "NEWOBJ", "EMPTY_DICT", "MARK", *state, "SETITEMS",
                   "BUILD")  # fmt: skip


def test_an_array_of_joblibs_is_as_long_as_its_bytes(file):
    good = wrapper(b"K\x03\x85")
    file.write_bytes(good[:-1] + b"abc.")
    assert read_plain_pickle(file).tolist() == [97, 98, 99]
    for shape, says in [
        (VAST + b"\x85", "would take more"),
        (b"J\xff\xff\xff\xff\x85", "no shape"),
        (b"K\x01" * 3 + b"\x87", "damaged"),
        (b"](" + b"K\x01" * 40 + b"e", "list"),
        (b"(" + b"K\x01" * 40 + b"t", "40 axes"),
        (b"M\xff\xff\x85", "too early"),
    ]:
        file.write_bytes(wrapper(shape))
        with pytest.raises(TableError, match=says):
            read_plain_pickle(file)


def test_what_a_file_may_take_is_bounded(file):
    limit = 1 << 20
    bombs = {
        "lists": b"(" + b"]" * 40000 + b"l.",
        "marks": b"(" * 40000 + b".",
        "memory": b"]" + b"\x94" * 20000 + b".",
        "references": b"]\x94" + b"(" + b"h\x00" * 80000 + b"e.",
        "sets": b"\x8f" * 40000 + b".",
        "texts": b"(" + b"\x8c\x00" * 40000 + b"t.",
        "laughs": b"]\x94" + b"h\x00" * 200000 + b".",
    }
    for what, data in bombs.items():
        file.write_bytes(data)
        with pytest.raises(TableError, match="would take more than 1 MiB"):
            read_plain_pickle(file, limit_bytes=limit)
        assert what
    # A kilobyte that unpacks to a gigabyte.
    packer = zlib.compressobj(9)
    zeros = bytes(1 << 20)
    data = packer.compress(b"\x80\x04")
    for _ in range(40):
        data += packer.compress(zeros)
    file.write_bytes(data + packer.flush())
    assert file.stat().st_size < 50000
    with pytest.raises(TableError, match="refused"):
        read_plain_pickle(file, limit_bytes=limit)
    file.write_bytes(zlib.compress(b"\x80\x04" * (1 << 20)))
    with pytest.raises(TableError, match=r"larger than what is read"):
        read_plain_pickle(file, limit_bytes=limit)


def test_nesting_without_end_is_no_crash(file):
    depth = 300_000
    file.write_bytes(b"]" * depth + b"a" * (depth - 1) + b".")
    value = read_plain_pickle(file)
    assert len(value) == 1
    file.write_bytes(b")" + b"\x85" * depth + b".")
    assert isinstance(read_plain_pickle(file), tuple)


@settings(deadline=None, max_examples=150)
@given(data=st.data())
def test_damaged_files_end_in_an_error_of_ours_or_a_value(tmp_path_factory, data):
    file = tmp_path_factory.getbasetemp() / "damaged.dat"
    buffer = io.BytesIO()
    joblib.dump({"a": [np.arange(4), 1.5, "text", {"b": (1, None)}]}, buffer)
    whole = bytearray(buffer.getvalue())
    for _ in range(data.draw(st.integers(1, 3))):
        whole[data.draw(st.integers(0, len(whole) - 1))] = data.draw(st.integers(0, 255))
    file.write_bytes(whole[: data.draw(st.integers(0, len(whole)))] if data.draw(st.booleans()) else
                     bytes(whole))  # fmt: skip
    with suppress(WsiPipelineError):
        read_plain_pickle(file, limit_bytes=1 << 22)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(TableError, match="cannot be read"):
        read_plain_pickle(tmp_path / "none.dat")
