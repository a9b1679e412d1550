"""Small testbeds for tests."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from meshwright.cluster.files import cluster_from
from meshwright.cluster.spec import Cluster
from meshwright.plan.spec import Job, Pipeline, Plan, PlanInput, Stage
from meshwright.testbed.capabilities import Capabilities, Quotas
from meshwright.testbed.spec import Testbed, TestbedFile, make_testbed
from worlds import plan_by_hand

JOB = Job(global_batch=4, sequence=16, precision="fp32", optimizer="sgd")
EVERYTHING = Capabilities(
    namespaces=True,
    shaper="htb",
    priority=True,
    latency=True,
    quotas=Quotas(version=2, folder="/sys/fs/cgroup"),
    cubic=True,
)
NOTHING = Capabilities(
    missing={"namespaces and link rates": "needs root", "CPU quotas": "none is mounted"}
)


def mixed_cluster() -> Cluster:
    """Two sites, unlike nodes, one direct link."""
    link = {"bandwidth": "100 Mbit/s", "latency": "4 ms"}
    data = {
        "format": 1,
        "name": "mixed",
        "device": {
            "fast": {"like": "cpu", "peak": {"fp32": "40 GFLOP/s"}},
            "slow": {"like": "cpu", "peak": {"fp32": "10 GFLOP/s"}},
        },
        "site": [
            {"name": "east", "uplink": {"bandwidth": "20 Mbit/s", "latency": "10 ms"}},
            {"name": "west"},
        ],
        "node": [
            {"name": "a", "devices": ["2 x fast"], "network": link, "site": "east",
             "inside": {"bandwidth": "1 Gbit/s", "latency": "0 s"}},
            {"name": "b", "devices": ["1 x slow"], "site": "east",
             "network": {"bandwidth": "50 Mbit/s", "latency": "0 s"}},
            {"name": "c", "devices": ["1 x slow"], "network": link, "site": "west"},
        ],
        "link": [{"between": ["a", "c"], "bandwidth": "30 Mbit/s", "latency": "1 ms"}],
    }  # fmt: skip
    return cluster_from(data, source="mixed")


def bed(mode: str = "virtual", **changes: Any) -> Testbed:
    """A testbed of the mixed cluster."""
    shares = {} if mode == "virtual" else {"fastest_share": 0.4}
    entry = TestbedFile(name="mixed", cluster="", mode=mode, **{**shares, **changes})  # type: ignore[arg-type]
    return make_testbed(entry, mixed_cluster(), source="testbed.toml")


def without_latency(able: Capabilities) -> Capabilities:
    """A kernel that cannot delay packets."""
    return replace(able, latency=False, missing={"link latency": "netem: unknown"})


def pipeline_plan(devices: tuple[tuple[tuple[str, ...], ...], ...], cuts: tuple[int, ...]) -> Plan:
    """One pipeline of these stages, two micro-batches of two rows each."""
    stages = tuple(
        Stage(layers=(a, b), devices=each)
        for a, b, each in zip(cuts, cuts[1:], devices, strict=False)
    )
    return plan_by_hand(
        Pipeline(micro_batches=2, rows=2, stages=stages),
        model=PlanInput(name="gpt-tiny", fingerprint=""),
        job=JOB,
    )
