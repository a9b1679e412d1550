"""Runs each process of a run: trains as one of the ranks, as the run folder says."""

from __future__ import annotations

import json
import os
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import TextIO

import torch

from meshwright import files
from meshwright.errors import LaunchError, MeshwrightError, Problem
from meshwright.model.zoo.build import build_model, vocabulary_of
from meshwright.plan.files import load_plan
from meshwright.plan.spec import Plan
from meshwright.records import dumps, plain
from meshwright.runtime.corpus import Corpus, batch_rows, check_corpus, open_corpus
from meshwright.runtime.failure import rank_process
from meshwright.runtime.observer import UNOBSERVED, Observer
from meshwright.runtime.run_folder import (
    METRICS,
    PLAN,
    SETTINGS,
    TIMELINE,
    WEIGHTS,
    Metrics,
    RunSettings,
    load_settings,
)
from meshwright.runtime.training_loop import (
    OPTIMIZERS,
    Batch,
    StepRows,
    TrainingResult,
    train,
    warmup_cosine,
)


def run_worker(folder: Path) -> None:
    """Trains as the run folder says. Raises LaunchError for an emulated device."""
    settings = load_settings(folder, error=MeshwrightError)
    plan = load_plan(folder / PLAN)
    rank = int(os.environ.get("RANK", "0"))
    device = plan.devices[rank] if rank < len(plan.devices) else ""
    if device in settings.shares:
        found, wanted = f"{settings.shares[device]:g}", "a rank that a testbed has started"
        raise LaunchError(Problem(str(folder / SETTINGS), f"shares.{device}", found, wanted))
    train_rank(folder, settings, plan, rank)


def train_rank(
    folder: Path,
    settings: RunSettings,
    plan: Plan,
    rank: int,
    observer: Observer = UNOBSERVED,
) -> None:
    """Trains as one rank of a plan; the first one writes metrics, timeline and weights."""
    options, vocabulary = settings.options, vocabulary_of(settings.model)
    corpus = open_corpus(settings.data, vocabulary)
    check_corpus(corpus, sequence=plan.job.sequence, global_batch=plan.job.global_batch)
    with torch.device("meta"):
        model = build_model(settings.model, plan.job.sequence)
    peaks = [settings.peak_flops.get(name) for name in plan.devices]
    with files.append_file(folder / METRICS) if rank == 0 else nullcontext() as metrics:

        def write(line: Metrics) -> None:
            assert metrics is not None, "only the first rank is told"
            write_line(metrics, line)
            if sys.stdout.isatty():
                speed = f"{line.tokens_per_second:.0f} tokens/s"
                print(f"step {line.step}  loss {line.loss:.4f}  {speed}", flush=True)

        trained = train(
            model,
            plan,
            corpus_rows(corpus, plan, vocabulary, options.seed),
            optimizer=OPTIMIZERS[plan.job.optimizer](settings.learning_rate, settings.weight_decay),
            options=options,
            learning_rate=warmup_cosine(options.steps, settings.warmup_steps),
            on_metrics=write,
            peak_flops=sum(p for p in peaks if p) if all(peaks) else None,
            observer=observer,
        )
    if rank == 0:
        _keep(folder, trained)


def write_line(metrics: TextIO, line: Metrics) -> None:
    """Writes one step's line to the metrics file."""
    files.add_line(metrics, json.dumps(plain(line)))


def corpus_rows(corpus: Corpus, plan: Plan, vocabulary: int, seed: int) -> StepRows:
    """Returns a function that reads a step's rows from the corpus."""

    def rows(step: int, first: int, last: int) -> Batch:
        arrays = batch_rows(
            corpus,
            sequence=plan.job.sequence,
            global_batch=plan.job.global_batch,
            vocabulary=vocabulary,
            seed=seed,
            step=step,
            first=first,
            last=last,
        )
        return tuple(torch.from_numpy(array) for array in arrays)

    return rows


def _keep(folder: Path, trained: TrainingResult) -> None:
    if trained.timeline is not None:
        files.write_text(folder / TIMELINE, dumps(trained.timeline))
    if trained.parameters is not None:
        from safetensors.torch import save_file

        whole = {name: value.contiguous() for name, value in trained.parameters.items()}
        with files.replacing(folder / WEIGHTS, durable=True) as draft:
            save_file(whole, draft)


def main() -> None:
    """Trains, and reports the reason if that fails."""
    folder = Path(sys.argv[1])
    with rank_process(folder):
        run_worker(folder)


if __name__ == "__main__":
    main()
