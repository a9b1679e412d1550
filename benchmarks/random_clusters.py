"""Mixed clusters as people have them, drawn at random: a few kinds of nodes, one or two sites."""

from __future__ import annotations

from dataclasses import dataclass
from random import Random

from meshwright.cluster.catalog import catalog
from meshwright.cluster.spec import Cluster, Link, Node, Precision, Site

TYPES = ("T4", "A10G", "V100-16", "V100-32", "A100-40", "A100-80", "L4", "H100", "RTX3090")
NETWORKS = (10e9, 25e9, 50e9, 100e9, 200e9, 400e9)
"""Bits per second of a node."""
UPLINKS = (5e9, 10e9, 50e9)
MODELS = (("gpt2-medium", 1024), ("gpt2-large", 1024), ("gpt2-xl", 1024), ("llama-2-7b", 2048))
BATCHES = (32, 48, 64, 96, 128, 192, 256)


@dataclass(frozen=True, slots=True)
class Draw:
    """A cluster, and what is trained on it."""

    cluster: Cluster
    model: str
    sequence: int
    batch: int
    precision: Precision


def draw(seed: int) -> Draw:
    """The case of this number: two or three types on two to six nodes of one to eight devices."""
    chance = Random(seed)
    entries = catalog()
    kinds = chance.sample([kind for kind in TYPES if kind in entries], chance.choice((2, 2, 3)))
    two = chance.random() < 0.25
    nodes: list[Node] = []
    for i, kind in enumerate(kinds):
        width = chance.choice((1, 2, 4, 4, 8))
        network = Link(bandwidth=chance.choice(NETWORKS) / 8, latency=2e-5)
        for _ in range(chance.choice((1, 1, 2, 2, 3))):
            site = "away" if two and i == len(kinds) - 1 else "home"
            nodes.append(
                Node(
                    name=f"n{len(nodes)}",
                    site=site,
                    devices=(kind,) * width,
                    inside=entries[kind].inside,
                    network=network,
                )
            )
    uplink = Link(bandwidth=chance.choice(UPLINKS) / 8, latency=5e-3) if two else None
    sites = ("home", "away") if two else ("home",)
    model, sequence = chance.choice(MODELS)
    cluster = Cluster(
        name=f"random-{seed}",
        types={kind: entries[kind].type for kind in kinds},
        nodes=tuple(nodes),
        sites=tuple(Site(name=site, uplink=uplink) for site in sites),
    )
    return Draw(cluster, model, sequence, chance.choice(BATCHES), "fp16")
