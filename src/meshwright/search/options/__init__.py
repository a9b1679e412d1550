"""Lists the options that the search tries on its best plans before it ends."""

from __future__ import annotations

from collections.abc import Collection

from meshwright.errors import PlanError, Problem
from meshwright.search.finishing import PlanOption
from meshwright.search.options import (
    boundary_kinds,
    coarser_plans,
    other_schedules,
    virtual_stages,
)
from meshwright.techniques import rooms_with

OPTIONS: tuple[PlanOption, ...] = (
    boundary_kinds.OPTION,
    other_schedules.OPTION,
    virtual_stages.OPTION,
    *(room.OPTION for room in rooms_with("options")),
    coarser_plans.OPTION,
)
"""The options in the order in which they are tried; those of techniques come before coarser
plans, which are compared with the best of all the others."""
OPTION_NAMES = tuple(option.name for option in OPTIONS)


def options_without(forbidden: Collection[str]) -> list[PlanOption]:
    """Returns the options but for those with forbidden names.

    Raises PlanError for a name that no option has.
    """
    PlanError.check(
        Problem("search", "--forbid", repr(name), f"one of: {', '.join(OPTION_NAMES)}")
        for name in forbidden
        if name not in OPTION_NAMES
    )
    return [option for option in OPTIONS if option.name not in forbidden]
