"""Tensor parallelism on plain tensors against torch's DTensor styles, on one transformer block.

    python benchmarks/tensor_parallel.py [--rounds 40] [--json OUT]

Two gloo processes, forward and backward of one GPT block divided over both: ours (slices and
autograd functions) and ColwiseParallel/RowwiseParallel. Both live in the same processes and take
turns; medians are compared. torch cuts the fused q|k|v projection across its parts, ours within
each, which costs the same.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import time
from pathlib import Path

from again import start_again

SIZES = {"small": (128, 4, 64, 2), "medium": (512, 8, 128, 4)}
"""Width, heads, sequence, rows."""


def main() -> None:
    """Start two processes; print and keep what their rank 0 measured."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--worker", action="store_true")
    options = parser.parse_args()
    if options.worker:
        worker(options.rounds, options.json)
        return
    arguments = ["--worker", "--rounds", str(options.rounds)]
    if options.json:
        arguments += ["--json", str(options.json)]
    start_again(2, arguments)


def worker(rounds: int, out: Path | None) -> None:
    """Both sides, turn by turn."""
    import torch.distributed as dist

    dist.init_process_group("gloo")
    results = {name: compare(rounds, *size) for name, size in SIZES.items()}
    if dist.get_rank() == 0:
        print(f"{'block':8}{'DTensor ms':>12}{'ours ms':>10}{'ours / DTensor':>16}")
        for name, r in results.items():
            print(f"{name:8}{r['dtensor_ms']:>12.2f}{r['ours_ms']:>10.2f}{r['ratio']:>16.3f}")
        if out:
            out.write_text(json.dumps(results, indent=1))
    dist.destroy_process_group()


def compare(rounds: int, width: int, heads: int, sequence: int, rows: int) -> dict[str, float]:
    """Median milliseconds of a forward and backward, either way."""
    import torch
    import torch.distributed as dist

    from meshwright.model.zoo.gpt import Block

    torch.manual_seed(0)
    block = Block(width, heads, 4 * width, 0.0, 0.02)
    sides = {"dtensor": by_torch(copy.deepcopy(block)), "ours": by_us(copy.deepcopy(block))}
    x = torch.randn(rows, sequence, width)
    times: dict[str, list[float]] = {name: [] for name in sides}
    for turn in range(rounds + 5):
        for name, module in sides.items():
            module.zero_grad()
            given = x.clone().requires_grad_()
            dist.barrier()
            start = time.perf_counter()
            module(given).sum().backward()
            if turn >= 5:
                times[name].append(1e3 * (time.perf_counter() - start))
    ours, dtensor = (statistics.median(times[name]) for name in ("ours", "dtensor"))
    return {"ours_ms": ours, "dtensor_ms": dtensor, "ratio": ours / dtensor}


def by_torch(block):
    """torch's own tensor parallelism."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor.parallel import (
        ColwiseParallel,
        RowwiseParallel,
        parallelize_module,
    )

    styles = {
        "attention.qkv": ColwiseParallel(),
        "attention.out": RowwiseParallel(),
        "mlp.up": ColwiseParallel(),
        "mlp.down": RowwiseParallel(),
    }
    return parallelize_module(block, init_device_mesh("cpu", (2,)), styles)


def by_us(block):
    """The runtime's tensor parallelism."""
    import torch.distributed as dist
    from torch import nn

    from meshwright.layout.shares import own_share
    from meshwright.model.shard import tile_of
    from meshwright.runtime.slices import read_slices
    from meshwright.techniques.tensor_parallel.runtime import TensorParallelGroup, divide

    team = TensorParallelGroup(dist.group.WORLD, dist.get_rank(), 2)
    for name, how in block.tensor_split.items():
        module = block.get_submodule(name)
        for attribute, full in list(module.named_parameters()):
            tile = tile_of(how, attribute, tuple(full.shape), own_share(2, team.index))
            setattr(module, attribute, nn.Parameter(read_slices(full.detach(), tile)))
        divide(module, name, how, 0, team)
    return block


if __name__ == "__main__":
    main()
