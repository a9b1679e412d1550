"""Measured times, as files that the planner reads: layers on devices, and links."""

from __future__ import annotations

from dataclasses import field

from meshwright.cluster.spec import Link, Precision
from meshwright.records import Seconds, record


@record
class LayerTime:
    """Median time of one kind of layer on one kind of device."""

    device: str
    """Device type."""
    signature: str
    """Layer.signature."""
    precision: Precision
    tensor: int
    """Tensor width; the time contains no communication."""
    rows: int
    """Rows of the micro-batch."""
    forward_seconds: Seconds
    backward_seconds: Seconds
    spread: float = 0.0
    """Interquartile range of the repeats over their median."""


@record
class OptimizerTime:
    """Time of one optimizer step (clipping included) per parameter that a rank holds."""

    device: str
    optimizer: str
    seconds_per_parameter: Seconds
    overhead_seconds: Seconds = 0.0


@record
class LinkTimes:
    """Measured links of a cluster by their level; they replace the figures of the cluster file."""

    inside: Link | None = None
    network: Link | None = None
    site: Link | None = None
    all_reduce_latency: Seconds | None = None
    """Fixed cost of one step of a ring, measured on collectives."""


@record
class Profile:
    """Everything measured for one model on one cluster."""

    format: int = 1
    model: str
    """LayerGraph.name."""
    sequence: int
    versions: dict[str, str] = field(default_factory=dict)
    """torch, Python and driver, as measured with."""
    layers: tuple[LayerTime, ...] = ()
    optimizers: tuple[OptimizerTime, ...] = ()
    links: LinkTimes | None = None
    step_overhead_seconds: Seconds = 0.0
    """Fixed cost of a step outside all instructions: the next batch, bookkeeping."""
