"""Defines the application, the arguments that several verbs share, and printing."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from meshwright.workflows.session import SearchLimits

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Finds the fastest way to train a model on the machines you have, and trains it that way.",
)

INTERRUPTED_STATUS = 130
"""Exit status after Ctrl-C without a result, as in shells."""


class PrecisionChoice(StrEnum):
    """Lists the number formats in which forward and backward can compute."""

    FP64 = "fp64"
    FP32 = "fp32"
    FP16 = "fp16"
    BF16 = "bf16"
    TF32 = "tf32"


class OptimizerChoice(StrEnum):
    """Lists the optimizers, the rules that update weights."""

    ADAMW = "adamw"
    SGD = "sgd"


class RuntimeChoice(StrEnum):
    """Lists the systems that may run a plan."""

    MESHWRIGHT = "meshwright"
    MEGATRON = "megatron"
    DEEPSPEED = "deepspeed"
    FSDP = "fsdp"


class ObjectiveChoice(StrEnum):
    """Lists what a plan can be chosen for: the shortest step, or the lowest cost of a token."""

    TIME = "time"
    COST = "cost"


PlanFile = Annotated[Path, typer.Argument(help="A plan, as `meshwright plan` writes it.")]
ClusterOption = Annotated[
    Path | None, typer.Option("--cluster", help="Cluster file; default: the plan's own.")
]
BudgetOption = Annotated[
    str | None,
    typer.Option(help="Stop improving after this time: 5s, 500 ms. Default: when done."),
]
MarginOption = Annotated[
    float | None,
    typer.Option(
        help="Of plans whose predicted steps differ by less than this share, take one with fewer "
        "stages and larger micro-batches. Default: 0.03 without --profile, else 0."
    ),
]
ForbidOption = Annotated[
    list[str] | None,
    typer.Option(
        help="Leave out schedules, virtual-stages, boundary-kinds, divided-states or "
        "coarser-plans, which are tried on the best plans. May be repeated."
    ),
]
SequenceOption = Annotated[int, typer.Option(help="Tokens per row.")]
PrecisionOption = Annotated[
    PrecisionChoice | None,
    typer.Option(help="Default: the fastest that every device supports."),
]
RuntimeOption = Annotated[
    RuntimeChoice,
    typer.Option(
        help="The system that will run the plan: the step is predicted with its habits where "
        "nothing was measured (fsdp: PyTorch's FSDP and pipelines)."
    ),
]
CompiledOption = Annotated[
    bool,
    typer.Option(
        "--compiled/--eager",
        help="Whether a compiler fuses the operations of a layer (torch.compile).",
    ),
]
MeasuredTimes = Annotated[Path | None, typer.Option("--profile", help="Measured times.")]
PricesOption = Annotated[
    Path | None,
    typer.Option(
        "--prices", help="File of hourly prices, to say what a plan costs. Default: none."
    ),
]
ObjectiveOption = Annotated[
    ObjectiveChoice,
    typer.Option(help="What shall be least: time of a step, or cost of a token (with --prices)."),
]
LimitOption = Annotated[
    list[str] | None,
    typer.Option(
        help="Keep within '30 USD/h', '0.05 USD/step', '0.40 USD/Mtoken', '2 s' a step or "
        "'5000 tokens/s'; with --prices. May be repeated."
    ),
]
FrontOption = Annotated[
    Path | None,
    typer.Option(help="Draw the front of speed and cost as SVG; plans for all of it."),
]
ProfileOption = Annotated[
    Path | None, typer.Option("--profile", help="Measured times; default: the plan's own.")
]
NewPlanFile = Annotated[Path, typer.Option("--output", "-o", help="Where to write it.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")]
PageOption = Annotated[Path | None, typer.Option(help="Write an HTML page.")]
ModelOption = Annotated[
    str, typer.Option("--model", help="A name (gpt2-xl), a config.json, or a model.toml.")
]


def say(text: str, *, to_errors: bool = False) -> None:
    """Prints a line; control characters are escaped."""
    from meshwright.text import printable

    typer.echo(printable(text, lines=True), err=to_errors)


def search_limits(
    budget: str | None, forbid: list[str] | None, margin: float | None = None
) -> SearchLimits:
    """Returns what BudgetOption, ForbidOption and MarginOption set, for each verb that searches.
    Raises OptionError or PlanError, before any work is done, for values that they cannot have."""
    from meshwright.records import checked
    from meshwright.search.options import options_without
    from meshwright.workflows.session import SearchLimits

    forbidden = tuple(forbid or ())
    options_without(forbidden)
    named = {"budget_seconds": "--budget", "margin": "--margin"}
    return checked(SearchLimits, named, budget_seconds=budget, forbidden=forbidden, margin=margin)


def check_outputs(*paths: Path | None) -> None:
    """Raises OutputError, before any work is done, if one of the files could not be written."""
    from meshwright import files

    for path in paths:
        if path is not None:
            files.check_output(path)
