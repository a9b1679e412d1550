"""Plan files of before say nothing of who runs the plan."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from meshwright.errors import PlanError
from meshwright.plan.files import load_plan, save_plan

OLD = Path(__file__).parents[1] / "old_files" / "plan_without_runtime.json"


def test_a_plan_that_names_no_runtime_is_run_by_ours(tmp_path: Path) -> None:
    assert "runtime" not in json.loads(OLD.read_text())["job"]
    plan = load_plan(OLD)
    assert plan.job.runtime == "meshwright"
    save_plan(plan, tmp_path / "plan.json")
    assert load_plan(tmp_path / "plan.json") == plan


def test_a_runtime_that_does_not_exist_is_refused_by_name(tmp_path: Path) -> None:
    told = json.loads(OLD.read_text())
    told["job"]["runtime"] = "megatrn"
    path = tmp_path / "plan.json"
    path.write_text(json.dumps(told))
    with pytest.raises(PlanError, match=r"job\.runtime: found 'megatrn'.*megatron"):
        load_plan(path)
