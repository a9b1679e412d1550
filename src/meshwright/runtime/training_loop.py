"""Trains the user's own model, on their data and with their optimizer, by a plan."""

from __future__ import annotations

import math
from collections.abc import Callable, Sized
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, default_collate

from meshwright.errors import DataError, Problem
from meshwright.model.loss import WithLoss
from meshwright.model.spec import LayerGraph
from meshwright.plan.spec import Plan
from meshwright.program.timeline import Timeline
from meshwright.runtime.engine import Engine, StepResult
from meshwright.runtime.observer import UNOBSERVED, Observer
from meshwright.runtime.optimizer import OptimizerFactory
from meshwright.runtime.run_folder import Metrics, TrainingOptions

Batch = tuple[Tensor, ...]
"""The tensors of some rows; the first dimension of each is the rows."""
StepRows = Callable[[int, int, int], Batch]
"""Function from (step, first, last) to the batch tensors of rows [first, last) of that step's
global batch."""
Loss = Callable[..., Tensor]


@dataclass(frozen=True, kw_only=True)
class TrainingResult:
    """Holds the results of a run."""

    losses: tuple[float, ...]
    """Mean loss of each step, the same on every rank."""
    timeline: Timeline | None
    """Timeline of the recorded step, on rank 0 only."""
    parameters: dict[str, Tensor] | None
    """Whole parameters by name, on rank 0 only and only if they were asked for."""


def warmup_cosine(steps: int, warmup_steps: int) -> Callable[[int], float]:
    """Returns a learning-rate schedule, as the factor of the peak at each step: linear warm-up,
    then half a cosine down to 10 %."""

    def factor(step: int) -> float:
        if step < warmup_steps:
            return (step + 1) / warmup_steps
        progress = (step - warmup_steps) / max(1, steps - warmup_steps)
        return 0.1 + 0.45 * (1 + math.cos(math.pi * min(1.0, progress)))

    return factor


def adamw(learning_rate: float, weight_decay: float = 0.1) -> OptimizerFactory:
    """Returns a factory of AdamW with the betas usual for language models, in the fused form: one
    pass over the states, without temporaries."""
    return lambda parameters: torch.optim.AdamW(
        parameters, lr=learning_rate, betas=(0.9, 0.95), weight_decay=weight_decay, fused=True
    )


def sgd(learning_rate: float, weight_decay: float = 0.0) -> OptimizerFactory:
    """Returns a factory of plain gradient descent without momentum, which keeps no state besides
    the weights."""
    return lambda parameters: torch.optim.SGD(
        parameters, lr=learning_rate, weight_decay=weight_decay
    )


OPTIMIZERS = {"adamw": adamw, "sgd": sgd}
"""Optimizers, by their names in Job.optimizer."""


def dataset_rows(dataset: Dataset[Any], global_batch: int, *, seed: int = 0) -> StepRows:
    """Returns the rows of a map-style dataset, which every epoch visits in a new random order.

    Raises DataError if the dataset is shorter than one batch.
    """
    length = len(cast("Sized", dataset))
    if length < global_batch:
        wanted = f"at least {global_batch}, one global batch"
        raise DataError(Problem(type(dataset).__name__, "", f"{length} rows", wanted))

    def rows(step: int, first: int, last: int) -> Batch:
        numbers = range(step * global_batch + first, step * global_batch + last)
        items = [dataset[_position(number, length, seed)] for number in numbers]
        return tuple(default_collate(items))

    return rows


def _position(number: int, length: int, seed: int) -> int:
    epoch, index = divmod(number, length)
    return _EpochOrder.of(length, seed, epoch)[index]


class _EpochOrder:
    """Keeps the order of the current epoch, which every row looks up."""

    _kept: tuple[tuple[int, int, int], list[int]] = ((0, 0, -1), [])

    @classmethod
    def of(cls, length: int, seed: int, epoch: int) -> list[int]:
        """Returns the order of an epoch: for each position, the index of the dataset's item."""
        key = (length, seed, epoch)
        if cls._kept[0] != key:
            generator = torch.Generator().manual_seed((seed * 1_000_003 + epoch) % 2**63)
            cls._kept = (key, torch.randperm(length, generator=generator).tolist())
        return cls._kept[1]


def train(  # noqa: PLR0913 - all that a user brings to a run
    model: nn.Module,
    plan: Plan,
    data: Dataset[Any] | StepRows,
    *,
    loss: Loss | None = None,
    optimizer: OptimizerFactory,
    options: TrainingOptions,
    learning_rate: Callable[[int], float] | None = None,
    on_metrics: Callable[[Metrics], None] | None = None,
    peak_flops: float | None = None,
    observer: Observer = UNOBSERVED,
) -> TrainingResult:
    """Trains `model` by `plan`; every process of the launcher calls this with the same arguments.

    `model` may be on the meta device: then each rank allocates and initialises only its own layers.
    Without `loss` its forward takes the batch's tensors and returns the mean loss over the rows;
    with `loss`, all but the last tensor go to the model and `loss(output, last)` is that mean.
    `data` is a dataset whose items are tuples of tensors, or a function from (step, first, last) to
    rows. `optimizer` makes an optimizer for some parameters; `learning_rate` gives the factor of
    its rate at each step. `on_metrics` is called on rank 0; with `peak_flops`, of all devices
    together, its metrics contain the MFU. Raises a MeshwrightError for anything that the user can
    mend.
    """
    batch = plan.job.global_batch
    rows = data if callable(data) else dataset_rows(data, batch, seed=options.seed)
    module = model if loss is None else WithLoss(model, loss)
    with Engine(
        module,
        plan,
        inputs=rows(0, 0, min(2, batch)),
        optimizer=optimizer,
        options=options,
        learning_rate=learning_rate,
        observer=observer,
    ) as engine:
        losses, timeline = run_steps(engine, rows, on_metrics=on_metrics, peak_flops=peak_flops)
        parameters = engine.parameters() if options.save_weights else None
    return TrainingResult(losses=losses, timeline=timeline, parameters=parameters)


def run_steps(
    engine: Engine,
    rows: StepRows,
    *,
    on_metrics: Callable[[Metrics], None] | None = None,
    peak_flops: float | None = None,
) -> tuple[tuple[float, ...], Timeline | None]:
    """Runs all steps; returns their losses, and on rank 0 the timeline of the recorded step. See
    `train`."""
    losses: list[float] = []
    timeline: Timeline | None = None
    for step in range(engine.options.steps):
        of_step = partial(rows, step)
        if step == engine.options.recorded_step:
            result, timeline = engine.record(of_step)
        else:
            result = engine.step(of_step)
        losses.append(result.loss)
        if on_metrics is not None and engine.rank == 0:
            on_metrics(_metrics(step, result, engine, peak_flops))
    return tuple(losses), timeline


def _metrics(step: int, result: StepResult, engine: Engine, peak_flops: float | None) -> Metrics:
    job = engine.plan.job
    flops = step_flops(engine.model, job.global_batch)
    return Metrics(
        step=step,
        loss=result.loss,
        gradient_norm=result.grad_norm,
        learning_rate=engine.learning_rate,
        step_seconds=result.seconds,
        tokens_per_second=job.global_batch * job.sequence / result.seconds,
        mfu=flops / result.seconds / peak_flops if peak_flops else None,
        memory_bytes=engine.memory_bytes(),
    )


def step_flops(model: LayerGraph, global_batch: int) -> float:
    """Returns the model FLOPs of one step: forward and backward of every row, without
    recomputation."""
    return global_batch * sum(
        layer.forward_flops + layer.attention_flops + layer.backward_flops for layer in model.layers
    )
