"""FSDP2 on CPUs with the overlap that it has on GPUs.

FSDP2 leaves overlap to CUDA streams; on CPUs each of its collectives would block. Here gathers are
asynchronous and asked for two layers ahead, and a thread with a process group of its own plays the
stream on which gradients are reduced.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import timedelta
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard

from meshwright.emulation.dilation import Dilator

AHEAD = 2
"""Layers whose parameters are gathered before they are needed."""


class Waited(dist.Work):
    """A gather; the device stands still while it is waited for."""

    def __init__(self, work: dist.Work, device: Dilator) -> None:
        super().__init__()
        self.work, self.device = work, device

    def wait(self, timeout: timedelta | None = None) -> bool:
        """Until it is done."""
        del timeout
        if not self.work.is_completed():
            self.work.wait()
            self.device.resume()
        return True


def allocated(size: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> Tensor:
    """What FSDP2 asks for buffers."""
    return torch.empty(*size, dtype=dtype, device=device)


class Gather:
    """FSDP2's all-gather."""

    allocate = staticmethod(allocated)

    def __init__(self, device: Dilator) -> None:
        self.device = device

    def __call__(
        self,
        output_tensor: Tensor,
        input_tensor: Tensor,
        group: dist.ProcessGroup,
        async_op: bool = False,
    ) -> dist.Work:
        assert async_op
        work = dist.all_gather_single(output_tensor, input_tensor, group=group, async_op=True)
        return Waited(work, self.device)


class Stream:
    """What happens one after the other, beside the computing."""

    allocate = staticmethod(allocated)

    def __init__(self, inside: dist.ProcessGroup, across: dist.ProcessGroup | None) -> None:
        self.inside, self.across = inside, across
        self._thread = ThreadPoolExecutor(1)
        self._posted: list[Future[None]] = []

    def post(self, run: Callable[[], None]) -> None:
        """After all that was posted before."""
        self._posted.append(self._thread.submit(run))

    def wait(self) -> None:
        """Until all of it has happened."""
        for posted in self._posted:
            posted.result()
        self._posted.clear()

    def __call__(
        self,
        output_tensor: Tensor,
        input_tensor: Tensor,
        group: dist.ProcessGroup,
        op: dist.ReduceOp,
        async_op: bool = False,
    ) -> None:
        """FSDP2's reduce-scatter: of means, in a group of the same ranks."""
        del group, async_op
        assert op == dist.ReduceOp.AVG
        self.post(partial(ring_reduce_scatter, output_tensor, input_tensor, self.inside))

    def sum_across(self, shard: Tensor) -> None:
        """The mean over all groups, of what one has reduced."""
        assert self.across is not None
        self.post(partial(dist.all_reduce, shard, op=dist.ReduceOp.AVG, group=self.across))


def ring_reduce_scatter(output: Tensor, whole: Tensor, group: dist.ProcessGroup) -> None:
    """Each rank gets the mean of its part, in n - 1 steps of 1/n of the whole (gloo's own
    reduce-scatter is an all-reduce, of twice the bytes). Destroys `whole`."""
    size, own = group.size(), group.rank()
    parts = whole.chunk(size)
    arrived = torch.empty_like(parts[own])
    for step in range(1, size):
        receiving = dist.irecv(arrived, group=group, group_src=(own - 1) % size)
        dist.send(parts[(own - step) % size], group=group, group_dst=(own + 1) % size)
        assert receiving is not None
        receiving.wait()
        parts[(own - step - 1) % size].add_(arrived)
    torch.div(parts[own], size, out=output)


def sharded(
    model: nn.Module,
    *,
    reshard: bool,
    device: Dilator,
    gathering: dist.ProcessGroup,
    reducing: dist.ProcessGroup,
    across: dist.ProcessGroup | None,
) -> Stream:
    """Shards `model.layers`, each by itself, over a group, of which `across` joins replicas.

    `reducing` is a second group of the ranks of `gathering`. The returned stream must be waited for
    before gradients are used.
    """
    mesh, stream = DeviceMesh.from_group(gathering, "cpu"), Stream(reducing, across)
    layers: list[FSDPModule] = [
        fully_shard(layer, mesh=mesh, reshard_after_forward=reshard) for layer in model.layers
    ]
    fully_shard(model, mesh=mesh)._set_unshard_async_op(True)
    for n, layer in enumerate(layers):
        layer.set_custom_all_gather(Gather(device))
        layer.set_custom_reduce_scatter(stream)
        if across is not None:
            layer.set_all_reduce_hook(stream.sum_across)
        layer.set_modules_to_forward_prefetch(layers[n + 1 : n + 1 + AHEAD])
        layer.set_modules_to_backward_prefetch(layers[max(0, n - AHEAD) : n][::-1])
    return stream
