"""Runs each emulated device: trains as one rank in the time of a slower device.

python -m meshwright.testbed.emulated_worker RUN_FOLDER      one rank, under a launcher
"""

from __future__ import annotations

import os
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from meshwright import files
from meshwright.emulation.dilation import Dilation, Dilator, dilation_observer
from meshwright.emulation.virtual_device import virtual_device
from meshwright.emulation.virtual_times import TIMES_FILE, RankTimes, VirtualTimes
from meshwright.errors import LaunchError, MeshwrightError
from meshwright.model.zoo.build import build_model, vocabulary_of
from meshwright.plan.files import load_plan
from meshwright.plan.spec import Plan
from meshwright.records import dumps, load
from meshwright.runtime.corpus import open_corpus
from meshwright.runtime.engine import Engine
from meshwright.runtime.failure import rank_process
from meshwright.runtime.launch_variables import RANK
from meshwright.runtime.observer import UNOBSERVED
from meshwright.runtime.run_folder import METRICS, PLAN, TIMELINE, RunSettings, load_settings
from meshwright.runtime.training_loop import run_steps
from meshwright.runtime.worker import corpus_rows, train_rank, write_line


def run_emulated(folder: Path) -> None:
    """Trains as the run folder says, on a device with a share of a core or on a virtual one."""
    settings = load_settings(folder, error=MeshwrightError)
    plan, rank = load_plan(folder / PLAN), int(os.environ[RANK])
    if not settings.shares:
        times = load(folder / TIMES_FILE, VirtualTimes, error=LaunchError).ranks[rank]
        run_virtual(folder, settings, plan, times)
        return
    share = settings.shares.get(plan.devices[rank])
    observer = dilation_observer(Dilator(Dilation(share=share))) if share else UNOBSERVED
    train_rank(folder, settings, plan, rank, observer)


def run_virtual(folder: Path, settings: RunSettings, plan: Plan, times: RankTimes) -> None:
    """Runs the steps on a virtual device. The loss is zero: nothing is learned."""
    vocabulary, corpus = vocabulary_of(settings.model), open_corpus(settings.data, 256)
    with torch.device("meta"):
        model = build_model(settings.model, plan.job.sequence)
    rows = corpus_rows(corpus, plan, vocabulary, settings.options.seed)
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
        files.append_file(folder / METRICS) as metrics,
    ):
        _, timeline = run_steps(engine, rows, on_metrics=partial(write_line, metrics))
    if timeline is not None:
        files.write_text(folder / TIMELINE, dumps(timeline))


def main() -> None:
    """Runs, and reports the reason if that fails."""
    folder = Path(sys.argv[1])
    with rank_process(folder):
        run_emulated(folder)


if __name__ == "__main__":
    main()
