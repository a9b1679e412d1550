"""Clusters as people have them are planned for without a crash, and what the plans say is so.

`python benchmarks/random_plans.py --count 500` gives each search the time that it wants, not the
second that it has here; `--budget 1 --show N` tries a case that has failed here.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest

from meshwright.workflows.session import SearchLimits, open_session, search_plan
from soaks import tenth

pytestmark = pytest.mark.heavy

ROOT = Path(__file__).parents[2]


def load(name: str):
    spec = importlib.util.spec_from_file_location(name, ROOT / "benchmarks" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


random_plans = load("random_plans")

LINKED = """\
format = 1
name = "linked"
[[node]]
name = "n"
count = 2
devices = ["2 x T4"]
network = { bandwidth = "10 Gbit/s", latency = "50 us" }
[[link]]
between = ["n-0", "n-1"]
bandwidth = "20 Gbit/s"
latency = "1 us"
"""
"""Two nodes with a cable of their own."""
PLAIN = """\
format = 1
name = "plain"
[[node]]
name = "n"
count = 2
devices = ["2 x A100-40"]
inside = { bandwidth = "300 GB/s", latency = "8 us", kind = "measured" }
network = { bandwidth = "100 Gbit/s", latency = "50 us", kind = "measured" }
"""
"""Stages of several devices that are divided into virtual ones, with broadcasts between them."""


def check(cluster: Path, model: str, batch: int, sequence: int):
    here = open_session(
        model=model,
        cluster=cluster,
        profile=None,
        global_batch=batch,
        sequence=sequence,
        precision=None,
        optimizer="adamw",
    )
    plan = search_plan(here, SearchLimits(margin=0.0))
    assert not [*random_plans.wrongs(plan, here.model, here.cluster)]
    return plan


def test_a_plan_may_cross_an_explicit_link(tmp_path):
    (tmp_path / "linked.toml").write_text(LINKED)
    plan = check(tmp_path / "linked.toml", "gpt-tiny", 8, 64)
    assert len(plan.pipelines[0].stages) > 1


def test_virtual_stages_may_have_broadcasts_between_them(tmp_path):
    (tmp_path / "plain.toml").write_text(PLAIN)
    plan = check(tmp_path / "plain.toml", "llama-2-7b", 16, 1024)
    stages = plan.pipelines[0].stages
    assert any(stage.boundary == "broadcast" for stage in stages)
    assert len({stage.devices for stage in stages}) < len(stages)


def test_an_irregular_cluster_is_planned_for():
    check(ROOT / "examples" / "clusters" / "irregular.toml", "gpt2-medium", 64, 1024)


@pytest.mark.slow
@pytest.mark.parametrize("batch", [1, 8, 48, 256])
@pytest.mark.parametrize("model", ["gpt2", "gpt2-medium", "llama-2-7b", "mixtral-tiny"])
def test_an_irregular_cluster_is_planned_for_whatever_the_model_and_the_batch(model, batch):
    check(ROOT / "examples" / "clusters" / "irregular.toml", model, batch, 512)


def test_every_case_can_be_drawn_and_read_again():
    for number in range(100):
        case = random_plans.draw(number)
        assert case == random_plans.draw(number)
        model, where, job = random_plans.inputs(case)
        assert job.sequence == model.sequence
        assert where.nodes


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_ordinary_clusters_are_planned_for_without_a_crash():
    count = tenth(500)
    found = [*random_plans.outcomes(range(count), workers=2, budget_seconds=1.0)]
    assert not [f"case {each.case.number}: {each.failure}" for each in found if each.failure]
    assert sum(each.found == "planned" for each in found) > 0.7 * count
