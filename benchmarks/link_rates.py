"""All-reduces as others have published them, against those that the cost model prices.

    python benchmarks/link_rates.py

For every table of `published_all_reduces.toml` one line: the error of the priced seconds at each
size. Tables with a star were in sight when the figures of `link_rates.toml` were chosen.
"""

from __future__ import annotations

import tomllib
from pathlib import Path
from statistics import median
from typing import Any

from meshwright.cluster.files import cluster_from
from meshwright.cluster.spec import devices_of
from meshwright.cluster.topology import topology
from meshwright.cost.collective import all_reduce, uncontended_seconds
from meshwright.cost.reached_links import reached_links

TABLES = Path(__file__).with_name("published_all_reduces.toml")
CLASSES = ((1, 1), (8, 16), (128, 256))
"""Sizes in MiB that are judged, from and to: the largest that a table has in each range."""


def published() -> list[dict[str, Any]]:
    """Reads the published tables."""
    tables: list[dict[str, Any]] = tomllib.loads(TABLES.read_text(encoding="utf-8"))["table"]
    for table in tables:
        table["us"] = {float(size): value for size, value in table["us"].items()}
    return tables


def priced_us(table: dict[str, Any], mebibytes: float) -> float:
    """Returns the microseconds that the cost model gives one all-reduce of a table."""
    node = {
        "name": "n",
        "count": table.get("nodes", 1),
        "devices": [f"{table['devices']} x {table['type']}"],
        "network": table.get("network", {"bandwidth": "10 Gbit/s", "latency": "50 us"}),
        **({"inside": table["inside"]} if "inside" in table else {}),
    }
    cluster = cluster_from({"format": 1, "name": "x", "node": [node]}, source=table["name"])
    links = topology(reached_links(cluster, None))
    devices = [device.name for device in devices_of(cluster)]
    return 1e6 * uncontended_seconds(links, all_reduce(links, devices, mebibytes * 2**20))


def judged(table: dict[str, Any]) -> dict[float, float]:
    """Returns the errors of a table, by size, at those of 1, 16 and 256 MiB that it has."""
    sizes = [max((s for s in table["us"] if low <= s <= high), default=None)
             for low, high in CLASSES]  # fmt: skip
    return {s: priced_us(table, s) / table["us"][s] - 1 for s in sizes if s is not None}


def main() -> None:
    """Print the error of every table at every size, and how many of those judged are small."""
    found = []
    for table in published():
        star = "*" if table["chosen_with"] else " "
        errors = {s: priced_us(table, s) / t - 1 for s, t in sorted(table["us"].items())}
        cells = "  ".join(f"{size:g}M {error:+.0%}" for size, error in errors.items())
        print(f"{star} {table['name']:<29} {cells}")
        found += [(abs(error), table["chosen_with"]) for error in judged(table).values()]
    for name, those in (("all", found), ("not in sight", [x for x in found if not x[1]])):
        good = sum(error <= 0.1 for error, _ in those)
        middle = median(error for error, _ in those)
        print(
            f"at 1, 16 and 256 MiB, {name}: {good} of {len(those)} within 10 %, median {middle:.1%}"
        )


if __name__ == "__main__":
    main()
