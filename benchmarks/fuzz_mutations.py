"""Ways to spoil a file or an option, for fuzz.py: each is drawn from a class, and says what must
become of it."""

from __future__ import annotations

import copy
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any, Literal

from fuzz_text import Pairs, Raw, data_of, written
from fuzz_world import Kind

Verdict = Literal["refused", "accepted", "either"]
Place = tuple[int | str, ...]
DIGITS = "9" * 6000
CONTROLS = (
    "\x1b[2J", "\x1b]0;x\x07", "a\rb", "\x7f", "\x9b31m", "\u202egnp", "\u2066x", "\u2028", "\x00",
    "\ufeff", "a\nb\x08",
)  # fmt: skip
"""Text that steers a terminal: never let through."""
PAYLOADS = (
    '"""\nimport os; os.system("touch ../pwned")\n"""', "$(touch ../pwned)", "`touch ../pwned`",
    "'; touch ../pwned; '", "../../escaped", "/etc/passwd", "[link=https://x]y[/link]", "[/x]",
    "<script>alert(1)</script>", "{{7*7}}", "%s%n", "-rf", "*", "", " ", "x" * 5000, "名前",
)  # fmt: skip
"""Text that means something elsewhere."""
JUNK: tuple[Any, ...] = (None, True, -1, 0, 2.5, "", "text", [], {}, [[]], {"a": 1}, 10**30)
HUGE: tuple[Any, ...] = (10**9, 10**18, 2**63, 10**30, 1e30, 1e300)
UNITS = ("10", "1e999 GB/s", "-1 GB/s", "0 GB/s", "5 parsecs", "1 GB/s/s", "nan GB/s")


@dataclass(frozen=True)
class Spoiled:
    """What is done to one file."""

    change: str
    """In words."""
    verdict: Verdict
    make: Callable[[Path], None]
    """Puts it in the place of the good file."""


def places(data: Any, place: Place = ()) -> Iterator[Place]:
    """The way to everything in plain data."""
    if place:
        yield place
    if isinstance(data, dict):
        for key, value in data.items():
            yield from places(value, (*place, key))
    elif isinstance(data, list):
        for index, value in enumerate(data):
            yield from places(value, (*place, index))


def at(data: Any, place: Place) -> Any:
    """What stands at a place."""
    for part in place:
        data = data[part]
    return data


def put(data: Any, place: Place, value: Any) -> Any:
    """A copy with another value at a place."""
    data = copy.deepcopy(data)
    if not place:
        return value
    at(data, place[:-1])[place[-1]] = value
    return data


def _pick(data: Any, chance: Random, wanted: Callable[[Any], bool] = lambda _: True) -> Place:
    fitting = [place for place in places(data) if wanted(at(data, place))]
    return chance.choice(fitting or [*places(data)])


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_table(value: Any) -> bool:
    return isinstance(value, dict) and bool(value)


def _is_quantity(value: Any) -> bool:
    return isinstance(value, str) and bool(re.match(r"[0-9.]+ [A-Za-zµ]", value))


Change = tuple[Any, Place, str, Verdict]


def deleted(data: Any, chance: Random) -> Change:
    """A field or an entry is taken away."""
    place = _pick(data, chance)
    changed = copy.deepcopy(data)
    del at(changed, place[:-1])[place[-1]]
    return changed, place, "taken away", "either"


def swapped(data: Any, chance: Random) -> Change:
    """Two values change places."""
    one, other = _pick(data, chance), _pick(data, chance)
    if one[: len(other)] == other or other[: len(one)] == one:
        return data, one, "left", "either"
    left, right = at(data, one), at(data, other)
    return put(put(data, one, right), other, left), one, f"swapped with {other}", "either"


def huge(data: Any, chance: Random) -> Change:
    """A number is far too large."""
    place, value = _pick(data, chance, _is_number), chance.choice(HUGE)
    return put(data, place, value), place, f"{value}", "either"


def negative(data: Any, chance: Random) -> Change:
    """A number is below zero."""
    place = _pick(data, chance, _is_number)
    value = chance.choice((-1, -0.5, -(10**30)))
    return put(data, place, value), place, f"{value}", "either"


def zero(data: Any, chance: Random) -> Change:
    """A number is zero."""
    place = _pick(data, chance, _is_number)
    return put(data, place, chance.choice((0, 0.0))), place, "0", "either"


def not_a_number(data: Any, chance: Random) -> Change:
    """A number is none, or infinite."""
    place = _pick(data, chance, _is_number)
    value = chance.choice(("NaN", "Infinity", "-Infinity", "1e400"))
    return put(data, place, Raw(value)), place, value, "refused"


def truth(data: Any, chance: Random) -> Change:
    """A number is true or false."""
    place = _pick(data, chance, _is_number)
    verdict: Verdict = "refused" if _is_number(at(data, place)) else "either"
    return put(data, place, chance.choice((True, False))), place, "true or false", verdict


def other_type(data: Any, chance: Random) -> Change:
    """A value is of another type."""
    place, value = _pick(data, chance), chance.choice(JUNK)
    return put(data, place, value), place, f"{value!r}", "either"


def nested(data: Any, chance: Random) -> Change:
    """Lists in lists, without end."""
    place, depth = _pick(data, chance), chance.choice((100, 5_000, 100_000))
    return put(data, place, Raw("[" * depth + "]" * depth)), place, f"{depth} deep", "refused"


def doubled(data: Any, chance: Random) -> Change:
    """A key stands twice."""
    inside = [place for place in ((), *places(data)) if _is_table(at(data, place))]
    place = chance.choice(inside)
    table = at(data, place)
    key = chance.choice([*table])
    pairs = Pairs([*table.items(), (key, table[key])])
    return put(data, place, pairs) if place else pairs, (*place, key), "twice", "refused"


def steering(data: Any, chance: Random) -> Change:
    """Text with characters that steer a terminal."""
    place, text = _pick(data, chance, _is_text), chance.choice(CONTROLS)
    return put(data, place, f"x{text}y"), place, f"{text!r}", "refused"


def payload(data: Any, chance: Random) -> Change:
    """Text that means something to a shell, a page or Python."""
    place, text = _pick(data, chance, _is_text), chance.choice(PAYLOADS)
    return put(data, place, text), place, f"{text[:40]!r}", "either"


def unknown(data: Any, chance: Random) -> Change:
    """An unknown field."""
    inside = [place for place in ((), *places(data)) if _is_table(at(data, place))]
    place = chance.choice(inside)
    more = put(data, (*place, "colour"), "red")
    return more, (*place, "colour"), "unknown", "either"


def units(data: Any, chance: Random) -> Change:
    """A quantity in no unit of its kind."""
    place, text = _pick(data, chance, _is_quantity), chance.choice(UNITS)
    verdict: Verdict = "refused" if _is_quantity(at(data, place)) else "either"
    return put(data, place, text), place, text, verdict


def digits(data: Any, chance: Random) -> Change:
    """A whole number of thousands of digits."""
    place = _pick(data, chance, _is_number)
    return put(data, place, Raw(DIGITS)), place, "6,000 digits", "refused"


def repeated(data: Any, chance: Random) -> Change:
    """A list of very many entries."""
    place = _pick(data, chance, lambda value: isinstance(value, list) and bool(value))
    value = at(data, place)
    # Planning for very many devices takes its time, which is not what is looked at here.
    times = chance.choice((2, 100) if "devices" in place else (2, 1000, 20_000))
    many = value * times if isinstance(value, list) else value
    return put(data, place, many), place, "repeated", "either"


def swollen(data: Any, chance: Random) -> Change:
    """Hundreds of thousands of different entries in the place of a list or table."""
    place = _pick(data, chance, lambda value: isinstance(value, list | dict) and bool(value))
    count = chance.choice((20_000, 300_000))
    entry = chance.choice(("x{}", "a:{}", "a-{}:0", "1 x T{}"))
    names = [entry.format(number) for number in range(count)]
    value: Any = chance.choice((names, dict.fromkeys(names, 1), [{"name": n} for n in names]))
    return put(data, place, value), place, f"{count} entries", "either"


def several(data: Any, chance: Random) -> Change:
    """Four changes at once."""
    for _ in range(4):
        ways = (deleted, swapped, huge, negative, zero, other_type, payload, repeated)
        changed = chance.choice(ways)(data, chance)[0]
        data = changed if changed and _is_whole(changed, data) else data
    return data, (), "four changes", "either"


def _is_whole(changed: Any, data: Any) -> bool:
    return type(changed) is type(data)


IN_DATA = (
    several, swollen, deleted, swapped, huge, negative, zero, not_a_number, truth, other_type,
    nested, doubled, steering, payload, unknown, units, digits, repeated,
)  # fmt: skip


def _bytes(data: bytes) -> Callable[[Path], None]:
    def make(path: Path) -> None:
        path.write_bytes(data)

    return make


def _text(text: str) -> Callable[[Path], None]:
    return _bytes(text.encode("utf-8", "surrogatepass"))


def _link(target: str) -> Callable[[Path], None]:
    def make(path: Path) -> None:
        path.unlink()
        path.symlink_to(target)

    return make


def _instead(make: Callable[[Path], object]) -> Callable[[Path], None]:
    def put_there(path: Path) -> None:
        path.unlink()
        make(path)

    return put_there


def _crowded(millions: int) -> Callable[[Path], None]:
    def make(path: Path) -> None:
        with path.open("wb") as file:
            file.write(b"[")
            for _ in range(millions):
                file.write(b"[]," * 10**6)
            file.write(b"[]]")

    return make


def _sparse(path: Path) -> None:
    with path.open("wb") as file:
        file.truncate(10 * 2**30)


def _readable(path: Path, form: str) -> Iterator[tuple[str, Spoiled]]:
    """What editors of other systems do to text."""
    good = path.read_bytes()
    if form == "bytes":
        return
    yield "byte order mark", Spoiled("U+FEFF first", "accepted", _bytes(b"\xef\xbb\xbf" + good))
    yield "line ends", Spoiled("CR LF", "accepted", _bytes(good.replace(b"\n", b"\r\n")))


def in_bytes(kind: Kind, path: Path, chance: Random) -> dict[str, Spoiled]:
    """Classes that spoil a file as a whole, whatever is in it."""
    good = path.read_bytes()
    middle = chance.randrange(1, len(good) - 1)
    noise = bytes(chance.randrange(256) for _ in range(200))
    text = kind.form != "bytes"
    sure: Verdict = "refused" if text else "either"
    found = {
        **dict(_readable(path, kind.form)),
        "empty": Spoiled("no bytes", "refused", _bytes(b"")),
        "blank": Spoiled("spaces", sure, _bytes(b" \n \n")),
        "truncated": Spoiled(f"to {middle} bytes", "either", _bytes(good[:middle])),
        "binary": Spoiled(
            "200 bytes of noise", sure, _bytes(good[:middle] + noise + good[middle:])
        ),
        "nul": Spoiled("a NUL byte", sure, _bytes(good[:middle] + b"\0" + good[middle:])),
        "utf-16": Spoiled("UTF-16", sure, _bytes(good.decode("utf-8", "replace").encode("utf-16"))),
        "pipe": Spoiled("a pipe", "refused", _instead(os.mkfifo)),
        "folder": Spoiled("a folder", "refused", _instead(Path.mkdir)),
        "device": Spoiled("/dev/zero", "refused", _link("/dev/zero")),
        "loop": Spoiled("a link to itself", "refused", _link(path.name)),
        "missing": Spoiled("no file", "refused", Path.unlink),
        "oversize": Spoiled("10 GiB", sure, _sparse),
        "forbidden": Spoiled("mode 000", "either", lambda path: path.chmod(0)),
    }
    if kind.form in ("json", "lines"):
        millions = chance.choice((2, 21))
        found["crowded"] = Spoiled(f"{millions} million lists", "refused", _crowded(millions))
    return found


def classes_of(kind: Kind) -> tuple[str, ...]:
    """Names of all classes that a kind of file can be spoiled by."""
    whole = ["same", "empty", "blank", "truncated", "binary", "nul", "utf-16", "pipe", "folder"]
    whole += ["device", "loop", "missing", "oversize", "forbidden"]
    if kind.form != "bytes":
        whole += ["byte order mark", "line ends"]
    if kind.form in ("json", "lines"):
        whole += ["crowded"]
    inside = [each.__name__ for each in IN_DATA] if kind.form in ("json", "toml", "lines") else []
    return (*whole, *inside)


def spoiled(kind: Kind, name: str, path: Path, chance: Random) -> Spoiled:
    """A mutation of a good file, of this class."""
    if name == "same":
        return Spoiled("nothing", "accepted", lambda _: None)
    known = {each.__name__: each for each in IN_DATA}
    if name not in known:
        return in_bytes(kind, path, chance)[name]
    data = data_of(path.read_text(encoding="utf-8"), kind.form)
    changed, place, change, verdict = known[name](data, chance)
    if name == "unknown" and kind.strict and place[-2:-1] not in (("versions",),):
        verdict = _unknown_verdict(place)
    if name == "not_a_number" and kind.form == "lines":  # a run of fp16 may overflow
        verdict = "either"
    if name == "truth" and not kind.strict:
        verdict = "either"
    text = written(changed, kind.form)
    where = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in place)
    return Spoiled(f"{where.lstrip('.')}: {change}", verdict, _text(text))


_FREE_TABLES = ("versions", "dropped", "parts", "peak", "devices", "device", "shares", "peak_flops")
"""Tables whose keys are names of other things."""


def _unknown_verdict(place: Place) -> Verdict:
    return "either" if len(place) > 1 and place[-2] in _FREE_TABLES else "refused"


def with_value(kind: Kind, path: Path, at: str, value: object) -> Spoiled:
    """A good file with a value that it must not have: `pipelines.0.rows` is where."""
    place = tuple(int(part) if part.isdecimal() else part for part in at.split("."))
    data = data_of(path.read_text(encoding="utf-8"), kind.form)
    return Spoiled(
        f"{at}: {value!r}"[:200], "refused", _text(written(put(data, place, value), kind.form))
    )
