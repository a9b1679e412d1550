"""Finds out which rank has gone when communication fails, by the heartbeats of all ranks.

A rank that waits for a message cannot tell if its neighbour has gone or is waiting itself. So every
rank increments a counter in the rendezvous store once a second, from a thread of its own. When a
message is overdue, the ranks whose counters stand still have gone: a process that has ended or is
stopped does not count, one that waits does. The first rank to find out leaves its finding in the
store, so that all ranks report the same reason.
"""

from __future__ import annotations

import threading
import time
from datetime import timedelta

from torch._C._distributed_c10d import PrefixStore, Store
from torch.distributed.distributed_c10d import _get_default_store

BEAT_SECONDS = 1.0
"""Time between two heartbeats of a rank."""
SILENCE_SECONDS = 4.0
"""A rank whose counter has stood still for this long has gone."""
STORE_SECONDS = 5.0
"""A store that takes longer than this to answer has gone, with the rank that hosts it."""
_VERDICT = "verdict"
"""Key of the first finding in the store."""


class Heartbeat:
    """Sends this rank's heartbeat, and checks that of the others."""

    def __init__(self, rank: int, size: int) -> None:
        # The only way to the store: torch.distributed has no public one.
        self._store: Store = PrefixStore("meshwright/pulse", _get_default_store())
        self._rank = rank
        self._size = size
        self._ended = threading.Event()
        self._store.add(str(rank), 1)
        self._thread = threading.Thread(target=self._beat, daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Stops this rank's heartbeat."""
        self._ended.set()
        self._thread.join(STORE_SECONDS)

    def lost_ranks(self, words: str) -> tuple[tuple[int, ...], str]:
        """Returns the ranks that have gone, and the words of the first rank that noticed: `words`,
        if it is this one.

        Takes up to SILENCE_SECONDS + STORE_SECONDS. Returns no ranks if all seem alive, or if the
        store has gone too.
        """
        found: list[tuple[tuple[int, ...], str]] = []
        thread = threading.Thread(target=lambda: found.append(self._judge(words)), daemon=True)
        thread.start()
        thread.join(SILENCE_SECONDS + STORE_SECONDS)
        return found[0] if found else ((), words)

    def _beat(self) -> None:
        while not self._ended.wait(BEAT_SECONDS):
            try:
                self._store.add(str(self._rank), 1)
            except RuntimeError:
                return  # the rank that hosted the store has ended, and so will this one

    def _judge(self, words: str) -> tuple[tuple[int, ...], str]:
        try:
            self._store.set_timeout(timedelta(seconds=STORE_SECONDS))
            silent = [] if self._store.check([_VERDICT]) else self._silent()
            said = words
            if silent:
                own = f"{' '.join(map(str, silent))}|{words}"
                said = self._store.compare_set(_VERDICT, "", own).decode()
            elif self._store.check([_VERDICT]):
                said = self._store.get(_VERDICT).decode()
        except RuntimeError:
            return (), words
        ranks, bar, first = said.partition("|")
        return (tuple(map(int, ranks.split())), first) if bar else ((), words)

    def _silent(self) -> list[int]:
        """Returns the ranks whose counters stand still while this one watches."""
        others = [rank for rank in range(self._size) if rank != self._rank]
        before = {rank: self._store.add(str(rank), 0) for rank in others}
        end = time.monotonic() + SILENCE_SECONDS
        while time.monotonic() < end:
            time.sleep(BEAT_SECONDS / 4)
            if self._store.check([_VERDICT]):
                return []
        return [rank for rank in others if self._store.add(str(rank), 0) == before[rank]]
