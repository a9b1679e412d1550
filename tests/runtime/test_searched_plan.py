"""A plan of the search in which devices hold several stages: it runs, and training equals one
process's."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
from cases import ROWS, SEQUENCE, Case, batch, gpt
from ranks import run_ranks
from test_parity import exact, reference, relative, trained

from meshwright.cluster.spec import Link
from meshwright.model.spec import LayerGraph
from meshwright.model.trace import trace
from meshwright.plan.ranks import stage_layout
from meshwright.plan.spec import Job
from meshwright.search.planner import find_plan
from worlds import cluster, device

LINK = Link(bandwidth=1e6, latency=1e-6)
"""A network on which parameters are dear to reduce."""
SLOW = (device("fast", 2e-4, precision="fp64"), device("slow", 1e-4, precision="fp64"))


def searched() -> tuple[Case, LayerGraph]:
    """A plan for the tied model, with both its ends on one device, and that model's layers."""
    model = partial(gpt, layers=8)
    graph = trace(model(), batch(0), "fp64", SEQUENCE, "gpt")
    job = Job(global_batch=ROWS, sequence=SEQUENCE, precision="fp64")
    where = cluster(("fast",), ("slow",), network=LINK, types=SLOW)
    plan = find_plan(graph, where, job)
    return Case(model=model, pipelines=plan.pipelines, schedule=plan.schedule), graph


def play(_: int, case: Case, graph: LayerGraph) -> tuple[list[tuple[float, float]], Any]:
    """On one rank."""
    return trained(case, graph)


@pytest.mark.timeout(300)
def test_a_searched_plan_with_several_stages_on_each_device_trains_as_one_process() -> None:
    case, graph = searched()
    (pipeline,) = case.pipelines
    assert max(map(len, stage_layout(pipeline))) > 1
    ranks = run_ranks(case.world_size, play, case, graph, limit=120)
    wanted, weights = reference(case)
    for losses, _ in ranks:
        assert exact(losses) == pytest.approx(exact(wanted), rel=1e-9)
    for name, value in weights.items():
        assert relative(ranks[0][1][name], value.detach()) < 1e-9, name
