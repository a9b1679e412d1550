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
from meshwright.launch.fork_server import ProcessEvent, SpawnRequest
from meshwright.launch.root_cause import root_cause
from meshwright.launch.signals import unwind_on_signals
from meshwright.launch.store import Rendezvous, new_token, open_store
from meshwright.launch.supervise import PRELOADED, STORE, ForkServer, has_failed, run_to_end
from meshwright.records import record
from meshwright.runtime import launch_variables
from meshwright.runtime.run_folder import (
    LOGS,
    METRICS,
    TIMELINE,
    TIMEOUT_SECONDS,
    WEIGHTS,
    failure_file,
)

MetricsLine = dict[str, float]
OnMetrics = Callable[[MetricsLine], None]
WORKER = "meshwright.runtime.worker"
PROCESS_BYTES = 350 * 2**20
"""Resident memory in bytes of a process that has imported PyTorch, before it holds a model."""


@record
class ProcessPlacement:
    """Says where a rank runs; this is what differs between the ranks of one machine."""

    node: str = "here"
    address: str = launch_variables.LOOPBACK
    """Network address of the rank's node."""
    interface: str | None = None
    """Network interface for traffic with other nodes; None: the loopback."""
    namespace: str | None = None
    group: str | None = None
    """Folder of its control group; None: the launcher's."""
    environment: tuple[tuple[str, str], ...] = ()


def on_this_machine(_device: str) -> ProcessPlacement:
    """Returns the same place for every rank: this machine, without a namespace or control group."""
    return ProcessPlacement()


class Launcher:
    """Starts runs on this machine, one after the other. It is a context manager.

    `place` gives the place of the rank of a device; testbeds use it for network namespaces.
    `worker` is the module that ranks run.
    """

    def __init__(
        self, place: Callable[[str], ProcessPlacement] = on_this_machine, worker: str = WORKER
    ) -> None:
        self._place = place
        self._worker = worker
        self._server: ForkServer | None = None
        self._meetings: dict[ProcessPlacement, Rendezvous] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def preload(self) -> Self:
        """Begins to import what ranks need, while the caller does something else."""
        self._started(*PRELOADED, WORKER)
        return self

    def _started(self, *modules: str) -> ForkServer:
        """Returns the fork server, which has imported these modules or will."""
        if self._server is None:
            self._server = ForkServer(*modules)
        return self._server

    def close(self, *, gracefully: bool = False) -> None:
        """Ends every process that was started."""
        server, self._server = self._server, None
        self._meetings.clear()
        if server is not None:
            server.close(gracefully=gracefully)

    def accelerators(self, timeout_seconds: float = TIMEOUT_SECONDS) -> int:
        """Returns the number of CUDA devices that ranks can use here. Raises LaunchError if the
        process that counts is stopped for `timeout_seconds`."""
        return accelerators(self._started(*PRELOADED, WORKER), timeout_seconds)

    def processor_seconds(self) -> float:
        """Returns the processor seconds of all ranks that have ended since the last `close`."""
        return 0.0 if self._server is None else self._server.processor_seconds()

    def run(
        self,
        devices: Sequence[str],
        folder: Path,
        *,
        module: str | None = None,
        on_metrics: OnMetrics = lambda _: None,
        timeout_seconds: float = TIMEOUT_SECONDS,
        node: str | None = None,
        rendezvous: Rendezvous | None = None,
    ) -> None:
        """Runs `module`, or the launcher's worker, on all devices and waits for its end.

        Each new line of metrics.jsonl goes to `on_metrics`. With `node`, only the ranks of that
        node run, and meet all others at `rendezvous`. Raises the MeshwrightError of the first rank
        that fails, or a TrainingError that names the rank that was lost. After a failure no process
        is left.
        """
        started = time.time()
        self._started(*PRELOADED, WORKER).patience_seconds = timeout_seconds
        module, log = module or self._worker, folder / LOGS
        requests = self.requests(devices, module, (str(folder),), log, node, rendezvous)
        clear_run_files(folder, None if node is None else [request.rank for request in requests])
        follower = LineFollower(folder / METRICS, on_metrics)
        events = self._run_to_end(requests, follower.look, timeout_seconds)
        if not _all_succeeded(events, requests):
            raise root_cause(events, folder, since=started)

    def run_command(
        self,
        devices: Sequence[str],
        command: Sequence[str],
        *,
        node: str | None = None,
        rendezvous: Rendezvous | None = None,
    ) -> tuple[ProcessEvent, ...]:
        """Runs a command once for each device (of `node`, if given), and returns the events of its
        processes."""
        requests = self.requests(devices, "", tuple(command), None, node, rendezvous)
        return self._run_to_end(requests, lambda: None, float("inf"))

    def requests(
        self,
        devices: Sequence[str],
        module: str,
        arguments: tuple[str, ...],
        logs: Path | None,
        node: str | None = None,
        rendezvous: Rendezvous | None = None,
    ) -> list[SpawnRequest]:
        """Returns the requests that start each rank, or those of one node."""
        places = [self._place(device) for device in devices]
        rendezvous = self._rendezvous(places[0], node, rendezvous)
        return [
            SpawnRequest(
                rank=rank,
                environment=rank_environment(places, rank, rendezvous),
                namespace=place.namespace,
                group=place.group,
                module=module,
                arguments=arguments,
                log=str(logs / f"rank-{rank}.log") if logs else "",
            )
            for rank, place in enumerate(places)
            if node in (None, place.node)
        ]

    def _rendezvous(
        self, first: ProcessPlacement, node: str | None, rendezvous: Rendezvous | None
    ) -> Rendezvous:
        """Returns where ranks meet. The store runs beside the first rank; later runs use the same
        store, each with a new secret."""
        server = self._started()
        if rendezvous is not None:
            own = node == first.node
            port, token = rendezvous.port, rendezvous.token
            return open_store(server, first.address, port=port, token=token) if own else rendezvous
        where = replace(first, group=None)
        if where not in self._meetings:
            self._meetings[where] = open_store(server, first.address, namespace=first.namespace)
        return replace(self._meetings[where], token=new_token())

    def _run_to_end(
        self, requests: list[SpawnRequest], look: Callable[[], None], timeout_seconds: float
    ) -> tuple[ProcessEvent, ...]:
        assert self._server is not None
        try:
            with unwind_on_signals():
                events = run_to_end(
                    self._server, requests, look=look, timeout_seconds=timeout_seconds
                )
        except BaseException:
            self.close(gracefully=True)
            raise
        if not _all_succeeded(events, requests):
            self.close()
        return events


def _all_succeeded(events: Sequence[ProcessEvent], requests: Sequence[SpawnRequest]) -> bool:
    """True if every process has ended by itself with its work done."""
    ended = sum(each.kind == "exited" and each.rank != STORE for each in events)
    return ended == len(requests) and not any(map(has_failed, events))


def rank_environment(
    places: Sequence[ProcessPlacement], rank: int, rendezvous: Rendezvous
) -> dict[str, str]:
    """Returns the environment variables of a rank: those that every launcher sets, and ours."""
    nodes, own = [place.node for place in places], places[rank]
    named = {
        **launch_variables.FOR_PLAIN_TORCH,
        launch_variables.RANK: str(rank),
        launch_variables.WORLD_SIZE: str(len(places)),
        launch_variables.LOCAL_RANK: str(nodes[:rank].count(own.node)),
        launch_variables.LOCAL_WORLD_SIZE: str(nodes.count(own.node)),
        **rendezvous.environment,
    }
    return (
        named
        | launch_variables.interface_variables(own.interface, os.environ)
        | dict(own.environment)
    )


def clear_run_files(folder: Path, ranks: Sequence[int] | None) -> None:
    """Deletes the files that an earlier run of some ranks (None: of all) left in a folder, and
    creates the folder of logs."""
    (folder / LOGS).mkdir(mode=0o700, parents=True, exist_ok=True)
    everything = [*folder.glob("failure-*.json")]
    stale = everything if ranks is None else [failure_file(folder, rank) for rank in ranks]
    for path in stale:
        path.unlink(missing_ok=True)
    if ranks is None or 0 in ranks:
        (folder / METRICS).unlink(missing_ok=True)
        for name in (TIMELINE, WEIGHTS):
            files.remove_drafts(folder / name)


class LineFollower:
    """Forwards each line of a growing file once."""

    def __init__(self, path: Path, tell: OnMetrics) -> None:
        self.path, self.tell, self.position = path, tell, 0

    def look(self) -> None:
        """Forwards the lines that were added since the last call."""
        if not self.path.exists():
            return
        with self.path.open("rb") as lines:
            lines.seek(self.position)
            text = lines.read()
        whole = text[: text.rfind(b"\n") + 1]
        self.position += len(whole)
        for line in whole.splitlines():
            self.tell(json.loads(line))
