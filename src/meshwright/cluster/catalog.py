"""Accelerators whose figures are known: `catalog.toml` as records, each with its source."""

from __future__ import annotations

import re
import tomllib
from functools import lru_cache
from importlib.resources import files

from meshwright.cluster.spec import DeviceType, Link
from meshwright.errors import ClusterError
from meshwright.records import parse, record


@record
class CatalogEntry:
    """A device type, and what a machine that holds it is usually like."""

    type: DeviceType
    inside: Link
    """Between two such devices of one node, as servers that hold them are usually built."""
    reported_as: str | None = None
    """Regular expression for the name by which drivers report it."""


@lru_cache
def catalog() -> dict[str, CatalogEntry]:
    """Every known device type, by name."""
    text = files("meshwright.cluster").joinpath("catalog.toml").read_text(encoding="utf-8")
    entries = {}
    for name, row in tomllib.loads(text).items():
        extra = {key: row.pop(key) for key in ("inside", "reported_as") if key in row}
        data = {"type": {"name": name, **row}, **extra}
        entries[name] = parse(data, CatalogEntry, source="catalog.toml", error=ClusterError)
    return entries


def type_reported_as(driver_name: str) -> str | None:
    """The catalogue's name of the device that a driver calls `driver_name`, or None."""
    for name, entry in catalog().items():
        if entry.reported_as and re.search(entry.reported_as, driver_name):
            return name
    return None
