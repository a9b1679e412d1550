"""Reads the catalogue of known accelerators, `catalog*.toml`; each entry names the source of its
figures."""

from __future__ import annotations

import math
import re
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import lru_cache
from importlib.resources import files
from typing import Any

from meshwright.cluster.efficiency import ARCHITECTURES, with_reached_shares
from meshwright.cluster.ranges import WATTS, device_problems, out_of_range
from meshwright.cluster.spec import DeviceType, Link, LinkKind
from meshwright.errors import ClusterError, Problem
from meshwright.records import Bytes, Name, parse, record
from meshwright.text import did_you_mean

FILES = (
    "catalog.toml",
    "catalog_servers.toml",
    "catalog_workstation.toml",
    "catalog_geforce.toml",
    "catalog_amd.toml",
    "catalog_others.toml",
)


@record
class CatalogEntry:
    """Describes a known device type, and how servers that hold it are usually built."""

    type: DeviceType
    inside: Link
    """Link between two such devices of one node, as servers that hold them are usually built."""
    link: LinkKind | None = None
    """What this link consists of; None: what its bandwidth suggests."""
    reported_as: str | None = None
    """Regular expression that matches the name which drivers report."""
    architecture: Name | None = None
    """Generation of its chip, as in `ARCHITECTURES`; None if its efficiencies are stated."""
    watts: float = 0.0
    """Power limit; 0 if it is not needed."""


@lru_cache
def catalog() -> dict[str, CatalogEntry]:
    """Returns every entry of the catalogue, by device type name."""
    folder = files("meshwright.cluster")
    entries: dict[str, CatalogEntry] = {}
    for name in FILES:
        entries |= read_catalog(folder.joinpath(name).read_text(encoding="utf-8"), name)
    return entries


def read_catalog(text: str, source: str) -> dict[str, CatalogEntry]:
    """Parses one file of the catalogue; efficiencies that an entry does not state follow from its
    architecture and power. Raises ClusterError for figures that no device has."""
    entries: dict[str, CatalogEntry] = {}
    for name, row in tomllib.loads(text).items():
        entry = _entry(name, row, source)
        ClusterError.check(_problems(entry, source))
        if entry.architecture is not None:
            chip = ARCHITECTURES[entry.architecture]
            kind = with_reached_shares(entry.type, chip, entry.watts, row)
            entry = replace(entry, type=kind)
        entries[name] = entry
    return entries


def _entry(name: str, row: Mapping[str, Any], source: str) -> CatalogEntry:
    own = ("inside", "link", "reported_as", "architecture", "watts")
    extra = {key: value for key, value in row.items() if key in own}
    if "watts" in extra:
        extra["watts"] = float(extra["watts"])
    figures = {key: value for key, value in row.items() if key not in own}
    data = {"type": {"name": name, **figures}, **extra}
    try:
        return parse(data, CatalogEntry, source=source, error=ClusterError)
    except ClusterError as failure:
        fields = (replace(x, field=f"{name}.{_field(x.field)}") for x in failure.problems)
        raise ClusterError(*fields) from None


def _field(path: str) -> str:
    return path.removeprefix("type.")


def _problems(entry: CatalogEntry, source: str) -> Iterator[Problem]:
    name = entry.type.name
    yield from device_problems(name, entry.type, source)
    if entry.architecture is None:
        return
    if entry.architecture not in ARCHITECTURES:
        wanted = f"one of: {', '.join(ARCHITECTURES)}"
        mend = did_you_mean(entry.architecture, ARCHITECTURES)
        yield Problem(source, f"{name}.architecture", repr(entry.architecture), wanted, mend)
    yield from out_of_range(f"{name}.watts", entry.watts, WATTS, source)


def type_reported_as(driver_name: str, memory: Bytes | None = None) -> str | None:
    """Returns the catalogue's name of the device that a driver calls `driver_name`, or None.

    Of several cards with one name, that with the nearest `memory` in bytes is taken; the first of
    them if it is not told.
    """
    fitting = [
        name
        for name, entry in catalog().items()
        if entry.reported_as and re.search(entry.reported_as, driver_name)
    ]
    if not fitting or memory is None:
        return next(iter(fitting), None)
    told = max(memory, 1)
    return min(fitting, key=lambda name: abs(math.log(catalog()[name].type.memory / told)))
