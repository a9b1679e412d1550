"""A process group for several processes on one device: gloo carries copies on the host.

NCCL refuses two ranks on one device, and gloo sends no tensor from a device to another rank. Here
every message is copied to the host, sent by gloo, and copied back once it is waited for. Tensors on
the CPU take the same path, so that what runs on a GPU is tested without one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import timedelta
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

BACKEND = "staged"
"""The name under which `register` makes the group known to torch.distributed."""


class StagedWork(dist.Work):
    """A message in flight; when it is waited for, what has arrived is copied to the device."""

    def __init__(self, work: dist.Work, arrived: Callable[[], None]) -> None:
        super().__init__()
        self.work, self.arrived = work, arrived

    def is_completed(self) -> bool:
        """Whether gloo is through; the copy to the device waits for `wait`."""
        return self.work.is_completed()

    def wait(self, timeout: timedelta | None = None) -> bool:
        """Until it has arrived; the copy is then in the order of the current stream."""
        self.work.wait(*(() if timeout is None else (timeout,)))
        self.arrived()
        self.arrived = _nothing
        return True


class StagedGroup(dist.ProcessGroup):
    """Those of a process group's functions that the runtime calls."""

    def __init__(self, store: dist.Store, rank: int, size: int, timeout: timedelta) -> None:
        super().__init__(rank, size)
        self.gloo = dist.ProcessGroupGloo(store, rank, size, timeout)
        self._name = ""

    def getBackendName(self) -> str:  # noqa: N802 - torch's name
        """As it is registered."""
        return BACKEND

    @property
    def group_name(self) -> str:
        """As torch.distributed names it."""
        return self._name

    def _set_group_name(self, name: str) -> None:
        """Keeps the name here: a group in C++ leaves it to its backends, of which this has none."""
        self._name = name

    def shutdown(self) -> None:
        """Nothing is under way when a group is destroyed."""

    def send(self, tensors: Sequence[Tensor], rank: int, tag: int) -> dist.Work:
        """Waits for the device, not for the receiver."""
        host = _on_host(tensors)
        return StagedWork(self.gloo.send(host, rank, tag), partial(_keep, host))

    def recv(self, tensors: Sequence[Tensor], rank: int, tag: int) -> dist.Work:
        """Receives in a buffer on the host."""
        host = _buffers(tensors)
        return StagedWork(self.gloo.recv(host, rank, tag), partial(_copy, tensors, host))

    def broadcast(self, tensors: Sequence[Tensor], options: Any) -> dist.Work:
        """As gloo's."""
        host = _on_host(tensors)
        return StagedWork(self.gloo.broadcast(host, options), partial(_copy, tensors, host))

    def allreduce(self, tensors: Sequence[Tensor], options: Any) -> dist.Work:
        """As gloo's."""
        host = _on_host(tensors)
        return StagedWork(self.gloo.allreduce(host, options), partial(_copy, tensors, host))

    def allgather(
        self, out: Sequence[Sequence[Tensor]], own: Sequence[Tensor], options: Any
    ) -> Any:
        """As gloo's."""
        host = [_buffers(each) for each in out]
        work = self.gloo.allgather(host, _on_host(own), options)
        return StagedWork(work, lambda: [_copy(*pair) for pair in zip(out, host, strict=True)])

    def gather(self, out: Sequence[Sequence[Tensor]], own: Sequence[Tensor], options: Any) -> Any:
        """As gloo's."""
        host = [_buffers(each) for each in out]
        work = self.gloo.gather(host, _on_host(own), options)
        return StagedWork(work, lambda: [_copy(*pair) for pair in zip(out, host, strict=True)])

    def _allgather_base(self, out: Tensor, own: Tensor, options: Any) -> dist.Work:
        (host,) = _buffers([out])
        work = self.gloo._allgather_base(host, *_on_host([own]), options)
        return StagedWork(work, partial(_copy, [out], [host]))

    def _reduce_scatter_base(self, out: Tensor, whole: Tensor, options: Any) -> dist.Work:
        (host,) = _buffers([out])
        work = self.gloo._reduce_scatter_base(host, *_on_host([whole]), options)
        return StagedWork(work, partial(_copy, [out], [host]))

    def barrier(self, opts: Any) -> dist.Work:
        """As gloo's, for the hosts."""
        return self.gloo.barrier(opts)


def register() -> None:
    """Make the group known to torch.distributed, for tensors of both kinds."""
    if BACKEND not in dist.Backend.backend_list:
        dist.Backend.register_backend(BACKEND, StagedGroup, devices=["cpu", "cuda"])


def _on_host(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Copies, for which the host waits: gloo reads them at once."""
    return [tensor.detach().to("cpu", copy=True) for tensor in tensors]


def _buffers(tensors: Sequence[Tensor]) -> list[Tensor]:
    return [torch.empty_like(tensor, device="cpu") for tensor in tensors]


def _copy(tensors: Sequence[Tensor], host: Sequence[Tensor]) -> None:
    for tensor, arrived in zip(tensors, host, strict=True):
        tensor.detach().copy_(arrived)


def _keep(host: Sequence[Tensor]) -> None:
    """Nothing to copy: the buffer was only to live until it had been sent."""


def _nothing() -> None:
    pass
