"""Constants fitted to published measurements, and what was believed before."""
from __future__ import annotations
from meshwright.cost.calibrate import Knob
from meshwright.cost.constants import Calibration, DeviceConstants, SystemConstants

PRIOR_A100 = Calibration(
    devices={"A100-80": DeviceConstants(attention_efficiency=.25, launch_forward=1e-3, launch_backward=1e-3, weight_traffic=.3, optimizer_traffic=.7)},
    system=SystemConstants(inside_efficiency=.75, network_efficiency=.75, ring_step=10e-6, boundary=20e-6, gradient_width=.5, reduction_delay=1.0),
)
A=("A100-80",)
MEGATRON_KNOBS = (
    Knob(name="matmul_efficiency", types=A, start=.8),
    Knob(name="attention_efficiency", types=A, start=.25),
    Knob(name="memory_efficiency", types=A, start=.8),
    Knob(name="head_efficiency", types=A, start=.8),
    Knob(name="launch_forward", types=A, start=1e-3),
    Knob(name="launch_backward", types=A, start=1e-3),
    Knob(name="layer_overhead", types=A, start=1e-4),
    Knob(name="optimizer_traffic", types=A, start=.7),
    Knob(name="inside_efficiency", start=.75),
    Knob(name="ring_step", start=1e-5),
    Knob(name="boundary", start=2e-5),
    Knob(name="step", start=1e-3),
)
AMP_PRIOR = Calibration(
    devices={
        "T4": DeviceConstants(launch_forward=3e-3, launch_backward=3e-3, weight_traffic=0.3, optimizer_traffic=0.7),
        "V100-16": DeviceConstants(launch_forward=3e-3, launch_backward=3e-3, weight_traffic=0.3, optimizer_traffic=0.7),
    },
    system=SystemConstants(inside_efficiency=.75, network_efficiency=.75, ring_step=2e-5, boundary=2e-4, gradient_width=1.0, reduction_delay=1.0),
)
T4,V=("T4",),("V100-16",)
BOTH = (*T4, *V)
AMP_KNOBS = (
    Knob(name="matmul_efficiency", types=T4, start=0.33),
    Knob(name="memory_efficiency", types=T4, start=0.8),
    Knob(name="matmul_efficiency", types=V, start=0.6),
    Knob(name="memory_efficiency", types=V, start=0.8),
    Knob(name="launch_forward", types=BOTH, start=3e-3),
    Knob(name="launch_backward", types=T4, start=3e-3),
    Knob(name="launch_backward", types=V, start=3e-3),
    Knob(name="inside_efficiency", start=0.75),
    Knob(name="network_efficiency", start=0.75),
    Knob(name="boundary", start=2e-4),
)
def shipped(x): raise NotImplementedError
