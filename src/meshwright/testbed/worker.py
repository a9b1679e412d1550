"""Entry point of each virtual device: runs as one rank whose layers take their times from a table.

python -m meshwright.testbed.worker RUN_FOLDER      one rank, under a launcher
"""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path

import torch

from meshwright import files
from meshwright.errors import LaunchError, MeshwrightError
from meshwright.model.zoo.build import build, vocabulary_of
from meshwright.plan.files import load_plan
from meshwright.records import dumps, load
from meshwright.runtime.corpus import open_corpus
from meshwright.runtime.failure import rank_process
from meshwright.runtime.run import METRICS, PLAN, SETTINGS, TIMELINE, RunSettings
from meshwright.runtime.train import run_steps
from meshwright.runtime.worker import rows_of, write_line
from meshwright.testbed.times import TIMES, VirtualTimes
from meshwright.testbed.virtual import VirtualEngine


def run(folder: Path) -> None:
    """Runs the steps that the run folder asks for. The loss is zero: nothing is learned."""
    settings = load(folder / SETTINGS, RunSettings, error=MeshwrightError)
    times = load(folder / TIMES, VirtualTimes, error=LaunchError)
    plan = load_plan(folder / PLAN)
    vocabulary, corpus = vocabulary_of(settings.model), open_corpus(settings.data, 256)
    with torch.device("meta"):
        model = build(settings.model, plan.job.sequence)
    rows = rows_of(corpus, plan, vocabulary, settings.seed)
    with (
        VirtualEngine(model, plan, inputs=rows(0, 0, 1), times=times.ranks) as engine,
        files.growing(folder / METRICS) as metrics,
    ):
        _, timeline = run_steps(
            engine,
            rows,
            settings.steps,
            on_metrics=partial(write_line, metrics),
            record_step=settings.recorded_step,
        )
    if timeline is not None:
        files.write_text(folder / TIMELINE, dumps(timeline))


def main() -> None:
    """Runs, and reports the reason if that fails."""
    folder = Path(sys.argv[1])
    with rank_process(folder):
        run(folder)


if __name__ == "__main__":
    main()
