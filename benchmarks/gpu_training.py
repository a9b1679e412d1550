"""One process on one device: the model that gpu.py's cases train, our engine, and a plain loop."""

from __future__ import annotations

import os
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from functools import cache, lru_cache
from itertools import pairwise

import torch
import torch.distributed as dist
from torch import Tensor, nn

from meshwright.cluster.spec import Precision
from meshwright.model.spec import LayerGraph
from meshwright.model.trace import trace
from meshwright.model.zoo.gpt import GPT
from meshwright.plan.spec import Job, Pipeline, Plan, PlanInput, Stage, StateDivision
from meshwright.program.compile import compile_plan
from meshwright.program.instructions import Program
from meshwright.runtime.engine import Engine
from meshwright.runtime.launch_variables import interface_variables
from meshwright.runtime.run_folder import TrainingOptions
from meshwright.runtime.world import World, connect

TIMEOUT_SECONDS = 50.0
"""For a message: less than a case may take, so that it is the message that is named."""
LARGE_BYTES = 40 << 30
"""A device with less memory trains the smaller models only."""


@dataclass(frozen=True, kw_only=True)
class Shape:
    """A GPT and its batch."""

    width: int
    heads: int
    blocks: int
    vocabulary: int
    sequence: int
    rows: int
    """Of a micro-batch, on all replicas together."""
    micro_batches: int

    @property
    def batch(self) -> int:
        """Rows of a step."""
        return self.rows * self.micro_batches

    @property
    def layers(self) -> int:
        """Embedding, blocks and head."""
        return self.blocks + 2


SHAPES = {
    "tiny": Shape(
        width=32, heads=2, blocks=2, vocabulary=64, sequence=16, rows=2, micro_batches=2
    ),
    "small": Shape(
        width=512, heads=8, blocks=8, vocabulary=8192, sequence=256, rows=1, micro_batches=4
    ),
    "large": Shape(
        width=2048, heads=16, blocks=8, vocabulary=32768, sequence=1024, rows=4, micro_batches=2
    ),
}  # fmt: skip
"""Where the host is the limit, and where the device is; the tiny one is for runs without a GPU."""


def shapes_for(device: torch.device) -> dict[str, Shape]:
    """What a device is measured with."""
    if device.type == "cpu":
        return {"tiny": SHAPES["tiny"]}
    large = torch.cuda.get_device_properties(device).total_memory >= LARGE_BYTES
    return {name: SHAPES[name] for name in ("small", "large")[: 1 + large]}


def sizes_of(device: torch.device, real: int, tiny: int) -> int:
    """A number of repeats: the real one on a GPU, a tiny one without."""
    return real if device.type == "cuda" else tiny


def synchronize(device: torch.device) -> None:
    """Wait until the device has done all that it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def start_alone(device: torch.device) -> None:
    """Make this process a world of one: NCCL on a GPU, gloo for the host."""
    os.environ.update(interface_variables(None, os.environ))
    if not dist.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)


def made(shape: Shape) -> GPT:
    """The same model, with the same weights, in every process."""
    return deepcopy(_first(shape))


@lru_cache(maxsize=1)
def _first(shape: Shape) -> GPT:
    """Kept, since random weights of a large model take the CPU seconds."""
    torch.manual_seed(1)
    return _new(shape)


def _new(shape: Shape) -> GPT:
    return GPT(
        vocabulary=shape.vocabulary, positions=shape.sequence, width=shape.width,
        heads=shape.heads, layers=shape.blocks, tied=False,
    )  # fmt: skip


def without_storage(shape: Shape) -> GPT:
    """Its layers and shapes alone."""
    with torch.device("meta"):
        return _new(shape)


def batch_of(shape: Shape, device: torch.device | str = "cpu") -> tuple[Tensor, Tensor]:
    """The same rows for all."""
    torch.manual_seed(0)
    tokens = torch.randint(shape.vocabulary, (shape.batch, shape.sequence + 1))
    return tokens[:, :-1].contiguous().to(device), tokens[:, 1:].contiguous().to(device)


def adamw(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    """The same optimizer on both sides."""
    return torch.optim.AdamW(parameters, lr=1e-4, fused=True)


def plan_of(
    shape: Shape,
    precision: Precision,
    *,
    stages: int = 1,
    data: int = 1,
    recompute: bool = False,
    states: StateDivision | None = None,
) -> Plan:
    """Equal stages of `data` devices each, one micro-batch after the other by 1F1B."""
    cuts = [round(shape.layers * s / stages) for s in range(stages + 1)]
    devices = tuple(f"here:{n}" for n in range(stages * data))
    held = [devices[s * data : (s + 1) * data] for s in range(stages)]
    return Plan(
        name="gpu",
        model=PlanInput(name="gpt", fingerprint=""),
        cluster=PlanInput(name="here", fingerprint=""),
        job=Job(global_batch=shape.batch, sequence=shape.sequence, precision=precision),
        schedule="1f1b",
        devices=devices,
        pipelines=(
            Pipeline(
                micro_batches=shape.micro_batches,
                rows=shape.rows,
                stages=tuple(
                    Stage(
                        layers=cut,
                        devices=tuple((each,) for each in own),
                        recompute=recompute,
                        states=states,
                    )
                    for cut, own in zip(pairwise(cuts), held, strict=True)
                ),
            ),
        ),
    )


@cache
def graph_of(shape: Shape, precision: Precision) -> LayerGraph:
    """The layers, traced without storage."""
    inputs = torch.zeros(2, shape.sequence, dtype=torch.long, device="meta")
    return trace(
        without_storage(shape), (inputs, inputs), precision, shape.sequence, "gpt", divided=False
    )


Connect = Callable[[Plan, Program], World]
"""Makes the world in which a plan's program runs."""


def engine_of(
    shape: Shape,
    plan: Plan,
    device: torch.device,
    *,
    compile: bool = False,
    world: Connect | None = None,
    bucket_bytes: int | None = None,
) -> Engine:
    """Our runtime on the same model; `world` is by default that of one process."""
    graph = graph_of(shape, plan.job.precision)
    program = compile_plan(plan, graph, bucket_bytes=bucket_bytes, clipped=True)

    def alone(plan: Plan, program: Program) -> World:
        return connect(plan, program, timeout_seconds=TIMEOUT_SECONDS, device=device.type)

    example = torch.zeros(2, shape.sequence, dtype=torch.long)
    return Engine(
        made(shape), plan, inputs=(example, example), optimizer=adamw, graph=graph,
        options=TrainingOptions(compile=compile, timeout_seconds=TIMEOUT_SECONDS),
        world=(world or alone)(plan, program), bucket_bytes=bucket_bytes,
    )  # fmt: skip


def engine_step(engine: Engine, batch: tuple[Tensor, Tensor]) -> float:
    """One step of ours on the whole batch; returns its loss."""
    return engine.step(lambda first, last: tuple(x[first:last] for x in batch)).loss


class PlainLoop:
    """What a user would write: autocast, micro-batches one after the other, clipping, AdamW."""

    def __init__(
        self, shape: Shape, device: torch.device, precision: Precision, *, compile: bool = False
    ) -> None:
        self.shape, self.device = shape, device
        self.model = made(shape).to(device)
        if compile:  # layer by layer, as ours: the whole would take minutes
            model = self.model
            model.embedding = torch.compile(model.embedding)
            model.blocks = torch.nn.ModuleList(torch.compile(each) for each in model.blocks)
            model.head = torch.compile(model.head)
        self.optimizer = adamw(list(self.model.parameters()))
        self.arithmetic = torch.autocast(
            device.type, dtype=torch.bfloat16, enabled=precision == "bf16"
        )

    def step(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        """One step on the whole batch; returns its loss, which the host has not read."""
        shape = self.shape
        self.optimizer.zero_grad()
        total = torch.zeros((), device=self.device)
        for first in range(0, shape.batch, shape.rows):
            rows = (x[first : first + shape.rows].to(self.device) for x in batch)
            with self.arithmetic:
                loss = self.model(*rows) / shape.micro_batches
            loss.backward()
            total += loss.detach()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        return total
