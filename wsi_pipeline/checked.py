"""Values from outside, checked against the types that our own code expects, and texts to be shown.

JSON files are written by this package, and by whoever wants to: a list where a number should be
would otherwise be found by the first line that counts with it.
"""

from __future__ import annotations

import json
import math
import types
from collections.abc import Mapping
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

__all__ = ["fits", "misfits", "parse_json", "plain_text"]

_LARGEST = 1 << 63


def parse_json(text: str) -> Any:  # noqa: ANN401 - whatever it holds
    """Read JSON.

    Raises:
        ValueError: it is none, or nested too deeply.
    """
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error


def plain_text(text: str) -> str:
    r"""Return a text as UTF-8 can hold it: what it cannot is spelt out, as JSON does.

    Names of files are bytes; those that are no UTF-8 are lone surrogates in Python: the byte FC
    becomes ``\udcfc``.
    """
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def misfits(kind: type, values: Mapping[str, Any]) -> list[str]:
    """Return the fields of a dataclass that a value is given for which it cannot take.

    Args:
        kind: the dataclass.
        values: by field; those of other names are passed over.
    """
    wanted = get_type_hints(kind)
    return sorted(name for name in wanted.keys() & values.keys()
                  if not fits(values[name], wanted[name]))  # fmt: skip


def fits(value: object, wanted: Any) -> bool:  # noqa: ANN401 - types are values of any kind
    """Tell whether a value that came from JSON has a type.

    Whole numbers count as floats, lists as tuples; numbers are finite and have 64 bits at most.

    Args:
        value: the value.
        wanted: a type as in an annotation; or a dict, whose keys must be there with values
            of their types (further keys may be).
    """
    if isinstance(wanted, dict):
        return isinstance(value, Mapping) and all(
            key in value and fits(value[key], inner) for key, inner in wanted.items()
        )
    origin, inside = get_origin(wanted), get_args(wanted)
    if origin in (Union, types.UnionType):
        return any(fits(value, one) for one in inside)
    if origin is Literal:
        return isinstance(value, str | int) and value in inside
    if wanted is Any:
        return True
    if wanted in (int, float):
        return _is_number(value, wanted)
    if origin in (tuple, list):
        return isinstance(value, list | tuple) and _all_fit(value, inside)
    if origin in (dict, Mapping):
        return isinstance(value, Mapping) and all(
            fits(key, inside[0]) and fits(one, inside[1]) for key, one in value.items()
        )
    return isinstance(value, wanted or type(None))


def _is_number(value: object, wanted: type) -> bool:
    if isinstance(value, bool):
        return False
    if isinstance(value, int):
        # As a float it must be the same number.
        return -_LARGEST <= value < _LARGEST and (wanted is int or float(value) == value)
    return wanted is float and isinstance(value, float) and math.isfinite(value)


def _all_fit(values: list[Any] | tuple[Any, ...], inside: tuple[Any, ...]) -> bool:
    if len(inside) > 1 and inside[-1] is not Ellipsis:
        return len(values) == len(inside) and all(map(fits, values, inside))
    return all(fits(value, inside[0]) for value in values)
