"""Tokens per second of the runtime against PyTorch's own, on the same even plan and processes.

    python benchmarks/runtime.py [--steps 20] [--json OUT]

dp: DistributedDataParallel.  pp: torch.distributed.pipelining, Schedule1F1B.
Both sides live in the same processes and take turns, step by step; medians are compared.
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
from pathlib import Path

SEQUENCE, WIDTH, HEADS, BLOCKS, VOCABULARY = 128, 256, 8, 6, 256
GLOBAL_BATCH = 16
MICRO_BATCHES = 8
CASES = {"dp2": 2, "pp2": 2, "pp4": 4}


def main() -> None:
    """Run every case in processes of its own and print one table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--cases", default=",".join(CASES))
    parser.add_argument("--json", type=Path)
    parser.add_argument("--worker")
    options = parser.parse_args()
    if options.worker:
        worker(options.worker, options.steps, options.json)
        return
    results = {case: launch(case, options.steps) for case in options.cases.split(",")}
    print(f"{'case':6}{'baseline':>34}{'tokens/s':>10}{'ours':>10}{'ratio':>8}{'quartiles':>16}")
    for case, r in results.items():
        quartiles = f"{r['ratio_low']:.3f}-{r['ratio_high']:.3f}"
        print(
            f"{case:6}{r['baseline']:>34}{r['baseline_tokens_per_second']:>10.0f}"
            f"{r['tokens_per_second']:>10.0f}{r['ratio']:>8.3f}{quartiles:>16}"
        )
    if options.json:
        options.json.write_text(json.dumps(results, indent=1))


def launch(case: str, steps: int) -> dict:
    """One case under torchrun; returns what its rank 0 wrote."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "result.json"
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        arguments = ["--worker", case, "--steps", str(steps), "--json", str(out)]
        subprocess.run(
            [*torchrun, f"--nproc-per-node={CASES[case]}", __file__, *arguments],
            check=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            timeout=900,
        )
        return json.loads(out.read_text())


def worker(case: str, steps: int, out: Path) -> None:
    """Take turns: one step of PyTorch's, one of ours."""
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank, size = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(0)
    tokens = torch.randint(VOCABULARY, (GLOBAL_BATCH, SEQUENCE + 1))
    batch = (tokens[:, :-1], tokens[:, 1:])
    theirs = ddp(rank, size) if case.startswith("dp") else pipelining(rank, size)
    ours, close = meshwright_steps(case, size)
    seconds: dict[str, list[float]] = {"theirs": [], "ours": []}
    losses: dict[str, float] = {}
    for turn in range(steps + 3):
        order = (("theirs", theirs), ("ours", ours))
        for name, step in order if turn % 2 else reversed(order):
            dist.barrier()
            began = time.perf_counter()
            losses[name] = step(batch)
            dist.barrier()
            if turn >= 3:
                seconds[name].append(time.perf_counter() - began)
    if rank == 0:
        kind = "DistributedDataParallel" if case.startswith("dp") else "pipelining.Schedule1F1B"
        out.write_text(json.dumps(summary(kind, seconds)))
    close()


def summary(kind: str, seconds: dict[str, list[float]]) -> dict:
    """Medians of both, and of their ratio turn by turn."""
    tokens = GLOBAL_BATCH * SEQUENCE
    ratios = sorted(a / b for a, b in zip(seconds["theirs"], seconds["ours"], strict=True))
    low, middle, high = statistics.quantiles(ratios, n=4)
    return {
        "baseline": kind,
        "baseline_tokens_per_second": tokens / statistics.median(seconds["theirs"]),
        "tokens_per_second": tokens / statistics.median(seconds["ours"]),
        "ratio": middle,
        "ratio_low": low,
        "ratio_high": high,
    }


def model():
    """The same small GPT on both sides."""
    import torch

    from meshwright.model.zoo.gpt import GPT

    torch.manual_seed(1)
    return GPT(
        vocabulary=VOCABULARY, positions=SEQUENCE, width=WIDTH, heads=HEADS, layers=BLOCKS,
        tied=False,
    )  # fmt: skip


def adamw(parameters):
    """The same optimizer on both sides."""
    import torch

    return torch.optim.AdamW(parameters, lr=1e-4)


def ddp(rank: int, size: int):
    """DistributedDataParallel over the whole share of a rank, as one micro-batch."""
    import torch
    from torch.nn.parallel import DistributedDataParallel

    wrapped = DistributedDataParallel(model(), gradient_as_bucket_view=True)
    optimizer = adamw(wrapped.parameters())
    share = GLOBAL_BATCH // size

    def step(batch) -> float:
        optimizer.zero_grad(set_to_none=False)
        rows = slice(rank * share, (rank + 1) * share)
        loss = wrapped(batch[0][rows], batch[1][rows])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(wrapped.parameters(), 1.0)
        optimizer.step()
        return loss.item()

    return step


def pipelining(rank: int, size: int):
    """torch.distributed.pipelining with hand-made stages, 1F1B."""
    import torch
    from torch.distributed.pipelining import PipelineStage, Schedule1F1B

    stage_model = stage_module(model(), rank, size)
    stage = PipelineStage(stage_model, rank, size, torch.device("cpu"))
    schedule = Schedule1F1B(stage, MICRO_BATCHES, loss_fn=lambda loss, _: loss.mean())
    optimizer = adamw(stage_model.parameters())

    def step(batch) -> float:
        optimizer.zero_grad(set_to_none=False)
        losses: list = []
        if rank == 0:
            schedule.step(batch[0])
        elif rank == size - 1:
            schedule.step(target=batch[1], losses=losses, targets=batch[1])
        else:
            schedule.step()
        torch.nn.utils.clip_grad_norm_(stage_model.parameters(), 1.0)
        optimizer.step()
        return sum(loss.item() for loss in losses) / MICRO_BATCHES if losses else 0.0

    return step


def stage_module(whole, rank: int, size: int):
    """Blocks in equal runs; embedding first, head last."""
    from torch import nn

    share = BLOCKS // size
    extra = BLOCKS - share * size
    counts = [share + (i < extra) for i in range(size)]
    first = sum(counts[:rank])

    class StageModule(nn.Module):
        """One rank's run of layers."""

        def __init__(self) -> None:
            super().__init__()
            self.embedding = whole.embedding if rank == 0 else None
            self.blocks = nn.ModuleList(whole.blocks[first : first + counts[rank]])
            self.head = whole.head if rank == size - 1 else None

        def forward(self, x, targets=None):
            if self.embedding is not None:
                x = self.embedding(x)
            for block in self.blocks:
                x = block(x)
            return x if self.head is None else self.head(x, targets)[None]

    return StageModule()


def meshwright_steps(case: str, size: int):
    """Our engine on the same even plan."""
    import torch

    from meshwright.plan.spec import Job, Pipeline, Plan, Stage, Subject
    from meshwright.runtime.engine import Engine

    devices = tuple(f"here:{i}" for i in range(size))
    layers = BLOCKS + 2
    if case.startswith("dp"):
        stages = (Stage(layers=(0, layers), devices=tuple((d,) for d in devices)),)
        pipeline = Pipeline(micro_batches=1, rows=GLOBAL_BATCH, stages=stages)
    else:
        share, extra = divmod(BLOCKS, size)
        ends = [1 + (i + 1) * share + min(i + 1, extra) for i in range(size)]
        cuts = [0, *ends[:-1], layers]
        stages = tuple(
            Stage(layers=(cuts[i], cuts[i + 1]), devices=((devices[i],),)) for i in range(size)
        )
        rows = GLOBAL_BATCH // MICRO_BATCHES
        pipeline = Pipeline(micro_batches=MICRO_BATCHES, rows=rows, stages=stages)
    plan = Plan(
        name=case,
        model=Subject(name="gpt", fingerprint=""),
        cluster=Subject(name="here", fingerprint=""),
        job=Job(global_batch=GLOBAL_BATCH, sequence=SEQUENCE, precision="fp32"),
        devices=devices,
        pipelines=(pipeline,),
    )
    example = torch.zeros(2, SEQUENCE, dtype=torch.long)
    engine = Engine(
        model(), plan, inputs=(example, example), optimizer=adamw, clip_norm=1.0,
        learning_rate=None, seed=0,
    )  # fmt: skip

    def step(batch) -> float:
        return engine.step(lambda a, b: tuple(x[a:b] for x in batch)).loss

    return step, engine.close


if __name__ == "__main__":
    main()
