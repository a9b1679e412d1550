"""Reads rotary positions and their scaling from `rope_scaling` or `rope_parameters` of a
config.json."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

from meshwright.errors import ModelError, Problem
from meshwright.model.transformer.spec import Rotary, Scaling

SCALINGS = ("default", "linear", "llama3", "yarn", "longrope")
_OLD_NAMES = {"su": "longrope"}
_FIELDS = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    "yarn": ("factor", "original_max_position_embeddings", "beta_fast", "beta_slow",
             "attention_factor", "mscale", "mscale_all_dim", "truncate"),
    "longrope": ("factor", "original_max_position_embeddings", "short_factor", "long_factor",
                 "attention_factor", "short_mscale", "long_mscale"),
}  # fmt: skip
_ANYWHERE = ("rope_type", "type", "rope_theta", "partial_rotary_factor")


def rotary(
    given: Mapping[str, Any] | None,
    where: str,
    source: str,
    *,
    base: float,
    features: int,
    positions: int,
    original: int | None = None,
    adjacent: bool = False,
) -> Rotary:
    """Makes the Rotary that a `rope_scaling` or `rope_parameters` table (`given`) asks for.

    `positions` is the model's longest sequence, `original` that of its original training. `where`
    is the table's name, for messages. Raises ModelError with every field that is not understood.
    """
    table = {key: value for key, value in (given or {}).items() if value is not None}
    kind = table.get("rope_type", table.get("type", "default"))
    kind = _OLD_NAMES.get(kind, kind) if isinstance(kind, str) else kind
    ModelError.check(_problems(table, kind, where, source, features))
    base = float(table.get("rope_theta", base))
    plain = Rotary(base=base, features=features, adjacent=adjacent)
    if kind == "default":
        return plain
    scaling = _SCALED[kind](table, positions, original)
    return Rotary(base=base, features=features, adjacent=adjacent, scaling=scaling)


def _problems(
    table: Mapping[str, Any], kind: object, where: str, source: str, features: int
) -> Iterator[Problem]:
    if not isinstance(kind, str) or kind not in SCALINGS:
        yield Problem(
            source, f"{where}.rope_type", repr(kind)[:60], f"one of {', '.join(SCALINGS)}"
        )
        return
    for key, value in table.items():
        if key in ("rope_type", "type"):
            continue
        if key not in (*_FIELDS[kind], *_ANYWHERE):
            wanted = f"a field of {kind} scaling: {', '.join(_FIELDS[kind]) or 'none'}"
            yield Problem(source, f"{where}.{key}", repr(value)[:60], wanted)
        elif key in ("short_factor", "long_factor"):
            right = isinstance(value, list) and all(_is_positive(each) for each in value)
            if not right or len(value) != features // 2:
                found = f"{len(value)} numbers" if isinstance(value, list) else repr(value)[:60]
                wanted = f"{features // 2} numbers above 0, one for each pair of features"
                yield Problem(source, f"{where}.{key}", found, wanted)
        elif key == "truncate":
            if not isinstance(value, bool):
                yield Problem(source, f"{where}.{key}", repr(value)[:60], "true or false")
        elif not _is_positive(value):
            yield Problem(source, f"{where}.{key}", repr(value)[:60], "a number above 0")
    needed = {"linear": ("factor",), "llama3": _FIELDS["llama3"], "yarn": ("factor",),
              "longrope": ("short_factor", "long_factor")}  # fmt: skip
    for key in needed.get(kind, ()):
        if key not in table:
            wanted = f"this field, which {kind} scaling needs"
            yield Problem(source, f"{where}.{key}", "nothing", wanted)


def _is_positive(value: object) -> bool:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return number and math.isfinite(value) and 0 < value <= 1e15  # type: ignore[arg-type,operator]


def _linear(t: Mapping[str, Any], _positions: int, _original: int | None) -> Scaling:
    return Scaling(kind="linear", factor=t["factor"])


def _llama3(t: Mapping[str, Any], _positions: int, _original: int | None) -> Scaling:
    return Scaling(
        kind="llama3",
        factor=t["factor"],
        original=int(t["original_max_position_embeddings"]),
        low=float(t["low_freq_factor"]),
        high=float(t["high_freq_factor"]),
    )


def _yarn(t: Mapping[str, Any], positions: int, original: int | None) -> Scaling:
    """Reads YaRN, whose magnitude grows with the logarithm of the factor (Peng et al. 2023, eq.
    22)."""

    def grown(share: float) -> float:
        return 0.1 * share * math.log(t["factor"]) + 1.0 if t["factor"] > 1 else 1.0

    magnitude = t.get("attention_factor")
    if magnitude is None:
        magnitude = grown(1.0)
        if "mscale" in t and "mscale_all_dim" in t:
            magnitude = grown(t["mscale"]) / grown(t["mscale_all_dim"])
    return Scaling(
        kind="yarn",
        factor=t["factor"],
        original=int(original or t.get("original_max_position_embeddings") or positions),
        low=float(t.get("beta_slow", 1.0)),
        high=float(t.get("beta_fast", 32.0)),
        magnitude=float(magnitude),
        truncated=t.get("truncate", True),
    )


def _longrope(t: Mapping[str, Any], positions: int, original: int | None) -> Scaling:
    first = int(original or t.get("original_max_position_embeddings") or positions)
    factor = t.get("factor", positions / first)
    magnitude = t.get("attention_factor")
    if magnitude is None:
        magnitude = math.sqrt(1 + math.log(factor) / math.log(first)) if factor > 1 else 1.0
    return Scaling(
        kind="longrope",
        factor=float(factor),
        original=first,
        magnitude=float(magnitude),
        short=tuple(map(float, t["short_factor"])),
        long=tuple(map(float, t["long_factor"])),
    )


_SCALED = {"linear": _linear, "llama3": _llama3, "yarn": _yarn, "longrope": _longrope}
