"""Changes to bytes and to JSON that know nothing of what they mean."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

__all__ = ["NUMBERS", "Rng", "break_bytes", "break_json", "break_json_text", "pick"]

Rng = np.random.Generator

NUMBERS = (0, 1, 2, 3, 7, 15, 16, 255, 256, 65_500, 65_535, 65_536, 1_000_000, 1_000_000_000,
           2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**53, 2**63 - 1, 2**63, 2**64 - 1)  # fmt: skip
"""Where sizes, counts and offsets go wrong."""
_VALUES: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 0.5, 1e9, 1e308, float("nan"), float("inf"), 2**63, 10**400,
    "", "x", "../../etc/passwd", "/etc/passwd", "\x00", "\ud800", "a" * 5000, [], {}, [[]],
    [1, 2, 3], ["a"], {"a": 1}, [None] * 3, "NaN", "1e999", -(2**31), 1_000_000_000,
)  # fmt: skip


def pick(rng: Rng, items: Sequence[Any]) -> Any:
    """Draw one of some things, as it is."""
    return items[int(rng.integers(len(items)))]


def break_bytes(data: bytes, rng: Rng, others: Sequence[bytes] = ()) -> tuple[bytes, str]:
    """Damage bytes blindly.

    Args:
        data: what to damage.
        rng: what decides how.
        others: whose parts may be spliced in.

    Returns:
        The damaged bytes, and what was done.
    """
    changed = bytearray(data)
    kinds: list[Callable[[bytearray, Rng], str]] = [_flip, _truncate, _blank, _repeat, _cut]
    if others:
        other = pick(rng, others)
        kinds.append(lambda data, rng: _splice(data, rng, other))
    done = [pick(rng, kinds)(changed, rng) for _ in range(1 + int(rng.integers(3)))]
    return bytes(changed), ", ".join(done)


def _span(data: bytearray, rng: Rng, most: int) -> tuple[int, int]:
    start = int(rng.integers(len(data) + 1))
    return start, min(len(data), start + int(rng.integers(1, most + 1)))


def _flip(data: bytearray, rng: Rng) -> str:
    count = pick(rng, (1, 1, 2, 8, 64))
    for _ in range(count if data else 0):
        # the beginning of a file says the most
        end = len(data) if rng.random() < 0.6 else min(len(data), 512)
        data[int(rng.integers(end))] ^= 1 << int(rng.integers(8))
    return f"{count} bits flipped"


def _truncate(data: bytearray, rng: Rng) -> str:
    del data[int(rng.integers(len(data) + 1)) :]
    return f"truncated to {len(data)}"


def _blank(data: bytearray, rng: Rng) -> str:
    start, stop = _span(data, rng, 256)
    data[start:stop] = pick(rng, (b"\0", b"\xff")) * (stop - start)
    return f"{stop - start} bytes blanked at {start}"


def _repeat(data: bytearray, rng: Rng) -> str:
    start, stop = _span(data, rng, 4096)
    times = pick(rng, (1, 2, 50))
    data[start:start] = bytes(data[start:stop]) * times
    return f"{stop - start} bytes repeated at {start}"


def _cut(data: bytearray, rng: Rng) -> str:
    start, stop = _span(data, rng, 512)
    del data[start:stop]
    return f"{stop - start} bytes cut at {start}"


def _splice(data: bytearray, rng: Rng, other: bytes) -> str:
    at, start = int(rng.integers(len(data) + 1)), int(rng.integers(len(other) + 1))
    part = other[start : start + int(rng.integers(1, 2048))]
    data[at : at + len(part)] = part
    return f"{len(part)} foreign bytes at {at}"


def break_json(content: Any, rng: Rng) -> tuple[Any, str]:
    """Change a JSON value in one place: another value, a key lost, added or repeated."""
    content = copy.deepcopy(content)
    parents = list(_containers(content))
    if not parents or rng.random() < 0.03:
        value = pick(rng, _VALUES)
        return value, f"all is {value!r:.40}"
    parent = pick(rng, parents)
    keys = list(parent) if isinstance(parent, dict) else list(range(len(parent)))
    act = pick(rng, ("value", "value", "value", "drop", "add"))
    if not keys or act == "add":
        value = pick(rng, _VALUES)
        if isinstance(parent, dict):
            parent["more"] = value
        else:
            parent.append(value)
        return content, f"{value!r:.40} added"
    key = pick(rng, keys)
    if act == "drop":
        del parent[key]
        return content, f"{key!r} dropped"
    value = pick(rng, _VALUES)
    if isinstance(parent[key], int | float) and rng.random() < 0.5:
        value = pick(rng, NUMBERS) * pick(rng, (1, -1))
    parent[key] = value
    return content, f"{key!r} is {value!r:.40}"


def _containers(content: Any) -> list[Any]:
    if isinstance(content, dict):
        inner = list(content.values())
    elif isinstance(content, list):
        inner = content
    else:
        return []
    return [content, *(found for value in inner for found in _containers(value))]


def break_json_text(text: str, rng: Rng) -> tuple[bytes, str]:
    """Change the text of a JSON file, by its values or by its bytes."""
    roll = rng.random()
    if roll < 0.25:
        return break_bytes(text.encode(), rng)
    if roll < 0.28:
        return b"[" * 200_000, "200,000 brackets"
    if roll < 0.31:
        return b'{"a":' * 50_000 + b"1" + b"}" * 50_000, "50,000 levels"
    content, done = break_json(json.loads(text), rng)
    for _ in range(int(rng.integers(3))):
        content, more = break_json(content, rng)
        done += f", {more}"
    return json.dumps(content).encode("utf-8", "surrogatepass"), done
