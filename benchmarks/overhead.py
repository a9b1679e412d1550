"""What the interpreter adds to an instruction on the host, apart from what PyTorch itself does.

    python benchmarks/overhead.py [--steps 30] [--schedule 1f1b-2bp]

Two processes train a small model; the processor time of every instruction is taken, and from it
that of the calls it is there to make: reading the batch, the layers' forwards, the backwards
(whole or in parts, the release of their graphs included), making room for messages, posting them
and waiting for them. The rest is the interpreter, less what the clock itself takes. That is told by
blanks, timed among the others: what only calls PyTorch, which leaves cold caches to the clock, or
calls nothing (of sends and receives). Processor time, so that what else runs on the machine counts
only by what it takes of the caches.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import tempfile
import time
from collections import defaultdict
from pathlib import Path

from again import start_again


def main() -> None:
    """Print medians by operation."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--schedule", default="1f1b-2bp")
    parser.add_argument("--worker", type=Path)
    options = parser.parse_args()
    if options.worker:
        worker(options)
        return
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "result.json"
        arguments = ["--steps", str(options.steps), "--schedule", options.schedule]
        start_again(2, ["--worker", str(out), *arguments])
        found = json.loads(out.read_text())
    print(f"{'operation':16}{'median, us':>12}{'of them PyTorch':>17}{'interpreter':>13}")
    for op, (whole, inside, rest) in found.items():
        print(f"{op:16}{whole:>12.1f}{inside:>17.1f}{rest:>13.1f}")


ENDS = ("REDUCE_NORM", "OPTIMIZER_STEP")
"""Once a step, not once a micro-batch."""

COMPUTING = ("F", "B", "I", "W")
BLANKS = ("empty", "nothing", "once", "twice")
"""Those of sends and receives, and those of what computes."""

Sample = tuple[float, float, int]
"""Seconds of an instruction, of them in PyTorch's calls, and how many calls these were."""
Samples = dict[str, list[Sample]]


class Clock:
    """Processor time inside PyTorch's calls, and their number."""

    def __init__(self) -> None:
        self.inside = 0.0
        self.calls = 0
        self.depth = 0

    def around(self, function):
        """The function, with the time that it takes added up, unless called from such a one."""

        def timed(*args, **kwargs):
            if self.depth:
                return function(*args, **kwargs)
            self.depth += 1
            began = time.thread_time()
            try:
                return function(*args, **kwargs)
            finally:
                self.inside += time.thread_time() - began
                self.calls += 1
                self.depth -= 1

        return timed


def worker(options: argparse.Namespace) -> None:
    """Train, and take the time."""
    import torch
    import torch.distributed as dist
    from torch.utils import checkpoint  # noqa: F401 - imported ahead of the clock

    from meshwright.model.zoo.gpt import GPT
    from meshwright.plan.spec import Job, Pipeline, Plan, PlanInput, Stage
    from meshwright.runtime.engine import Engine
    from meshwright.runtime.exchange import all_gather_records
    from meshwright.runtime.run_folder import TrainingOptions

    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    share, micro_batches, blocks = 2, 8, 4
    stages = (
        Stage(layers=(0, 3), devices=(("here:0",),)),
        Stage(layers=(3, blocks + 2), devices=(("here:1",),)),
    )
    nobody = PlanInput(name="any", fingerprint="")
    plan = Plan(
        name="overhead", model=nobody, cluster=nobody,
        job=Job(global_batch=share * micro_batches, sequence=16, precision="fp32"),
        schedule=options.schedule, devices=("here:0", "here:1"),
        pipelines=(Pipeline(micro_batches=micro_batches, rows=share, stages=stages),),
    )  # fmt: skip
    torch.manual_seed(0)
    model = GPT(vocabulary=64, positions=16, width=32, heads=4, layers=blocks, tied=False)
    tokens = torch.randint(64, (share * micro_batches, 17))
    batch = (tokens[:, :-1], tokens[:, 1:])
    clock = Clock()
    watch(clock)
    engine = Engine(
        model, plan, inputs=batch, options=TrainingOptions(),
        optimizer=lambda p: torch.optim.AdamW(p, lr=1e-4, fused=True),
    )  # fmt: skip
    small = GPT(vocabulary=64, positions=16, width=32, heads=4, layers=1, tied=False)
    samples = sampled(engine, batch, clock, small, share=share, steps=options.steps)
    gathered = all_gather_records(dict(samples), dict[str, list[Sample]])
    if dist.get_rank() == 0:
        options.worker.write_text(json.dumps(medians(gathered)))
    dist.barrier()
    os._exit(0)


def sampled(engine, batch, clock: Clock, small, *, share: int, steps: int) -> Samples:
    """The samples of every instruction and of the blanks, for which `small` is run on `share` rows.

    The clock must have been put around PyTorch (see `watch`) before the engine was made.
    """
    import torch

    watch_own(engine, clock)
    rows = clock.around(lambda a, b: tuple(x[a:b] for x in batch))
    device = next(small.parameters()).device
    samples: Samples = defaultdict(list)
    actions = engine._actions
    timed = [(measured(act, samples[str(i.op)], clock), i) for act, i in actions]

    def work(_) -> None:
        torch.autograd.backward([small(*(x.to(device) for x in rows(0, share)))])

    followed = [(followed_by_blanks(act, samples, clock, work), i) for act, i in actions]
    for step in range(2 * steps + 4):
        engine._actions = followed if step % 2 else timed
        engine.step(rows)
        if step == 3:
            for own in samples.values():
                own.clear()
    return samples


def watch(clock: Clock) -> None:
    """Puts the clock around every call of PyTorch that does an instruction's own work."""
    import torch
    import torch.distributed as dist

    from meshwright.runtime import stage

    back = torch.autograd.backward

    def backward(roots, *others) -> None:
        back(roots, *others)
        roots.clear()  # which frees the graph

    torch.autograd.backward = clock.around(backward)
    stage.backward_weights = clock.around(stage.backward_weights)
    torch.empty = clock.around(torch.empty)
    for name in ("isend", "irecv", "all_reduce"):
        setattr(dist, name, clock.around(getattr(dist, name)))
    work = type(dist.all_reduce(torch.zeros(1), async_op=True))
    for name in ("wait", "is_completed"):
        setattr(work, name, clock.around(getattr(work, name)))


def watch_own(engine, clock: Clock) -> None:
    """The same around its layers and its optimizer."""
    for place in engine._own.stages.values():
        for layer in place.stage._layers:
            layer.module = clock.around(layer.module)
    for optimizer in engine._end.optimizers:
        optimizer.step = clock.around(optimizer.step)


def measured(act, own: list[Sample], clock: Clock):
    """An action that leaves its time, and PyTorch's part of it."""

    def timed(step) -> None:
        clock.inside, clock.calls = 0.0, 0
        began = time.thread_time()
        act(step)
        own.append((time.thread_time() - began, clock.inside, clock.calls))

    return timed


def followed_by_blanks(act, samples: Samples, clock: Clock, work):
    """An action that is not timed, and then one that only calls PyTorch, which is."""
    nothing, computing = clock.around(lambda _: None), clock.around(work)

    def twice(step) -> None:
        computing(step)
        computing(step)

    blanks = {"empty": lambda _: None, "nothing": nothing, "once": computing, "twice": twice}
    turns = itertools.cycle([measured(blank, samples[k], clock) for k, blank in blanks.items()])

    def both(step) -> None:
        act(step)
        next(turns)(step)

    return both


def medians(gathered: list[Samples]) -> dict[str, tuple[float, float, float]]:
    """By operation and over all, in microseconds: whole, PyTorch's part, and the rest, less what
    the clock takes."""
    found: Samples = defaultdict(list)
    for one in gathered:
        for op, own in one.items():
            found[op] += own
    blank = {key: _median_rest(found.pop(key)) for key in BLANKS}
    call, cold_call = blank["nothing"] - blank["empty"], blank["twice"] - blank["once"]
    for op, own in found.items():
        first, each = (
            (blank["once"] - cold_call, cold_call) if op in COMPUTING else (blank["empty"], call)
        )
        found[op] = [(whole - first - calls * each, inside, 0) for whole, inside, calls in own]
    found["all"] = [one for op, own in found.items() if op not in ENDS for one in own]
    return {
        op: (
            1e6 * statistics.median(whole for whole, _, _ in own),
            1e6 * statistics.median(inside for _, inside, _ in own),
            1e6 * _median_rest(own),
        )
        for op, own in found.items()
        if own
    }


def _median_rest(own: list[Sample]) -> float:
    """Seconds outside of PyTorch."""
    return statistics.median(whole - inside for whole, inside, _ in own)


if __name__ == "__main__":
    main()
