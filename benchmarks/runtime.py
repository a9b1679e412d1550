"""Tokens per second of the runtime against PyTorch's own, on the same model and processes.

    python benchmarks/runtime.py [--steps 20] [--cases dp2,pp2] [--json OUT] [--alone]

Even plans (the same on both sides):
dp2: DistributedDataParallel.  pp2, pp4: pipelining.Schedule1F1B.
il2, il4: ScheduleInterleaved1F1B, two stages a process.  zb2, zb4: ScheduleInterleavedZeroBubble
against interleaved 1F1B with backwards in two parts.  zbv2, zbv4: ScheduleZBVZeroBubble.
Uneven: un2: a head as heavy as six blocks. Theirs has as many blocks in either stage, so that
stage times differ by two; ours cuts where measured times balance.

Both sides live in the same processes and take turns, step by step; medians are compared.
--alone: instead, each side in processes of its own: seconds from the first import to the end of the
first step, and resident memory after it.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

BEGAN = time.perf_counter()
SEQUENCE = 128


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

    @property
    def batch(self) -> int:
        """Rows of a step."""
        return self.micro_batches * self.rows


CASES = {
    "dp2": Case(processes=2, theirs="DistributedDataParallel", micro_batches=1, rows=16),
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
        processes=2, theirs="Schedule1F1B", width=128, blocks=12, vocabulary=8192, balanced=True
    ),
}  # fmt: skip


def main() -> None:
    """Run every case in processes of its own and print one table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--cases", default=",".join(CASES))
    parser.add_argument("--json", type=Path)
    parser.add_argument("--alone", action="store_true")
    parser.add_argument("--worker")
    parser.add_argument("--sides", default="theirs,ours")
    options = parser.parse_args()
    if options.worker:
        run = start if options.alone else worker
        run(CASES[options.worker], options)
        return
    table = start_table if options.alone else speed_table
    results = table(options)
    if options.json:
        options.json.write_text(json.dumps(results, indent=1))


def speed_table(options: argparse.Namespace) -> dict:
    """Tokens per second and their ratio, case by case."""
    print(f"{'case':6}{'baseline':>32}{'tokens/s':>10}{'ours':>10}{'ratio':>8}{'quartiles':>16}")
    results = {}
    for case in options.cases.split(","):
        r = results[case] = launch(case, ["--steps", str(options.steps)])
        quartiles = f"{r['ratio_low']:.3f}-{r['ratio_high']:.3f}"
        print(
            f"{case:6}{r['baseline']:>32}{r['baseline_tokens_per_second']:>10.0f}"
            f"{r['tokens_per_second']:>10.0f}{r['ratio']:>8.3f}{quartiles:>16}",
            flush=True,
        )
    return results


def start_table(options: argparse.Namespace) -> dict:
    """Seconds to the end of the first step, and memory, of either side by itself."""
    print(f"{'case':6}{'side':>8}{'start, s':>10}{'CPU, s':>8}{'resident, MB':>14}")
    results = {}
    for case in options.cases.split(","):
        for side in ("theirs", "ours"):
            r = results[f"{case} {side}"] = launch(case, ["--alone", "--sides", side])
            print(
                f"{case:6}{side:>8}{r['seconds']:>10.2f}{r['cpu_seconds']:>8.2f}"
                f"{r['resident_bytes'] / 1e6:>14.0f}",
                flush=True,
            )
    return results


def launch(case: str, arguments: list[str]) -> dict:
    """One case under torchrun; returns what its rank 0 wrote."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "result.json"
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        subprocess.run(
            [
                *torchrun, f"--nproc-per-node={CASES[case].processes}", __file__,
                "--worker", case, "--json", str(out), *arguments,
            ],
            check=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            timeout=900,
        )  # fmt: skip
        return json.loads(out.read_text())


def sides_of(case: Case, names: str):
    """The chosen sides, ready to step, and a step's batch."""
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    if not dist.is_initialized():
        dist.init_process_group("gloo")
    rank, size = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(0)
    tokens = torch.randint(case.vocabulary, (case.batch, SEQUENCE + 1))
    batch = (tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous())
    sides = {}
    for name in names.split(","):
        if name == "ours":
            sides[name] = meshwright_steps(case, size)
        elif case.theirs == "DistributedDataParallel":
            sides[name] = ddp(case, rank, size)
        else:
            sides[name] = pipelining(case, rank, size)
    return sides, batch


def worker(case: Case, options: argparse.Namespace) -> None:
    """Take turns: one step of PyTorch's, one of ours."""
    import torch.distributed as dist

    sides, batch = sides_of(case, options.sides)
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for turn in range(options.steps + 3):
        order = list(sides.items())
        for name, step in order if turn % 2 else reversed(order):
            dist.barrier()
            began = time.perf_counter()
            step(batch)
            dist.barrier()
            if turn >= 3:
                seconds[name].append(time.perf_counter() - began)
    if dist.get_rank() == 0:
        options.json.write_text(json.dumps(summary(case, seconds)))
    leave()


def start(case: Case, options: argparse.Namespace) -> None:
    """One side alone: what it takes to get through the first step."""
    import torch
    import torch.distributed as dist

    from meshwright.runtime.measure import peak_bytes

    sides, batch = sides_of(case, options.sides)
    for step in sides.values():
        step(batch)
    dist.barrier()
    spent = time.perf_counter() - BEGAN, time.process_time()
    own = torch.tensor([*spent, peak_bytes(torch.device("cpu"))], dtype=torch.float64)
    dist.all_reduce(own, dist.ReduceOp.MAX)
    if dist.get_rank() == 0:
        names = ("seconds", "cpu_seconds", "resident_bytes")
        options.json.write_text(json.dumps(dict(zip(names, own.tolist(), strict=True))))
    leave()


def leave() -> None:
    """End at once: gloo's threads need not be taken apart."""
    import torch.distributed as dist

    dist.barrier()
    sys.stdout.flush()
    os._exit(0)


def summary(case: Case, seconds: dict[str, list[float]]) -> dict:
    """Medians of both, and of their ratio turn by turn."""
    tokens = case.batch * SEQUENCE
    ratios = sorted(a / b for a, b in zip(seconds["theirs"], seconds["ours"], strict=True))
    low, middle, high = statistics.quantiles(ratios, n=4)
    return {
        "baseline": case.theirs,
        "baseline_tokens_per_second": tokens / statistics.median(seconds["theirs"]),
        "tokens_per_second": tokens / statistics.median(seconds["ours"]),
        "ratio": middle,
        "ratio_low": low,
        "ratio_high": high,
    }


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


def balanced_cut(case: Case) -> int:
    """The layer at which measured compute is halved, agreed upon by all."""
    import torch
    import torch.distributed as dist

    whole = model(case)
    x = torch.randn(case.rows, SEQUENCE, case.width)
    targets = torch.zeros(case.rows, SEQUENCE, dtype=torch.long)

    def seconds(run) -> float:
        found = []
        for _ in range(5):
            leaf = x.clone().requires_grad_()
            began = time.process_time()
            run(leaf).sum().backward()
            found.append(time.process_time() - began)
        return statistics.median(found)

    block, head = seconds(whole.blocks[0]), seconds(lambda leaf: whole.head(leaf, targets))
    before = (case.blocks + head / block) / 2
    cut = torch.tensor([1 + min(case.blocks, round(before))])
    dist.broadcast(cut, 0)
    return int(cut)


def meshwright_steps(case: Case, size: int):
    """Our engine on the same plan; on one of its own where the case asks for balance."""
    import torch

    from meshwright.plan.spec import Job, Pipeline, Plan, Stage, Subject
    from meshwright.runtime.engine import Engine

    devices = tuple(f"here:{i}" for i in range(size))
    if case.theirs == "DistributedDataParallel":
        stages = (Stage(layers=(0, case.blocks + 2), devices=tuple((d,) for d in devices)),)
    else:
        at = [0, balanced_cut(case), case.blocks + 2] if case.balanced else cuts(case)
        holder = {s: rank for rank in range(size) for s in stages_of(case, rank, size)}
        stages = tuple(
            Stage(layers=(at[s], at[s + 1]), devices=((devices[holder[s]],),))
            for s in range(len(at) - 1)
        )
    plan = Plan(
        name="benchmark",
        model=Subject(name="gpt", fingerprint=""),
        cluster=Subject(name="here", fingerprint=""),
        job=Job(global_batch=case.batch, sequence=SEQUENCE, precision="fp32"),
        schedule=case.schedule,
        devices=devices,
        pipelines=(Pipeline(micro_batches=case.micro_batches, rows=case.rows, stages=stages),),
    )
    example = torch.zeros(2, SEQUENCE, dtype=torch.long)
    engine = Engine(
        model(case), plan, inputs=(example, example), optimizer=adamw, clip_norm=1.0, seed=0
    )
    return lambda batch: engine.step(lambda a, b: tuple(x[a:b] for x in batch))


if __name__ == "__main__":
    main()
