"""One training run: what to do, and the folder in which it leaves its traces.

run.json        the RunSettings, as every process reads them
plan.json       the plan that was followed
metrics.jsonl   one line a step
timeline.json   one measured step
failure-N.json  why rank N stopped, if it did
logs/           what the processes printed
model.safetensors
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
"""What a run writes; nothing else may be put into its folder under these names."""

Steps = Annotated[int, Field(ge=1, le=10**9)]
Seed = Annotated[int, Field(ge=0, lt=2**63)]
"""What torch's generators take."""


@record
class RunSettings:
    """How to train, beyond what the plan says."""

    model: Line
    """Name, `config.json` or folder: what `model.zoo.build` understands."""
    data: Annotated[Line, Field(min_length=1)] | None = None
    """Path of the corpus; None: the standard library's source."""
    steps: Steps = 100
    learning_rate: Annotated[float, Field(gt=0, le=1e3)] = 3e-4
    """Of the optimizer, at the peak of its schedule."""
    warmup_steps: Annotated[int, Field(ge=0, le=10**9)] = 10
    weight_decay: Annotated[float, Field(ge=0, le=1e3)] = 0.1
    clip_norm: Annotated[float, Field(gt=0, le=1e9)] | None = 1.0
    """Largest norm of the gradients; None: they are not clipped."""
    seed: Seed = 0
    shares: dict[Name, PositiveShare] = field(default_factory=dict)
    """Emulation: share of a core that a device gets, by device name."""
    peak_flops: dict[Name, Flops] = field(default_factory=dict)
    """FLOP/s of each device at the job's precision, where known: for MFU."""
    save_weights: bool = False
    debug: bool = False
    """Headers on messages, a look at every layer's numbers."""
    timeout_seconds: Annotated[float, Field(ge=1, le=1e6)] = 300.0
    """A rank that waits for a message longer than this takes the other one for lost."""
    compile: bool = False
    """Run layers through torch.compile."""

    @property
    def recorded_step(self) -> int:
        """The step that is measured instruction by instruction: a late one, when caches are warm;
        the last but one where there is a choice."""
        return max(0, self.steps - 2)


@record
class Metrics:
    """One line of metrics.jsonl."""

    step: Count
    loss: Annotated[float, Field(ge=-1e30, le=1e30)]
    gradient_norm: Annotated[float, Field(allow_inf_nan=True)]
    """Infinite, or none at all, in a step of fp16 that overflowed and was left out."""
    learning_rate: Ratio
    step_seconds: PositiveSeconds
    tokens_per_second: Ratio
    mfu: Ratio | None = None
    """Share of the peak that the model's FLOPs make up; None where the peak is unknown."""
    memory_bytes: Bytes
    """Largest over all ranks."""


@record
class Failure:
    """Why a rank stopped."""

    rank: Rank
    seconds: Ratio
    """When, by the machine's clock: the first failure is the cause, the rest follow from it."""
    kind: Name
    """Name of the MeshwrightError, or of another exception."""
    problems: tuple[Problem, ...]
    secondary: bool
    """It only noticed that another rank had gone."""


def failure_file(folder: Path, rank: int) -> Path:
    """Where a rank says why it stopped."""
    return folder / f"failure-{rank}.json"
