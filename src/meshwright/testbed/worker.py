"""What each virtual device does: a run of the runtime whose layers take the time of a table.

python -m meshwright.testbed.worker RUN_FOLDER      one rank, under a launcher
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch

from meshwright.errors import LaunchError, MeshwrightError
from meshwright.model.zoo.build import build, vocabulary_of
from meshwright.plan.files import load_plan
from meshwright.records import dumps, load, plain
from meshwright.runtime.corpus import batch_rows, open_corpus
from meshwright.runtime.engine import StepResult
from meshwright.runtime.failure import rank_process
from meshwright.runtime.run import METRICS, PLAN, SETTINGS, TIMELINE, Metrics, RunSettings
from meshwright.testbed.times import TIMES, VirtualTimes
from meshwright.testbed.virtual import VirtualEngine


def run(folder: Path) -> None:
    """The steps that the run folder asks for. The loss is zero: nothing is learned."""
    settings = load(folder / SETTINGS, RunSettings, error=MeshwrightError)
    times = load(folder / TIMES, VirtualTimes, error=LaunchError)
    plan = load_plan(folder / PLAN)
    vocabulary, corpus = vocabulary_of(settings.model), open_corpus(settings.data, 256)
    with torch.device("meta"):
        model = build(settings.model, plan.job.sequence)

    def rows(first: int, last: int) -> tuple[torch.Tensor, ...]:
        arrays = batch_rows(
            corpus,
            sequence=plan.job.sequence,
            global_batch=plan.job.global_batch,
            vocabulary=vocabulary,
            seed=settings.seed,
            step=0,
            first=first,
            last=last,
        )
        return tuple(torch.from_numpy(array) for array in arrays)

    recorded = settings.steps - 2 if settings.record_step is None else settings.record_step
    with (
        VirtualEngine(model, plan, inputs=rows(0, 1), times=times.ranks) as engine,
        (folder / METRICS).open("a", buffering=1) as metrics,
    ):
        for step in range(settings.steps):
            if step == recorded:
                result, timeline = engine.record(rows)
                if timeline is not None:
                    (folder / TIMELINE).write_text(dumps(timeline))
            else:
                result = engine.step(rows)
            if engine.rank == 0:
                line = _line(step, result, engine)
                metrics.write(json.dumps(plain(line)) + "\n")


def _line(step: int, result: StepResult, engine: VirtualEngine) -> Metrics:
    tokens = engine.plan.job.global_batch * engine.plan.job.sequence
    return Metrics(
        step=step,
        loss=result.loss,
        gradient_norm=result.grad_norm,
        learning_rate=engine.learning_rate,
        step_seconds=result.seconds,
        tokens_per_second=tokens / result.seconds,
        memory_bytes=engine.memory_bytes(),
    )


def main() -> None:
    """Run; leave the reason behind if it fails."""
    folder = Path(sys.argv[1])
    with rank_process(folder):
        run(folder)


if __name__ == "__main__":
    main()
