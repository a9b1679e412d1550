"""Entry point of each emulated device: trains as one rank in the time of a slower device.

python -m meshwright.testbed.worker RUN_FOLDER      one rank, under a launcher
"""

from __future__ import annotations

import os
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from meshwright import files
from meshwright.errors import LaunchError, MeshwrightError
from meshwright.model.zoo.build import build, vocabulary_of
from meshwright.plan.files import load_plan
from meshwright.plan.spec import Plan
from meshwright.records import dumps, load
from meshwright.runtime.corpus import open_corpus
from meshwright.runtime.dilation import Dilation, Dilator, timed_by
from meshwright.runtime.engine import Engine
from meshwright.runtime.failure import rank_process
from meshwright.runtime.observer import UNOBSERVED
from meshwright.runtime.run import METRICS, PLAN, TIMELINE, RunSettings, load_settings
from meshwright.runtime.train import run_steps
from meshwright.runtime.variables import RANK
from meshwright.runtime.worker import rows_of, train_rank, write_line
from meshwright.testbed.times import TIMES, RankTimes, VirtualTimes
from meshwright.testbed.virtual import virtual_device


def run(folder: Path) -> None:
    """Trains as the run folder says, on a device with a share of a core or on a virtual one."""
    settings = load_settings(folder, error=MeshwrightError)
    plan, rank = load_plan(folder / PLAN), int(os.environ[RANK])
    if not settings.shares:
        times = load(folder / TIMES, VirtualTimes, error=LaunchError).ranks[rank]
        run_virtual(folder, settings, plan, times)
        return
    share = settings.shares.get(plan.devices[rank])
    observer = timed_by(Dilator(Dilation(share=share))) if share else UNOBSERVED
    train_rank(folder, settings, plan, rank, observer)


def run_virtual(folder: Path, settings: RunSettings, plan: Plan, times: RankTimes) -> None:
    """Runs the steps on a virtual device. The loss is zero: nothing is learned."""
    vocabulary, corpus = vocabulary_of(settings.model), open_corpus(settings.data, 256)
    with torch.device("meta"):
        model = build(settings.model, plan.job.sequence)
    rows = rows_of(corpus, plan, vocabulary, settings.options.seed)
    device = virtual_device(times)
    with (
        Engine(
            model,
            plan,
            inputs=rows(0, 0, 1),
            optimizer=device.optimizer,
            # Without real gradients there is nothing to clip.
            options=replace(settings.options, clip_norm=0),
            observer=device.observer,
        ) as engine,
        files.growing(folder / METRICS) as metrics,
    ):
        _, timeline = run_steps(engine, rows, on_metrics=partial(write_line, metrics))
    if timeline is not None:
        files.write_text(folder / TIMELINE, dumps(timeline))


def main() -> None:
    """Runs, and reports the reason if that fails."""
    folder = Path(sys.argv[1])
    with rank_process(folder):
        run(folder)


if __name__ == "__main__":
    main()
