"""Estimates the datasheet of a GPU that the catalogue does not hold, from what its driver tells."""

from __future__ import annotations

import math
import re

from meshwright.cluster.efficiency import ARCHITECTURES, with_reached_shares
from meshwright.cluster.spec import DeviceType, Precision
from meshwright.records import Bytes, BytesPerSecond, Count, Name, record

GIGAHERTZ = 1e9


@record
class DriverFigures:
    """Holds what a driver tells of a GPU's speed; None for what it does not."""

    multiprocessors: Count | None = None
    """Number of streaming multiprocessors, or of AMD's compute units."""
    clock: float | None = None
    """Highest clock of the multiprocessors in Hz."""
    memory_rate: BytesPerSecond | None = None
    """Memory clock times two times the width of the bus."""
    chip: Name | None = None
    """AMD's name of the generation: `gfx942`."""


@record
class Generation:
    """Gives what one multiprocessor of a generation computes in a clock."""

    architecture: Name
    """Name in ARCHITECTURES."""
    vector: float
    """FLOP of fp32 a clock."""
    products: float
    """FLOP of 16-bit products a clock, accumulated in fp32."""
    gigahertz: float
    """Usual boost clock. Drivers tell the highest one that a card may be set to, which is up to a
    quarter more."""
    bf16: float = 1.0
    """Products in bf16 over those in fp16; 0 for a generation without."""


_NVIDIA = (
    ((12, 0), Generation(architecture="blackwell-rtx", vector=256, products=1024, gigahertz=2.45)),
    ((10, 0), Generation(architecture="blackwell", vector=256, products=8192, gigahertz=1.9)),
    ((9, 0), Generation(architecture="hopper", vector=256, products=4096, gigahertz=1.83)),
    ((8, 9), Generation(architecture="ada", vector=256, products=1024, gigahertz=2.5)),
    ((8, 6), Generation(architecture="ampere-rtx", vector=256, products=1024, gigahertz=1.75)),
    ((8, 0), Generation(architecture="ampere", vector=128, products=2048, gigahertz=1.41)),
    (
        (7, 5),
        Generation(architecture="turing", vector=128, products=1024, gigahertz=1.7, bf16=0.0),
    ),
    (
        (7, 0),
        Generation(architecture="volta", vector=128, products=1024, gigahertz=1.53, bf16=0.0),
    ),
    (
        (6, 1),
        Generation(architecture="pascal", vector=256, products=256, gigahertz=1.6, bf16=0.0),
    ),
    (
        (6, 0),
        Generation(architecture="pascal", vector=128, products=256, gigahertz=1.4, bf16=0.0),
    ),
)
"""Lists them by least compute capability, from NVIDIA's tuning guides and whitepapers."""

_AMD = (
    ("gfx12", Generation(architecture="rdna4", vector=256, products=1024, gigahertz=2.9)),
    ("gfx11", Generation(architecture="rdna3", vector=256, products=512, gigahertz=2.5)),
    (
        "gfx10",
        Generation(architecture="rdna2", vector=128, products=256, gigahertz=2.2, bf16=0.0),
    ),
    ("gfx95", Generation(architecture="cdna4", vector=256, products=4096, gigahertz=2.4)),
    ("gfx94", Generation(architecture="cdna3", vector=256, products=2048, gigahertz=2.1)),
    ("gfx90a", Generation(architecture="cdna2", vector=128, products=1024, gigahertz=1.7)),
    ("gfx908", Generation(architecture="cdna", vector=128, products=1024, gigahertz=1.5, bf16=0.5)),
    (
        "gfx90",
        Generation(architecture="gcn", vector=128, products=256, gigahertz=1.6, bf16=0.0),
    ),
)
"""Lists them by the beginning of the chip's name, from AMD's architecture whitepapers."""

_HALF_RATE = re.compile(r"GeForce")
"""Cards that add up 16-bit products in fp32 at half the rate of the same chip elsewhere, from
Turing on (the Turing, GA102 and Ada whitepapers)."""
_WITHOUT_MATRIX_UNITS = re.compile(r"GTX 16\d\d")


def generation_of(
    name: str, capability: tuple[int, int] | None, chip: str | None
) -> Generation | None:
    """Returns what the multiprocessors of a GPU compute, by its vendor's own numbering; None if
    neither vendor's is known."""
    if chip is not None:
        return next((each for start, each in _AMD if chip.startswith(start)), None)
    if capability is None:
        return None
    found = next((each for least, each in _NVIDIA if least <= capability), None)
    if found is None or found.products == found.vector or not _HALF_RATE.search(name):
        return found
    if _WITHOUT_MATRIX_UNITS.search(name):
        return Generation(
            architecture="turing-gtx", vector=128, products=256, gigahertz=1.75, bf16=0.0
        )
    if found.architecture in ("ampere", "volta", "hopper", "blackwell"):
        return found
    return Generation(
        architecture=found.architecture,
        vector=found.vector,
        products=found.products / 2,
        gigahertz=found.gigahertz,
        bf16=found.bf16,
    )


def untold(
    name: str, capability: tuple[int, int] | None, figures: DriverFigures
) -> tuple[str, ...]:
    """Lists what an estimate of a GPU lacks; empty if there is enough."""
    missing = []
    if generation_of(name, capability, figures.chip) is None:
        missing.append("generation")
    if not figures.multiprocessors:
        missing.append("number of multiprocessors")
    if not figures.memory_rate:
        missing.append("memory clock and width of the bus")
    return tuple(missing)


def estimated_type(
    name: str,
    driver_name: str,
    memory: Bytes,
    capability: tuple[int, int] | None,
    figures: DriverFigures,
    watts: float | None,
) -> tuple[DeviceType, str]:
    """Returns a device type with the peaks and the memory bandwidth that a driver's figures give,
    and a sentence on how.

    Peaks are multiprocessors x clock x FLOP a clock of the generation. Without `watts` the power is
    taken not to limit it. There must be nothing `untold`.
    """
    chip = generation_of(driver_name, capability, figures.chip)
    if chip is None or not figures.multiprocessors or not figures.memory_rate:
        raise ValueError(f"not enough is told of {driver_name}")
    usual = chip.gigahertz * GIGAHERTZ
    clock = min(figures.clock or usual, 1.1 * usual)
    rate = figures.multiprocessors * clock
    peak: dict[Precision, float] = {"fp32": rate * chip.vector, "fp16": rate * chip.products}
    if chip.bf16:
        peak["bf16"] = chip.bf16 * peak["fp16"]
    if capability is not None and capability >= (8, 0):
        peak["tf32"] = peak["fp16"] / 2
    how = (
        f"ESTIMATED from {figures.multiprocessors} multiprocessors at {clock / GIGAHERTZ:.2f} GHz "
        f"of the generation {chip.architecture}, and {figures.memory_rate / 1e9:.0f} GB/s of memory"
    )
    kind = DeviceType(
        name=name, memory=memory, memory_bandwidth=figures.memory_rate, peak=peak, source=how
    )
    power = watts if watts else math.inf
    return with_reached_shares(kind, ARCHITECTURES[chip.architecture], power, {}), how
