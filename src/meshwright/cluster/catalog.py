"""Reads the catalogue of known accelerators, `catalog.toml`; each entry names the source of its
figures."""

from __future__ import annotations

import re
import tomllib
from functools import lru_cache
from importlib.resources import files

from meshwright.cluster.spec import DeviceType, Link, LinkKind
from meshwright.errors import ClusterError
from meshwright.records import parse, record


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


@lru_cache
def catalog() -> dict[str, CatalogEntry]:
    """Returns every entry of the catalogue, by device type name."""
    text = files("meshwright.cluster").joinpath("catalog.toml").read_text(encoding="utf-8")
    entries = {}
    for name, row in tomllib.loads(text).items():
        extra = {key: row.pop(key) for key in ("inside", "link", "reported_as") if key in row}
        data = {"type": {"name": name, **row}, **extra}
        entries[name] = parse(data, CatalogEntry, source="catalog.toml", error=ClusterError)
    return entries


def type_reported_as(driver_name: str) -> str | None:
    """Returns the catalogue's name of the device that a driver calls `driver_name`, or None."""
    for name, entry in catalog().items():
        if entry.reported_as and re.search(entry.reported_as, driver_name):
            return name
    return None
