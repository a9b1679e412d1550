"""Runs a function on several ranks: forked gloo processes that are always reaped."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing import forkserver
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"

LIMIT_SECONDS = 120.0
EXIT_SECONDS = 20.0
"""A process that has said its word must be gone after this."""
TIMEOUT = timedelta(seconds=30)

# A server that has imported all this once forks every rank in milliseconds. It passes over what it
# does not find.
PRELOADED = ["pytest", "torch._dynamo", "torch.distributed", "meshwright.runtime.engine", "warm"]
_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(PRELOADED)


def start_server() -> None:
    """Starts the process that ranks are forked from, where it finds the modules of tests, too."""
    here = Path(__file__).parent
    known = os.environ.get("PYTHONPATH")
    folders = [str(here), str(here.parent), *([known] if known else [])]
    os.environ["PYTHONPATH"] = os.pathsep.join(folders)
    try:
        forkserver.ensure_running()
    finally:
        if known is None:
            del os.environ["PYTHONPATH"]
        else:
            os.environ["PYTHONPATH"] = known


def run_ranks(
    count: int, function: Callable[..., Any], *args: Any, limit: float = LIMIT_SECONDS
) -> list[Any]:
    """What `function(rank, *args)` returns on each of `count` ranks of a fresh gloo group.

    Raises AssertionError with the traceback of every rank that failed, or went without a word.
    """
    results = outcomes(count, function, *args, limit=limit)
    failures = [f"rank {r}:\n{text}" for r, (good, text) in enumerate(results) if not good]
    assert not failures, "\n".join(failures)
    return [value for _, value in results]


def outcomes(
    count: int, function: Callable[..., Any], *args: Any, limit: float = LIMIT_SECONDS
) -> list[tuple[bool, Any]]:
    """(True, result) or (False, what went wrong) of every rank.

    Raises AssertionError if a rank that is done does not end by itself.
    """
    with tempfile.TemporaryDirectory() as folder:
        return settle(count, function, args, Path(folder) / "store", limit)


def settle(
    count: int, function: Callable[..., Any], args: tuple[Any, ...], store: Path, limit: float
) -> list[tuple[bool, Any]]:
    """Starts the ranks, hears them, and sees them end."""
    start_server()
    pipes = [_context.Pipe(duplex=False) for _ in range(count)]
    processes = [
        _context.Process(target=_rank, args=(function, r, count, str(store), ours, args))
        for r, (_, ours) in enumerate(pipes)
    ]
    try:
        for process in processes:
            process.start()
        for _, ours in pipes:
            ours.close()
        results = _collect([theirs for theirs, _ in pipes], time.monotonic() + limit)
        for rank, process in enumerate(processes):
            process.join(EXIT_SECONDS)
            assert process.exitcode is not None, f"rank {rank} did not end; it said {results[rank]}"
        return results
    finally:
        for process in processes:
            process.kill()
            process.join()


def _collect(pipes: list[Connection], deadline: float) -> list[tuple[bool, Any]]:
    results: list[tuple[bool, Any]] = [(False, "no answer in time")] * len(pipes)
    left = {pipe: rank for rank, pipe in enumerate(pipes)}
    while left and time.monotonic() < deadline:
        for pipe in wait(list(left), timeout=max(0.0, deadline - time.monotonic())):
            assert isinstance(pipe, Connection)
            rank = left.pop(pipe)
            try:
                results[rank] = pickle.loads(pipe.recv_bytes())
            except EOFError:
                results[rank] = (False, "ended without a word")
    return results


def _rank(
    function: Callable[..., Any],
    rank: int,
    count: int,
    store: str,
    pipe: Connection,
    args: tuple[Any, ...],
) -> None:
    absent = [module for module in PRELOADED if module not in sys.modules]

    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    try:
        assert not absent, f"not imported by the server, but anew by every rank: {absent}"
        address = f"file://{store}"
        dist.init_process_group(
            "gloo", init_method=address, rank=rank, world_size=count, timeout=TIMEOUT
        )
        value = function(rank, *args)
        pipe.send_bytes(pickle.dumps((True, value)))
        dist.destroy_process_group()
    except BaseException:
        pipe.send_bytes(pickle.dumps((False, traceback.format_exc())))
        sys.exit(1)
