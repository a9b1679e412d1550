"""Signs of life: who has gone, when communication fails?

A rank that waits sees only that its neighbour has not answered, and the neighbour may be waiting
itself. So every rank counts up in the store that all have met in, once a second, from a thread of
its own. When a message is overdue, whose count stands still is the one that has gone: a process
that has ended or is stopped counts no more, one that waits does. The first to find out leaves its
finding in the store, so that all give the same reason.
"""

from __future__ import annotations

import threading
import time
from datetime import timedelta

from torch._C._distributed_c10d import PrefixStore, Store
from torch.distributed.distributed_c10d import _get_default_store

BEAT_SECONDS = 1.0
SILENCE_SECONDS = 4.0
"""A rank whose count has stood still for this long has gone."""
STORE_SECONDS = 5.0
"""A store that takes longer to answer has gone with the rank that kept it."""
_VERDICT = "verdict"


class Pulse:
    """This rank's signs of life, and a look at the others'."""

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
        """No more signs."""
        self._ended.set()
        self._thread.join(STORE_SECONDS)

    def verdict(self, words: str) -> tuple[tuple[int, ...], str]:
        """Ranks that have gone, and what the first to notice said: `words`, where it is this one.

        Takes up to SILENCE_SECONDS + STORE_SECONDS. No ranks where all seem alive, or the store has
        gone too.
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
                return  # the rank that kept the store has ended, and so will this one

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
        """Ranks that give no sign of life while this one watches."""
        others = [rank for rank in range(self._size) if rank != self._rank]
        before = {rank: self._store.add(str(rank), 0) for rank in others}
        end = time.monotonic() + SILENCE_SECONDS
        while time.monotonic() < end:
            time.sleep(BEAT_SECONDS / 4)
            if self._store.check([_VERDICT]):
                return []
        return [rank for rank in others if self._store.add(str(rank), 0) == before[rank]]
