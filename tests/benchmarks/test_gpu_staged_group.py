"""benchmarks/gpu_staged_group.py: what arrives over gloo by way of copies on the host."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch._C import _distributed_c10d as c10d

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))
try:
    import gpu_staged_group
finally:
    sys.path.remove(str(BENCHMARKS))

Group = gpu_staged_group.StagedGroup


def in_two_ranks(act: Callable[[Group, int], object]) -> list[object]:
    """What two ranks of a staged group return, each in a thread of its own."""
    store, told, failures = dist.HashStore(), [None, None], []

    def run(rank: int) -> None:
        try:
            group = Group(dist.PrefixStore("staged", store), rank, 2, timedelta(seconds=60))
            told[rank] = act(group, rank)
        except BaseException as failure:
            failures.append(failure)

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(2)]
    for each in threads:
        each.start()
    for each in threads:
        each.join()
    assert not failures, failures
    return told


def test_messages_arrive_when_they_are_waited_for() -> None:
    def act(group: Group, rank: int) -> object:
        if rank == 0:
            tensor = torch.arange(4.0)
            work = group.send([tensor], 1, 0)
            tensor.zero_()  # the message is a copy
            work.wait()
            return None
        arrived = torch.full((4,), -1.0)
        work = group.recv([arrived], 0, 0)
        before = arrived.tolist()
        assert work.wait()
        return before, arrived.tolist()

    assert in_two_ranks(act)[1] == ([-1.0] * 4, [0.0, 1.0, 2.0, 3.0])


@pytest.mark.parametrize("kind", ["allreduce", "broadcast", "allgather", "gather", "base"])
def test_collectives_give_what_gloo_gives(kind: str) -> None:
    def act(group: Group, rank: int) -> object:
        own, both = torch.tensor([rank + 1.0, 10.0]), torch.zeros(4)
        out = [torch.zeros(2), torch.zeros(2)]
        if kind == "allreduce":
            group.allreduce([own], dist.AllreduceOptions()).wait()
            return own.tolist()
        if kind == "broadcast":
            options = dist.BroadcastOptions()
            options.rootRank = 1
            group.broadcast([own], options).wait()
            return own.tolist()
        if kind == "allgather":
            group.allgather([out], [own], c10d.AllgatherOptions()).wait()
            return torch.cat(out).tolist()
        if kind == "gather":
            options = c10d.GatherOptions()
            options.rootRank = 0
            group.gather([out] if rank == 0 else [], [own], options).wait()
            return torch.cat(out).tolist() if rank == 0 else [1.0, 10.0, 2.0, 10.0]
        group._allgather_base(both, own, c10d.AllgatherOptions()).wait()
        half = torch.zeros(2)
        group._reduce_scatter_base(half, both, dist.ReduceScatterOptions()).wait()
        assert half.tolist() == [2 * x for x in both.tolist()[2 * rank : 2 * rank + 2]]
        return both.tolist()

    wanted = {"allreduce": [3.0, 20.0], "broadcast": [2.0, 10.0]}
    assert in_two_ranks(act) == [wanted.get(kind, [1.0, 10.0, 2.0, 10.0])] * 2
