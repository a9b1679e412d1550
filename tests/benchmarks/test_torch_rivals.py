"""PyTorch's own systems on virtual devices: they train what they should, take the time of the
table, and end."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn

from meshwright.cost.priced_plan import PricedPlan
from meshwright.emulation.dilation import Dilation, Dilator
from meshwright.emulation.virtual_times import virtual_times
from meshwright.model.spec import LayerGraph, without_division
from meshwright.plan.ranks import stage_placements
from meshwright.plan.spec import Job
from meshwright.plan.validate import validate_plan
from meshwright.testbed.launcher import TestbedLauncher, launcher_on_testbed
from meshwright.testbed.lifecycle import RunningTestbed, design_testbed

ROOT = Path(__file__).parents[2]
FOLDERS = [str(ROOT / folder) for folder in ("benchmarks", "tests/runtime", "tests/testbed")]
sys.path[:0] = FOLDERS
try:
    from against_amp import amp_choice, of_equal_nodes
    from beds import NOTHING
    from ranks import run_ranks
    from testbed_accuracy import EIGHT, PAIR
    from testbed_cases import SEQUENCE, Known, Setting, Suite, bed_at
    from testbed_rank import graph_of
    from torch_rivals import Rival, torch_rivals
    from torch_streams import sharded
finally:
    del sys.path[: len(FOLDERS)]


class Chain(nn.Module):
    """Layers for `sharded`; sizes that four ranks cannot share evenly."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in ((6, 10), (10, 10), (10, 3)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return x.square().mean()


def seeded() -> Chain:
    torch.manual_seed(0)
    return Chain()


def rows() -> torch.Tensor:
    return torch.randn(4, 6, generator=torch.Generator().manual_seed(1))


def sharded_gradients(rank: int, hybrid: bool, reshard: bool) -> list[torch.Tensor]:
    model = seeded()
    sets, across = ([[0, 1], [2, 3]], [[0, 2], [1, 3]]) if hybrid else ([[0, 1, 2, 3]], [])

    def own(groups: list[list[int]]) -> dist.ProcessGroup:
        return next(g for r, g in [(r, dist.new_group(r)) for r in groups] if rank in r)

    stream = sharded(
        model,
        reshard=reshard,
        device=Dilator(Dilation(share=float("inf"))),
        gathering=own(sets),
        reducing=own(sets),
        across=own(across) if hybrid else None,
    )
    for _ in range(2):
        model.zero_grad()
        model(rows()[rank : rank + 1]).backward()
        stream.wait()
    return [p.grad.full_tensor() for p in model.parameters()]


@pytest.mark.slow
@pytest.mark.parametrize("hybrid", [False, True])
@pytest.mark.parametrize("reshard", [False, True])
def test_fsdp_with_streams_gives_the_gradients_of_one_process(
    hybrid: bool, reshard: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    for folder in FOLDERS:
        monkeypatch.syspath_prepend(folder)
    model = seeded()
    model(rows()).backward()
    for found in run_ranks(4, sharded_gradients, hybrid, reshard):
        for parameter, gradient in zip(model.parameters(), found, strict=True):
            torch.testing.assert_close(gradient, parameter.grad)


@pytest.fixture(scope="module")
def graph() -> LayerGraph:
    return without_division(graph_of("gpt", SEQUENCE), "tensor")


def known_at(setting: Setting, graph: LayerGraph) -> Known:
    bed = bed_at(setting.place, "virtual", foreign_share=1.0, attempts=1)
    job = Job(global_batch=16, sequence=SEQUENCE, precision="fp32", optimizer="sgd")
    return Known(setting=setting, graph=graph, cluster=bed.cluster, profile=None, job=job)


@pytest.mark.heavy
def test_every_system_comes_with_a_plan_that_holds(graph: LayerGraph) -> None:
    known = known_at(Setting(EIGHT, "virtual", "gpt"), graph)
    rivals = torch_rivals(known)
    systems = {(r.job["system"], r.plan.schedule) for r in rivals}
    assert systems == {("ddp", "1f1b"), ("fsdp", "1f1b"), ("pipelining", "1f1b"),
                       ("pipelining", "interleaved-1f1b")}  # fmt: skip
    for rival in rivals:
        validate_plan(rival.plan, graph, known.cluster)
    # Nodes of two and of six devices cannot be replicas of each other.
    assert not any(r.job.get("hybrid") for r in rivals)
    even = known_at(Setting(PAIR, "virtual", "gpt"), graph)
    assert sum(r.job.get("hybrid", False) for r in torch_rivals(even)) == 2


@pytest.mark.heavy
def test_amp_is_told_of_nodes_of_one_size(graph: LayerGraph) -> None:
    known = known_at(Setting(EIGHT, "virtual", "gpt"), graph)
    told = of_equal_nodes(known.cluster)
    assert [node.devices for node in told.nodes] == [("fast",) * 2, *[("slow",) * 2] * 3]
    validate_plan(amp_choice(known), graph, known.cluster)


class OnLoopback(Suite):
    """A suite without a testbed: all processes meet on the loopback."""

    def launcher(self, setting: Setting) -> TestbedLauncher:
        if self._up is None:
            bed = bed_at(setting.place, "virtual", foreign_share=1.0, attempts=1)
            up: RunningTestbed = design_testbed(bed, NOTHING, "mw-none").running
            self._up = (
                (setting.place.name, setting.mode),
                self._stack.enter_context(launcher_on_testbed(up)),
            )
        return self._up[1]


def compute_seconds(known: Known, rival: Rival) -> float:
    """Of the busiest device."""
    times = virtual_times(PricedPlan(rival.plan, known.graph, known.cluster)).ranks
    busy = dict.fromkeys(range(len(times)), 0.0)
    for stage in stage_placements(rival.plan):
        for placement in stage.mesh.members:
            own, layers = times[placement.rank], slice(*stage.layers)
            busy[placement.rank] += sum(own.forward[layers]) + sum(own.backward[layers])
    return rival.plan.pipelines[0].micro_batches * max(busy.values())


@pytest.mark.slow
def test_every_system_runs_to_its_end(
    tmp_path: Path, graph: LayerGraph, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Layers sleep at least their time, so that no step can be shorter than the busiest rank's: one
    step after the first is enough to see it."""
    path = [FOLDERS[0], *filter(None, [os.environ.get("PYTHONPATH")])]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(path))
    known = known_at(Setting(PAIR, "virtual", "gpt"), graph)
    suite = OnLoopback(tmp_path, foreign_share=1.0, attempts=1)
    seen = set()
    try:
        for rival in torch_rivals(known):
            kind = (rival.plan.schedule, *rival.job.values())
            if kind in seen:
                continue
            seen.add(kind)
            line = suite.measure(known, rival.name, rival.plan, rival.job | {"steps": 2})
            assert line["measured"] > 0.99 * compute_seconds(known, rival), rival.name
    finally:
        suite.close()
    assert len(seen) >= 8
