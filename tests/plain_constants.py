"""Constants of a host and a framework that take next to no time: for tests that check a formula by
hand, whatever the defaults are."""

from __future__ import annotations

from typing import Any

from meshwright.cost.constants import Calibration, DeviceConstants, SystemConstants
from meshwright.cost.profile import Profile

PLAIN_DEVICE = DeviceConstants(launch_forward=50e-6, launch_backward=100e-6, layer_overhead=0.0)
"""A layer takes the time of its work, but at least that of its launches."""
PLAIN_SYSTEM = SystemConstants(instruction=0.0, boundary=0.0)
"""An instruction takes the time of its layers, a transfer that of its bytes and latencies."""


def plain(**facts: Any) -> Profile:
    """Measurements, if any are given, beside plain constants."""
    known = {"model": "any", "sequence": 1, "calibration": PLAIN}
    return Profile(**{**known, **facts})


PLAIN = Calibration(others=PLAIN_DEVICE, system=PLAIN_SYSTEM)
PLAINLY = plain()
"""Nothing is measured, and the constants are plain."""
