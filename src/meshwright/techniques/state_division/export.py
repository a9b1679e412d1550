"""Tells other tools of divided optimizer states: all that have ZeRO-1 know it as one switch.

Names: zero_optimization in docs/_pages/config-json.md of DeepSpeed 0.19;
megatron/core/optimizer/distrib_optimizer.py of Megatron-LM 0.20, which accelerate's plugin calls.
"""

from __future__ import annotations

from collections.abc import Iterator

from meshwright.export.answers import (
    ExportedTraining,
    PropertyAnswer,
    StageSwitch,
    switch_of_all,
    switch_of_none,
)
from meshwright.plan.spec import Plan
from meshwright.techniques.state_division.plan import divides_optimizer

PROPERTY = "stage.states"
_DIVIDED = StageSwitch(
    "states",
    divides_optimizer,
    mend="; `meshwright plan --forbid divided-states` makes a plan without them",
)


def answers(tool: str) -> dict[str, PropertyAnswer]:
    """Returns the answer of a tool for `Stage.states`; one that is not known here refuses it."""
    unknown = switch_of_none(_DIVIDED, f"{tool} divides no optimizer states")
    return {PROPERTY: _OF_TOOLS.get(tool, unknown)}


def beside_the_schedule(plan: Plan) -> Iterator[str]:
    """Yields the note for a tool that is told the schedule alone."""
    held = [divides_optimizer(stage.states) for stage in plan.stages]
    if any(held):
        which = "all stages" if all(held) else "the stages marked z"
        yield f"the optimizer states of {which}, which the replicas are to divide (ZeRO-1)"


def _only_adamw(asked: ExportedTraining) -> str:
    optimizer = asked.plan.job.optimizer
    own = f"Megatron-LM divides only the states of Adam, not of {optimizer}"
    return "" if optimizer == "adamw" else own


def _megatron(divided: bool, _: ExportedTraining) -> list[str]:
    return ["--use-distributed-optimizer"] * divided


def _plugin(divided: bool, _: ExportedTraining) -> list[str]:
    return [f"megatron_lm_use_distributed_optimizer: {str(divided).lower()}"]


def _deepspeed(divided: bool, asked: ExportedTraining) -> list[str]:
    """Returns the setting for ZeRO stage 1. Only with it does DeepSpeed add up the gradients of
    micro-batches in fp32; it must then be told that SGD is meant."""
    if not divided:
        return []
    job = asked.plan.job
    return [
        "zero_optimization.stage = 1",
        *['data_types.grad_accum_dtype = "fp32"'] * (job.precision != "fp32"),
        *["zero_allow_untested_optimizer = true"] * (job.optimizer == "sgd"),
    ]


_OF_TOOLS = {
    "DeepSpeed": switch_of_all(_DIVIDED, "`zero_optimization.stage` 1", "DeepSpeed", _deepspeed),
    "Megatron-LM": switch_of_all(
        _DIVIDED,
        "`--use-distributed-optimizer`",
        "Megatron-LM",
        _megatron,
        _only_adamw,
    ),
    "accelerate's Megatron-LM plugin": switch_of_all(
        _DIVIDED,
        "`megatron_lm_use_distributed_optimizer`",
        "Megatron-LM",
        _plugin,
        _only_adamw,
    ),
    "accelerate": switch_of_none(
        _DIVIDED,
        "without its Megatron-LM plugin accelerate replicates them, or divides weights as well",
    ),
    "torchtitan": switch_of_none(
        _DIVIDED, "torchtitan's FSDP divides weights and gradients as well"
    ),
}
