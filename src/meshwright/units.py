"""Parses and formats quantities with units: text in files, SI base units inside.

This is the only place that knows 8, 1000 and 1024. Inside the program a size is in bytes, a time in
seconds, a bandwidth in bytes per second, a speed in floating-point operations per second. Networks
are sold in decimal bits ("25 Gbit/s"), memory in binary bytes ("80 GiB"); both spellings are read,
neither is guessed.
"""

from __future__ import annotations

import math
import re

_DECIMAL = {"": 1.0, "k": 1e3, "K": 1e3, "M": 1e6, "G": 1e9, "T": 1e12, "P": 1e15}
_BINARY = {f"{prefix}i": 1024.0**power for power, prefix in enumerate("KMGTP", start=1)}
_PREFIX = _DECIMAL | _BINARY
_PER_SECOND = {"s": 1, "ms": 1_000, "us": 1_000_000, "µs": 1_000_000, "ns": 1_000_000_000}
_SECONDS_IN = {"min": 60, "h": 3600}
# Written so that a text of any length is matched in linear time.
_NUMBER = r"(?:[0-9]+(?:\.[0-9]+)?|\.[0-9]+)(?:[eE][-+]?[0-9]+)?"
_QUANTITY = re.compile(rf"\s*({_NUMBER})\s*(?:([A-Za-zµ/]+)\s*)?")
_PREFIXES = "|".join(sorted(_PREFIX, key=len, reverse=True))
_BYTES = re.compile(f"({_PREFIXES})(B|bit|b)")
_RATE = re.compile(f"({_PREFIXES})(B|bit|b)(?:/s|ps)")
_FLOPS = re.compile(f"({_PREFIXES})(?:FLOP/s|FLOPS|flops|FLOP)")


def parse_quantity(text: str, example: str) -> tuple[float, str]:
    """Parses a number and its unit: `"25 Gbit/s"` to 25.0 and "Gbit/s". Raises ValueError, with a
    quantity as it should be, `example`."""
    match = _QUANTITY.fullmatch(text)
    if match is None:
        raise ValueError(f"a quantity like {example!r}, not {text!r}")
    return float(match[1]), match[2] or ""


def _finite(value: float, text: str) -> float:
    if not math.isfinite(value):
        raise ValueError(f"a finite quantity, not {text!r}")
    return value


def _scaled(text: str, pattern: re.Pattern[str], example: str) -> float:
    number, unit = parse_quantity(text, example)
    match = pattern.fullmatch(unit)
    if match is None:
        raise ValueError(f"a quantity like {example!r}: {unit!r} in {text!r} is no such unit")
    bits = pattern is not _FLOPS and match[2] != "B"
    return _finite(number * _PREFIX[match[1]] / (8 if bits else 1), text)


def parse_bytes(text: str) -> int:
    """Parses `"80 GiB"`, `"16 GB"` or `"512 KiB"` to bytes. Raises ValueError."""
    return round(_scaled(text, _BYTES, "80 GiB"))


def parse_bandwidth(text: str) -> float:
    """Parses `"25 Gbit/s"`, `"900 GB/s"` or `"200 Gbps"` to bytes per second. Raises ValueError."""
    return _scaled(text, _RATE, "25 Gbit/s")


def parse_flops(text: str) -> float:
    """Parses `"312 TFLOP/s"` to floating-point operations per second. Raises ValueError."""
    return _scaled(text, _FLOPS, "312 TFLOP/s")


def parse_seconds(text: str) -> float:
    """Parses `"50 us"`, `"2 ms"` or `"1.5 s"` to seconds. Raises ValueError."""
    number, unit = parse_quantity(text, "50 us")
    if unit in _PER_SECOND:  # dividing keeps "10 us" the float 1e-05
        return _finite(number / _PER_SECOND[unit], text)
    if unit in _SECONDS_IN:
        return _finite(number * _SECONDS_IN[unit], text)
    raise ValueError(f"a quantity like '50 us': {unit!r} in {text!r} is no such unit")


def format_bytes(size: float) -> str:
    """Formats bytes in binary units: `"1.5 GiB"`."""
    for power, prefix in ((5, "Pi"), (4, "Ti"), (3, "Gi"), (2, "Mi"), (1, "Ki")):
        if abs(size) >= 1024**power:
            return f"{size / 1024**power:.4g} {prefix}B"
    return f"{size:.4g} B"


def _decimal(value: float, unit: str) -> str:
    for scale, prefix in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= scale:
            return f"{value / scale:.4g} {prefix}{unit}"
    return f"{value:.4g} {unit}"


def format_bandwidth(bytes_per_second: float) -> str:
    """Formats a bandwidth in decimal bits: `"25 Gbit/s"`."""
    return _decimal(bytes_per_second * 8, "bit/s")


def format_throughput(bytes_per_second: float) -> str:
    """Formats the speed of memory or storage in decimal bytes: `"900 GB/s"`."""
    return _decimal(bytes_per_second, "B/s")


def format_flops(flops_per_second: float) -> str:
    """Formats a speed of computing: `"312 TFLOP/s"`."""
    return _decimal(flops_per_second, "FLOP/s")


def format_seconds(seconds: float) -> str:
    """Formats a time: `"1.25 s"`, `"350 ms"`, `"12 us"`."""
    for scale, unit in ((1.0, "s"), (1e-3, "ms"), (1e-6, "us")):
        if abs(seconds) >= scale:
            return f"{seconds / scale:.4g} {unit}"
    return "0 s" if seconds == 0 else f"{seconds / 1e-9:.4g} ns"
