"""Runs the ranks of a plan on this machine: starts one process for each device, watches and ends
them."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Self

from meshwright import files
from meshwright.launch.accelerators import accelerators
from meshwright.launch.cause import cause
from meshwright.launch.fork_server import Event, SpawnRequest
from meshwright.launch.signals import ended_by_signals
from meshwright.launch.store import Meeting, new_token, open_store
from meshwright.launch.supervise import PRELOADED, STORE, ForkServer, failed, see_through
from meshwright.records import record
from meshwright.runtime import variables
from meshwright.runtime.run import (
    LOGS,
    METRICS,
    TIMELINE,
    TIMEOUT_SECONDS,
    WEIGHTS,
    failure_file,
)

Line = dict[str, float]
Look = Callable[[Line], None]
WORKER = "meshwright.runtime.worker"
PROCESS_BYTES = 350 * 2**20
"""Resident memory in bytes of a process that has imported PyTorch, before it holds a model."""


@record
class Place:
    """Says where a rank runs; this is what differs between the ranks of one machine."""

    node: str = "here"
    address: str = variables.LOOPBACK
    """Network address of the rank's node."""
    interface: str | None = None
    """Network interface for traffic with other nodes; None: the loopback."""
    namespace: str | None = None
    group: str | None = None
    """Folder of its control group; None: the launcher's."""
    environment: tuple[tuple[str, str], ...] = ()


def here(_device: str) -> Place:
    """Return the same place for every rank: this machine, without a namespace or control group."""
    return Place()


class Launcher:
    """Starts runs on this machine, one after the other; a context manager.

    `place` gives the place of the rank of a device; testbeds use it for network namespaces.
    `worker` is the module that ranks run.
    """

    def __init__(self, place: Callable[[str], Place] = here, worker: str = WORKER) -> None:
        self._place = place
        self._worker = worker
        self._server: ForkServer | None = None
        self._meetings: dict[Place, Meeting] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def warm(self) -> Self:
        """Begin to import what ranks need, while the caller does something else."""
        self._started(*PRELOADED, WORKER)
        return self

    def _started(self, *modules: str) -> ForkServer:
        """Return the fork server, which has imported these modules or will."""
        if self._server is None:
            self._server = ForkServer(*modules)
        return self._server

    def close(self, *, calmly: bool = False) -> None:
        """End every process that was started."""
        server, self._server = self._server, None
        self._meetings.clear()
        if server is not None:
            server.close(calmly=calmly)

    def accelerators(self, timeout_seconds: float = TIMEOUT_SECONDS) -> int:
        """Return the number of CUDA devices that ranks can use here. Raises LaunchError if the
        process that counts is stopped for `timeout_seconds`."""
        return accelerators(self._started(*PRELOADED, WORKER), timeout_seconds)

    def processor_seconds(self) -> float:
        """Return the processor seconds of all ranks that have ended since the last `close`."""
        return 0.0 if self._server is None else self._server.processor_seconds()

    def run(
        self,
        devices: Sequence[str],
        folder: Path,
        *,
        module: str | None = None,
        on_metrics: Look = lambda _: None,
        timeout_seconds: float = TIMEOUT_SECONDS,
        node: str | None = None,
        meeting: Meeting | None = None,
    ) -> None:
        """Run `module`, or the launcher's worker, on all devices and wait for its end.

        Each new line of metrics.jsonl goes to `on_metrics`. With `node`, only the ranks of that
        node run, and meet all others at `meeting`. Raises the MeshwrightError of the first rank
        that fails, or a TrainingError that names the rank that was lost. After a failure no process
        is left.
        """
        started = time.time()
        self._started(*PRELOADED, WORKER).patience_seconds = timeout_seconds
        module, log = module or self._worker, folder / LOGS
        requests = self.requests(devices, module, (str(folder),), log, node, meeting)
        clear(folder, None if node is None else [request.rank for request in requests])
        follower = Follower(folder / METRICS, on_metrics)
        events = self._see_through(requests, follower.look, timeout_seconds)
        if not _all_done(events, requests):
            raise cause(events, folder, since=started)

    def run_command(
        self,
        devices: Sequence[str],
        command: Sequence[str],
        *,
        node: str | None = None,
        meeting: Meeting | None = None,
    ) -> tuple[Event, ...]:
        """Run a command once for each device (of `node`, if given), and return the events of its
        processes."""
        requests = self.requests(devices, "", tuple(command), None, node, meeting)
        return self._see_through(requests, lambda: None, float("inf"))

    def requests(
        self,
        devices: Sequence[str],
        module: str,
        arguments: tuple[str, ...],
        logs: Path | None,
        node: str | None = None,
        meeting: Meeting | None = None,
    ) -> list[SpawnRequest]:
        """Return the requests that start each rank, or those of one node."""
        places = [self._place(device) for device in devices]
        meeting = self._meeting(places[0], node, meeting)
        return [
            SpawnRequest(
                rank=rank,
                environment=environment(places, rank, meeting),
                namespace=place.namespace,
                group=place.group,
                module=module,
                arguments=arguments,
                log=str(logs / f"rank-{rank}.log") if logs else "",
            )
            for rank, place in enumerate(places)
            if node in (None, place.node)
        ]

    def _meeting(self, first: Place, node: str | None, meeting: Meeting | None) -> Meeting:
        """Return where ranks meet. The store runs beside the first rank; later runs use the same
        store, each with a new secret."""
        server = self._started()
        if meeting is not None:
            own = node == first.node
            port, token = meeting.port, meeting.token
            return open_store(server, first.address, port=port, token=token) if own else meeting
        where = replace(first, group=None)
        if where not in self._meetings:
            self._meetings[where] = open_store(server, first.address, namespace=first.namespace)
        return replace(self._meetings[where], token=new_token())

    def _see_through(
        self, requests: list[SpawnRequest], look: Callable[[], None], timeout_seconds: float
    ) -> tuple[Event, ...]:
        assert self._server is not None
        try:
            with ended_by_signals():
                events = see_through(
                    self._server, requests, look=look, timeout_seconds=timeout_seconds
                )
        except BaseException:
            self.close(calmly=True)
            raise
        if not _all_done(events, requests):
            self.close()
        return events


def _all_done(events: Sequence[Event], requests: Sequence[SpawnRequest]) -> bool:
    """True if every process has ended by itself with its work done."""
    ended = sum(each.kind == "exited" and each.rank != STORE for each in events)
    return ended == len(requests) and not any(map(failed, events))


def environment(places: Sequence[Place], rank: int, meeting: Meeting) -> dict[str, str]:
    """Return the environment variables of a rank: those that every launcher sets, and ours."""
    nodes, own = [place.node for place in places], places[rank]
    named = {
        **variables.FOR_PLAIN_TORCH,
        variables.RANK: str(rank),
        variables.WORLD_SIZE: str(len(places)),
        variables.LOCAL_RANK: str(nodes[:rank].count(own.node)),
        variables.LOCAL_WORLD_SIZE: str(nodes.count(own.node)),
        **meeting.environment,
    }
    return named | variables.kept_to(own.interface, os.environ) | dict(own.environment)


def clear(folder: Path, ranks: Sequence[int] | None) -> None:
    """Delete the files that an earlier run of some ranks (None: of all) left in a folder, and
    create the folder of logs."""
    (folder / LOGS).mkdir(mode=0o700, parents=True, exist_ok=True)
    everything = [*folder.glob("failure-*.json")]
    stale = everything if ranks is None else [failure_file(folder, rank) for rank in ranks]
    for path in stale:
        path.unlink(missing_ok=True)
    if ranks is None or 0 in ranks:
        (folder / METRICS).unlink(missing_ok=True)
        for name in (TIMELINE, WEIGHTS):
            files.remove_drafts(folder / name)


class Follower:
    """Forwards the lines of a growing file, each once."""

    def __init__(self, path: Path, tell: Look) -> None:
        self.path, self.tell, self.position = path, tell, 0

    def look(self) -> None:
        """Forward the lines that were added since the last call."""
        if not self.path.exists():
            return
        with self.path.open("rb") as lines:
            lines.seek(self.position)
            text = lines.read()
        whole = text[: text.rfind(b"\n") + 1]
        self.position += len(whole)
        for line in whole.splitlines():
            self.tell(json.loads(line))
