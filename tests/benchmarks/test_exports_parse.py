"""The plans whose exports the tools are given are sound, and each tool takes some of them."""

from __future__ import annotations

import pytest
from test_resharding import load

from meshwright.model.load import load_model
from meshwright.plan.validate import validate_plan

exports_parse = load("exports_parse")
Case = exports_parse.Case


@pytest.mark.parametrize("case", exports_parse.CASES, ids=str)
def test_every_plan_is_sound(case):
    plan = exports_parse.plan_of(case)
    model = load_model(case.model, plan.job.sequence, plan.job.precision)
    validate_plan(plan, model)
    cuts = [stop - start for start, stop in (s.layers for s in plan.pipelines[0].stages)]
    assert "|".join(map(str, cuts)) == case.cuts
    assert len(plan.devices) == case.data * case.tensor * case.stages


@pytest.mark.parametrize("tool", exports_parse.CHECKS)
def test_what_a_tool_takes_is_checked_and_a_failure_is_told(tool, monkeypatch):
    monkeypatch.setattr(exports_parse, "CASES", (Case("llama-tiny", "10"), Case("gpt-tiny", "10")))
    seen = []

    def check(case, files):
        seen.append(case.model)
        assert "NOT_EXPRESSED.md" in files
        raise ValueError("read otherwise")

    told = [outcome for _, outcome in exports_parse.outcomes(tool, check)]
    assert told[0] == "FAILED: ValueError: read otherwise"
    assert len(seen) == sum(outcome.startswith("FAILED") for outcome in told)
