"""Describes the systems that may run a plan by the constants of the cost model that are theirs.

The host time of a layer, whether a sender waits for its message, when sums of gradients begin and
in how many bits they travel depend on the system, not on the machines. None of these constants was
fitted; `docs/accuracy.md` says which were chosen with which runs in sight. They stand where nothing
was calibrated.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from meshwright.cost.constants import (
    DEFAULT_DEVICE,
    DEFAULT_SYSTEM,
    Calibration,
    DeviceConstants,
    ErrorBar,
    SystemConstants,
)
from meshwright.cost.profile import Profile
from meshwright.model.spec import LayerGraph
from meshwright.plan.spec import RuntimeName
from meshwright.records import Line, record


@record
class Runtime:
    """Describes one system that runs plans."""

    device: DeviceConstants
    system: SystemConstants
    source: Line
    """What says so."""
    gradient_bytes: float | None = None
    """The bytes of a gradient beside 16-bit weights, in 16-bit arithmetic; the master weights are
    then states of the optimizer (Rajbhandari et al. 2020, section 3.1). None: weights and gradients
    are fp32."""


UNMEASURED = ErrorBar(low=0.84, high=1.18, runs=1644)
"""The spread of published runs about predictions without a constant fitted to them
(`python benchmarks/without_fit.py`): the 3rd and the 97th percentile, the mean of four sets."""


_MEGATRON_HOST = DeviceConstants(
    launch_forward=1e-3,
    launch_backward=2e-3,
    layer_overhead=3e-4,
    weight_traffic=0.3,
    optimizer_traffic=0.7,
)

RUNTIMES: Mapping[RuntimeName, Runtime] = {
    "meshwright": Runtime(
        device=DEFAULT_DEVICE,
        system=DEFAULT_SYSTEM,
        source="20 and 46 operations of 8 us in a block of GPT-2 under autocast; "
        "benchmarks/overhead.py for an instruction",
    ),
    "megatron": Runtime(
        device=_MEGATRON_HOST,
        system=SystemConstants(
            gradient_width=0.5,
            instruction=3e-4,
            boundary=5e-5,
            send_exposure=1.0,
            reduction_delay=1.0,
            step=1e-3,
        ),
        source="80 operations of a layer from Python, with hooks; schedules that wait for every "
        "message; 16-bit gradients summed after the last backward",
        gradient_bytes=4.0,
    ),
    "deepspeed": Runtime(
        device=_MEGATRON_HOST,
        system=SystemConstants(
            gradient_width=0.5,
            instruction=1e-3,
            boundary=2e-4,
            reduction_delay=1.0,
            step=1e-3,
        ),
        source="as megatron, with an engine that interprets a schedule in Python and sends sizes "
        "before tensors, without waiting",
        gradient_bytes=2.0,
    ),
    "fsdp": Runtime(
        device=DEFAULT_DEVICE,
        system=SystemConstants(gradient_width=0.5, shard_exposure=0.3, step=1e-3),
        source="16-bit weights and gradients on the links, gathered one unit ahead",
    ),
}
"""The constants of every system for devices of any type."""


COMPILED_TRAFFIC = 0.6
"""The share of the counted activation bytes that compiled layers move. Counted by hand: 38 of 62
numbers a feature in a Llama block, four fifths in a GPT-2 block, a third in its loss."""
COMPILED_LAUNCHES = 0.4
"""The launches of a compiled layer over those of an eager one: 8 of 20 in a block of GPT-2."""


def compiled_constants(eager: DeviceConstants) -> DeviceConstants:
    """Returns the constants of layers whose elementwise operations a compiler has fused."""
    return replace(
        eager,
        activation_traffic=eager.activation_traffic * COMPILED_TRAFFIC,
        launch_forward=eager.launch_forward * COMPILED_LAUNCHES,
        launch_backward=eager.launch_backward * COMPILED_LAUNCHES,
    )


def as_run_by(
    runtime: RuntimeName, profile: Profile | None, model: LayerGraph, *, compiled: bool = False
) -> Profile | None:
    """Returns the measurements with the constants of a system, with its layers compiled or not,
    where none were fitted."""
    plain = runtime == "meshwright" and not compiled
    if plain or (profile and profile.calibration):
        return profile
    known = RUNTIMES[runtime]
    device = compiled_constants(known.device) if compiled else known.device
    calibration = Calibration(source=known.source, others=device, system=known.system)
    measured = profile or Profile(model=model.name, sequence=model.sequence)
    return replace(measured, calibration=calibration)
