"""A two-stage plan on two unlike nodes, with a step that was worked out on paper."""

from __future__ import annotations

from dataclasses import replace

import worlds
from meshwright.cluster.spec import Cluster, DeviceType, Link
from meshwright.model.spec import LayerGraph
from meshwright.plan.spec import (
    DeviceMemory,
    Pipeline,
    Plan,
    PlanInput,
    Prediction,
    RunnerUp,
    Stage,
)
from meshwright.program.operations import Op
from meshwright.program.timeline import Interval, MemoryPoint, Stream, Timeline
from worlds import GIB


def cluster() -> Cluster:
    fast = DeviceType(
        name="fast", memory=16 * GIB, memory_bandwidth=9e11, peak={"fp32": 4e13}, source="paper"
    )
    made = worlds.cluster(
        ("fast",),
        ("slow", "slow"),
        inside=Link(bandwidth=2e10, latency=1e-5, kind="measured"),
        network=Link(bandwidth=1.25e9, latency=5e-5, kind="measured"),
        types=(fast, replace(fast, name="slow", memory=8 * GIB)),
    )
    return replace(made, name="pair")


def model() -> LayerGraph:
    names = ("embedding", "blocks.0", "blocks.1", "head")
    facts = {"signature": "block", "traffic_bytes": 1e6, "parameters": 1000, "saved_bytes": 1e6}
    layers = [worlds.layer(name, 1e9, **facts) for name in names]
    return worlds.in_a_row(layers, cut_bytes=4096.0, name="tiny", sequence=128)


def prediction() -> Prediction:
    memory = DeviceMemory(
        device="a:0",
        parameters=2 * GIB,
        gradients=2 * GIB,
        optimizer=4 * GIB,
        activations=5 * GIB,
        buffers=1 * GIB,
        capacity=16 * GIB,
    )
    return Prediction(
        step_seconds=0.010,
        parts={"compute": 0.006, "bubble": 0.003, "transfers": 0.001},
        memory=(memory, replace(memory, device="b:0", activations=0, capacity=9 * GIB)),
        runners_up=(
            RunnerUp(name="even", step_seconds=0.015, reason="slowest stage +5 ms"),
            RunnerUp(name="one <device>", reason="does not fit: a:0 needs 40 GiB of 16 GiB"),
        ),
        dropped={"slower in closed form": 7, "data width does not divide the batch": 9},
    )


def plan() -> Plan:
    stages = (
        Stage(layers=(0, 3), devices=(("a:0",),)),
        Stage(layers=(3, 4), devices=(("b:0",),)),
    )
    return worlds.plan_by_hand(
        Pipeline(micro_batches=2, rows=1, stages=stages),
        sequence=128,
        name="dp1-tp1-pp2",
        model=PlanInput(name="tiny", fingerprint="0123456789ab"),
        cluster=PlanInput(name="pair", fingerprint="ba9876543210"),
        prediction=prediction(),
    )


def _interval(
    rank: int, op: Op, micro_batch: int | None, span: tuple[float, float], peer: int | None = None
) -> Interval:
    streams: dict[Op, Stream] = {
        Op.SEND_F: "send",
        Op.SEND_B: "send",
        Op.RECV_F: "receive",
        Op.RECV_B: "receive",
        Op.REDUCE_NORM: "reduce",
    }
    number = "" if micro_batch is None else micro_batch
    return Interval(
        rank=rank,
        stream=streams.get(op, "compute"),
        op=op,
        stage=rank,
        micro_batch=micro_batch,
        label=f"{rank}{op}{number}",
        start_seconds=span[0] / 1000,
        end_seconds=span[1] / 1000,
        peer=peer,
        bytes=0 if peer is None else 4096,
    )


def timeline() -> Timeline:
    """Two micro-batches of 1 + 2 ms on the first rank, half of that on the second."""
    moves = [(0, (1.0, 1.1)), (1, (2.0, 2.1))]
    back = [(0, (2.6, 2.7)), (1, (4.1, 4.2))]
    return Timeline(
        source="simulated",
        devices=("a:0", "b:0"),
        step_seconds=0.0073,
        intervals=(
            _interval(0, Op.FORWARD, 0, (0.0, 1.0)),
            _interval(0, Op.FORWARD, 1, (1.0, 2.0)),
            *(_interval(0, Op.SEND_F, m, span, 1) for m, span in moves),
            *(_interval(1, Op.RECV_F, m, span, 0) for m, span in moves),
            _interval(1, Op.FORWARD, 0, (1.1, 1.6)),
            _interval(1, Op.BACKWARD, 0, (1.6, 2.6)),
            _interval(1, Op.FORWARD, 1, (2.6, 3.1)),
            _interval(1, Op.BACKWARD, 1, (3.1, 4.1)),
            *(_interval(1, Op.SEND_B, m, span, 0) for m, span in back),
            *(_interval(0, Op.RECV_B, m, span, 1) for m, span in back),
            _interval(0, Op.BACKWARD, 0, (2.7, 4.7)),
            _interval(0, Op.BACKWARD, 1, (4.7, 6.7)),
            _interval(0, Op.REDUCE_NORM, None, (6.7, 6.8)),
            _interval(1, Op.REDUCE_NORM, None, (6.7, 6.8)),
            _interval(0, Op.OPTIMIZER_STEP, None, (6.8, 7.3)),
            _interval(1, Op.OPTIMIZER_STEP, None, (6.8, 7.0)),
        ),
        memory=(
            MemoryPoint(rank=0, seconds=0.0, bytes=GIB),
            MemoryPoint(rank=0, seconds=0.002, bytes=3 * GIB),
        ),
    )


def measured() -> Timeline:
    """The same step, a tenth slower throughout."""
    return replace(
        timeline(),
        source="measured",
        step_seconds=0.00803,
        intervals=tuple(
            replace(i, start_seconds=1.1 * i.start_seconds, end_seconds=1.1 * i.end_seconds)
            for i in timeline().intervals
        ),
        memory=(),
    )
