"""Plans on disk."""

from __future__ import annotations

from pathlib import Path

from meshwright.errors import PlanError, Problem
from meshwright.plan.spec import FORMAT, Plan
from meshwright.plan.validate import validate_plan
from meshwright.records import dumps, parse, read


def load_plan(path: Path) -> Plan:
    """Read a plan and check it by itself. Raises PlanError with every mistake, file and field."""
    data = read(path, error=PlanError)
    found = data.get("format")
    if found != FORMAT:
        mend = "write the plan with this version" if isinstance(found, int) else ""
        raise PlanError(Problem(str(path), "format", repr(found), str(FORMAT), mend))
    plan = parse(data, Plan, source=str(path), error=PlanError)
    validate_plan(plan, source=str(path))
    return plan


def save_plan(plan: Plan, path: Path) -> None:
    """Write a plan as JSON; the same plan always gives the same bytes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(dumps(plan))
