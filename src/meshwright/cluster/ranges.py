"""Defines the ranges in which the figures of hardware lie, and reports those that no hardware
has."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from meshwright import units
from meshwright.cluster.spec import DeviceType
from meshwright.errors import Problem
from meshwright.records import record


@record
class AllowedRange:
    """Gives the least and the greatest value of a figure, and the function that formats it."""

    least: float
    most: float
    show: Callable[[float], str]


def _watts(value: float) -> str:
    return f"{value:g} W"


def _intensity(value: float) -> str:
    return f"{value:,.3g} FLOP for each byte of memory traffic"


# From a modem to ten times the fastest hardware announced: a value outside is a wrong unit.
BANDWIDTH = AllowedRange(least=1e3, most=1e14, show=units.format_bandwidth)
LATENCY = AllowedRange(least=0.0, most=10.0, show=units.format_seconds)
MEMORY = AllowedRange(least=2**20, most=2**44, show=units.format_bytes)
MEMORY_BANDWIDTH = AllowedRange(least=1e6, most=1e15, show=units.format_throughput)
PEAK = AllowedRange(least=1e6, most=1e17, show=units.format_flops)
WATTS = AllowedRange(least=5.0, most=5000.0, show=_watts)
INTENSITY = AllowedRange(least=0.05, most=20_000.0, show=_intensity)
"""Peak over memory bandwidth: 1 to 600 in all devices of the catalogue; GFLOP/s in place of TFLOP/s
or Gbit/s in place of GB/s leaves the range, or comes near its end."""


def out_of_range(field: str, value: float, allowed: AllowedRange, source: str) -> Iterator[Problem]:
    """Yields a Problem if `value` lies outside the allowed range."""
    if not allowed.least <= value <= allowed.most:
        wanted = f"{allowed.show(allowed.least)} to {allowed.show(allowed.most)}"
        yield Problem(source, field, allowed.show(value), wanted, each=("figure", ""))


def device_problems(where: str, kind: DeviceType, source: str) -> Iterator[Problem]:
    """Yields one Problem for each figure of a device type that no device has, and for a peak that
    cannot belong to its memory bandwidth."""
    figures = [
        ("memory", kind.memory, MEMORY),
        ("memory_bandwidth", kind.memory_bandwidth, MEMORY_BANDWIDTH),
        *((f"peak.{precision}", peak, PEAK) for precision, peak in kind.peak.items()),
    ]
    found = [
        problem
        for field, value, allowed in figures
        for problem in out_of_range(f"{where}.{field}", value, allowed, source)
    ]
    yield from found or intensity_problems(where, kind, source)


def intensity_problems(where: str, kind: DeviceType, source: str) -> Iterator[Problem]:
    """Yields a Problem if the greatest peak of a type and its memory bandwidth cannot be those of
    one device."""
    if not kind.peak:
        return
    precision, peak = max(kind.peak.items(), key=lambda each: each[1])
    intensity = peak / kind.memory_bandwidth
    if not INTENSITY.least <= intensity <= INTENSITY.most:
        bandwidth = units.format_throughput(kind.memory_bandwidth)
        found = f"{units.format_flops(peak)} at {bandwidth}: {_intensity(intensity)}"
        wanted = f"{INTENSITY.least:g} to {INTENSITY.most:,.0f} FLOP for each byte"
        mend = f"Check the units of peak.{precision} and of memory_bandwidth."
        yield Problem(source, f"{where}.peak.{precision}", found, wanted, mend)
