"""Reads and writes plan files (JSON)."""

from __future__ import annotations

from pathlib import Path

from meshwright import files
from meshwright.errors import PlanError
from meshwright.plan.spec import Plan
from meshwright.plan.validate import validate_plan
from meshwright.records import check_format, dumps, parse, read


def load_plan(path: str | Path) -> Plan:
    """Reads a plan and checks it by itself. Raises PlanError with every mistake, each with file and
    field."""
    data = read(Path(path), error=PlanError)
    check_format(data, source=str(path), error=PlanError)
    plan = parse(data, Plan, source=str(path), error=PlanError)
    validate_plan(plan, source=str(path))
    return plan


def save_plan(plan: Plan, path: str | Path) -> None:
    """Writes a plan as JSON; the same plan always gives the same bytes."""
    files.write_text(Path(path), dumps(plan), durable=True)
