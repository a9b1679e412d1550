"""Describes one training run: its settings, and the files in its folder.

run.json        the RunSettings, which every process reads with `load_settings`
plan.json       the plan that was followed
metrics.jsonl   one line for each step
timeline.json   one measured step
failure-N.json  why rank N stopped, if it did
logs/           what the processes printed
model.safetensors  the final weights, if they were asked for
"""

from __future__ import annotations

from dataclasses import field, fields
from pathlib import Path
from typing import Annotated

from pydantic import Field

from meshwright.cluster.spec import Precision
from meshwright.errors import MeshwrightError, Problem
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
    parse,
    read,
    record,
)

SETTINGS, PLAN, METRICS, TIMELINE = "run.json", "plan.json", "metrics.jsonl", "timeline.json"
WEIGHTS, LOGS = "model.safetensors", "logs"
OWN_NAMES = (SETTINGS, PLAN, METRICS, TIMELINE, WEIGHTS)
"""Names of the files that a run writes; its folder may hold no other files under these names."""

Steps = Annotated[int, Field(ge=1, le=10**9)]
Seed = Annotated[int, Field(ge=0, lt=2**63)]
"""A seed that torch's generators accept."""


TIMEOUT_SECONDS = 300.0
"""Default of `TrainingOptions.timeout_seconds`."""


@record
class TrainingOptions:
    """Says how a model is trained by a plan, whatever the model, the data and the optimizer are."""

    steps: Steps = 100
    """Number of optimizer steps."""
    clip_norm: Annotated[float, Field(ge=0, le=1e9)] = 1.0
    """Largest norm that the gradient may have; 0: gradients are not clipped."""
    seed: Seed = 0
    """Seed of the initial weights, of dropout and of the order of the data."""
    save_weights: bool = False
    """True: the trained weights are collected on the first rank."""
    debug: bool = False
    """True: every message has a header that its receiver checks, and the first layer with a
    non-finite value is named."""
    timeout_seconds: Annotated[float, Field(ge=1, le=1e6)] = TIMEOUT_SECONDS
    """A rank that waits longer than this for another takes it for lost."""
    compile: bool = False
    """True: layers run through torch.compile."""

    def waits_for_norm(self, precision: Precision) -> bool:
        """Returns True if weights wait for the norm of the whole gradient: to be clipped or, in
        fp16, because all ranks must agree on the loss scale. Else each bucket is updated at
        once."""
        return self.clip_norm > 0 or precision == "fp16"

    @property
    def recorded_step(self) -> int:
        """Returns the step that is measured instruction by instruction: the last but one, when
        caches are warm."""
        return max(0, self.steps - 2)


@record
class RunSettings:
    """Holds the settings of a training run that are not in the plan."""

    model: Line
    """A name, `config.json` or folder, as `model.zoo.build` understands it."""
    data: Annotated[Line, Field(min_length=1)] | None = None
    """Path of the corpus; None: the source of Python's standard library."""
    learning_rate: Annotated[float, Field(gt=0, le=1e3)] = 3e-4
    """The optimizer's learning rate at the peak of its schedule."""
    warmup_steps: Annotated[int, Field(ge=0, le=10**9)] = 10
    weight_decay: Annotated[float, Field(ge=0, le=1e3)] = 0.1
    shares: dict[Name, PositiveShare] = field(default_factory=dict)
    """Share of a core of each emulated device, by name; only testbed/emulated_worker.py can emulate
    them."""
    peak_flops: dict[Name, Flops] = field(default_factory=dict)
    """Peak FLOP/s of each device at the job's precision, by device name, as far as known; for
    MFU."""
    options: TrainingOptions = field(default_factory=TrainingOptions)


@record
class Metrics:
    """Holds what metrics.jsonl says of one step, in one line."""

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
    """Says why a rank stopped."""

    rank: Rank
    seconds: Ratio
    """Time of the failure by the machine's clock: the earliest failure is the cause, the others
    follow from it."""
    kind: Name
    """Class of the exception, such as `TrainingError`."""
    problems: tuple[Problem, ...]
    secondary: bool
    """True if the rank only noticed that another one had gone."""


def load_settings(folder: Path, *, error: type[MeshwrightError]) -> RunSettings:
    """Reads the settings of a run folder. Raises `error`, naming the file and the fields at fault.

    Folders of older versions have the options in the same table as all other settings.
    """
    path = folder / SETTINGS
    table = read(path, error=error)
    if "options" not in table:
        names = [each.name for each in fields(TrainingOptions) if each.name in table]
        table["options"] = {name: table.pop(name) for name in names}
    return parse(table, RunSettings, source=str(path), error=error)


def failure_file(folder: Path, rank: int) -> Path:
    """Returns the file in which a rank reports why it stopped."""
    return folder / f"failure-{rank}.json"
