"""Weights that a device holds, trained and frozen, and their casts, for any range of layers.

`layers` may be numbers or numpy arrays that broadcast.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from meshwright.cluster.spec import Precision
from meshwright.model.spec import LayerGraph, Tied
from meshwright.plan.ranks import StageSeats
from meshwright.plan.spec import Job
from meshwright.records import record

Array = NDArray[np.float64]
Ints = int | NDArray[np.int64]
Floats = Any
"""A float, or an array of them."""


@record
class ParameterBytes:
    """Bytes per parameter that a rank holds; of a frozen one, weights and casts alone."""

    weights: float
    gradients: float
    optimizer: float
    casts: float
    """The 16-bit weights that products read, of those that need one: made in a step's first
    forward, dropped after its last backward, or kept where they are frozen."""


def bytes_per_parameter(precision: Precision, optimizer: str) -> ParameterBytes:
    """Master weights, gradients and states are fp32 (fp64 for fp64): 4 + 4 + 8 with Adam, whose
    two moments are of the master's width; 16-bit arithmetic adds 2."""
    width = 8.0 if precision == "fp64" else 4.0
    cast = 2.0 if precision in ("fp16", "bf16") else 0.0
    moments = {"adamw": 2, "sgd": 0}[optimizer]
    return ParameterBytes(weights=width, gradients=width, optimizer=moments * width, casts=cast)


@record
class Numbers:
    """Of weights, cumulative: index l is the sum over layers before l."""

    replicated: Array
    split: Array
    """Divided among tensor ranks."""


@record
class WeightTable:
    """Sums over layers, so that any stage's weights are counted in constant time."""

    unit: ParameterBytes
    trained: Numbers
    frozen: Numbers
    cast: Numbers
    """Of both, those that have a cast in 16-bit precision."""
    constants: Array
    """Bytes of what is held beside weights, cumulative."""
    tied: tuple[TiedUses, ...]


@record
class TiedUses:
    """Of a tied parameter: its cumulative users, and those that cast it."""

    users: NDArray[np.int64]
    casting: NDArray[np.int64]
    next: NDArray[np.int64]
    """The first user at or after each layer."""
    last: int
    trained: int
    """Numbers; 0 where it is frozen."""
    frozen: int
    split: bool


def cumulative(values: Iterable[float]) -> Array:
    """Index l is the sum of the first l values."""
    return np.concatenate([[0.0], np.cumsum(np.array([*values], dtype=np.float64))])


def _numbers(whole: Iterable[float], split: Iterable[float]) -> Numbers:
    divided = cumulative(split)
    return Numbers(replicated=cumulative(whole) - divided, split=divided)


def weight_table(model: LayerGraph, job: Job) -> WeightTable:
    """Everything that has to be known of the weights of a model trained by a job."""
    layers = model.layers
    return WeightTable(
        unit=bytes_per_parameter(job.precision, job.optimizer),
        trained=_numbers((x.parameters for x in layers), (x.split_parameters for x in layers)),
        frozen=_numbers((x.frozen_parameters for x in layers), (x.split_frozen for x in layers)),
        cast=_numbers(
            (x.cast_parameters + x.cast_frozen for x in layers),
            (
                min(x.cast_parameters, x.split_parameters) + min(x.cast_frozen, x.split_frozen)
                for x in layers
            ),
        ),
        constants=cumulative(x.constant_bytes for x in layers),
        tied=tuple(_uses(model, tied) for tied in model.tied),
    )


def _uses(model: LayerGraph, tied: Tied) -> TiedUses:
    """A user that multiplies nothing (an embedding) reads the weights as they are."""

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
        split=tied.split,
    )


def share(tied: TiedUses, numbers: int, tensor: int) -> float:
    """What each tensor rank holds of a tied parameter's numbers."""
    return numbers / tensor if tied.split else float(numbers)


def own_numbers(numbers: Numbers, layers: tuple[Ints, Ints], tensor: int) -> Floats:
    """What each tensor rank holds of layers, without what is tied."""
    first, last = layers
    held = numbers.replicated[last] - numbers.replicated[first]
    return held + (numbers.split[last] - numbers.split[first]) / tensor


def stage_parameters(table: WeightTable, layers: tuple[Ints, Ints], tensor: int) -> Floats:
    """Trained parameters that each tensor rank of a stage holds, tied ones included."""
    first, last = layers
    held = own_numbers(table.trained, layers, tensor)
    for tied in table.tied:
        own = share(tied, tied.trained, tensor)
        held = held + np.where(tied.users[last] > tied.users[first], own, 0.0)
    return held


def _frozen_bytes(table: WeightTable, layers: tuple[Ints, Ints], tensor: int) -> Floats:
    """Of a stage's frozen weights, tied ones included, and its constants, on each tensor rank."""
    first, last = layers
    held = own_numbers(table.frozen, layers, tensor)
    for tied in table.tied:
        own = share(tied, tied.frozen, tensor)
        held = held + np.where(tied.users[last] > tied.users[first], own, 0.0)
    return held * table.unit.weights + (table.constants[last] - table.constants[first])


def weight_bytes(table: WeightTable, layers: tuple[Ints, Ints], tensor: int) -> Floats:
    """All that each tensor rank of a stage holds of weights, trained or not, and of constants; no
    casts."""
    trained = stage_parameters(table, layers, tensor) * table.unit.weights
    return trained + _frozen_bytes(table, layers, tensor)


def _repeated(table: WeightTable, stages: Sequence[StageSeats]) -> list[tuple[TiedUses, int]]:
    """Tied parameters, and how many of a rank's stages use each beyond the first one."""
    ranges = [stage.layers for stage in stages]
    using = [sum(bool(tied.users[b] > tied.users[a]) for a, b in ranges) for tied in table.tied]
    return [(tied, max(n - 1, 0)) for tied, n in zip(table.tied, using, strict=True)]


def rank_parameters(table: WeightTable, stages: Sequence[StageSeats], tensor: int) -> float:
    """Trained parameters that a rank holds of all its stages; of a tied one that several use, one
    copy."""
    held = sum(float(stage_parameters(table, stage.layers, tensor)) for stage in stages)
    for tied, times in _repeated(table, stages):
        held -= times * share(tied, tied.trained, tensor)
    return held


def rank_weight_bytes(table: WeightTable, stages: Sequence[StageSeats], tensor: int) -> float:
    """As `weight_bytes`, of all a rank's stages; of a tied weight that several use, one."""
    held = rank_parameters(table, stages, tensor) * table.unit.weights
    held += sum(float(_frozen_bytes(table, stage.layers, tensor)) for stage in stages)
    for tied, times in _repeated(table, stages):
        held -= times * share(tied, tied.frozen, tensor) * table.unit.weights
    return held


def cast_bytes(table: WeightTable, layers: tuple[Ints, Ints], tensor: int) -> Floats:
    """The 16-bit casts of a stage's weights, trained or not."""
    first, last = layers
    cast = own_numbers(table.cast, layers, tensor)
    for tied in table.tied:
        own = share(tied, tied.trained + tied.frozen, tensor)
        cast = cast + np.where(tied.casting[last] > tied.casting[first], own, 0.0)
    return cast * table.unit.casts
