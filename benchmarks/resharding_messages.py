"""The messages of a transfer, by strategy: what `resharding_run.py` sends.

No benchmark of its own.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

from meshwright.layout.boxes import Range, elements, is_empty
from meshwright.layout.reshard import Transfer
from meshwright.layout.shares import cut, own_share

Strategy = Literal["send", "gather", "broadcast"]
"""How a box travels. `send`: the whole box to every receiver. `gather`: a part of the box to
each receiver of a host, and these then all-gather the parts. `broadcast`: a chain from host to
host, and inside each from rank to rank, in which each rank forwards chunk by chunk what it
receives."""


@dataclass(frozen=True)
class Message:
    """One point-to-point message: a range of the elements of a transfer's box, counted in
    row-major order."""

    source: int
    target: int
    part: Range


def messages(
    transfer: Transfer, hosts: Mapping[int, str], strategy: Strategy | None = None, chunks: int = 1
) -> Iterator[Message]:
    """Yield the point-to-point messages of a transfer, each after those that bring what it carries.

    Without a strategy, a transfer to one receiver is a send and any other a broadcast, which is cut
    into `chunks` pieces, one of which is forwarded while the next arrives.
    """
    size = elements(transfer.box)
    strategy = strategy or ("send" if len(transfer.receivers) == 1 else "broadcast")
    if strategy == "send":
        for rank in transfer.receivers:
            yield Message(source=transfer.source, target=rank, part=(0, size))
    elif strategy == "broadcast":
        chain = (transfer.source, *transfer.receivers)
        for part in _even(size, max(1, min(chunks, size))):
            for source, target in pairwise(chain):
                yield Message(source=source, target=target, part=part)
    else:
        groups: dict[str, list[int]] = defaultdict(list)
        for rank in transfer.receivers:
            groups[hosts[rank]].append(rank)
        for ranks in groups.values():
            yield from _gathered(transfer.source, ranks, size)


def _gathered(source: int, ranks: Sequence[int], size: int) -> Iterator[Message]:
    """Yield the messages that give each rank one part, then those of a ring all-gather, in each
    step of which every rank forwards the part it received last."""
    count = len(ranks)
    parts = _even(size, count)
    filled = [k for k in range(count) if not is_empty((parts[k],))]
    for k in filled:
        yield Message(source=source, target=ranks[k], part=parts[k])
    for step in range(count - 1):
        for k, rank in enumerate(ranks):
            passed = (k - step) % count
            if passed in filled:
                yield Message(source=rank, target=ranks[(k + 1) % count], part=parts[passed])


def _even(size: int, parts: int) -> list[Range]:
    return [cut(size, own_share(parts, index)) for index in range(parts)]
