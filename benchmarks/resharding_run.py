"""The resharding cases on gloo processes: what `resharding.py --run` runs, and checks."""

from __future__ import annotations

import os
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from math import prod
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from resharding_cases import CASES, ITEM, METHODS, Case, layouts
from resharding_messages import Strategy, messages

from meshwright.layout.boxes import elements
from meshwright.layout.reshard import Transfer, reshard

SCALE = 8
"""Every dimension is so much smaller."""
HEADERS = 256
"""Bytes that gloo may add to a message for its own purposes."""
CHUNKS = 4
LIMIT_SECONDS = 120
"""Without a word from any process for so long, one of them has failed."""


def scaled(case: Case) -> Case:
    """Two devices for each host, and a tensor that is quick to move."""
    shape = tuple(size // SCALE for size in case.shape)
    return Case(case.name, (case.source[0], 2), (case.target[0], 2), shape, case.has, case.wants)


def execute(
    transfers: Sequence[Transfer],
    hosts: dict[int, str],
    strategy: Strategy | None,
    rank: int,
    have: Any,
) -> Any:
    """Plays one rank's part of the messages, in the order of all; gives {box: flat tensor}."""
    import torch
    import torch.distributed as dist

    got: dict[Any, Any] = {}
    leaving = []
    for number, transfer in enumerate(transfers):
        if rank == transfer.source:
            flat = have(transfer.box)
        elif rank in transfer.receivers:
            flat = got[transfer.box] = torch.empty(elements(transfer.box), dtype=torch.int32)
        else:
            continue
        for message in messages(transfer, hosts, strategy, CHUNKS):
            part = flat[slice(*message.part)]
            if message.target == rank:
                dist.recv(part, message.source, tag=number)
            elif message.source == rank:
                leaving.append(dist.isend(part, message.target, tag=number))
    for work in leaving:
        work.wait()
    return got


def worker(rank: int, size: int, store: str, results: Any) -> None:
    """One process: all cases, one after another."""
    import torch
    import torch.distributed as dist

    from meshwright.runtime.launch_variables import interface_variables

    torch.set_num_threads(1)
    os.environ.update(interface_variables(None, os.environ))
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=size)
    for case in map(scaled, CASES):
        source, target, hosts = layouts(case)
        whole = torch.arange(prod(case.shape), dtype=torch.int32).view(case.shape)

        def cut(box: Any, whole: Any = whole) -> Any:
            return whole[tuple(slice(*ends) for ends in box)].reshape(-1)

        for method, (strategy, order) in METHODS.items():
            transfers = reshard(source, target, hosts, order)
            execute(transfers, hosts, strategy, rank, cut)  # opens the connections
            dist.barrier()
            before = written()
            got = execute(transfers, hosts, strategy, rank, cut)
            sent = written() - before
            assert all(torch.equal(flat, cut(box)) for box, flat in got.items())
            tile = target.get(rank)
            assert tile is None or sum(map(elements, got)) == elements(tile[0])
            results.put((case.name, method, rank, sent))
            dist.barrier()
    dist.destroy_process_group()


def written() -> int:
    """Bytes that this process has written so far, to sockets and files."""
    lines = Path("/proc/self/io").read_text().splitlines()
    return int(dict(line.split(": ") for line in lines)["wchar"])


def run() -> list[dict[str, Any]]:
    """All cases on real processes; compares what each wrote with what the plan says."""
    size = max(prod(scaled(case).source) + prod(scaled(case).target) for case in CASES)
    context = get_context("fork")
    results = context.Queue()
    with tempfile.TemporaryDirectory() as folder:
        store = str(Path(folder) / "store")
        processes = [
            context.Process(target=worker, args=(rank, size, store, results), daemon=True)
            for rank in range(size)
        ]
        for process in processes:
            process.start()
        count = size * len(CASES) * len(METHODS)
        heard = [results.get(timeout=LIMIT_SECONDS) for _ in range(count)]
        for process in processes:
            process.join(60)
    sent = {(name, method, rank): count for name, method, rank, count in heard}
    print(f"{'case':6}{'method':14}{'messages':>10}{'plan bytes':>12}{'written':>12}{'added':>8}")
    return [
        compared(case, method, [sent[case.name, method, rank] for rank in range(size)])
        for case in map(scaled, CASES)
        for method in METHODS
    ]


def compared(case: Case, method: str, sent: Sequence[int]) -> dict[str, Any]:
    """The plan's bytes of each rank are what it wrote, gloo's headers apart."""
    source, target, hosts = layouts(case)
    strategy, order = METHODS[method]
    transfers = reshard(source, target, hosts, order)
    plan: Counter[int] = Counter()
    ends: Counter[int] = Counter()
    for transfer in transfers:
        for message in messages(transfer, hosts, strategy, CHUNKS):
            plan[message.source] += (message.part[1] - message.part[0]) * ITEM
            ends.update((message.source, message.target))
    for rank, count in enumerate(sent):
        added = count - plan[rank]
        assert 0 <= added <= HEADERS * ends[rank] + HEADERS, (case.name, method, rank, added)
    total = sum(plan.values())
    print(f"{case.name:6}{method:14}{sum(ends.values()) // 2:10}{total:12}", end="")
    print(f"{sum(sent):12}{(sum(sent) - total) / total:8.2%}")
    return {"case": asdict(case), "method": method, "plan": total, "written": sum(sent)}
