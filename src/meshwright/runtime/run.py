"""Describes one training run: its settings, and the files in its folder.

run.json        the RunSettings, as every process reads them
plan.json       the plan that was followed
metrics.jsonl   one line for each step
timeline.json   one measured step
failure-N.json  why rank N stopped, if it did
logs/           what the processes printed
model.safetensors  the final weights, if they were asked for
"""

from __future__ import annotations

from dataclasses import field
from pathlib import Path
from typing import Annotated

from pydantic import Field

from meshwright.errors import Problem
from meshwright.records import (
    Bytes,
    Count,
    Flops,
    Line,
    Name,
    PositiveSeconds,
    PositiveShare,
    Rank,
    Ratio,
    record,
)

SETTINGS, PLAN, METRICS, TIMELINE = "run.json", "plan.json", "metrics.jsonl", "timeline.json"
WEIGHTS, LOGS = "model.safetensors", "logs"
OWN_NAMES = (SETTINGS, PLAN, METRICS, TIMELINE, WEIGHTS)
"""Names of the files that a run writes; its folder may hold no other files under these names."""

Steps = Annotated[int, Field(ge=1, le=10**9)]
Seed = Annotated[int, Field(ge=0, lt=2**63)]
"""A seed that torch's generators accept."""


@record
class RunSettings:
    """Settings of a training run, beyond those in the plan."""

    model: Line
    """A name, `config.json` or folder, as `model.zoo.build` understands it."""
    data: Annotated[Line, Field(min_length=1)] | None = None
    """Path of the corpus; None: the source of Python's standard library."""
    steps: Steps = 100
    learning_rate: Annotated[float, Field(gt=0, le=1e3)] = 3e-4
    """The optimizer's learning rate at the peak of its schedule."""
    warmup_steps: Annotated[int, Field(ge=0, le=10**9)] = 10
    weight_decay: Annotated[float, Field(ge=0, le=1e3)] = 0.1
    clip_norm: Annotated[float, Field(gt=0, le=1e9)] | None = 1.0
    """Largest norm that the gradient may have; None: gradients are not clipped."""
    seed: Seed = 0
    shares: dict[Name, PositiveShare] = field(default_factory=dict)
    """Share of a core of each emulated device, by name; only testbed/worker.py can emulate them."""
    peak_flops: dict[Name, Flops] = field(default_factory=dict)
    """Peak FLOP/s of each device at the job's precision, by device name, as far as known; for
    MFU."""
    save_weights: bool = False
    debug: bool = False
    """Check a header before every message, and every layer for non-finite values."""
    timeout_seconds: Annotated[float, Field(ge=1, le=1e6)] = 300.0
    """A rank that waits longer than this for a message takes its sender for lost."""
    compile: bool = False
    """Run layers through torch.compile."""

    @property
    def recorded_step(self) -> int:
        """The step that is measured instruction by instruction: the last but one, when caches are
        warm."""
        return max(0, self.steps - 2)


@record
class Metrics:
    """One line of metrics.jsonl, about one step."""

    step: Count
    loss: Annotated[float, Field(ge=-1e30, le=1e30)]
    gradient_norm: Annotated[float, Field(allow_inf_nan=True)]
    """Norm before clipping; infinite or NaN in an fp16 step that overflowed and was skipped."""
    learning_rate: Ratio
    step_seconds: PositiveSeconds
    tokens_per_second: Ratio
    mfu: Ratio | None = None
    """Model FLOPs utilization: the model's FLOP/s as a share of the devices' peak; None if the peak
    is unknown."""
    memory_bytes: Bytes
    """Largest peak memory of any rank."""


@record
class Failure:
    """Why a rank stopped."""

    rank: Rank
    seconds: Ratio
    """Time of the failure by the machine's clock: the earliest failure is the cause, the others
    follow from it."""
    kind: Name
    """Class of the exception, such as `TrainingError`."""
    problems: tuple[Problem, ...]
    secondary: bool
    """True if the rank only noticed that another one had gone."""


def failure_file(folder: Path, rank: int) -> Path:
    """Returns the file in which a rank reports why it stopped."""
    return folder / f"failure-{rank}.json"
