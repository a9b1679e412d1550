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

from meshwright.errors import Problem
from meshwright.records import record

SETTINGS, PLAN, METRICS, TIMELINE = "run.json", "plan.json", "metrics.jsonl", "timeline.json"
WEIGHTS, LOGS = "model.safetensors", "logs"


@record
class RunSettings:
    """How to train, beyond what the plan says."""

    model: str
    """Name, `config.json` or folder: what `model.zoo.build` understands."""
    data: str | None = None
    """Path of the corpus; None: the standard library's source."""
    steps: int = 100
    learning_rate: float = 3e-4
    warmup_steps: int = 10
    weight_decay: float = 0.1
    clip_norm: float | None = 1.0
    seed: int = 0
    shares: dict[str, float] = field(default_factory=dict)
    """Emulation: share of a core that a device gets, by device name."""
    peak_flops: dict[str, float] = field(default_factory=dict)
    """FLOP/s of each device at the job's precision, where known: for MFU."""
    save_weights: bool = False
    debug: bool = False
    """Headers on messages, a look at every layer's numbers."""
    timeout_seconds: float = 300.0
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

    step: int
    loss: float
    gradient_norm: float
    learning_rate: float
    step_seconds: float
    tokens_per_second: float
    mfu: float | None = None
    """Share of the peak that the model's FLOPs make up; None where the peak is unknown."""
    memory_bytes: int
    """Largest over all ranks."""


@record
class Failure:
    """Why a rank stopped."""

    rank: int
    seconds: float
    """When, by the machine's clock: the first failure is the cause, the rest follow from it."""
    kind: str
    """Name of the MeshwrightError, or of another exception."""
    problems: tuple[Problem, ...]
    secondary: bool
    """It only noticed that another rank had gone."""


def failure_file(folder: Path, rank: int) -> Path:
    """Where a rank says why it stopped."""
    return folder / f"failure-{rank}.json"
