"""One process for each device of a testbed, in its node's network namespace."""

from __future__ import annotations

import json
import os
import select
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Self

import psutil

from meshwright.cluster.spec import node_of
from meshwright.errors import LaunchError, Problem
from meshwright.records import parse, plain
from meshwright.runtime.failure import cause
from meshwright.runtime.launch import GRACE_SECONDS, MODULE, POLL_SECONDS
from meshwright.runtime.run import LOGS, METRICS
from meshwright.testbed.bed import (
    VARIABLE,
    Standing,
    master_port,
    rank_environment,
    save_standing,
)
from meshwright.testbed.nursery import Birth, Death, end_with_parent

NURSERY = "meshwright.testbed.nursery"
Line = dict[str, float]


class Launcher:
    """Starts ranks on a standing testbed; use as a context manager, or call `close`."""

    def __init__(self, up: Standing) -> None:
        self.up = up
        self._process: subprocess.Popen[bytes] | None = None
        self._unread = b""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Ends the nursery and every rank."""
        process, self._process, self._unread = self._process, None, b""
        if process is None:
            return
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        for pipe in (process.stdin, process.stdout):
            if pipe is not None:
                pipe.close()

    def processor_seconds(self) -> float:
        """Processor time of the nursery and of all ranks that have ended."""
        if self._process is None:
            return 0.0
        times = psutil.Process(self._process.pid).cpu_times()
        return float(times.user + times.system + times.children_user + times.children_system)

    def run(
        self,
        devices: tuple[str, ...],
        folder: Path,
        *,
        module: str = MODULE,
        on_metrics: Callable[[Line], None] = lambda _: None,
    ) -> None:
        """Run `module` on all devices and wait, as `runtime.launch.run_here` does without a
        testbed: metrics are handed on, failures are raised in the first failing rank's words."""
        folder.mkdir(parents=True, exist_ok=True)
        for stale in (folder / METRICS, *folder.glob("failure-*.json")):
            stale.unlink(missing_ok=True)
        (folder / LOGS).mkdir(exist_ok=True)
        births = self._births(devices, module, (str(folder),), folder / LOGS)
        follow = _Follower(folder / METRICS, on_metrics)
        deaths = self._see_through(births, follow.look)
        lost = [death for death in deaths if death.status]
        if lost:
            (folder / "launcher.log").write_text(_summary(lost))
            raise cause(folder, lost[0].status)

    def run_command(self, devices: tuple[str, ...], command: Sequence[str]) -> int:
        """Run a command once for each device; the first exit status that is not 0."""
        births = self._births(devices, "", tuple(command), None)
        deaths = self._see_through(births, lambda: None)
        return next((abs(death.status) for death in deaths if death.status), 0)

    def _births(
        self,
        devices: tuple[str, ...],
        module: str,
        arguments: tuple[str, ...],
        logs: Path | None,
    ) -> list[Birth]:
        up, port = self.up, master_port()
        strangers = [node_of(d) for d in devices if up.namespaces and node_of(d) not in
                     up.namespaces]  # fmt: skip
        LaunchError.check(
            Problem("plan", "devices", f"node {node!r}", f"a node of testbed {up.bed.name!r}")
            for node in dict.fromkeys(strangers)
        )
        return [
            Birth(
                rank=rank,
                environment=rank_environment(up, devices, rank, port),
                namespace=up.namespaces.get(node_of(device)),
                group=up.groups.get(device),
                module=module,
                arguments=arguments,
                log=str(logs / f"rank-{rank}.log") if logs else "",
            )
            for rank, device in enumerate(devices)
        ]

    def _see_through(self, births: list[Birth], look: Callable[[], None]) -> list[Death]:
        """Start ranks, wait for all; when one fails the others are given a little time to say
        why."""
        process = self._nursery()
        assert process.stdin is not None
        for birth in births:
            process.stdin.write(json.dumps(plain(birth)).encode() + b"\n")
        process.stdin.flush()
        deaths: list[Death] = []
        deadline = float("inf")
        while len(deaths) < len(births):
            deaths += self._deaths(process)
            look()
            if any(death.status for death in deaths):
                deadline = min(deadline, time.monotonic() + GRACE_SECONDS)
            if time.monotonic() > deadline:
                break
        if len(deaths) < len(births):
            self.close()
        look()
        return deaths

    def _nursery(self) -> subprocess.Popen[bytes]:
        if self._process is None:
            self._process = subprocess.Popen(
                [sys.executable, "-m", NURSERY],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
                start_new_session=True,
                preexec_fn=end_with_parent if sys.platform == "linux" else None,
            )
        return self._process

    def _deaths(self, process: subprocess.Popen[bytes]) -> list[Death]:
        assert process.stdout is not None
        if not select.select([process.stdout], [], [], POLL_SECONDS)[0]:
            return []
        text = os.read(process.stdout.fileno(), 1 << 16)
        if not text:
            found = f"the process that ranks are forked from ended: {process.wait()}"
            self.close()
            raise LaunchError(Problem("testbed", "nursery", found, "to live to the end"))
        *lines, self._unread = (self._unread + text).split(b"\n")
        return [
            parse(json.loads(line), Death, source="nursery", error=LaunchError) for line in lines
        ]


def run_verb(up: Standing, command: Sequence[str]) -> int:
    """Run a verb of meshwright inside the testbed, in which it starts ranks of its own; its exit
    status. It ends when this process does."""
    with tempfile.TemporaryDirectory(prefix="meshwright-") as scratch:
        described = Path(scratch) / "testbed.json"
        save_standing(up, described)
        process = subprocess.Popen(
            command,
            env={**os.environ, VARIABLE: str(described)},
            preexec_fn=end_with_parent if sys.platform == "linux" else None,
        )
        try:
            return process.wait()
        finally:
            if process.poll() is None:
                process.terminate()
                with suppress(subprocess.TimeoutExpired):
                    process.wait(GRACE_SECONDS)
                process.kill()
                process.wait()


def as_shell(up: Standing, device: str, environment: dict[str, str], command: Sequence[str]) -> str:
    """What starts one device's process, as a shell would write it."""
    variables = [f"{name}={value}" for name, value in environment.items()]
    inside = ["env", *variables, *command]
    namespace = up.namespaces.get(node_of(device))
    line = shlex.join(["ip", "netns", "exec", namespace, *inside] if namespace else inside)
    group = up.groups.get(device)
    return f"(echo $BASHPID > {group}/cgroup.procs; {line})" if group else line


class _Follower:
    """Hands on the lines of a growing file, each once."""

    def __init__(self, path: Path, tell: Callable[[Line], None]) -> None:
        self.path, self.tell, self.position = path, tell, 0

    def look(self) -> None:
        if not self.path.exists():
            return
        with self.path.open("rb") as lines:
            lines.seek(self.position)
            text = lines.read()
        whole = text[: text.rfind(b"\n") + 1]
        self.position += len(whole)
        for line in whole.splitlines():
            self.tell(json.loads(line))


def _summary(lost: list[Death]) -> str:
    """In torchrun's words, which `runtime.failure` reads."""
    lines = (f"rank : {death.rank}\nexitcode : {death.status}\n" for death in lost)
    return "FAILED\n" + "".join(lines)
