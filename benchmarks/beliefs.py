"""What the accuracy benchmarks believe before they see a measurement, what they fit, and where the
fitted constants are kept (`calibrations/`, written by their --save)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from meshwright.cluster.spec import DeviceType
from meshwright.cost.constants import (
    Calibration,
    implausible,
)
from meshwright.cost.fit_constants import FitParameter
from meshwright.cost.runtimes import RUNTIMES
from meshwright.errors import ProfileError
from meshwright.records import dumps, load

FOLDER = Path(__file__).parent / "calibrations"


def shipped(name: str) -> Calibration:
    """Fitted constants, as `save` wrote them; ProfileError if one is implausible."""
    path = FOLDER / f"{name}.json"
    found = load(path, Calibration, error=ProfileError)
    ProfileError.check(implausible(found, str(path)))
    return found


def save(name: str, calibration: Calibration) -> None:
    """Keep fitted constants."""
    path = FOLDER / f"{name}.json"
    path.write_text(dumps(calibration), encoding="utf-8")
    print(f"wrote {path.name}")


A100 = ("A100-80",)
_LINKS = {"inside_efficiency": 0.75, "network_efficiency": 0.75, "ring_step": 1e-5}
MEGATRON_PRIOR = Calibration(
    source="stated in advance: Megatron's habits, unfused attention",
    devices={"A100-80": replace(RUNTIMES["megatron"].device, attention_efficiency=0.25)},
    system=replace(RUNTIMES["megatron"].system, **_LINKS),
)
MEGATRON_KNOBS = (
    FitParameter(name="matmul_efficiency", types=A100, start=0.8),
    FitParameter(name="attention_efficiency", types=A100, start=0.25, low=0.05, high=0.5),
    FitParameter(name="memory_efficiency", types=A100, start=0.8),
    FitParameter(name="head_efficiency", types=A100, start=0.8),
    FitParameter(name="launch_forward", types=A100, start=1e-3),
    FitParameter(name="launch_backward", types=A100, start=2e-3),
    FitParameter(name="layer_overhead", types=A100, start=3e-4),
    FitParameter(name="optimizer_traffic", types=A100, start=0.7),
    FitParameter(name="inside_efficiency", start=0.75),
    FitParameter(name="ring_step", start=1e-5),
    FitParameter(name="instruction", start=3e-4),
    FitParameter(name="boundary", start=5e-5),
    FitParameter(name="step", start=1e-3),
)

_AMP_HOST = replace(RUNTIMES["deepspeed"].device, launch_forward=5e-3, launch_backward=5e-3)
AMP_PRIOR = Calibration(
    source="stated in advance: DeepSpeed's habits, published GEMMs, slow hosts, TCP; gradients as "
    "32-bit words",
    devices={
        "T4": replace(_AMP_HOST, matmul_efficiency=0.33),
        "V100-16": replace(_AMP_HOST, matmul_efficiency=0.71),
    },
    system=replace(
        RUNTIMES["deepspeed"].system, **_LINKS | {"ring_step": 2e-5}, gradient_width=1.0
    ),
)
_BOTH = tuple(AMP_PRIOR.devices)
AMP_KNOBS = (
    FitParameter(name="memory_efficiency", types=_BOTH, start=0.8),
    FitParameter(name="launch_forward", types=_BOTH, start=5e-3),
    FitParameter(name="launch_backward", types=_BOTH, start=5e-3),
    FitParameter(name="inside_efficiency", start=0.75),
    FitParameter(name="network_efficiency", start=0.75),
    FitParameter(name="instruction", start=1e-3),
)
"""All of the framework, none of a GPU type: how many more bytes its kernels move than we count, how
long the host takes over a layer and over an instruction, what its collectives reach. What differs
between types is their datasheet, their published GEMM and the measured layer times."""

FSDP_PRIOR = Calibration(
    source="stated in advance: the catalogue's efficiencies, 16-bit gradients on the links",
    system=replace(RUNTIMES["fsdp"].system, **_LINKS),
)


MOST_OVERHEAD = 4e-4
"""Ramp and tail of 80 kernels, 5 us each: without this end, a fit to one GPU type alone gives the
layers' fixed cost what belongs to its memory, and does not carry over to another type."""


def fsdp_knobs(types: Mapping[str, DeviceType]) -> tuple[FitParameter, ...]:
    """Three efficiencies for each type; overheads and links for all of them together."""
    own = [
        FitParameter(name=name, types=(kind,), start=getattr(types[kind], name))
        for kind in sorted(types)
        for name in ("matmul_efficiency", "attention_efficiency", "memory_efficiency")
    ]
    every = tuple(sorted(types))
    return (
        *own,
        FitParameter(name="layer_overhead", types=every, start=1e-4, high=MOST_OVERHEAD),
        FitParameter(name="optimizer_traffic", types=every, start=1.0),
        FitParameter(name="inside_efficiency", start=0.75),
        FitParameter(name="network_efficiency", start=0.75),
        FitParameter(name="shard_exposure", start=0.3),
        FitParameter(name="step", start=5e-3),
    )
