"""Plain values out of pickles: containers, numbers, texts and arrays, and nothing that runs.

Unpickling a file is running it: Python's own unpickler imports and calls whatever the file names.
This one is a machine of its own. It knows the instructions that plain values are made of, and of
the names that a pickle may call for only those behind containers and NumPy arrays; what these
names stand for is done here, the named things are neither imported nor called. Everything else
is refused, by its name.

Read is what ``pickle.dump`` (protocols 2 to 5) and ``joblib.dump`` write, the latter plain or
packed by zlib or gzip. It puts the bytes of an array between the instructions::

    ... BUILD of a NumpyArrayWrapper | [n, n filling bytes] | bytes of the array | ...

Arrays of Python objects, records, and joblib's older way with a file beside for each array are
not read. What a file may claim is bounded: it is charged for every value before that is made, a
length is never trusted before that many bytes are there, and keys are texts, bytes and small
numbers, because others can be made to cost a machine hours.
"""

from __future__ import annotations

import math
import re
import struct
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from wsi_pipeline.errors import OutOfMemoryError, TableError
from wsi_pipeline.unpacked import RefusedError, Unpacked

__all__ = ["LIMIT_BYTES", "read_plain_pickle"]

LIMIT_BYTES = 4 << 30
"""What a file, unpacked, and the values in it may take unless another limit is given."""

_MULTIARRAY = ("numpy.core.multiarray", "numpy._core.multiarray")
_NUMERIC = ("numpy.core.numeric", "numpy._core.numeric")
_KNOWN = {
    **{(module, "_reconstruct"): "array" for module in _MULTIARRAY},
    **{(module, "scalar"): "scalar" for module in _MULTIARRAY},
    **{(module, "_frombuffer"): "buffer" for module in _NUMERIC},
    ("numpy", "ndarray"): "ndarray",
    ("numpy", "dtype"): "dtype",
    ("collections", "OrderedDict"): "dict",
    ("builtins", "set"): "set",
    ("__builtin__", "set"): "set",
    ("__builtin__", "bytes"): "bytes",
    ("_codecs", "encode"): "encode",
    ("joblib.numpy_pickle", "NumpyArrayWrapper"): "wrapper",
}
"""All names that a file may call for, and what they stand for here."""
_PLAIN_DTYPE = re.compile(r"[biuf](1|2|4|8)|[SU]\d{1,4}")
_LARGEST_KEY = 1 << 31
_MOST_AXES = 8
# What values take in memory, roughly.
_BOX, _ENTRY, _PAIR = 64, 16, 104
_DAMAGE = (IndexError, KeyError, ValueError, TypeError, EOFError, OverflowError, struct.error,
           zlib.error)  # fmt: skip


def read_plain_pickle(path: Path, *, limit_bytes: int = LIMIT_BYTES) -> Any:  # noqa: ANN401
    """Read the plain value in a file of ``pickle.dump`` or ``joblib.dump``; runs nothing.

    Args:
        path: the file.
        limit_bytes: what it, unpacked, and the values in it may take.

    Returns:
        Dicts, lists, tuples, sets, numbers, texts, bytes, None, and arrays in native byte order.

    Raises:
        TableError: no such file, damaged, too large, or it calls for anything else.
        OutOfMemoryError: the machine has less memory than the limit, and the file needs more.
    """
    try:
        with path.open("rb") as file:
            return _Machine(Unpacked(file, limit_bytes), limit_bytes).run()
    except RefusedError as error:
        raise TableError(f"{path} is refused: {error}") from error
    except OSError as error:
        raise TableError(f"{path} cannot be read: {error}") from error
    except MemoryError as error:
        raise OutOfMemoryError(f"{path} does not fit into the memory of this machine") from error
    except _DAMAGE as error:
        msg = f"{path} cannot be read: it is damaged, or no file of pickled values ("
        raise TableError(f"{msg}{type(error).__name__}: {error})") from error


@dataclass(frozen=True, slots=True)
class _Name:
    """Something that the file called for by a known name: inert."""

    means: str


@dataclass(slots=True)
class _Dtype:
    """A type of array elements, in two steps as pickles have it."""

    code: str
    order: str = "="

    def numpy(self) -> np.dtype[Any]:
        return _numpy_type(self.order + self.code)


@dataclass(slots=True)
class _Vessel:
    """An array that is announced; its content comes with the next BUILD."""

    by: str
    slots: list[int] = field(default_factory=list)
    """Where it was remembered: the array takes its place."""


class _Machine:
    """The stack machine that a pickle is a program for, as far as plain values need it."""

    def __init__(self, source: Unpacked, limit_bytes: int) -> None:
        self._source = source
        self._limit = self._left = limit_bytes
        self._stack: list[Any] = []
        self._below: list[list[Any]] = []
        self._memo: dict[int, Any] = {}
        self._done = False
        self._steps: dict[int, Callable[[], object]] = {
            **{code: partial(self._push, value, 0) for code, value in _CONSTANTS.items()},
            **{code: partial(self._empty, kind) for code, kind in _EMPTY.items()},
            **{code: partial(self._number, struct.Struct(f)) for code, f in _NUMBERS.items()},
            **{code: partial(self._text, *how) for code, how in _TEXTS.items()},
            **{0x85 + n - 1: partial(self._tuple, n) for n in (1, 2, 3)},
            ord("t"): lambda: self._push_tuple(tuple(self._pop_mark())),
            0x8A: self._long,
            ord("("): self._mark,
            ord("0"): self._stack_pop,
            ord("1"): self._pop_mark,
            ord("a"): lambda: self._append([self._stack.pop()]),
            ord("e"): lambda: self._append(self._pop_mark()),
            ord("s"): lambda: self._set_items([self._stack.pop(-2), self._stack.pop()]),
            ord("u"): lambda: self._set_items(self._pop_mark()),
            0x90: lambda: self._add(self._pop_mark()),
            ord("q"): lambda: self._remember(self._source.byte()),
            ord("r"): lambda: self._remember(int.from_bytes(self._source.read(4), "little")),
            0x94: lambda: self._remember(len(self._memo)),
            ord("h"): lambda: self._recall(self._source.byte()),
            ord("j"): lambda: self._recall(int.from_bytes(self._source.read(4), "little")),
            ord("c"): lambda: self._name(self._source.line(), self._source.line()),
            0x93: lambda: self._name(*[self._stack.pop(), self._stack.pop()][::-1]),
            ord("R"): self._reduce,
            0x81: self._reduce,
            ord("b"): self._build,
            0x80: lambda: self._source.read(1),
            0x95: lambda: self._source.read(8),
            ord("."): self._stop,
        }

    def run(self) -> Any:  # noqa: ANN401 - whatever was pickled
        """Follow the instructions to their end; return the value on the stack."""
        source, steps = self._source, self._steps
        while not self._done:
            code = source.byte()
            step = steps.get(code)
            if step is None:
                msg = f"it holds the instruction 0x{code:02x}, which no plain value needs"
                raise RefusedError(msg)
            step()
        return self._stack.pop()

    def _charge(self, size: int) -> None:
        self._left -= size
        if self._left < 0:
            limit = f"{self._limit / (1 << 20):,.0f} MiB"
            raise RefusedError(f"it would take more than {limit} of memory, the limit set for it")

    def _push(self, value: object, size: int) -> None:
        self._charge(8 + size)
        self._stack.append(value)

    def _stack_pop(self) -> None:
        self._stack.pop()

    def _stop(self) -> None:
        self._done = True

    def _empty(self, kind: Callable[[], object]) -> None:
        self._push(kind(), _BOX)

    def _number(self, form: struct.Struct) -> None:
        self._push(form.unpack(self._source.read(form.size))[0], 32)

    def _long(self) -> None:
        data = self._source.read(self._source.byte())
        self._push(int.from_bytes(data, "little", signed=True), _BOX + len(data))

    def _text(self, form: str, decode: Callable[[bytes], object]) -> None:
        (size,) = struct.unpack(form, self._source.read(struct.calcsize(form)))
        self._charge(_BOX + 4 * size if decode is _decode else _BOX + size)
        self._push(decode(self._source.read(size)), 0)

    def _tuple(self, count: int) -> None:
        if len(self._stack) < count:
            raise IndexError("a tuple of what is not there")
        items = tuple(self._stack[-count:])
        del self._stack[-count:]
        self._push_tuple(items)

    def _push_tuple(self, items: tuple[Any, ...]) -> None:
        self._push(items, _BOX + 8 * len(items))

    def _mark(self) -> None:
        self._charge(_BOX)
        self._below.append(self._stack)
        self._stack = []

    def _pop_mark(self) -> list[Any]:
        items, self._stack = self._stack, self._below.pop()
        return items

    def _append(self, items: list[Any]) -> None:
        self._charge(_ENTRY * len(items))
        _of_type(self._stack[-1], list).extend(items)

    def _set_items(self, items: list[Any]) -> None:
        self._charge(_PAIR * (len(items) // 2))
        target = _of_type(self._stack[-1], dict)
        for key, value in zip(items[::2], items[1::2], strict=True):
            target[_key(key)] = value

    def _add(self, items: list[Any]) -> None:
        self._charge(_PAIR * len(items))
        _of_type(self._stack[-1], set).update(map(_key, items))

    def _remember(self, slot: int) -> None:
        self._charge(_PAIR)
        value = self._memo[slot] = self._stack[-1]
        if type(value) is _Vessel:
            value.slots.append(slot)

    def _recall(self, slot: int) -> None:
        self._push(self._memo[slot], 0)

    def _name(self, module: object, name: object) -> None:
        means = _KNOWN.get((_of_type(module, str), _of_type(name, str)))
        if means is None:
            asked = ascii(f"{module}.{name}"[:120])
            msg = f"it asks for {asked}, but only plain arrays and containers are read"
            raise RefusedError(msg)
        self._push(_Name(means), _BOX)

    def _reduce(self) -> None:
        """Do what a call of a known name stands for."""
        arguments, function = _of_type(self._stack.pop(), tuple), self._stack.pop()
        means = _of_type(function, _Name).means
        sized = [len(a) for a in arguments if isinstance(a, str | bytes | list)]
        self._charge((_PAIR if means == "set" else 1) * sum(sized))
        made = _announced(means, arguments)
        self._push(_value(means, arguments) if made is None else made, _BOX)

    def _build(self) -> None:
        """Give an announced array, or a type of elements, its content."""
        state, target = self._stack.pop(), self._stack[-1]
        match target, state:
            case _Dtype(), (_, "<" | ">" | "|" | "=" as order, None, None, None, *_):
                target.order = order
                return
            case _Vessel(by="array"), (_, tuple() as shape, _Dtype() as dtype, f, bytes() as data):
                self._charge(len(data))
                array = _array(data, dtype, shape, "F" if f else "C")
            case _Vessel(by="wrapper"), dict():
                array = self._follows(state)
            case _:
                raise RefusedError(f"it fills a {type(target).__name__} in a way not known here")
        self._charge(2 * _BOX)
        self._stack[-1] = array
        for slot in target.slots:
            self._memo[slot] = array

    def _follows(self, state: dict[Any, Any]) -> NDArray[Any]:
        """Read the array that joblib put behind the instructions."""
        dtype = _of_type(state["dtype"], _Dtype)
        shape, order = _of_type(state["shape"], tuple), state["order"]
        size = _count(shape) * dtype.numpy().itemsize
        if state.get("numpy_array_alignment_bytes") is not None:
            self._source.read(self._source.byte())
        self._charge(size - _PAIR * len(state))
        state.clear()  # it is remembered, and there is one for each array
        return _array(self._source.read(size), dtype, shape, order)


def _announced(means: str, arguments: tuple[Any, ...]) -> _Vessel | _Dtype | None:
    """Return what a later BUILD completes, if that is what is called for."""
    match means, arguments:
        case "array", (_Name(means="ndarray"), (0,), bytes() | str()):
            return _Vessel("array")
        case "wrapper", ():
            return _Vessel("wrapper")
        case "dtype", (str() as code, *_):
            if not _PLAIN_DTYPE.fullmatch(code):
                raise RefusedError(f"it holds {code!r:.40} values; only numbers and texts are read")
            return _Dtype(code)
    return None


def _value(means: str, arguments: tuple[Any, ...]) -> object:
    match means, arguments:
        case "scalar", (_Dtype() as dtype, bytes() as data):
            return _array(data, dtype, (), "C").item()
        case "buffer", (bytes() as data, _Dtype() as dtype, tuple() as shape, str() as order):
            return _array(data, dtype, shape, order)
        case "dict", ():
            return {}
        case "set", (list() as items,):
            return set(map(_key, items))
        case "bytes", ():
            return b""
        case "encode", (str() as text, "latin1"):
            return text.encode("latin1")
    raise RefusedError(f"it calls a {means} in a way that no plain value needs")


@cache
def _numpy_type(text: str) -> np.dtype[Any]:
    return np.dtype(text)


def _decode(data: bytes) -> str:
    return data.decode("utf-8", "surrogatepass")


_CONSTANTS = {ord("N"): None, 0x88: True, 0x89: False}
_EMPTY: dict[int, Callable[[], object]] = {
    ord("]"): list, ord("}"): dict, ord(")"): tuple, 0x8F: set,
}  # fmt: skip
_NUMBERS = {ord("K"): "<B", ord("M"): "<H", ord("J"): "<i", ord("G"): ">d"}
_TEXTS: dict[int, tuple[str, Callable[[bytes], object]]] = {
    0x8C: ("<B", _decode), ord("X"): ("<I", _decode), 0x8D: ("<Q", _decode),
    ord("C"): ("<B", bytes), ord("B"): ("<I", bytes), 0x8E: ("<Q", bytes), 0x96: ("<Q", bytes),
}  # fmt: skip
"""Instructions by their byte: the form of the length, and what the bytes are."""


def _of_type(value: object, kind: type[Any]) -> Any:  # noqa: ANN401
    if type(value) is not kind:
        raise TypeError(f"a {kind.__name__} wanted, found a {type(value).__name__}")
    return value


def _key(value: object) -> object:
    if type(value) in (str, bytes) or (type(value) is int and abs(value) < _LARGEST_KEY):
        return value
    raise RefusedError(f"it has a key or member of type {type(value).__name__}, or a huge number")


def _count(shape: tuple[Any, ...]) -> int:
    if len(shape) > _MOST_AXES or not all(type(n) is int and n >= 0 for n in shape):
        raise ValueError(f"no shape of an array: {len(shape)} axes")
    return math.prod(shape)


def _array(data: bytes, dtype: _Dtype, shape: tuple[Any, ...], order: object) -> NDArray[Any]:
    kind = dtype.numpy()
    if order not in ("C", "F") or _count(shape) * kind.itemsize != len(data):
        raise ValueError(f"{len(data)} bytes are no array of {len(shape)} axes as announced")
    if not data:
        return np.zeros(shape, kind.newbyteorder("="))
    flat = np.frombuffer(data, kind).astype(kind.newbyteorder("="), copy=False)
    return flat.reshape(shape, order="C" if order == "C" else "F")
