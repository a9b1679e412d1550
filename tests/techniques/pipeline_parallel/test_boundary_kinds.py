"""What crosses a boundary of each kind: the plan's bytes, and every instruction on the timeline."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
import torch.distributed as dist
from cases import CASES, KINDS, batch
from ranks import run_ranks
from test_parity import graph

from meshwright.model.spec import LayerGraph
from meshwright.runtime.run_folder import TrainingOptions

pytestmark = pytest.mark.heavy

NAMES = [f"{kind}, 2x1 to 1x2, skips" for kind in KINDS]


def play(rank: int, graph: LayerGraph) -> dict[str, tuple[int, int, Counter[str] | None]]:
    """For each case: bytes that left in one step, those of the program, and labels of the
    timeline."""
    from meshwright.runtime.engine import Engine

    left = [0]
    isend, broadcast = dist.isend, dist.broadcast

    def sent(tensor: torch.Tensor, *args: Any, **options: Any) -> Any:
        left[0] += tensor.nbytes
        return isend(tensor, *args, **options)

    def spread(tensor: torch.Tensor, *args: Any, **options: Any) -> Any:
        left[0] += tensor.nbytes * (args[:1] == (rank,))
        return broadcast(tensor, *args, **options)

    def rows(first: int, last: int) -> tuple[torch.Tensor, ...]:
        return tuple(t[first:last] for t in batch(0))

    found = {}
    dist.isend, dist.broadcast = sent, spread
    for name in NAMES:
        case = CASES[name]
        with Engine(
            case.model(),
            case.plan,
            inputs=batch(0),
            graph=graph,
            optimizer=lambda p: torch.optim.SGD(p, lr=1e-2),
            options=TrainingOptions(clip_norm=0),
        ) as engine:
            left[0] = 0
            _, timeline = engine.record(rows)
            bytes_left = left[0]
            planned = sum(
                i.bytes
                for i in engine.program.ranks[rank]
                if i.op.kind == "send" and (not i.ranks or i.peer == i.ranks[1])
            )
            labels = None if timeline is None else Counter(i.label for i in timeline.intervals)
            found[name] = (bytes_left, planned, labels)
    return found


def test_bytes_are_the_plans_and_the_timeline_is_whole() -> None:
    ranks = run_ranks(4, play, graph(CASES[NAMES[0]].model))
    for name in NAMES:
        for each in ranks:
            sent, planned, _ = each[name]
            assert sent == planned
        gathers = sum(n for label, n in ranks[0][name][2].items() if "GATHER" in label)
        # Two ranks gather, for each of four micro-batches, the rows of two replicas.
        assert gathers == (16 if name.startswith("scatter") else 0)
    total = {name: sum(each[name][0] for each in ranks) for name in NAMES}
    direct, scattered, broadcast = (total[name] for name in NAMES)
    assert scattered < direct
    assert broadcast < direct
