"""One device of a cluster that trains with PyTorch's own systems: DDP, FSDP2, pipelining.

Started by testbed_cases.py for torch_rivals.py, with a folder that holds plan.json (the plan of
ours that is most like it: who holds which layers, and how many rows), virtual.json and job.json.
Layers take the time of the table that VirtualEngine lives by; parameters, activations, gradients
and all messages are real. What PyTorch's own code does between two layers costs nothing, as on a
device that is fed ahead of time; waiting for others does.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from testbed_rank import batch, make_model, meet
from torch import Tensor, nn
from torch.distributed._composable.replicate_with_fsdp import replicate
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleInterleaved1F1B
from torch.nn.parallel import DistributedDataParallel
from torch_sleep import SleepingLayer, SleepingStage
from torch_streams import sharded

from meshwright.emulation.dilation import Dilator
from meshwright.emulation.virtual_device import COMPUTE_IS_FREE
from meshwright.emulation.virtual_times import TIMES_FILE, RankTimes, VirtualTimes
from meshwright.errors import MeshwrightError
from meshwright.model.graph import LOSS, LayeredModel, cut
from meshwright.plan.files import load_plan
from meshwright.plan.ranks import StagePlacement, stage_placements
from meshwright.plan.spec import Plan
from meshwright.records import load
from meshwright.runtime.failure import rank_process

LEAST_STEPS = 2
LONG_SECONDS = 8.0
"""Steps end after so long: who is as slow as that need not be watched for minutes."""

Step = Callable[[], None]


class Own:
    """What this rank is to do: its seats, its table, its part of the batch."""

    def __init__(self, plan: Plan, times: RankTimes, layered: LayeredModel, device: Dilator):
        self.rank = int(os.environ["RANK"])
        self.plan, self.times, self.layered, self.device = plan, times, layered, device
        self.optimizer_seconds = times.optimizer
        self.stages = [
            s for s in stage_placements(plan) if any(self.rank == r for r in ranks_of(s))
        ]
        (pipeline,) = plan.pipelines
        self.micro_batches = pipeline.micro_batches
        self.rows = pipeline.rows // len(pipeline.stages[0].devices)
        """Of a micro-batch, on each replica."""
        assert all(tensor.gradient for tensor in layered.tensors)
        self.shapes = {tensor.name: tensor.shape for tensor in layered.tensors}
        self.shapes[LOSS] = (self.rows,)

    def alive(self, layer: int) -> list[str]:
        """The tensors that cross the cut before a layer; behind the last one it is the loss."""
        if layer == len(self.layered.layers):
            return [LOSS]
        tensors = self.layered.tensors
        return [t.name for t in tensors if t.producer < layer <= max(t.consumers)]

    def build(self, layers: tuple[int, int]) -> SleepingStage:
        """Some of the layers."""
        made = [
            SleepingLayer(
                self.layered.layers[n],
                self.shapes,
                (self.times.forward[n], self.times.backward[n]),
                self.device,
            )
            for n in range(*layers)
        ]
        return SleepingStage(made, self.alive(layers[0]), self.alive(layers[1]))

    def tokens(self, micro_batches: int) -> Tensor:
        """Of so many micro-batches."""
        return batch(self.rows * micro_batches, self.plan.job.sequence)[0]


def ranks_of(stage: StagePlacement) -> list[int]:
    """Of every replica."""
    return [placement.rank for placement in stage.mesh.members]


def group_of(groups: list[list[int]]) -> dist.ProcessGroup:
    """The one of these in which this rank is; all ranks make all of them, in the same order."""
    made = [(ranks, dist.new_group(ranks)) for ranks in groups]
    return next(group for ranks, group in made if dist.get_rank() in ranks)


def accumulating(own: Own, model: nn.Module, quiet: Callable[[], Any]) -> Step:
    """Forward and backward of every micro-batch, all but the last without summing gradients."""
    tokens = own.tokens(1)

    def step() -> None:
        for number in range(own.micro_batches):
            with nullcontext() if number == own.micro_batches - 1 else quiet():
                own.device.begin()
                (loss,) = model(tokens)
                own.device.begin()
                loss.sum().backward()
        model.zero_grad()

    return step


def data_parallel(own: Own, job: dict) -> Step:
    """DistributedDataParallel as its documentation recommends it."""
    model = DistributedDataParallel(
        own.build(own.stages[0].layers),
        bucket_cap_mb=job["bucket_mb"],
        gradient_as_bucket_view=True,
        forward_sync_buffers=False,
        init_sync=False,
    )
    return accumulating(own, model, model.no_sync)


def fully_sharded(own: Own, job: dict) -> Step:
    """FSDP2, layer by layer; `hybrid` shards inside nodes and sums across them."""
    assert own.micro_batches == 1
    model = own.build(own.stages[0].layers)
    nodes: dict[str, list[int]] = {}
    for rank, device in enumerate(own.plan.devices):
        nodes.setdefault(device.rpartition(":")[0] if job["hybrid"] else "", []).append(rank)
    inside = list(nodes.values())
    across = [list(ranks) for ranks in zip(*inside, strict=True)]
    own.optimizer_seconds /= len(inside[0])
    stream = sharded(
        model,
        reshard=job["reshard"],
        device=own.device,
        gathering=group_of(inside),
        reducing=group_of(inside),
        across=group_of(across) if job["hybrid"] else None,
    )
    step = accumulating(own, model, nullcontext)

    def reduced() -> None:
        step()
        stream.wait()

    return reduced


class Stage(PipelineStage):
    """Tells the device when it is given something to do."""

    device_time: Dilator

    def forward_one_chunk(self, *arguments: Any, **named: Any) -> Any:
        self.device_time.begin()
        return super().forward_one_chunk(*arguments, **named)

    def backward_one_chunk(self, *arguments: Any, **named: Any) -> Any:
        self.device_time.begin()
        return super().backward_one_chunk(*arguments, **named)


def pipelined(own: Own, job: dict) -> Step:
    """torch.distributed.pipelining, its replicas under DDP or under `replicate`."""
    every = stage_placements(own.plan)
    line = every[: 1 + max(stage.position for stage in every)]
    column = group_of([list(ranks) for ranks in zip(*map(ranks_of, line), strict=True)])
    row = group_of([ranks_of(stage) for stage in line])
    modules, stages = [], []
    for placements in own.stages:
        first, last = (
            tuple(
                torch.empty(own.shapes[name], device="meta", requires_grad=True)
                for name in own.alive(layer)
            )
            for layer in placements.layers
        )
        module: nn.Module = own.build(placements.layers)
        modules.append(module)
        if row.size() > 1 and job["replicas"] == "ddp":
            module = DistributedDataParallel(
                module,
                process_group=row,
                gradient_as_bucket_view=True,
                forward_sync_buffers=False,
                init_sync=False,
            )
        elif row.size() > 1:
            module = replicate(module, mesh=DeviceMesh.from_group(row, "cpu"))
        stage = Stage(
            module,
            placements.number,
            len(every),
            torch.device("cpu"),
            input_args=(own.tokens(1).to("meta"),) if placements.is_first else first,
            output_args=last,
            group=column,
        )
        stage.device_time = own.device
        stages.append(stage)
    how = {"loss_fn": lambda made, _: made[0].sum(), "scale_grads": False}
    schedule = (
        Schedule1F1B(stages[0], own.micro_batches, **how)
        if own.plan.schedule == "1f1b"
        else ScheduleInterleaved1F1B(stages, own.micro_batches, **how)
    )
    tokens = (own.tokens(own.micro_batches),) if own.stages[0].is_first else ()
    target = own.tokens(own.micro_batches) if own.stages[-1].is_last else None

    def step() -> None:
        schedule.step(*tokens, target=target, return_outputs=False)
        for module in modules:
            module.zero_grad()

    return step


SYSTEMS = {"ddp": data_parallel, "fsdp": fully_sharded, "pipelining": pipelined}


def timed(own: Own, step: Step, most: int) -> list[float]:
    """Seconds of each of `most` steps. As in our own runtime, all meet before the optimizer's."""
    seconds: list[float] = []
    began = time.perf_counter()
    over = False
    while not over:
        started = time.perf_counter()
        step()
        count = len(seconds) + 1
        enough = count >= LEAST_STEPS and time.perf_counter() - began > LONG_SECONDS
        news = torch.tensor([0.0, own.rank == 0 and (enough or count >= most)])
        dist.all_reduce(news)
        over = bool(news[1])
        own.device.begin()
        own.device.spend(own.optimizer_seconds)
        own.device.catch_up()
        seconds.append(time.perf_counter() - started)
    return seconds


def main() -> None:
    """One rank."""
    folder = Path(sys.argv[1])
    with rank_process(folder):
        torch.set_num_threads(1)
        job = json.loads((folder / "job.json").read_text())
        plan = load_plan(folder / "plan.json")
        meet()
        times = load(folder / TIMES_FILE, VirtualTimes, error=MeshwrightError).ranks[
            dist.get_rank()
        ]
        (pipeline,) = plan.pipelines
        rows = pipeline.rows // len(pipeline.stages[0].devices)
        layered = cut(make_model(job["model"]), batch(rows, plan.job.sequence))
        own = Own(plan, times, layered, Dilator(COMPUTE_IS_FREE))
        step = SYSTEMS[job["system"]](own, job)
        dist.barrier()
        seconds = timed(own, step, job["steps"])
        if own.rank == 0:
            (folder / "seconds.json").write_text(json.dumps(seconds))
        dist.barrier()


if __name__ == "__main__":
    main()
