"""The two sides of runtime.py: models and cases, PyTorch's ways to train them, and ours."""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass
from functools import partial
from itertools import pairwise

SEQUENCE = 128

DDP_BUCKET = 25 * 2**20
"""Bytes that DistributedDataParallel sums at once, but for the first MiB."""

BALANCING_STEPS = 6
"""Of which the first one does not count."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """A model, a way to train it, and PyTorch's word for it."""

    processes: int
    theirs: str
    schedule: str = "1f1b"
    stages_each: int = 1
    micro_batches: int = 8
    rows: int = 2
    width: int = 256
    blocks: int = 6
    vocabulary: int = 256
    balanced: bool = False
    bucket_bytes: int | None = None
    """Of our sums of gradients; None: as usual."""

    @property
    def batch(self) -> int:
        """Rows of a step."""
        return self.micro_batches * self.rows


CASES = {
    "dp2": Case(
        processes=2, theirs="DistributedDataParallel", micro_batches=1, rows=16,
        bucket_bytes=DDP_BUCKET,
    ),
    "dp2s": Case(processes=2, theirs="DistributedDataParallel", micro_batches=1, rows=16),
    "pp2": Case(processes=2, theirs="Schedule1F1B"),
    "pp4": Case(processes=4, theirs="Schedule1F1B"),
    "il2": Case(
        processes=2, theirs="ScheduleInterleaved1F1B", schedule="interleaved-1f1b", stages_each=2
    ),
    "il4": Case(
        processes=4, theirs="ScheduleInterleaved1F1B", schedule="interleaved-1f1b", stages_each=2,
        blocks=8,
    ),
    "zb2": Case(
        processes=2, theirs="ScheduleInterleavedZeroBubble", schedule="interleaved-1f1b-2bp",
        stages_each=2,
    ),
    "zb4": Case(
        processes=4, theirs="ScheduleInterleavedZeroBubble", schedule="interleaved-1f1b-2bp",
        stages_each=2, blocks=8,
    ),
    "zbv2": Case(processes=2, theirs="ScheduleZBVZeroBubble", schedule="zb-v", stages_each=2),
    "zbv4": Case(
        processes=4, theirs="ScheduleZBVZeroBubble", schedule="zb-v", stages_each=2, blocks=8
    ),
    "un2": Case(
        processes=2, theirs="Schedule1F1B", schedule="zb-h1", width=128, blocks=12,
        vocabulary=13312, balanced=True,
    ),
}  # fmt: skip


def sides_of(case: Case, names: str):
    """The chosen sides, ready to step, and a step's batch."""
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    if not dist.is_initialized():
        dist.init_process_group("gloo")
    rank, size = dist.get_rank(), dist.get_world_size()
    sides = {}
    for name in names.split(","):
        if name == "ours":
            sides[name] = meshwright_steps(case)
        elif case.theirs == "DistributedDataParallel":
            sides[name] = ddp(case, rank, size)
        else:
            sides[name] = pipelining(case, rank, size)
    return sides, whole_batch(case)


def whole_batch(case: Case):
    """The same rows for all."""
    import torch

    torch.manual_seed(0)
    tokens = torch.randint(case.vocabulary, (case.batch, SEQUENCE + 1))
    return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()


def model(case: Case):
    """The same small GPT on both sides."""
    import torch

    from meshwright.model.zoo.gpt import GPT

    torch.manual_seed(1)
    return GPT(
        vocabulary=case.vocabulary, positions=SEQUENCE, width=case.width, heads=8,
        layers=case.blocks, tied=False,
    )  # fmt: skip


def adamw(parameters):
    """The same optimizer on both sides."""
    import torch

    return torch.optim.AdamW(parameters, lr=1e-4, fused=True)


def ddp(case: Case, rank: int, size: int):
    """DistributedDataParallel over the whole share of a rank, as one micro-batch."""
    import torch
    from torch.nn.parallel import DistributedDataParallel

    wrapped = DistributedDataParallel(model(case), gradient_as_bucket_view=True)
    optimizer = adamw(wrapped.parameters())
    share = case.batch // size

    def step(batch) -> None:
        optimizer.zero_grad(set_to_none=False)
        rows = slice(rank * share, (rank + 1) * share)
        wrapped(batch[0][rows], batch[1][rows]).backward()
        torch.nn.utils.clip_grad_norm_(wrapped.parameters(), 1.0)
        optimizer.step()

    return step


def cuts(case: Case) -> list[int]:
    """Layers (embedding, blocks, head) at which stages begin and end, as many blocks in each."""
    stages = case.processes * case.stages_each
    share, extra = divmod(case.blocks, stages)
    ends = [1 + (i + 1) * share + min(i + 1, extra) for i in range(stages)]
    return [0, *ends[:-1], case.blocks + 2]


def stages_of(case: Case, rank: int, size: int) -> list[int]:
    """A process's stages: dealt out in turn, or down the line and back up."""
    if case.schedule == "zb-v":
        return [rank, 2 * size - 1 - rank]
    return [rank + turn * size for turn in range(case.stages_each)]


def pipelining(case: Case, rank: int, size: int):
    """torch.distributed.pipelining with hand-made stages."""
    import torch
    import torch.distributed.pipelining as p
    from torch.distributed.pipelining import schedules

    whole, at = model(case), cuts(case)
    own = stages_of(case, rank, size)
    modules = [stage_module(whole, at[s], at[s + 1]) for s in own]
    total = size * case.stages_each
    stages = [
        p.PipelineStage(module, s, total, torch.device("cpu"))
        for s, module in zip(own, modules, strict=True)
    ]
    kind = getattr(schedules, case.theirs)
    options = {"loss_fn": lambda loss, _: loss.mean()}
    single = case.stages_each == 1
    schedule = kind(stages[0] if single else stages, case.micro_batches, **options)
    parameters = [q for module in modules for q in module.parameters()]
    optimizer = adamw(parameters)

    def step(batch) -> None:
        optimizer.zero_grad(set_to_none=False)
        arguments = (batch[0],) if 0 in own else ()
        if total - 1 in own:
            schedule.step(*arguments, target=batch[1], losses=[], targets=batch[1])
        else:
            schedule.step(*arguments)
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()

    return step


def stage_module(whole, first: int, last: int):
    """A run of layers: embedding first, head last."""
    import torch
    from torch import nn

    blocks = len(whole.blocks)

    class StageModule(nn.Module):
        """One rank's run of layers."""

        def __init__(self) -> None:
            super().__init__()
            self.embedding = whole.embedding if first == 0 else None
            self.blocks = nn.ModuleList(whole.blocks[max(0, first - 1) : min(blocks, last - 1)])
            self.head = whole.head if last == blocks + 2 else None

        def forward(self, x, targets=None):
            if self.embedding is not None:
                x = self.embedding(x)
            for block in self.blocks:
                x = block(x)
            # A tensor of its own: their split backward cannot end in a view.
            return x if self.head is None else torch.stack([self.head(x, targets)])

    return StageModule()


def meshwright_steps(case: Case):
    """Our engine on the same plan; on one of its own where the case asks for balance."""
    if case.theirs == "DistributedDataParallel":
        at = [0, case.blocks + 2]
    else:
        at = [0, balanced_cut(case), case.blocks + 2] if case.balanced else cuts(case)
    return partial(step_of, meshwright_engine(case, at))


def meshwright_engine(case: Case, at: list[int]):
    """Our engine for stages that begin and end at these layers; a single one is on every device."""
    import torch

    from meshwright.plan.spec import Job, Pipeline, Plan, PlanInput, Stage
    from meshwright.runtime.engine import Engine
    from meshwright.runtime.run_folder import TrainingOptions

    size = case.processes
    devices = tuple(f"here:{i}" for i in range(size))
    holder = {s: rank for rank in range(size) for s in stages_of(case, rank, size)}
    single = tuple((d,) for d in devices)
    stages = tuple(
        Stage(layers=(first, last), devices=((devices[holder[s]],),) if len(at) > 2 else single)
        for s, (first, last) in enumerate(pairwise(at))
    )
    plan = Plan(
        name="benchmark",
        model=PlanInput(name="gpt", fingerprint=""),
        cluster=PlanInput(name="here", fingerprint=""),
        job=Job(global_batch=case.batch, sequence=SEQUENCE, precision="fp32"),
        schedule=case.schedule,
        devices=devices,
        pipelines=(Pipeline(micro_batches=case.micro_batches, rows=case.rows, stages=stages),),
    )
    example = torch.zeros(2, SEQUENCE, dtype=torch.long)
    return Engine(
        model(case), plan, inputs=(example, example), optimizer=adamw, options=TrainingOptions(),
        bucket_bytes=case.bucket_bytes,
    )  # fmt: skip


def step_of(engine, batch) -> None:
    """One step on the whole batch."""
    engine.step(lambda first, last: tuple(x[first:last] for x in batch))


def balanced_cut(case: Case) -> int:
    """The layer at which the compute of two stages is halved: from the processor seconds that each
    takes for a step where both have as many blocks."""
    import torch
    import torch.distributed as dist

    even, batch = cuts(case), whole_batch(case)
    engine = meshwright_engine(case, even)
    seconds = []
    for _ in range(BALANCING_STEPS):
        dist.barrier()
        began = time.process_time()
        step_of(engine, batch)
        seconds.append(time.process_time() - began)
    engine.close()
    own = torch.zeros(2)
    own[dist.get_rank()] = statistics.median(seconds[1:])
    dist.all_reduce(own)
    first, second = own.tolist()
    block = first / (even[1] - 1)
    return 1 + min(case.blocks, round((first + second) / 2 / block))
