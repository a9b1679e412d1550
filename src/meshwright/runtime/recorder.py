"""Measures one step: when each instruction began and ended on each rank, and the memory in use."""

from __future__ import annotations

import resource
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import Work

from meshwright.program.instructions import (
    Instruction,
    Program,
    collective_key,
    micro_batches_of,
)
from meshwright.program.operations import (
    MATCHING_RECEIVE,
    Op,
)
from meshwright.program.timeline import MemoryPoint, Timeline, interval_of
from meshwright.runtime.build_stages import LocalParameter
from meshwright.runtime.exchange import gather_records
from meshwright.runtime.flat_buckets import FlatBucket
from meshwright.runtime.handles import Handle, JointHandle, joint_handle

TimeReader = Callable[[], float]
"""Function that returns a time in seconds on the host's clock; for CUDA it must be called after the
device has got there."""


class _TimedHandle:
    """Waits for messages in a thread of its own, to note when they arrive."""

    def __init__(self, works: Sequence[Work], span: _Span) -> None:
        self._failure: BaseException | None = None
        self._thread = threading.Thread(target=self._watch, args=(works, span), daemon=True)
        self._thread.start()

    def _watch(self, works: Sequence[Work], span: _Span) -> None:
        try:
            JointHandle(works).wait()
        except Exception as failure:
            self._failure = failure
        span.end = _at(time.monotonic())

    def is_completed(self) -> bool:
        return not self._thread.is_alive()

    def wait(self) -> None:
        self._thread.join()
        if self._failure is not None:
            raise self._failure


@dataclass(slots=True)
class _Span:
    """Says when one instruction began and ended."""

    index: int
    start: TimeReader
    end: TimeReader


@dataclass(slots=True)
class RankRecord:
    """Holds what was measured on one rank in one step, in seconds on its host's clock."""

    host: str
    started: float
    ended: float = 0.0
    spans: list[tuple[int, float, float]] = field(default_factory=list)
    """(Index of the instruction in the rank's list, start, end) of everything measured."""
    memory: list[tuple[float, int]] = field(default_factory=list)
    """(Time, bytes in use), in order of time."""


class Recorder:
    """Measures one step while the interpreter runs it."""

    def __init__(
        self,
        instructions: Sequence[Instruction],
        device: torch.device,
        *,
        weights: Sequence[Tensor],
        static_bytes: int,
    ) -> None:
        self.device = device
        self.static_bytes = static_bytes
        self._weights = {weight.untyped_storage().data_ptr() for weight in weights}
        self._index = {id(i): n for n, i in enumerate(instructions)}
        self._spans: list[_Span] = []
        self._memory: list[tuple[TimeReader, int]] = []
        self._saved: dict[tuple[int, int], int] = {}
        """Bytes that autograd has saved for the backward, keyed by (stage, micro-batch)."""
        if device.type == "cuda":
            torch.cuda.synchronize(device)
            self._origin = _cuda_event()
        self.record = RankRecord(host=socket.gethostname(), started=time.monotonic())
        self._remember()

    def now(self) -> TimeReader:
        """Returns the current time, on the host or on the device's current stream."""
        if self.device.type != "cuda":
            return _at(time.monotonic())
        event = _cuda_event()
        return lambda: self.record.started + float(self._origin.elapsed_time(event)) / 1e3

    @contextmanager
    def computing(
        self, i: Instruction, kept_bytes: Callable[[Instruction], int | None]
    ) -> Iterator[None]:
        """Measures its `with` block as one instruction's computing (or waiting). `kept_bytes`
        returns the bytes that an I (first part of a backward) has left for its W; None: all that
        the forward saved."""
        start = self.now()
        with self._saving(i) if i.op is Op.FORWARD else nullcontext():
            yield
        self._spans.append(_Span(self._index[id(i)], start, self.now()))
        left = kept_bytes(i) if i.op is Op.BACKWARD_INPUT else None
        if left is not None:
            self._keep(i, left)
        elif i.op in (Op.BACKWARD, Op.BACKWARD_WEIGHT):
            for micro_batch in micro_batches_of(i):
                self._saved.pop((i.stage, micro_batch), None)
        if i.op.kind == "compute":
            self._remember()

    def posted(self, instruction: Instruction, works: Sequence[Work]) -> Handle:
        """Measures messages from now until they arrive, and returns a handle for them."""
        span = _Span(self._index[id(instruction)], self.now(), _at(0.0))
        self._spans.append(span)
        if self.device.type != "cuda":
            return _TimedHandle(works, span)
        stream = torch.cuda.Stream(self.device)  # type: ignore[no-untyped-call]
        with torch.cuda.stream(stream):
            JointHandle(works).wait()
            span.end = self.now()
        return JointHandle(works)

    @contextmanager
    def _saving(self, i: Instruction) -> Iterator[None]:
        """Counts the bytes that a forward in its `with` block saves for its backward."""
        sizes: dict[int, int] = {}

        def pack(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in self._weights:
                sizes[storage.data_ptr()] = storage.nbytes()
            return tensor.detach()

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            yield
        self._keep(i, sum(sizes.values()))

    def _keep(self, i: Instruction, size: int) -> None:
        assert i.micro_batch is not None
        self._saved[i.stage, i.micro_batch] = size

    def _remember(self) -> None:
        """Notes the memory in use at this moment."""
        used = self.static_bytes + sum(self._saved.values())
        if self.device.type == "cuda":
            used = torch.cuda.memory_allocated(self.device)
        self._memory.append((self.now(), used))

    def close(self) -> RankRecord:
        """Ends the step and returns what was measured."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self.record.ended = time.monotonic()
        self.record.spans = [(s.index, s.start(), s.end()) for s in self._spans]
        self.record.memory = [(moment(), size) for moment, size in self._memory]
        return self.record


class Recording:
    """Tells all parts of a rank whether the step is being measured."""

    def __init__(self) -> None:
        self.recorder: Recorder | None = None
        """Measures the step; None: it is not measured."""

    def posted(self, i: Instruction, works: Sequence[Work]) -> Handle:
        """Returns a handle for an instruction's communication, which has just been posted."""
        return joint_handle(works) if self.recorder is None else self.recorder.posted(i, works)


def _at(seconds: float) -> TimeReader:
    return lambda: seconds


def _cuda_event() -> torch.cuda.Event:
    event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
    event.record()
    return event


def static_bytes(
    held: Sequence[LocalParameter],
    buckets: Sequence[FlatBucket],
    optimizers: Sequence[torch.optim.Optimizer],
) -> int:
    """Returns the bytes of one rank's weights, gradients and optimizer states."""
    weights = sum(one.parameter.nbytes for one in held)
    gradients = sum(bucket.buffer.nbytes for bucket in buckets)
    states = sum(
        value.nbytes
        for optimizer in optimizers
        for state in optimizer.state.values()
        for value in state.values()
        if isinstance(value, Tensor)
    )
    return weights + gradients + states


def peak_bytes(device: torch.device) -> int:
    """Returns this process's peak memory: allocated on a CUDA device, else resident."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def gather_timeline(
    record: RankRecord, program: Program, devices: tuple[str, ...], group: dist.ProcessGroup
) -> Timeline | None:
    """Merges all ranks' records into one Timeline on rank 0; returns None on the other ranks.

    Ranks of one host share its clock; the clocks of hosts are aligned at the barrier before the
    step. A message or a collective starts when the last of its ranks is ready.
    """
    records = gather_records(record, RankRecord, group)
    if records is None:
        return None
    origin: dict[str, float] = {}
    for one in records:
        origin[one.host] = min(one.started, origin.get(one.host, one.started))
    spans = [
        [(program.ranks[r][n], start - origin[one.host], end - origin[one.host])
         for n, start, end in one.spans]
        for r, one in enumerate(records)
    ]  # fmt: skip
    ready = _ready(spans)
    return Timeline(
        source="measured",
        devices=devices,
        step_seconds=max(one.ended - origin[one.host] for one in records),
        intervals=tuple(
            interval_of(r, i, min(max(start, ready[_meeting(r, i)]), end), end)
            for r, found in enumerate(spans)
            for i, start, end in found
        ),
        memory=tuple(
            MemoryPoint(rank=r, seconds=at - origin[one.host], bytes=size)
            for r, one in enumerate(records)
            for at, size in one.memory
        ),
    )


_Meeting = tuple[object, ...]
"""Key of one message or collective, equal on all ranks that take part in it."""


def _meeting(rank: int, i: Instruction) -> _Meeting:
    """Returns the key under which all ranks of one message or collective are matched."""
    if i.op.kind == "send":
        stage = i.stage + 1 if i.op is Op.SEND_F else i.stage - 1
        return (MATCHING_RECEIVE[i.op], rank, i.peer, stage, i.micro_batch, i.rows)
    if i.op.kind == "receive":
        return (i.op, i.peer, rank, i.stage, i.micro_batch, i.rows)
    if i.op.kind == "collective":
        return collective_key(i)
    return (i.op, rank, i.stage, i.micro_batch, i.micro_batches)


def _ready(spans: list[list[tuple[Instruction, float, float]]]) -> dict[_Meeting, float]:
    ready: dict[_Meeting, float] = {}
    for rank, found in enumerate(spans):
        for i, start, _ in found:
            key = _meeting(rank, i)
            ready[key] = max(start, ready.get(key, start))
    return ready
