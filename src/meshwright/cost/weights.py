"""Counts the weights of any range of layers on a device: trained, frozen, and their casts.

`layers` may hold numbers or numpy arrays that broadcast.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from meshwright.cluster.spec import Precision
from meshwright.cost.runtimes import RUNTIMES
from meshwright.model.spec import LayerGraph, Tied
from meshwright.plan.ranks import StagePlacement
from meshwright.plan.spec import Job, RuntimeName
from meshwright.records import record

Array = NDArray[np.float64]
Ints = int | NDArray[np.int64]
Floats = Any
"""A float, or an array of floats."""


@record
class ParameterBytes:
    """Gives the bytes per trained parameter on a rank; a frozen one has only `weights` and
    `casts`."""

    weights: float
    gradients: float
    optimizer: float
    casts: float
    """The 16-bit copies that products read, for weights that need one. Casts of trained weights are
    made in a step's first forward and dropped after its last backward; those of frozen weights are
    kept."""


def bytes_per_parameter(
    precision: Precision, optimizer: str, runtime: RuntimeName = "meshwright"
) -> ParameterBytes:
    """Returns the bytes of each kind per parameter.

    Master weights, gradients and optimizer states are fp32 (fp64 in an fp64 job): 4 + 4 + 8 with
    Adam, which keeps two moments as wide as the weights. 16-bit arithmetic adds 2 for the cast. A
    runtime that keeps 16-bit weights has 2 + its gradients + 12 instead.
    """
    width = 8.0 if precision == "fp64" else 4.0
    cast = 2.0 if precision in ("fp16", "bf16") else 0.0
    moments = {"adamw": 2, "sgd": 0}[optimizer]
    beside = RUNTIMES[runtime].gradient_bytes
    if cast and beside is not None:
        states = (1 + moments) * width
        return ParameterBytes(weights=cast, gradients=beside, optimizer=states, casts=0.0)
    return ParameterBytes(weights=width, gradients=width, optimizer=moments * width, casts=cast)


@record
class ParameterCounts:
    """Counts weights cumulatively: index l is the sum over the layers before l."""

    replicated: Array
    """The weights that every tensor rank holds whole."""
    split: Array
    """The weights that tensor ranks divide."""


@record
class WeightTable:
    """Holds sums over layers, so that the bytes of any stage's weights are computed in constant
    time."""

    unit: ParameterBytes
    trained: ParameterCounts
    frozen: ParameterCounts
    cast: ParameterCounts
    """The weights, trained or frozen, that have a cast in 16-bit precision."""
    constants: Array
    """The bytes of what a layer holds besides weights, cumulative."""
    tied: tuple[TiedUses, ...]


@record
class TiedUses:
    """Describes which layers use a tied parameter, a parameter that several layers share."""

    users: NDArray[np.int64]
    """The number of users before each layer."""
    casting: NDArray[np.int64]
    """The number of users before each layer that read a cast of the parameter."""
    next: NDArray[np.int64]
    """The first user at or after each layer."""
    last: int
    trained: int
    """The number of trained weights; 0 if the parameter is frozen."""
    frozen: int
    """The number of frozen weights; 0 if the parameter is trained."""
    split: bool
    """True if tensor ranks divide the parameter."""


def cumulative(values: Iterable[float]) -> Array:
    """Returns the cumulative sums from 0: index l is the sum of the first l values."""
    return np.concatenate([[0.0], np.cumsum(np.array([*values], dtype=np.float64))])


def _numbers(whole: Iterable[float], split: Iterable[float]) -> ParameterCounts:
    divided = cumulative(split)
    return ParameterCounts(replicated=cumulative(whole) - divided, split=divided)


def weight_table(model: LayerGraph, job: Job) -> WeightTable:
    """Builds the sums over the weights of a model trained by a job."""
    layers = model.layers
    split = [layer.along("tensor") for layer in layers]
    return WeightTable(
        unit=bytes_per_parameter(job.precision, job.optimizer, job.runtime),
        trained=_numbers((x.parameters for x in layers), (x.parameters for x in split)),
        frozen=_numbers(
            (x.frozen_parameters for x in layers), (x.frozen_parameters for x in split)
        ),
        cast=_numbers(
            (x.cast_parameters + x.cast_frozen for x in layers),
            (
                min(x.cast_parameters, own.parameters) + min(x.cast_frozen, own.frozen_parameters)
                for x, own in zip(layers, split, strict=True)
            ),
        ),
        constants=cumulative(x.constant_bytes for x in layers),
        tied=tuple(_uses(model, tied) for tied in model.tied),
    )


def _uses(model: LayerGraph, tied: Tied) -> TiedUses:
    """Describes the users of a tied parameter.

    A user without matrix products (an embedding) reads the weights themselves, not a cast.
    """

    def counted(users: Iterable[int]) -> NDArray[np.int64]:
        count = np.zeros(len(model.layers) + 1, dtype=np.int64)
        count[[layer + 1 for layer in users]] = 1
        return np.cumsum(count)

    return TiedUses(
        users=counted(tied.layers),
        casting=counted(n for n in tied.layers if model.layers[n].forward_flops > 0),
        next=np.array(
            [
                min((user for user in tied.layers if user >= n), default=0)
                for n in range(len(model.layers))
            ]
        ),
        last=tied.layers[-1],
        trained=tied.parameters,
        frozen=tied.frozen_parameters,
        split="tensor" in tied.divided,
    )


def tied_share(tied: TiedUses, numbers: int, tensor: int) -> float:
    """Returns the part of `numbers` weights of a tied parameter that each tensor rank holds."""
    return numbers / tensor if tied.split else float(numbers)


def untied_parameters(numbers: ParameterCounts, layers: tuple[Ints, Ints], tensor: int) -> Floats:
    """Returns the number of weights of a range of layers on each tensor rank, without tied ones."""
    first, last = layers
    held = numbers.replicated[last] - numbers.replicated[first]
    return held + (numbers.split[last] - numbers.split[first]) / tensor


def stage_parameters(table: WeightTable, layers: tuple[Ints, Ints], tensor: int) -> Floats:
    """Returns the number of trained parameters on each tensor rank of a stage, tied ones
    included."""
    first, last = layers
    held = untied_parameters(table.trained, layers, tensor)
    for tied in table.tied:
        own = tied_share(tied, tied.trained, tensor)
        held = held + np.where(tied.users[last] > tied.users[first], own, 0.0)
    return held


def _frozen_bytes(table: WeightTable, layers: tuple[Ints, Ints], tensor: int) -> Floats:
    """Returns the bytes of frozen weights, tied ones included, and of constants on each tensor
    rank."""
    first, last = layers
    held = untied_parameters(table.frozen, layers, tensor)
    for tied in table.tied:
        own = tied_share(tied, tied.frozen, tensor)
        held = held + np.where(tied.users[last] > tied.users[first], own, 0.0)
    return held * table.unit.weights + (table.constants[last] - table.constants[first])


def weight_bytes(table: WeightTable, layers: tuple[Ints, Ints], tensor: int) -> Floats:
    """Returns the bytes of all weights and constants on each tensor rank of a stage, without
    casts."""
    trained = stage_parameters(table, layers, tensor) * table.unit.weights
    return trained + _frozen_bytes(table, layers, tensor)


def _repeated(table: WeightTable, stages: Sequence[StagePlacement]) -> list[tuple[TiedUses, int]]:
    """Returns every tied parameter with the number of a rank's stages that use it beyond the first
    one."""
    ranges = [stage.layers for stage in stages]
    using = [sum(bool(tied.users[b] > tied.users[a]) for a, b in ranges) for tied in table.tied]
    return [(tied, max(n - 1, 0)) for tied, n in zip(table.tied, using, strict=True)]


def rank_parameters(table: WeightTable, stages: Sequence[StagePlacement], tensor: int) -> float:
    """Returns the number of trained parameters in all stages of a rank.

    A tied parameter counts once, even if several stages use it.
    """
    held = sum(float(stage_parameters(table, stage.layers, tensor)) for stage in stages)
    for tied, times in _repeated(table, stages):
        held -= times * tied_share(tied, tied.trained, tensor)
    return held


def rank_weight_bytes(table: WeightTable, stages: Sequence[StagePlacement], tensor: int) -> float:
    """Returns the bytes of all weights and constants in all stages of a rank, without casts.

    A tied weight counts once, even if several stages use it.
    """
    held = rank_parameters(table, stages, tensor) * table.unit.weights
    held += sum(float(_frozen_bytes(table, stage.layers, tensor)) for stage in stages)
    for tied, times in _repeated(table, stages):
        held -= times * tied_share(tied, tied.frozen, tensor) * table.unit.weights
    return held


def cast_bytes(table: WeightTable, layers: tuple[Ints, Ints], tensor: int) -> Floats:
    """Returns the bytes of the 16-bit casts of a stage's weights, trained or not."""
    first, last = layers
    cast = untied_parameters(table.cast, layers, tensor)
    for tied in table.tied:
        own = tied_share(tied, tied.trained + tied.frozen, tensor)
        cast = cast + np.where(tied.casting[last] > tied.casting[first], own, 0.0)
    return cast * table.unit.casts
