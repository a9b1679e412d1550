"""Estimates the share of their peaks that devices reach, from the figures of their datasheets.

Matrix products are limited by the units that compute them and by the power that a card may draw.
With the joules of one FLOP, e_flop, and of one byte of memory traffic, e_byte, the power allows a
share x of the peak P:

    x = (W - e_byte B) / (e_flop P)

and where it binds a card lowers its clock, and with it the voltage, so that it reaches more than x:

    share = factor * most * min(1, x / most) ** exponent

`most` is what large products reach where power does not bind. Joules and `most` belong to a
generation of chips, and come from products that others measured and published (see ARCHITECTURES);
factors and exponents are the same for all devices (see SHARED), fitted to published times of
transformer layers by `benchmarks/layer_times.py`, which also predicts each device type from the
others alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Annotated

from pydantic import Field

from meshwright.cluster.spec import DeviceType, Precision, ReachedShares
from meshwright.records import PositiveShare, Ratio, record

_PICO = 1e-12
JOULES_PER_BYTE = {"hbm": 32 * _PICO, "gddr": 60 * _PICO}
"""Energy of memory traffic: about 4 pJ a bit for stacked memory (O'Connor et al., MICRO 2017) and
7.5 for GDDR6 (its makers' figures)."""


PER_16_BIT: Mapping[Precision, float] = {"fp16": 1.0, "bf16": 1.0, "tf32": 2.0}
"""The energy of a FLOP in the matrix units over that in 16 bits."""


@record
class ChipGeneration:
    """Describes what the matrix products of a generation of chips reach, and what they cost."""

    memory: str
    """The usual memory of its cards, by which their traffic costs energy: `hbm` or `gddr`."""
    tensor_joules: Ratio = 0.0
    """Joules of a 16-bit FLOP in the matrix units, for a card at its power limit; 0 for a
    generation that has none: its 16-bit products run on the vector units."""
    tensor_most: Annotated[float, Field(gt=0, le=1.2)] = 1.0
    """Share of the 16-bit peak that large products reach where power does not bind."""
    vector_joules: Ratio
    vector_most: PositiveShare
    shared_integers: bool = False
    """True if half of the fp32 units also compute addresses, so that products cannot use them
    all."""
    sums_in_fp32: bool = False
    """True if 16-bit products, whose sums are kept in fp32, run no faster than those in fp32,
    whatever the 16-bit peak of the datasheet."""
    attention: PositiveShare
    """Share of the efficiency of matrix products that the best attention kernels reach."""


def _pico(joules: float) -> float:
    return joules * _PICO


ARCHITECTURES = {
    "pascal": ChipGeneration(
        memory="gddr", vector_joules=_pico(12.7), vector_most=0.87, sums_in_fp32=True, attention=0.3
    ),
    "volta": ChipGeneration(
        memory="hbm",
        tensor_joules=_pico(2.4),
        tensor_most=0.72,
        vector_joules=_pico(12.7),
        vector_most=0.84,
        attention=0.3,
    ),
    "turing": ChipGeneration(
        memory="gddr",
        tensor_joules=_pico(2.2),
        tensor_most=0.95,
        vector_joules=_pico(12.7),
        vector_most=0.88,
        attention=0.4,
    ),
    "ampere": ChipGeneration(
        memory="hbm",
        tensor_joules=_pico(1.33),
        tensor_most=0.95,
        vector_joules=_pico(10),
        vector_most=0.985,
        attention=0.65,
    ),
    "ampere-rtx": ChipGeneration(
        memory="gddr",
        tensor_joules=_pico(2.07),
        vector_joules=_pico(9.5),
        vector_most=0.67,
        shared_integers=True,
        attention=0.65,
    ),
    "ada": ChipGeneration(
        memory="gddr",
        tensor_joules=_pico(1.1),
        vector_joules=_pico(6.35),
        vector_most=0.67,
        shared_integers=True,
        attention=0.65,
    ),
    "hopper": ChipGeneration(
        memory="hbm",
        tensor_joules=_pico(0.895),
        tensor_most=0.95,
        vector_joules=_pico(6.35),
        vector_most=0.775,
        attention=0.48,
    ),
    "blackwell": ChipGeneration(
        memory="hbm",
        tensor_joules=_pico(0.5),
        tensor_most=0.64,
        vector_joules=_pico(6.35),
        vector_most=0.83,
        attention=0.48,
    ),
    "blackwell-rtx": ChipGeneration(
        memory="gddr",
        tensor_joules=_pico(1.18),
        vector_joules=_pico(6.4),
        vector_most=0.66,
        attention=0.6,
    ),
    "cdna": ChipGeneration(
        memory="hbm",
        tensor_joules=_pico(1.9),
        tensor_most=0.75,
        vector_joules=_pico(10),
        vector_most=0.8,
        attention=0.4,
    ),
    "cdna2": ChipGeneration(
        memory="hbm",
        tensor_joules=_pico(1.56),
        tensor_most=0.8,
        vector_joules=_pico(8),
        vector_most=0.8,
        attention=0.5,
    ),
    "cdna3": ChipGeneration(
        memory="hbm",
        tensor_joules=_pico(0.74),
        tensor_most=0.65,
        vector_joules=_pico(3.2),
        vector_most=0.7,
        attention=0.5,
    ),
    "cdna4": ChipGeneration(
        memory="hbm",
        tensor_joules=_pico(0.69),
        tensor_most=0.72,
        vector_joules=_pico(3.2),
        vector_most=0.7,
        attention=0.5,
    ),
    "turing-gtx": ChipGeneration(
        memory="gddr", vector_joules=_pico(12.7), vector_most=0.88, attention=0.3
    ),
    "gcn": ChipGeneration(memory="hbm", vector_joules=_pico(15), vector_most=0.8, attention=0.3),
    "rdna2": ChipGeneration(memory="gddr", vector_joules=_pico(9), vector_most=0.75, attention=0.3),
    "rdna3": ChipGeneration(
        memory="gddr",
        tensor_joules=_pico(2.86),
        tensor_most=0.85,
        vector_joules=_pico(11),
        vector_most=0.45,
        attention=0.4,
    ),
    "rdna4": ChipGeneration(
        memory="gddr",
        tensor_joules=_pico(1.3),
        tensor_most=0.8,
        vector_joules=_pico(11),
        vector_most=0.45,
        attention=0.4,
    ),
}
"""Holds every generation by name. Joules and shares are from products of PyTorch, sizes 1024 to
10240, in zzc0721/torch-performance-test-data (2025-26: `database.md`, issues 43, 97, 160, 161 and
185), from the table of achievable products in stas00/ml-engineering (2024-26), and from AMD's own
(ROCm blog "Measuring Max-Achievable FLOPs, part 2", 2025), less the power of memory traffic:

pascal: Tesla P4 4.96 of 5.44 fp32 at 75 W, P40 10.07 of 11.8. volta: V100S 88.9 TFLOP/s at 250 W,
V100 89 of 125 where power does not bind; fp32 13.55 of 16.4. turing: T10 59.3 at 150 W, RTX 2080
39 of 42 and 9.2 fp32 of 10.1. ampere: A100 SXM 264 at 400 W, 19.2 fp32 of 19.5. ampere-rtx: A6000
123 at 300 W, RTX 3090 76 of 71, 24.8 fp32 of 35.6, A4000 11.9 at 140 W. ada: L40S 269 and 46.9 fp32
at 350 W, RTX 4090 165 to 173 of 165, 55 fp32 of 82.6. hopper: 0.67 of the peak at 700 W (fitted to
FSDP runs on H100; bare products reach 0.79), fp32 52 of 67. blackwell: 0.85 of what bare products
reach on a B200 (1696 of 2250), as on hopper; 66 fp32 of 80. blackwell-rtx: RTX PRO 6000 417 and 77
fp32 at 600 W, RTX 5090 236 of 210. cdna2: MI250X 147 of 191.5 a die. cdna3: MI300X 782 at 750 W.
rdna3: RX 7900 XTX 104 at 355 W, 26 fp32 of 61.4.

Vector joules of volta and turing are taken from pascal, and of hopper from ada (one process); those
of ampere, cdna and gcn bind no card and are assumed, as is all of cdna, cdna4, rdna2 and rdna4."""


@record
class SharedFactors:
    """Holds the numbers of the law that all devices share."""

    forward_exponent: PositiveShare = 0.54
    """The exponent of 16-bit products in a forward, which ends before power has slowed it."""
    backward_exponent: PositiveShare = 0.80
    vector_exponent: PositiveShare = 0.80
    vector_forward: Ratio = 0.97
    """Products inside a layer over bare ones, in fp32."""
    vector_backward: Ratio = 1.02
    integer_forward: Ratio = 0.87
    """The same for chips with `shared_integers`: the forward reads both factors along their rows,
    which takes more addresses than the products of a backward."""
    integer_backward: Ratio = 1.11


SHARED = SharedFactors()


def reached_shares(
    architecture: ChipGeneration, device: DeviceType, watts: float, shared: SharedFactors = SHARED
) -> dict[Precision, ReachedShares]:
    """Returns the shares of its peaks that a device reaches in matrix products, by precision.

    `watts` is the power limit of the card, or of the part of it that the device is.
    """
    net = watts - JOULES_PER_BYTE[architecture.memory] * device.memory_bandwidth
    net = max(net, watts / 4)
    return {
        precision: _tensor(architecture, net / (PER_16_BIT[precision] * peak), shared)
        if architecture.tensor_joules and precision in PER_16_BIT
        else _vector(architecture, net, peak, device.peak.get("fp32", 0.0), shared)
        for precision, peak in device.peak.items()
    }


def _tensor(chip: ChipGeneration, watts_per_flop: float, shared: SharedFactors) -> ReachedShares:
    bound = min(1.0, watts_per_flop / chip.tensor_joules / chip.tensor_most)
    return ReachedShares(
        forward=min(chip.tensor_most * bound**shared.forward_exponent, 1.0),
        backward=min(chip.tensor_most * bound**shared.backward_exponent, 1.0),
    )


def _vector(
    chip: ChipGeneration, watts: float, peak: float, fp32: float, shared: SharedFactors
) -> ReachedShares:
    rate = fp32 if chip.sums_in_fp32 and fp32 else peak
    bound = min(1.0, watts / max(rate, fp32) / chip.vector_joules / chip.vector_most)
    share = chip.vector_most * bound**shared.vector_exponent * min(1.0, rate / peak)
    forward, backward = shared.vector_forward, shared.vector_backward
    if chip.shared_integers:
        forward, backward = shared.integer_forward, shared.integer_backward
    return ReachedShares(forward=min(share * forward, 1.0), backward=min(share * backward, 1.0))


def with_reached_shares(
    device: DeviceType,
    architecture: ChipGeneration,
    watts: float,
    stated: Mapping[str, float],
    shared: SharedFactors = SHARED,
) -> DeviceType:
    """Returns the device type with the shares of its peaks that its generation and power allow.

    An efficiency that is `stated` (by field name) is kept; a stated one of matrix products is that
    of the shortest precision, and the estimate is for the others alone.
    """
    shares = reached_shares(architecture, device, watts, shared)
    fastest = max(device.peak.values())
    if "matmul_efficiency" in stated:
        shares = {p: each for p, each in shares.items() if device.peak[p] < fastest}
        matmul = device.matmul_efficiency
    else:
        best = next(shares[p] for p, peak in device.peak.items() if peak == fastest)
        # A backward computes twice what a forward does.
        matmul = 3 / (1 / best.forward + 2 / best.backward)
    attention = device.attention_efficiency
    if "attention_efficiency" not in stated:
        attention = architecture.attention * matmul
    return replace(
        device,
        matmul_efficiency=round(matmul, 3),
        attention_efficiency=round(attention, 3),
        matmul_shares={
            p: ReachedShares(forward=round(each.forward, 3), backward=round(each.backward, 3))
            for p, each in shares.items()
        }
        or None,
    )
