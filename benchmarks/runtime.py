"""Tokens per second of the runtime against PyTorch's own, on the same model and processes.

    python benchmarks/runtime.py [--steps 20] [--cases dp2,pp2] [--json OUT] [--alone]

Even plans (the same on both sides):
dp2: DistributedDataParallel, with buckets of 25 MiB on both sides.  dp2s: ours as small as usual,
for links slower than a machine's own.  pp2, pp4: pipelining.Schedule1F1B.
il2, il4: ScheduleInterleaved1F1B, two stages a process.  zb2, zb4: ScheduleInterleavedZeroBubble
against interleaved 1F1B with backwards in two parts.  zbv2, zbv4: ScheduleZBVZeroBubble.
Uneven: un2: a head as heavy as six blocks. Theirs has as many blocks in either stage, so that
stage times differ by two; ours cuts where times measured in such stages balance, in the order
ZB-H1, for which PyTorch's schedules want several stages a process.

Both sides live in the same processes and take turns, step by step; medians are compared. CPU: the
ratio of the processor seconds that all processes take for a step, which tells something on a busy
machine, too.
--alone: instead, each side in processes of its own: seconds from the first import to the end of the
first step, and resident memory after it; un2 with as many blocks in either stage on both sides.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

from again import start_again
from runtime_sides import CASES, SEQUENCE, Case, sides_of

BEGAN = time.perf_counter()


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
    print(
        f"{'case':6}{'baseline':>32}{'tokens/s':>10}{'ours':>10}{'ratio':>8}{'quartiles':>16}"
        f"{'CPU':>8}"
    )
    results = {}
    for case in options.cases.split(","):
        r = results[case] = launch(case, ["--steps", str(options.steps)])
        quartiles = f"{r['ratio_low']:.3f}-{r['ratio_high']:.3f}"
        print(
            f"{case:6}{r['baseline']:>32}{r['baseline_tokens_per_second']:>10.0f}"
            f"{r['tokens_per_second']:>10.0f}{r['ratio']:>8.3f}{quartiles:>16}{r['cpu_ratio']:>8.3f}",
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
    """One case in processes of its own; returns what its rank 0 wrote."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "result.json"
        start_again(CASES[case].processes, ["--worker", case, "--json", str(out), *arguments])
        return json.loads(out.read_text())


def worker(case: Case, options: argparse.Namespace) -> None:
    """Take turns: one step of PyTorch's, one of ours."""
    import torch
    import torch.distributed as dist

    sides, batch = sides_of(case, options.sides)
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    processor: dict[str, list[float]] = {name: [] for name in sides}
    for turn in range(options.steps + 3):
        order = list(sides.items())
        for name, step in order if turn % 2 else reversed(order):
            dist.barrier()
            began = time.perf_counter(), time.process_time()
            step(batch)
            dist.barrier()
            if turn >= 3:
                seconds[name].append(time.perf_counter() - began[0])
                processor[name].append(time.process_time() - began[1])
    for name, own in processor.items():
        total = torch.tensor(own)
        dist.all_reduce(total)
        processor[name] = total.tolist()
    if dist.get_rank() == 0:
        options.json.write_text(json.dumps(summary(case, seconds, processor)))
    leave()


def start(case: Case, options: argparse.Namespace) -> None:
    """One side alone: what it takes to get through the first step."""
    import torch
    import torch.distributed as dist

    from meshwright.runtime.recorder import peak_bytes

    sides, batch = sides_of(replace(case, balanced=False), options.sides)
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


def summary(case: Case, seconds: dict[str, list[float]], processor: dict[str, list[float]]) -> dict:
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
        "cpu_ratio": statistics.median(processor["theirs"]) / statistics.median(processor["ours"]),
    }


if __name__ == "__main__":
    main()
