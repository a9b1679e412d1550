"""What each device does in the benchmarks on a testbed: measures its layers, or trains a plan.

Started by testbed_cases.py, with a folder that holds job.json.
"""

from __future__ import annotations

import json
import os
import sys
from datetime import timedelta
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn

from meshwright.cost.profile import LayerTime
from meshwright.emulation.dilation import Dilation, Dilator, EmulatedStopwatch, dilation_observer
from meshwright.emulation.virtual_device import virtual_device
from meshwright.emulation.virtual_times import TIMES_FILE, VirtualTimes
from meshwright.errors import MeshwrightError
from meshwright.model.spec import LayerGraph
from meshwright.model.trace import trace
from meshwright.model.zoo.gpt import GPT
from meshwright.model.zoo.llama import Llama
from meshwright.model.zoo.u_transformer import UTransformer
from meshwright.model.zoo.uneven import Uneven
from meshwright.plan.files import load_plan
from meshwright.profiling.layer_times import (
    DeviceStopwatch,
    LayerBenchmark,
    distinct_layers,
    layer_times,
    optimizer_time,
)
from meshwright.profiling.measure_profile import RankTimings, merged_layers, merged_optimizers
from meshwright.records import load, plain
from meshwright.runtime.engine import Engine
from meshwright.runtime.exchange import all_gather_records
from meshwright.runtime.failure import rank_process
from meshwright.runtime.observer import UNOBSERVED
from meshwright.runtime.rendezvous import join_run
from meshwright.runtime.run_folder import TIMEOUT_SECONDS, TrainingOptions
from meshwright.runtime.training_loop import sgd

VOCABULARY = 256
BUILDERS = {
    "gpt": partial(
        GPT, vocabulary=VOCABULARY, positions=256, width=256, heads=8, layers=6, tied=False
    ),
    "gpt-24": partial(
        GPT, vocabulary=VOCABULARY, positions=256, width=160, heads=8, layers=24, tied=False
    ),
    "llama": partial(
        Llama, vocabulary=VOCABULARY, width=256, heads=8, kv_heads=4, layers=6, hidden=704
    ),
    "u-transformer": partial(
        UTransformer, vocabulary=VOCABULARY, positions=256, width=128, heads=4, layers=1, levels=2
    ),
    "uneven": partial(
        Uneven,
        vocabulary=VOCABULARY,
        widths=(256, 192, 128, 64, 32),
        hidden=(512, 384, 256, 128, 128, 384, 1024, 3072),
    ),
}
"""Small enough for seconds, large enough that arithmetic and messages are felt."""


def make_model(name: str) -> nn.Module:
    """A model on the meta device."""
    with torch.device("meta"):
        return BUILDERS[name]()


def batch(rows: int, sequence: int) -> tuple[Tensor, ...]:
    """Tokens and targets; always the same."""
    tokens = torch.randint(VOCABULARY, (rows, sequence + 1), generator=torch.Generator())
    return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()


def graph_of(name: str, sequence: int) -> LayerGraph:
    """The model as the planner sees it."""
    return trace(make_model(name), batch(1, sequence), "fp32", sequence, name)


def meet() -> None:
    """Join the other ranks. Runs share a launcher's store: their keys begin with a run's secret."""
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    join_run(rank, size, torch.device("cpu"), timedelta(seconds=TIMEOUT_SECONDS))


def measure(job: dict, folder: Path) -> None:
    """Layers and optimizer on every device; rank 0 writes them."""
    meet()
    rank = dist.get_rank()
    graph = graph_of(job["model"], job["sequence"])
    share = job["shares"].get(job["devices"][rank])
    bench = LayerBenchmark(
        make_model=partial(make_model, job["model"]),
        graph=graph,
        inputs=batch(1, job["sequence"]),
        device_type=job["types"][rank],
        stopwatch=EmulatedStopwatch(Dilator(Dilation(share=share)))
        if share
        else DeviceStopwatch(torch.device("cpu")),
        repeats=job["repeats"],
    )
    distinct = distinct_layers(graph).values()
    layers: list[LayerTime] = []
    for rows in job["rows"]:
        for found in layer_times(bench, layers=distinct, rows=rows, tensor=1):
            layers.append(found)
            dist.barrier()
    step = optimizer_time(bench, sgd(1e-3), "sgd")
    everyone = all_gather_records(
        RankTimings(layers=tuple(layers), optimizers=(step,)), RankTimings
    )
    if rank == 0:
        times = merged_layers([time for own in everyone for time in own.layers])
        steps = merged_optimizers([time for own in everyone for time in own.optimizers])
        merged = {"layers": [*map(plain, times)], "optimizers": [*map(plain, steps)]}
        (folder / "layers.json").write_text(json.dumps(merged))
    dist.barrier()


def train(job: dict, folder: Path) -> None:
    """A few steps of a plan; rank 0 writes their seconds."""
    plan = load_plan(folder / "plan.json")
    rank = int(os.environ["RANK"])
    whole = batch(plan.job.global_batch, plan.job.sequence)

    def rows(first: int, last: int) -> tuple[Tensor, ...]:
        return tuple(tensor[first:last] for tensor in whole)

    model = make_model(job["model"])
    if job["mode"] == "virtual":
        times = load(folder / TIMES_FILE, VirtualTimes, error=MeshwrightError).ranks[rank]
        device = virtual_device(times)
        optimizer, observer = device.optimizer, device.observer
    else:
        share = job["shares"].get(plan.devices[rank])
        optimizer = sgd(1e-3)
        observer = dilation_observer(Dilator(Dilation(share=share))) if share else UNOBSERVED
    inputs = rows(0, 1)
    options = TrainingOptions(clip_norm=0)
    with Engine(
        model, plan, inputs=inputs, optimizer=optimizer, options=options, observer=observer
    ) as engine:
        seconds = [engine.step(rows).seconds for _ in range(job["steps"])]
    if rank == 0:
        (folder / "seconds.json").write_text(json.dumps(seconds))


def main() -> None:
    """One rank."""
    folder = Path(sys.argv[1])
    with rank_process(folder):
        torch.set_num_threads(1)
        job = json.loads((folder / "job.json").read_text())
        {"measure": measure, "train": train}[job["action"]](job, folder)


if __name__ == "__main__":
    main()
