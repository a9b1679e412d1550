"""Names the stages that recompute in the description of a plan."""

from __future__ import annotations

from meshwright.plan.spec import Stage


def stage_text(stage: Stage) -> str:
    """Formats recomputation in the one-line description of a plan: `[12r|12]`."""
    return "r" if stage.recompute else ""
