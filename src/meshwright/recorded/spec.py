"""Describes one training run of any tool: what was trained, where, how it was laid out, and what
was measured of it."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from meshwright.cluster.spec import Precision
from meshwright.model.config import (
    NAMED,
    Heads,
    Hidden,
    LanguageModel,
    Layers,
    Vocabulary,
    Width,
)
from meshwright.records import (
    Bytes,
    BytesPerSecond,
    Line,
    Name,
    PositiveSeconds,
    Rows,
    Tokens,
    record,
)
from meshwright.units import parse_quantity

Devices = Annotated[int, Field(ge=1, le=2**17)]
"""Number of devices; limits what a mistaken digit can cost."""
Ways = Annotated[int, Field(ge=1, le=2**17)]
"""Number of ways in which a layout divides something."""

SHARDED = ("gradients", "full", "hybrid")
"""Shardings that gather weights, or scatter gradients, layer by layer."""


@record
class RecordedRun:
    """Describes one run. The fields are the columns of a runs file, in any order; an empty cell
    stands for the default."""

    run: Name
    """A name of the run, of which a file has one each."""
    framework: Name
    """The tool that ran it, such as `megatron`, `deepspeed` or `fsdp`."""
    model: Name
    """A named model, or any name if the next seven columns give its shape."""
    family: Literal["gpt2", "llama"] | None = None
    layers: Layers | None = None
    """Number of blocks."""
    width: Width | None = None
    """Width of the residual stream."""
    heads: Heads | None = None
    kv_heads: Heads | None = None
    """Default: as many as `heads`."""
    hidden: Hidden | None = None
    """Inner width of the feed-forward module; default: 4 times the width."""
    vocabulary: Vocabulary | None = None
    """Words, padding included."""
    tied: bool | None = None
    """`yes` if the output projection is the input embedding; default: no."""
    sequence: Tokens
    """Tokens of a row."""
    precision: Precision
    optimizer: Literal["adamw", "sgd"] = "adamw"
    device: Name
    """A device type of the catalogue, or of the cluster file."""
    devices: Devices
    """The world size: data x tensor x stages."""
    devices_per_node: Devices
    network: BytesPerSecond | None = None
    """Bandwidth of a node's adapters together, in one direction: `400 Gbit/s`."""
    data: Ways
    """Number of replicas."""
    tensor: Ways = 1
    """Devices that share each layer."""
    stages: Ways = 1
    """Devices of a pipeline, one behind the other."""
    chunks: Ways = 1
    """Virtual stages on each device of a pipeline."""
    cut: Literal["blocks", "all"] = "blocks"
    """What the stages have equally many of: blocks, or blocks, embedding and output together."""
    schedule: Literal["1f1b", "interleaved-1f1b", "gpipe", "zb-h1"] | None = None
    """Default: 1f1b, or interleaved-1f1b with several chunks."""
    sharding: Literal["none", "optimizer", "gradients", "full", "hybrid"] = "none"
    """What the replicas divide: nothing, optimizer states (ZeRO-1), also gradients (ZeRO-2), also
    weights (ZeRO-3, FSDP), or all of these within a node, of which each has a copy (HSDP)."""
    rows: Rows
    """Rows of a micro-batch on one replica."""
    global_batch: Rows
    """Rows of a step on all replicas together."""
    recompute: Literal["none", "selective", "full"] = "none"
    """Blocks that repeat their forward: none; the scores of attention alone; all."""
    attention: Literal["fused", "unfused"] = "fused"
    compiled: bool = False
    """`yes` if kernels were fused by a compiler."""
    step: PositiveSeconds | None = None
    """Measured time of a step: `1.25 s`."""
    throughput: Line | None = None
    """Measured instead: `3050 tokens/s/device`, or `tokens/s`, `rows/s`, `rows/s/device`,
    `TFLOP/s/device`."""
    flops: Literal["model", "hardware"] | None = None
    """What TFLOP/s count: the model's products, or also those repeated by full recomputation."""
    memory: Bytes | None = None
    """Measured peak of the fullest device: `41.2 GiB`."""
    memory_kind: Literal["allocated", "reserved", "device"] = "device"
    """What the memory counts: tensors, the allocator's blocks, or the whole process."""
    source: Line = ""
    """The address or title where the run was found."""
    assumptions: Line = ""
    """What the source leaves open."""


SHAPE = ("family", "layers", "width", "heads", "vocabulary")
"""Columns that describe a model which is not known by name."""


def shape_of(run: RecordedRun) -> LanguageModel:
    """Returns the sizes of the run's model; of one that is not known by name, the columns of SHAPE
    must be given."""
    if run.layers is None and run.model in NAMED:
        return NAMED[run.model]
    width, heads = run.width or 1, run.heads or 1
    return LanguageModel(
        name=run.model,
        family=run.family or "",
        vocabulary=run.vocabulary or 1,
        positions=run.sequence,
        width=width,
        layers=run.layers or 1,
        heads=heads,
        kv_heads=run.kv_heads or heads,
        head=max(1, width // heads),
        hidden=run.hidden or 4 * width,
        tied=bool(run.tied),
    )


def micro_batches_of(run: RecordedRun) -> int:
    """Returns the number of micro-batches of a step on one replica."""
    return run.global_batch // (run.data * run.rows)


def forward_flops(shape: LanguageModel, sequence: int) -> tuple[float, float]:
    """Returns the floating-point operations of all blocks and of the output projection for one
    token: two for each weight of a product, and 4 S h for the scores and their use, all S of them
    (Narayanan et al. 2021, section 5.1)."""
    attention = 2 * shape.width * shape.head * (shape.heads + shape.kv_heads)
    feed_forward = (2 if shape.family == "gpt2" else 3) * shape.width * shape.hidden
    scores = 4 * sequence * shape.heads * shape.head
    blocks = shape.layers * (2 * (attention + feed_forward) + scores)
    return float(blocks), float(2 * shape.vocabulary * shape.width)


def step_flops(run: RecordedRun, *, repeated: bool = False) -> float:
    """Returns the floating-point operations of a step: three times those of the forward, and with
    `repeated` four times those of the blocks."""
    blocks, output = forward_flops(shape_of(run), run.sequence)
    tokens = run.global_batch * run.sequence
    return tokens * ((4 if repeated else 3) * blocks + 3 * output)


RATES = ("tokens/s", "tokens/s/device", "rows/s", "rows/s/device", "TFLOP/s/device")
"""Units of a throughput."""


def seconds_at(run: RecordedRun, throughput: str) -> float:
    """Converts a throughput to the seconds of a step. Raises ValueError for another unit than those
    of RATES, or for zero."""
    number, unit = parse_quantity(throughput, "3050 tokens/s/device")
    if unit not in RATES:
        raise ValueError(f"one of {', '.join(RATES)}, not {unit!r}")
    if number <= 0:
        raise ValueError("more than 0")
    work = {
        "tokens/s": float(run.global_batch * run.sequence),
        "rows/s": float(run.global_batch),
        "TFLOP/s": step_flops(run, repeated=run.flops == "hardware") / 1e12,
    }[unit.removesuffix("/device")]
    return work / number / (run.devices if unit.endswith("/device") else 1)


def step_seconds_of(run: RecordedRun) -> float | None:
    """Returns the measured seconds of a step, from its time or its throughput; None if neither was
    measured."""
    if run.step is not None or run.throughput is None:
        return run.step
    return seconds_at(run, run.throughput)
