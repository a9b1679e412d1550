"""Defines the physical constants of the cost model, with units, plausible ranges and sources.

Datasheets state what the hardware could reach; these constants state what it does reach, and what a
framework adds. `calibrate` fits them to measured steps; a constant that was not fitted keeps its
default.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import field, fields, replace

from meshwright.cluster.spec import DeviceType
from meshwright.errors import Problem
from meshwright.records import Count, Format, Line, Name, PositiveShare, Ratio, Seconds, record


@record
class DeviceConstants:
    """Holds the constants of one device type and of the host that drives it; see CONSTANTS."""

    matmul_efficiency: PositiveShare | None = None
    attention_efficiency: PositiveShare | None = None
    memory_efficiency: PositiveShare | None = None
    """None in any of these three stands for the device type's own figure."""
    head_efficiency: PositiveShare = 1.0
    launch_forward: Seconds = 2e-4
    launch_backward: Seconds = 4e-4
    layer_overhead: Seconds = 1e-4
    activation_traffic: Ratio = 1.0
    weight_traffic: Ratio = 1.0
    optimizer_traffic: Ratio = 1.0


@record
class SystemConstants:
    """Holds the constants of the links and of the framework's work between computations; see
    CONSTANTS."""

    inside_efficiency: PositiveShare | None = None
    network_efficiency: PositiveShare | None = None
    """None in these two stands for what each kind of link reaches."""
    ring_step: Seconds = 0.0
    instruction: Seconds = 1e-4
    boundary: Seconds = 3e-5
    send_exposure: Ratio = 0.0
    gradient_width: Ratio = 1.0
    reduction_delay: Ratio = 0.0
    shard_exposure: Ratio = 0.3
    step: Seconds = 0.0


@record
class Constant:
    """Describes one constant: unit, plausible range, meaning and source."""

    unit: str
    low: float
    high: float
    meaning: str
    source: str


CONSTANTS = {
    "matmul_efficiency": Constant(
        unit="share of peak",
        low=0.1,
        high=0.9,
        meaning="share of the peak that matrix products reach",
        source="published GEMMs: T4 a third (70 W), V100 .71, A100 .79 to .88, H100 .67",
    ),
    "attention_efficiency": Constant(
        unit="share of peak",
        low=0.03,
        high=0.9,
        meaning="share of the peak that the two products of attention reach",
        source="unfused .1 to .28 of an A100, FlashAttention-2 .57 to .65 (A100), .33 (H100)",
    ),
    "memory_efficiency": Constant(
        unit="share of bandwidth",
        low=0.3,
        high=1.0,
        meaning="share of the memory bandwidth that elementwise operations reach",
        source="stream kernels .75 to .92; fused operations move fewer bytes than are counted",
    ),
    "head_efficiency": Constant(
        unit="share of matmul efficiency",
        low=0.2,
        high=1.0,
        meaning="efficiency of the output projection over that of other products",
        source="1 for well padded vocabularies; a quarter to a half is common for others",
    ),
    "launch_forward": Constant(
        unit="s per layer",
        low=20e-6,
        high=6e-3,
        meaning="least time of a layer's forward: the host launches its kernels",
        source="5 to 20 us an operation; a block under autocast has 20, one with hooks up to 150",
    ),
    "launch_backward": Constant(
        unit="s per layer",
        low=20e-6,
        high=6e-3,
        meaning="least time of a layer's backward: the host launches its kernels",
        source="about twice the operations of the forward: 46 in that block",
    ),
    "layer_overhead": Constant(
        unit="s per layer",
        low=1e-7,
        high=1e-3,
        meaning="fixed time of a layer's forward, whatever the rows; a backward takes twice it",
        source="5 us for the ramp and the tail of each of 20 (a block) to 80 kernels",
    ),
    "activation_traffic": Constant(
        unit="share",
        low=0.1,
        high=3.0,
        meaning="share of the counted activation bytes that the kernels of a layer really move",
        source="1: one kernel an operation; a third to a half where a compiler fuses them",
    ),
    "weight_traffic": Constant(
        unit="share",
        low=0.0,
        high=1.0,
        meaning="share of the counted weight and gradient bytes that a micro-batch really moves",
        source="1 with autocast over fp32 weights; about 0.3 where 16-bit weights are kept",
    ),
    "optimizer_traffic": Constant(
        unit="share",
        low=0.4,
        high=1.5,
        meaning="bytes that an optimizer step really moves, over the counted ones",
        source="44 bytes (AdamW, clipping, clearing); a fused one with 16-bit gradients about 30",
    ),
    "inside_efficiency": Constant(
        unit="share of bandwidth",
        low=0.2,
        high=1.0,
        meaning="share of the stated bandwidth that transfers inside a node reach",
        source="NCCL bus bandwidth .7 to .85 of the line rate on NVLink, about .5 over PCIe hosts",
    ),
    "network_efficiency": Constant(
        unit="share of bandwidth",
        low=0.2,
        high=1.0,
        meaning="share of the stated bandwidth that transfers between nodes reach",
        source="NCCL over InfiniBand .7 to .9; over TCP sockets .4 to .8",
    ),
    "ring_step": Constant(
        unit="s per step",
        low=1e-6,
        high=2e-4,
        meaning="fixed cost of one of the 2(n - 1) steps of a ring all-reduce",
        source="NCCL 5 to 20 us a step; more where ranks are out of step with each other",
    ),
    "instruction": Constant(
        unit="s per instruction",
        low=1e-6,
        high=1e-2,
        meaning="host time of each forward and backward of a stage, its messages included",
        source="benchmarks/overhead.py: 70 to 110 us (Meshwright); DeepSpeed's engine about a ms",
    ),
    "boundary": Constant(
        unit="s per transfer",
        low=1e-6,
        high=1e-3,
        meaning="fixed cost of a transfer between stages",
        source="20 us (NCCL) to a ms (handshakes through the host)",
    ),
    "send_exposure": Constant(
        unit="share",
        low=0.0,
        high=1.0,
        meaning="share of a message's time in which its sender computes nothing",
        source="0: asynchronous (Meshwright, DeepSpeed); 1: Megatron's schedules wait for it",
    ),
    "gradient_width": Constant(
        unit="share",
        low=0.5,
        high=1.0,
        meaning="bytes of a gradient on the links over those of its master weight",
        source="1: fp32 (Meshwright); 0.5: 16-bit (Megatron-DeepSpeed, FSDP)",
    ),
    "reduction_delay": Constant(
        unit="share",
        low=0.0,
        high=1.0,
        meaning="share of the rest of the last backward for which complete gradients wait",
        source="0: as they are complete (DDP, Meshwright); 1: after it (DeepSpeed's pipelines)",
    ),
    "shard_exposure": Constant(
        unit="share",
        low=0.0,
        high=1.0,
        meaning="exposed share of the shorter of two overlapping: compute, gathering of shards",
        source="FSDP prefetches one unit ahead; both sides slow when they overlap",
    ),
    "step": Constant(
        unit="s per step",
        low=1e-5,
        high=0.1,
        meaning="fixed cost of a step outside all instructions",
        source="data loading, loss scaling, logging",
    ),
}
"""Every constant that can be fitted, by its field name in DeviceConstants or SystemConstants."""

ADDED = frozenset({"layer_overhead", "ring_step", "instruction", "boundary", "step"})
"""Constants that add seconds: 0 leaves them out."""

DEVICE_NAMES = tuple(each.name for each in fields(DeviceConstants))
SYSTEM_NAMES = tuple(each.name for each in fields(SystemConstants))


@record
class ErrorBar:
    """Gives the spread of measured / predicted step seconds.

    Each run was predicted from constants fitted to the other runs.
    """

    low: Ratio
    """The 10th percentile."""
    high: Ratio
    """The 90th percentile."""
    runs: Count
    """The number of runs."""


@record
class Calibration:
    """Holds constants fitted to measured steps."""

    format: Format = 1
    source: Line = ""
    """A description for people of the runs that were fitted."""
    devices: dict[Name, DeviceConstants] = field(default_factory=dict)
    """The constants of every fitted device type."""
    others: DeviceConstants | None = None
    """Those of all types where none was fitted; None: the defaults."""
    system: SystemConstants = SystemConstants()
    error: ErrorBar | None = None


DEFAULT_DEVICE = DeviceConstants()
DEFAULT_SYSTEM = SystemConstants()

KIN = 2.5
"""The factor in peak and in memory bandwidth within which two device types share efficiencies."""


def device_constants(calibration: Calibration | None, device: DeviceType) -> DeviceConstants:
    """Returns the constants of a device type: fitted ones, or those of the nearest fitted type.

    The distance is measured in peak and memory bandwidth. A type beyond the factor KIN lends only
    the constants that describe host and framework. Memory efficiency is among them: it depends less
    on the chip than on how many more bytes the framework's kernels move than the model counts. The
    efficiencies of matrix products and attention are then the device type's own figures.
    """
    if calibration is None or not calibration.devices:
        return calibration.others if calibration and calibration.others else DEFAULT_DEVICE
    if device.name in calibration.devices:
        return calibration.devices[device.name]
    distance, name = min((_distance(device, name), name) for name in calibration.devices)
    nearest = calibration.devices[name]
    if distance < math.log(KIN):
        return nearest
    return replace(nearest, matmul_efficiency=None, attention_efficiency=None)


def _distance(device: DeviceType, name: str) -> float:
    """Returns the larger of |log(peak ratio)| and |log(bandwidth ratio)|; inf for an unknown
    type."""
    from meshwright.cluster.catalog import catalog

    if name not in catalog():
        return math.inf
    other = catalog()[name].type
    if other.processor != device.processor:
        return math.inf
    peaks = max(device.peak.values()) / max(other.peak.values())
    bandwidths = device.memory_bandwidth / other.memory_bandwidth
    return max(abs(math.log(peaks)), abs(math.log(bandwidths)))


def system_constants(calibration: Calibration | None) -> SystemConstants:
    """Returns the fitted constants of links and framework, or the defaults."""
    return calibration.system if calibration else DEFAULT_SYSTEM


def implausible(calibration: Calibration, source: str) -> Iterator[Problem]:
    """Yields one Problem for every constant outside its plausible range; default values and those
    that leave an added time out always pass."""
    mend = "calibrate again, or correct the file"
    held = [(f"devices.{kind}", constants) for kind, constants in calibration.devices.items()]
    held += [("others", calibration.others)] if calibration.others else []
    found = [
        (f"{where}.{name}", name, getattr(constants, name), getattr(DEFAULT_DEVICE, name))
        for where, constants in held
        for name in DEVICE_NAMES
    ]
    found += [
        (f"system.{name}", name, getattr(calibration.system, name), getattr(DEFAULT_SYSTEM, name))
        for name in SYSTEM_NAMES
    ]
    for where, name, value, default in found:
        known = CONSTANTS[name]
        usual = (None, default, 0.0) if name in ADDED else (None, default)
        if value not in usual and not known.low <= value <= known.high:
            wanted = f"{known.low:g} to {known.high:g} {known.unit}"
            yield Problem(source, where, f"{value:g}", wanted, mend)


CUDA_CONTEXT_BYTES = 512 << 20
"""A CUDA process's context and the loaded kernels of PyTorch and its libraries: about 300 to 550
MiB from V100 to H100, as nvidia-smi's figure less `torch.cuda.memory_reserved`."""

CUBLAS_WORKSPACE_BYTES = 32 << 20
"""PyTorch's cuBLAS workspace on Hopper; on older devices it is a little over 8 MiB: the default of
CUBLAS_WORKSPACE_CONFIG in PyTorch's documentation."""

NCCL_COMMUNICATOR_BYTES = 96 << 20
"""The buffers of one communicator: NCCL_BUFFSIZE (4 MiB by default) for sending and as much for
receiving, on about 12 channels."""

COMMUNICATORS = 4
"""The communicators of a rank: forward, backward, gradients, and one of the tensor ranks or of all
ranks."""

FRAGMENTATION = {"gpu": 0.04, "cpu": 0.0}
"""The share of a device's memory that is lost to fragmentation. The caching allocator keeps blocks
of sizes that are not asked for again: reserved memory exceeds allocated memory by 2 to 10 % in
PyTorch's own statistics of training loops with fixed shapes."""

FRAMEWORK_BYTES = {
    "gpu": CUDA_CONTEXT_BYTES + CUBLAS_WORKSPACE_BYTES + COMMUNICATORS * NCCL_COMMUNICATOR_BYTES,
    "cpu": 64 << 20,
}
"""The bytes that a process holds besides tensors, by processor; on a CPU they are gloo's
buffers."""
