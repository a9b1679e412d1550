"""Rank processes that are started once and play one thing after another."""

from __future__ import annotations

import gc
import pickle
import tempfile
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from ranks import EXIT_SECONDS, _collect, _context, _rank, start_server


class Pool:
    """Does what `run_ranks` does, in the same processes each time.

    It starts a process when a call first needs one more. A failure ends all of them; the next call
    starts new ones.
    """

    def __init__(self, limit: float) -> None:
        self.limit = limit
        self._pipes: list[Connection] = []
        self._processes: list[Any] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._end()

    def run(self, count: int, function: Callable[..., Any], *args: Any) -> list[Any]:
        """What `function(rank, *args)` returns on each of `count` ranks of a fresh gloo group.

        Raises AssertionError with what went wrong on every rank.
        """
        self._start(count - len(self._processes))
        with tempfile.TemporaryDirectory() as folder:
            store = str(Path(folder) / "store")
            for rank, pipe in enumerate(self._pipes[:count]):
                pipe.send_bytes(pickle.dumps((function, rank, count, store, args)))
            results = _collect(self._pipes[:count], time.monotonic() + self.limit)
        failures = [f"rank {r}:\n{text}" for r, (good, text) in enumerate(results) if not good]
        if failures:
            self._end()
        assert not failures, "\n".join(failures)
        return [value for _, value in results]

    def _start(self, count: int) -> None:
        start_server()
        for _ in range(count):
            ours, theirs = _context.Pipe()
            process = _context.Process(target=_serve, args=(theirs,))
            process.start()
            theirs.close()
            self._pipes.append(ours)
            self._processes.append(process)

    def _end(self) -> None:
        for pipe in self._pipes:
            pipe.close()
        for process in self._processes:
            process.join(EXIT_SECONDS if process.exitcode is None else 0)
            process.kill()
            process.join()
        self._pipes, self._processes = [], []


def _serve(pipe: Connection) -> None:
    """Plays what comes until the other end is closed."""
    while True:
        try:
            function, rank, count, store, args = pickle.loads(pipe.recv_bytes())
        except EOFError:
            return
        _rank(function, rank, count, store, pipe, args)
        gc.collect()  # an engine is full of circles, and its groups have threads
