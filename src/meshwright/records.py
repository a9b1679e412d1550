"""Defines frozen records, and reads and writes them as files.

Every file that a person writes or reads (cluster, model, plan, profile) is one record. Reading is
strict: unknown fields, missing fields and wrong types are all reported at once, each with its path.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, is_dataclass, replace
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

from pydantic import (
    AfterValidator,
    BeforeValidator,
    ConfigDict,
    Field,
    TypeAdapter,
    ValidationError,
)

from meshwright import units
from meshwright.errors import PROBLEMS_KEPT, MeshwrightError, OptionError, Problem
from meshwright.formats import format_key_path as _field
from meshwright.formats import read_table
from meshwright.text import LINE_LETTERS, NAME_LETTERS, did_you_mean, forbidden_character

T = TypeVar("T")
_CONFIG = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


@dataclass_transform(frozen_default=True, kw_only_default=True, field_specifiers=(field,))
def record(cls: type[T]) -> type[T]:
    """Makes a class a frozen, keyword-only, slotted dataclass that files are checked against.

    All numbers are finite. Further limits of a field are written as `Annotated[int, Field(ge=1,
    le=10)]` or as one of the types below.
    """
    cls.__pydantic_config__ = _CONFIG  # type: ignore[attr-defined]
    return dataclass(frozen=True, kw_only=True, slots=True)(cls)


def _reader(parse: Any) -> BeforeValidator:
    return BeforeValidator(lambda value: parse(value) if isinstance(value, str) else value)


def _one_line(text: str) -> str:
    if wrong := forbidden_character(text):
        raise ValueError(f"one line of printable text, without {wrong}")
    return text


def _format(value: object) -> object:
    if type(value) is not int or value != FORMAT:
        newer = type(value) is int and value > FORMAT
        why = "a file of a newer version of meshwright" if newer else "the format of this version"
        raise ValueError(f"{FORMAT}" if not newer else f"{FORMAT}: this is {why}")
    return value


def one_of(*words: str) -> AfterValidator:
    """Validates a text that must be one of some words."""

    def check(text: str) -> str:
        if text not in words:
            raise ValueError(f"one of {', '.join(words)}")
        return text

    return AfterValidator(check)


FORMAT = 1
"""Format version of every kind of file."""
Format = Annotated[int, BeforeValidator(_format), Field(ge=FORMAT, le=FORMAT)]

Name = Annotated[str, Field(max_length=NAME_LETTERS), AfterValidator(_one_line)]
"""A name of something."""
Line = Annotated[str, Field(max_length=LINE_LETTERS), AfterValidator(_one_line)]
"""One line: a sentence, a path, a description."""
Text = Annotated[str, Field(max_length=LINE_LETTERS)]
"""Text of several lines."""

_MOST = 2**60
"""Largest size or count: more than any machine has, so that a larger figure is a mistake, and would
overflow."""
Bytes = Annotated[int, _reader(units.parse_bytes), Field(ge=0, le=_MOST)]
BytesPerSecond = Annotated[float, _reader(units.parse_bandwidth), Field(gt=0, le=1e30)]
Flops = Annotated[float, _reader(units.parse_flops), Field(ge=0, le=1e30)]
Seconds = Annotated[float, _reader(units.parse_seconds), Field(ge=0, le=1e30)]
PositiveSeconds = Annotated[Seconds, Field(gt=0)]
Count = Annotated[int, Field(ge=0, le=_MOST)]
Ratio = Annotated[float, Field(ge=0, le=1e30)]
Share = Annotated[float, Field(ge=0, le=1)]
PositiveShare = Annotated[float, Field(gt=0, le=1)]

Rank = Annotated[int, Field(ge=0, le=2**20)]
Rows = Annotated[int, Field(ge=1, le=2**20)]
"""Number of rows of a batch, a micro-batch or a share of one; also a number of micro-batches."""
Tokens = Annotated[int, Field(ge=1, le=2**27)]
"""Length of a row in tokens."""
LayerIndex = Annotated[int, Field(ge=0, le=2**20)]


@lru_cache
def _adapter(kind: Any) -> TypeAdapter[Any]:
    return TypeAdapter(kind)


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _known_fields(kind: Any, path: tuple[int | str, ...]) -> list[str]:
    """Returns the field names of the record at `path` inside a `kind`; empty if it is no record."""
    for part in path:
        kind = _chosen(kind)
        if is_dataclass(kind):
            kind = get_type_hints(cast("type", kind)).get(str(part))
        else:
            inside = get_args(kind) or (None,)
            kind = inside[-1 if get_origin(kind) is dict else 0]
    kind = _chosen(kind)
    return [each.name.removesuffix("_") for each in fields(kind)] if is_dataclass(kind) else []


def _chosen(kind: Any) -> Any:
    """Returns the type of an optional field without None."""
    if get_origin(kind) not in (Union, UnionType):
        return kind
    return next((each for each in get_args(kind) if each is not NoneType), None)


_WANTED = {
    "int_type": "a whole number",
    "float_type": "a number",
    "bool_type": "true or false",
    "string_type": "text",
    "finite_number": "a finite number",
    "greater_than": "more than {gt}",
    "greater_than_equal": "at least {ge}",
    "less_than": "less than {lt}",
    "less_than_equal": "at most {le}",
    "string_too_long": "at most {max_length} letters",
    "string_too_short": "at least {min_length} letters",
    "too_short": "at least {min_length} entries",
    "too_long": "at most {max_length} entries",
    "tuple_type": "a list",
    "dict_type": "a table",
    "dataclass_type": "a table of named fields",
    "literal_error": "{expected}",
}
"""Text for `wanted`, by pydantic's name of the mistake."""


def _wanted(mistake: Any) -> str:
    pattern = _WANTED.get(mistake["type"])
    if pattern is None:
        return str(mistake["msg"]).removeprefix("Value error, ")
    limits = {name: _figure(value) for name, value in mistake.get("ctx", {}).items()}
    return pattern.format(**limits)


def _figure(value: object) -> str:
    if isinstance(value, float) and value.is_integer() and abs(value) < 1e15:
        value = int(value)
    return f"{value:,}" if isinstance(value, int | float) else str(value)


def _problem(mistake: Any, kind: Any, source: str, mend: str) -> Problem:
    found, wanted = _short(mistake["input"]), _wanted(mistake)
    path = tuple(part for part in mistake["loc"] if part != "[key]")
    # pydantic adds "[key]" to the path if a table's key is itself at fault
    if mistake["type"] == "missing":
        found, wanted = "nothing", "this field, which is required"
    elif mistake["type"] in ("extra_forbidden", "unexpected_keyword_argument"):
        known = _known_fields(kind, path[:-1])
        found, wanted = "an unknown field", f"one of: {', '.join(known)}"
        mend = did_you_mean(str(path[-1]), known) or mend
    return Problem(source, _field(path), found, wanted, mend)


_MISTAKES_READ = 10_000
"""Largest number of mistakes that are listed; of more only their number is reported, since a list
would take all memory."""


def parse(
    data: object, kind: type[T], *, source: str, error: type[MeshwrightError], mend: str = ""
) -> T:
    """Converts plain data (from JSON or TOML) to a record of type `kind`.

    Raises `error` with one Problem for every mistake found.
    """
    try:
        return cast("T", _adapter(cast("Any", kind)).validate_json(json.dumps(data, default=str)))
    except ValidationError as failure:
        count = failure.error_count()
        if count > _MISTAKES_READ:
            wanted = "what the documentation says of this file"
            raise error(Problem(source, "", f"{count:,} mistakes", wanted, mend)) from None
        mistakes = failure.errors(include_url=False)[:PROBLEMS_KEPT]
        raise error(*(_problem(each, kind, source, mend) for each in mistakes)) from None
    except (ValueError, RecursionError) as failure:  # too many digits or levels
        raise error(Problem(source, "", str(failure), "plain data", mend)) from None


def problems_in(value: object, *, source: str) -> tuple[Problem, ...]:
    """Returns the problems of a record made in memory that no file could contain."""
    try:
        parse(plain(value), type(value), source=source, error=MeshwrightError)
    except MeshwrightError as failure:
        return failure.problems
    return ()


def checked(kind: type[T], options: Mapping[str, str], /, **values: object) -> T:
    """Makes a record from options of the command line; `options` gives the name of the option that
    sets a field, keyed by the field's path. Raises OptionError with one Problem, naming the option,
    for every value that its field cannot have."""
    try:
        return parse(values, kind, source="options", error=OptionError)
    except OptionError as failure:
        named = []
        for each in failure.problems:
            field = each.field
            inside = (n for n in options if field == n or field.startswith((f"{n}.", f"{n}[")))
            name = next(inside, "")
            source = options.get(name, each.source)
            named.append(replace(each, source=source, field=field.removeprefix(name)))
        raise OptionError(*named) from None


def checked_value(kind: Any, value: object, option: str) -> Any:
    """Returns the value of an option, checked as a field of type `kind`. Raises OptionError."""
    return checked(_holder(kind), {"value": option}, value=value).value


@lru_cache
def _holder(kind: Any) -> Any:
    """Makes a record type with one field of this type."""
    return record(type("Holder", (), {"__annotations__": {"value": kind}}))


def read(path: Path, *, error: type[MeshwrightError]) -> dict[str, Any]:
    """Reads the table in a TOML or JSON file. Raises `error` if it is missing or malformed."""
    return read_table(path, error=error)


def check_format(data: Mapping[str, object], *, source: str, error: type[MeshwrightError]) -> None:
    """Raises `error` unless the data of a file have the format of this version."""
    if "format" not in data:
        mend = f"write: format = {FORMAT}"
        raise error(Problem(source, "format", "nothing", f"format {FORMAT}", mend))
    try:
        _format(data["format"])
    except ValueError as failure:
        found, wanted = _short(data["format"]), f"format {failure}"
        raise error(Problem(source, "format", found, wanted)) from None


def load(path: Path, kind: type[T], *, error: type[MeshwrightError], large: bool = False) -> T:
    """Reads a record from a TOML or JSON file; `large` is for files written by our runs, which may
    be larger. Raises `error`, naming the file and every field at fault."""
    data = read_table(path, error=error, large=large)
    return parse(data, kind, source=str(path), error=error)


def plain(value: object) -> Any:
    """Converts a record to plain data; fields that are None are left out."""
    return _adapter(cast("Any", type(value))).dump_python(value, mode="json", exclude_none=True)


def dumps(value: object) -> str:
    """Formats a record as JSON; the same record always gives the same bytes."""
    return json.dumps(plain(value), indent=1, ensure_ascii=False) + "\n"


def fingerprint(value: object) -> str:
    """Returns twelve hexadecimal digits that change when the record's content changes."""
    text = json.dumps(plain(value), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]
