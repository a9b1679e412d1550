"""Plain data, read from good files and written with faults that no writer makes, for fuzz.py."""

from __future__ import annotations

import json
import tomllib
from typing import Any


def data_of(text: str, form: str) -> Any:
    """What a good file holds, to be spoiled and written again."""
    if form == "lines":
        return [json.loads(line) for line in text.splitlines()]
    return tomllib.loads(text) if form == "toml" else json.loads(text)


class Pairs(list[tuple[str, Any]]):
    """A table in which keys may stand twice."""


class Raw(str):
    """A value that is written as it stands."""

    __slots__ = ()


def written(data: Any, form: str) -> str:
    """Spoiled data as text of their form."""
    if form == "lines":
        return "".join(f"{_value(line, toml=False)}\n" for line in data)
    if form == "json":
        return _value(data, toml=False)
    pairs = data if isinstance(data, Pairs) else list(data.items())
    return "".join(f"{_key(k)} = {_value(v, toml=True)}\n" for k, v in pairs)


def _key(key: str) -> str:
    return json.dumps(key)


def _value(value: Any, *, toml: bool) -> str:
    if isinstance(value, Raw):
        return str(value)
    if isinstance(value, Pairs | dict):
        pairs = value if isinstance(value, Pairs) else list(value.items())
        sign = " = " if toml else ": "
        return "{" + ", ".join(f"{_key(k)}{sign}{_value(v, toml=toml)}" for k, v in pairs) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(_value(each, toml=toml) for each in value) + "]"
    if value is None and toml:
        return '""'
    if isinstance(value, float) and toml:
        return repr(value)
    return json.dumps(value)
