"""Updates weights: the optimizer of each group of buckets, the global gradient norm, clipping, and
the loss scale."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from meshwright.errors import Problem, TrainingError
from meshwright.program.instructions import GradientKey, Instruction
from meshwright.program.operations import Op
from meshwright.runtime.exchange import all_gather_records
from meshwright.runtime.flat_buckets import FlatBucket
from meshwright.runtime.world import World

LearningRateSchedule = Callable[[int], float]
"""Function from the step (from 0) to the factor of the learning rate."""

OptimizerFactory = Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]
"""Function that makes an optimizer for some parameters."""


@dataclass(slots=True)
class Update:
    """Holds the gradients and the optimizer of one OPTIMIZER_STEP."""

    buckets: list[FlatBucket]
    optimizer: torch.optim.Optimizer | None
    """None if there is nothing to update."""
    rates: list[float]
    """The optimizer's own learning rates, one for each parameter group."""
    squared: Tensor | None = None
    """Squared norm of this step's gradients, once it has been asked for."""

    def squared_norm(self, device: torch.device) -> Tensor:
        """Returns this rank's share of the squared norm of these gradients."""
        if self.squared is None:
            self.squared = squared_norm(self.buckets, device)
        return self.squared

    def run(self, factor: float, rate: float) -> None:
        """Updates the weights, with gradients multiplied by `factor` and learning rates by
        `rate`."""
        if self.optimizer is None:
            return
        for group, own in zip(self.optimizer.param_groups, self.rates, strict=True):
            group["lr"] = rate * own
        scale_gradients(self.buckets, factor)
        self.optimizer.step()

    @property
    def on_device(self) -> bool:
        """True if the optimizer reads the clip factor and the decision to skip a step from its
        device, as torch.amp.GradScaler passes them: the host need not wait for the gradients. Fused
        optimizers can."""
        supports = getattr(self.optimizer, "_step_supports_amp_scaling", False)
        return self.optimizer is None or bool(supports)

    def run_on_device(self, good: Tensor, rate: float, factor: Tensor | None = None) -> None:
        """Updates as `run` does, but only if the flag `good`, a tensor on the device, is true."""
        if self.optimizer is None:
            return
        self.optimizer.found_inf = good.logical_not().float()  # type: ignore[attr-defined]
        if factor is not None and self.buckets[0].buffer.dtype == torch.float32:
            self.optimizer.grad_scale = factor.reciprocal().float()  # type: ignore[attr-defined]
        elif factor is not None:  # grad_scale is a float32, too coarse for others
            for bucket in self.buckets:
                bucket.buffer.mul_(factor)
        self.run(1.0, rate)


def make_updates(
    instructions: Sequence[Instruction],
    buckets: Mapping[GradientKey, FlatBucket],
    make: OptimizerFactory,
) -> dict[GradientKey, Update]:
    """Makes the Update of each of a rank's OPTIMIZER_STEPs, keyed by the step's layers or tied
    parameter.

    A step updates the bucket with its own key, or all buckets that no step has as a key. If a rank
    has one step, it updates all buckets.
    """
    named = dict.fromkeys((i.layers, i.tied) for i in instructions if i.op is Op.OPTIMIZER_STEP)
    rest = [bucket for key, bucket in buckets.items() if key not in named]
    found = {}
    for key in named:
        own = [buckets[key]] if key in buckets else rest
        own = own if len(named) > 1 else list(buckets.values())
        parameters = [each.parameter for bucket in own for each in bucket.trained]
        optimizer = make(parameters) if parameters else None
        groups = optimizer.param_groups if optimizer else []
        found[key] = Update(own, optimizer, [float(group["lr"]) for group in groups])
    assert sum(len(each.buckets) for each in found.values()) == len(buckets), "a weight forgotten"
    return found


def squared_norm(buckets: Iterable[FlatBucket], device: torch.device) -> Tensor:
    """Returns this rank's share of the squared norm of the whole gradient, in float64.

    The sum over all ranks counts every element once: one that h ranks hold has weight 1 / h.
    """
    total = torch.zeros((), dtype=torch.float64, device=device)
    for bucket in buckets:
        for part, copies in bucket.norm_terms:
            if part.numel():
                total += torch.linalg.vector_norm(part).double().square() / copies
    return total


def scale_gradients(buckets: Iterable[FlatBucket], factor: float) -> None:
    """Multiplies all gradients by `factor`."""
    if factor != 1.0:
        for bucket in buckets:
            bucket.buffer.mul_(factor)


def clip_factor(norm: float, clip_norm: float) -> float:
    """Returns min(1, clip_norm / (norm + 1e-6)), as torch.nn.utils.clip_grad_norm_ defines it; 1 if
    `clip_norm` is 0, which stands for no clipping."""
    return 1.0 if clip_norm == 0 else min(1.0, clip_norm / (norm + 1e-6))


def clip_factor_on_device(norm: Tensor, clip_norm: float) -> Tensor:
    """Returns the clip factor as a tensor, for a norm that the host has not read."""
    return (clip_norm / (norm + 1e-6)).clamp(max=1.0)


class LossScale:
    """Keeps small float16 gradients from vanishing: the loss is multiplied by a power of two that
    halves when gradients overflow, and doubles after 2000 steps without overflow (Micikevicius et
    al. 2018). Other precisions use the constant 1."""

    GROWTH_STEPS = 2000

    def __init__(self, dynamic: bool) -> None:
        self.dynamic = dynamic
        self.value = 65536.0 if dynamic else 1.0
        self._good = 0

    def update(self, overflow: bool) -> None:
        """Adjusts the scale after one step."""
        if not self.dynamic:
            return
        self._good = 0 if overflow else self._good + 1
        if overflow:
            self.value = max(self.value / 2, 1.0)
        elif self._good % self.GROWTH_STEPS == 0:
            self.value *= 2


def check_finite(step: int, loss: float, norm: float, scale: LossScale, weights: str) -> None:
    """Raises TrainingError, on every rank alike, if loss or norm is non-finite (an overflow that a
    smaller loss scale may cure is left alone). `weights` says what has happened to the weights; no
    weight has received a non-finite update."""
    if not math.isfinite(loss):
        _stop(step, "loss", loss, weights)
    if not math.isfinite(norm) and not (scale.dynamic and scale.value > 1):
        _stop(step, "gradient norm", norm, weights)


UNTOUCHED = "the weights are those before this step"
"""State of the weights when a step stops, for `check_finite`."""
PARTLY_UPDATED = (
    "layers whose own gradients were finite have taken this step: resume from saved weights"
)


def _stop(step: int, what: str, value: float, weights: str) -> None:
    raise TrainingError(
        Problem(
            f"step {step}",
            what,
            str(value),
            "a finite number",
            f"lower the learning rate, clip gradients, or look at this step's batch; {weights}",
        )
    )


def stop_for_missing(names: list[str], world: World) -> None:
    """Raises TrainingError, on every rank alike, naming the parameters that got no gradient on any
    of the ranks."""
    found = all_gather_records(tuple(names), tuple[str, ...], world.everyone)
    raise TrainingError(
        *(
            Problem(
                "step 0",
                name,
                "no gradient for this parameter",
                "every trainable parameter to take part in the loss",
                "remove it, or set requires_grad = False",
            )
            for name in dict.fromkeys(name for some in found for name in some)
        )
    )
