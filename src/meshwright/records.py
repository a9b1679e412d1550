"""Frozen records, and their way to and from files.

Every file that a person writes or reads (cluster, model, plan, profile) is one record. Reading is
strict: unknown fields, missing fields and wrong types are all reported at once, each with its path.
"""

from __future__ import annotations

import hashlib
import json
import tomllib
from dataclasses import dataclass, field, fields, is_dataclass
from difflib import get_close_matches
from functools import lru_cache
from pathlib import Path
from types import NoneType, UnionType
from typing import (
    Annotated,
    Any,
    TypeVar,
    Union,
    cast,
    dataclass_transform,
    get_args,
    get_origin,
    get_type_hints,
)

from pydantic import BeforeValidator, ConfigDict, TypeAdapter, ValidationError

from meshwright import units
from meshwright.errors import MeshwrightError, Problem

T = TypeVar("T")


@dataclass_transform(frozen_default=True, kw_only_default=True, field_specifiers=(field,))
def record(cls: type[T]) -> type[T]:
    """A frozen, keyword-only, slotted dataclass that files are checked against."""
    cls.__pydantic_config__ = ConfigDict(extra="forbid", strict=True)  # type: ignore[attr-defined]
    return dataclass(frozen=True, kw_only=True, slots=True)(cls)


def _reader(parse: Any) -> BeforeValidator:
    return BeforeValidator(lambda value: parse(value) if isinstance(value, str) else value)


Bytes = Annotated[int, _reader(units.parse_bytes)]
BytesPerSecond = Annotated[float, _reader(units.parse_bandwidth)]
Flops = Annotated[float, _reader(units.parse_flops)]
Seconds = Annotated[float, _reader(units.parse_seconds)]


@lru_cache
def _adapter(kind: Any) -> TypeAdapter[Any]:
    return TypeAdapter(kind)


def _field(path: tuple[int | str, ...]) -> str:
    """`("stages", 1, "layers")` to `stages[1].layers`."""
    text = ""
    for part in path:
        if part == "[key]":  # pydantic's mark for a table's key that is itself at fault
            continue
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else part
    return text


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _known_fields(kind: Any, path: tuple[int | str, ...]) -> list[str]:
    """Names of the fields of the record at `path` inside a `kind`; none if it is no record."""
    for part in path:
        if get_origin(kind) in (Union, UnionType):
            kind = next(choice for choice in get_args(kind) if choice is not NoneType)
        if is_dataclass(kind):
            kind = get_type_hints(cast("type", kind)).get(str(part))
        else:
            kind = get_args(kind)[-1 if get_origin(kind) is dict else 0]
    if get_origin(kind) in (Union, UnionType):
        kind = next(choice for choice in get_args(kind) if choice is not NoneType)
    return [each.name for each in fields(kind)] if is_dataclass(kind) else []


def _problem(mistake: Any, kind: Any, source: str, mend: str) -> Problem:
    found, wanted = _short(mistake["input"]), mistake["msg"].removeprefix("Value error, ")
    path = mistake["loc"]
    if mistake["type"] == "missing":
        found, wanted = "nothing", "this field, which is required"
    elif mistake["type"] in ("extra_forbidden", "unexpected_keyword_argument"):
        known = _known_fields(kind, path[:-1])
        near = get_close_matches(str(path[-1]), known, 1)
        found, wanted = "an unknown field", f"one of: {', '.join(known)}"
        mend = f"Did you mean {near[0]!r}?" if near else mend
    return Problem(source=source, field=_field(path), found=found, wanted=wanted, mend=mend)


def parse(
    data: object, kind: type[T], *, source: str, error: type[MeshwrightError], mend: str = ""
) -> T:
    """Plain data (as JSON or TOML give it) to a record of type `kind`.

    Raises `error` with one Problem for every mistake found.
    """
    try:
        return cast("T", _adapter(cast("Any", kind)).validate_json(json.dumps(data, default=str)))
    except ValidationError as failure:
        raise error(
            *(_problem(mistake, kind, source, mend) for mistake in failure.errors())
        ) from None


def read(path: Path, *, error: type[MeshwrightError]) -> dict[str, Any]:
    """The table in a TOML or JSON file. Raises `error` if it is missing or malformed."""
    try:
        text = path.read_text(encoding="utf-8")
        data = tomllib.loads(text) if path.suffix == ".toml" else json.loads(text)
    except FileNotFoundError:
        raise error(Problem(str(path), "", "no such file", "a readable file")) from None
    except (OSError, UnicodeDecodeError) as failure:
        raise error(Problem(str(path), "", str(failure), "a readable text file")) from None
    except (tomllib.TOMLDecodeError, json.JSONDecodeError, RecursionError) as failure:
        kind = "TOML" if path.suffix == ".toml" else "JSON"
        raise error(Problem(str(path), "", f"{failure}", f"well-formed {kind}")) from None
    if not isinstance(data, dict):
        raise error(Problem(str(path), "", type(data).__name__, "a table of named fields"))
    return data


def load(path: Path, kind: type[T], *, error: type[MeshwrightError]) -> T:
    """A TOML or JSON file to a record. Raises `error`, naming the file and every field at fault."""
    return parse(read(path, error=error), kind, source=str(path), error=error)


def plain(value: object) -> Any:
    """A record as plain data; fields that hold None are left out."""
    return _adapter(cast("Any", type(value))).dump_python(value, mode="json", exclude_none=True)


def dumps(value: object) -> str:
    """A record as JSON: the same record always gives the same bytes."""
    return json.dumps(plain(value), indent=1, ensure_ascii=False) + "\n"


def fingerprint(value: object) -> str:
    """Twelve hexadecimal digits that change when the record's content changes."""
    text = json.dumps(plain(value), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]
