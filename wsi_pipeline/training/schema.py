"""From TOML tables to frozen dataclasses: the dataclass is the schema."""

from __future__ import annotations

import math
import os
import tomllib
import types
from collections.abc import Mapping
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from wsi_pipeline.errors import RecipeError

__all__ = ["build", "override_value"]

T = TypeVar("T")


def build(kind: type[T], data: Any, *, where: str, folder: Path) -> T:  # noqa: ANN401 - parsed TOML
    """Make a dataclass of a TOML table.

    Args:
        kind: the dataclass; tables become its dataclass fields, arrays its tuples.
        data: the table.
        where: names it in messages.
        folder: what relative paths are relative to; ``~`` and ``$NAME`` are expanded.

    Raises:
        RecipeError: a key unknown or missing, or a value of another type.
    """
    if not isinstance(data, Mapping):
        raise RecipeError(f"{where}: a table wanted, not {data!r}")
    known = {f.name: f for f in fields(kind)}  # type: ignore[arg-type]
    unknown = sorted(set(data) - set(known))
    if unknown:
        offered = sorted(set(known) - {"text"})
        raise RecipeError(f"{where}: unknown keys {unknown}; known are {offered}")
    required = [
        name
        for name, f in known.items()
        if f.default is MISSING and f.default_factory is MISSING and name not in data
    ]
    if required:
        raise RecipeError(f"{where}: {required} must be given")
    hints = get_type_hints(kind)
    values = {
        key: _value(hints[key], value, f"{where}: {key}", folder) for key, value in data.items()
    }
    return kind(**values)


def _value(hint: Any, value: Any, where: str, folder: Path) -> Any:  # noqa: ANN401, C901
    origin, arguments = get_origin(hint), get_args(hint)
    if hint is Any:
        return value
    if origin in (Union, types.UnionType):
        inner = next(kind for kind in arguments if kind is not type(None))
        return _value(inner, value, where, folder)
    if origin is Literal:
        if value not in arguments:
            raise RecipeError(f"{where}: {value!r} is none of {list(arguments)}")
        return value
    if origin is tuple and isinstance(value, list):
        kinds = arguments[:1] * len(value) if arguments[-1] is Ellipsis else arguments
        if len(kinds) != len(value):
            raise RecipeError(f"{where}: {len(kinds)} values wanted, not {value!r}")
        return tuple(_value(k, v, where, folder) for k, v in zip(kinds, value, strict=True))
    if origin is not None and issubclass(origin, Mapping) and isinstance(value, Mapping):
        return {k: _value(arguments[1], v, f"{where}.{k}", folder) for k, v in value.items()}
    if hasattr(hint, "__dataclass_fields__"):
        return build(hint, value, where=where, folder=folder)
    if hint is Path and isinstance(value, str):
        return _path(value, where, folder)
    if hint is float and isinstance(value, int | float) and not isinstance(value, bool):
        if not math.isfinite(value):
            raise RecipeError(f"{where}: a finite number wanted, not {value}")
        return float(value)
    # True and False are whole numbers to Python, but not to who writes a recipe.
    if (
        isinstance(hint, type)
        and isinstance(value, hint)
        and isinstance(value, bool) == (hint is bool)
    ):
        return value
    wanted = getattr(hint, "__name__", str(hint))
    raise RecipeError(f"{where}: {wanted} wanted, not {value!r}")


def _path(text: str, where: str, folder: Path) -> Path:
    expanded = os.path.expandvars(text)
    if "$" in expanded:
        raise RecipeError(f"{where}: {text!r} names an environment variable that is not set")
    return folder / Path(expanded).expanduser()


def override_value(data: dict[str, Any], text: str) -> None:
    """Change one value of parsed TOML in place.

    Args:
        data: the whole document.
        text: ``key.key=value``; a number as key counts the tables of an array, and tables
            that are not there are made.

    Raises:
        RecipeError: not of that form, or no such place.
    """
    keys, equals, value = text.partition("=")
    if not equals:
        raise RecipeError(f"{text!r}: an override is written KEY=VALUE")
    try:
        parsed = tomllib.loads(f"value = {value}")["value"]
    except ValueError as error:
        msg = f"{text!r}: {value!r} is no TOML value (text needs quotation marks): {error}"
        raise RecipeError(msg) from error
    *path, last = keys.strip().split(".")
    place: Any = data
    try:
        for key in path:
            place = place[int(key)] if isinstance(place, list) else place.setdefault(key, {})
        if isinstance(place, list):
            place[int(last)] = parsed
        else:
            place[last] = parsed
    except (ValueError, IndexError, AttributeError, TypeError) as error:
        raise RecipeError(f"{text!r}: there is no such place in the recipe") from error
