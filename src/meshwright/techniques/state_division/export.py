"""Tells other tools of divided optimizer states: all that have ZeRO-1 know it as one switch.

Names: zero_optimization in docs/_pages/config-json.md of DeepSpeed 0.19;
megatron/core/optimizer/distrib_optimizer.py of Megatron-LM 0.20, which accelerate's plugin calls.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

from meshwright.export.answers import ExportedTraining, PropertyAnswer
from meshwright.plan.spec import Plan, StateDivision
from meshwright.techniques.state_division.plan import divides_optimizer

PROPERTY = "stage.states"
MEND = "`meshwright plan --forbid divided-states` makes a plan without them"

Value = StateDivision | None
Lines = Callable[[bool, ExportedTraining], Iterable[str]]


def answers(tool: str) -> dict[str, PropertyAnswer]:
    """Returns the answer of a tool for `Stage.states`; one that is not known here refuses it."""
    return {PROPERTY: _OF_TOOLS.get(tool, _none(f"{tool} divides no optimizer states"))}


def beside_the_schedule(plan: Plan) -> Iterator[str]:
    """Yields the note for a tool that is told the schedule alone."""
    held = [divides_optimizer(stage.states) for stage in plan.stages]
    if any(held):
        which = "all stages" if all(held) else "the stages marked z"
        yield f"the optimizer states of {which}, which the replicas are to divide (ZeRO-1)"


def _none(lacks: str) -> PropertyAnswer:
    """Refuses divided states; `lacks` says what the tool has not."""
    return PropertyAnswer(
        "refused",
        wanted=lambda value, _: f"none: {lacks}; {MEND}" if divides_optimizer(value) else "",
    )


def _switch(told: str, tool: str, write: Lines, *, only_adamw: bool = False) -> PropertyAnswer:
    """Writes the lines of a tool that has one switch for all stages."""

    def wanted(value: Value, asked: ExportedTraining) -> str:
        if not divides_optimizer(value):
            return ""
        if not all(divides_optimizer(stage.states) for stage in asked.plan.stages):
            return f"the same in all stages: {tool} has one switch for all; {MEND}"
        if only_adamw and asked.plan.job.optimizer != "adamw":
            own = f"{tool} divides only the states of Adam"
            return f"none with {asked.plan.job.optimizer}: {own}; {MEND}"
        return ""

    return PropertyAnswer(
        told, write=lambda value, asked: write(divides_optimizer(value), asked), wanted=wanted
    )


def _megatron(divided: bool, _: ExportedTraining) -> list[str]:
    return ["--use-distributed-optimizer"] * divided


def _plugin(divided: bool, _: ExportedTraining) -> list[str]:
    return [f"megatron_lm_use_distributed_optimizer: {str(divided).lower()}"]


def _deepspeed(divided: bool, asked: ExportedTraining) -> list[str]:
    """Returns ZeRO stage 1. Only with it DeepSpeed adds up the gradients of micro-batches in fp32,
    and it must be told that SGD is meant."""
    if not divided:
        return []
    job = asked.plan.job
    return [
        "zero_optimization.stage = 1",
        *['data_types.grad_accum_dtype = "fp32"'] * (job.precision != "fp32"),
        *["zero_allow_untested_optimizer = true"] * (job.optimizer == "sgd"),
    ]


_OF_TOOLS = {
    "DeepSpeed": _switch(
        "`zero_optimization.stage` 1, all stages or none", "DeepSpeed", _deepspeed
    ),
    "Megatron-LM": _switch(
        "`--use-distributed-optimizer`, all stages or none",
        "Megatron-LM",
        _megatron,
        only_adamw=True,
    ),
    "accelerate's Megatron-LM plugin": _switch(
        "`megatron_lm_use_distributed_optimizer`, all stages or none",
        "Megatron-LM",
        _plugin,
        only_adamw=True,
    ),
    "accelerate": _none(
        "without its Megatron-LM plugin accelerate replicates them, or divides weights as well"
    ),
    "torchtitan": _none("torchtitan's FSDP divides weights and gradients as well"),
}
