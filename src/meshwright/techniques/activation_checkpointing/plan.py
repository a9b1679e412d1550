"""Names the stages that recompute in the description of a plan, and lets them keep activations."""

from __future__ import annotations

from dataclasses import replace

from meshwright.plan.spec import Stage


def stage_text(stage: Stage) -> str:
    """Formats recomputation in the one-line description of a plan: `[12r|12]`."""
    return "r" if stage.recompute else ""


def without(stage: Stage) -> Stage:
    """Returns the stage with activations that are kept."""
    return replace(stage, recompute=False)
