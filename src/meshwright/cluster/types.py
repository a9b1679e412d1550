"""Resolves the device types that a cluster file names: the catalogue's, changed ones and new
ones."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from meshwright.cluster.catalog import catalog
from meshwright.cluster.entries import DeviceEntry, link_of
from meshwright.cluster.spec import DeviceType, Link
from meshwright.errors import Problem
from meshwright.text import nearest

_NEEDED = ("memory", "memory_bandwidth", "peak")
_FIGURES = (
    "memory",
    "memory_bandwidth",
    "matmul_efficiency",
    "attention_efficiency",
    "memory_efficiency",
    "processor",
)


def nearest_types(name: str, known: Mapping[str, object]) -> str:
    """Return a hint for a device type name that is not known."""
    names = sorted({*catalog(), *known})
    folded = {each.lower(): each for each in names}
    near = [each for each in folded if each.startswith(name.lower())]
    near = near or nearest(name.lower(), folded, count=3, cutoff=0.5)
    close = " or ".join(repr(folded[each]) for each in near)
    mend = f"Did you mean {close}? " if near else ""
    return f"{mend}Known: {', '.join(names)}; or define [device.{name}]."


def type_problems(devices: Mapping[str, DeviceEntry], source: str) -> Iterator[Problem]:
    """Yield mistakes in how types refer to each other, and the figures that a new type lacks."""
    for name, entry in devices.items():
        where = f"device.{name}"
        if entry.like is not None and entry.like not in devices and entry.like not in catalog():
            wanted, hint = "a known device type", nearest_types(entry.like, devices)
            yield Problem(source, f"{where}.like", repr(entry.like), wanted, hint)
        elif entry.like is not None and _is_circular(name, devices):
            wanted = "a type that does not lead back here"
            yield Problem(source, f"{where}.like", repr(entry.like), wanted)
        elif entry.like is None and name not in catalog():
            for figure in _NEEDED:
                if not getattr(entry, figure):
                    mend = 'Or derive it: like = "T4".'
                    wanted = f"this figure of a new device type{_missing_hint(figure)}"
                    yield Problem(source, f"{where}.{figure}", "nothing", wanted, mend)


def _missing_hint(figure: str) -> str:
    return ', like { fp32 = "8.1 TFLOP/s" }' if figure == "peak" else ""


def _base(name: str, entry: DeviceEntry) -> str | None:
    return entry.like or (name if name in catalog() else None)


def _is_circular(name: str, devices: Mapping[str, DeviceEntry]) -> bool:
    seen = {name}
    base = devices[name].like
    while base is not None and base in devices:
        if base in seen:
            return True
        seen.add(base)
        base = devices[base].like
    return False


def offer_problems(devices: Mapping[str, DeviceEntry], source: str) -> Iterator[Problem]:
    """Yield a Problem for each type whose peaks are all 0. The file must be free of
    `type_problems`."""
    for name in devices:
        if not resolve_type(name, devices)[0].peak:
            yield Problem(source, f"device.{name}.peak", "0 for all", "a precision that is offered")


def resolve_type(name: str, devices: Mapping[str, DeviceEntry]) -> tuple[DeviceType, Link | None]:
    """Return a device type with every figure, and the link between two such devices in a node if
    one is known.

    The file must be free of `type_problems`.
    """
    chain: list[tuple[str, DeviceEntry]] = []
    base: str | None = name
    while base is not None and base in devices:
        chain.append((base, devices[base]))
        following = _base(base, devices[base])
        if following == base:
            break
        base = following
    known = catalog().get(base) if base is not None else None
    figures: dict[str, object] = {}
    inside = known.inside if known else None
    if known:
        figures = {each: getattr(known.type, each) for each in (*_FIGURES, "source")}
        figures["peak"] = dict(known.type.peak)
    for _, entry in reversed(chain):
        figures = _changed(figures, entry)
        inside = link_of(entry.inside) if entry.inside else inside
    return DeviceType(name=name, **figures), inside  # type: ignore[arg-type]


def _changed(figures: dict[str, object], entry: DeviceEntry) -> dict[str, object]:
    given = {each: getattr(entry, each) for each in _FIGURES if getattr(entry, each) is not None}
    before = figures.get("peak")
    merged = {**(before if isinstance(before, dict) else {}), **(entry.peak or {})}
    peak = {precision: speed for precision, speed in merged.items() if speed}
    mended = ", ".join([*given, *(f"peak {each}" for each in entry.peak or {})])
    origin = f"{figures.get('source', '')}; from the cluster file: {mended}".removeprefix("; ")
    changed = {**figures, **given, "peak": peak}
    if entry.source is not None or mended:
        changed["source"] = origin if entry.source is None else entry.source
    return changed
