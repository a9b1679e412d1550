"""Real step times of the AMP paper's trials against ours, and against AMP's own predictions.

    python benchmarks/amp_trials.py --trials F.json --cluster C.toml --profiles P.json --json OUT

F names the model (`gpt2` or `transgan`) and lists strategies with measured seconds, null where the
trial failed; P holds forward seconds per sample of every layer on g4dn (T4) and p3 (V100) nodes
(github.com/MccRee177/AMP). `--refit` also fits the constants to F's runs.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from amp_models import MODELS
from constants import AMP_KNOBS, AMP_PRIOR, shipped
from grids import Trial, World, excess_bytes, predict
from numpy.typing import NDArray
from scores import HEADER, line, relative_errors, spearman, summary, write

from meshwright.cluster.files import load_cluster
from meshwright.cluster.spec import Cluster, DeviceType
from meshwright.cost.calibrate import fit, folds, held_out
from meshwright.cost.compute import device_seconds, host_seconds, launch_seconds
from meshwright.cost.constants import Calibration, device_constants
from meshwright.cost.profile import LayerTime, Profile
from meshwright.model.spec import LayerGraph
from meshwright.plan.spec import Job

Array = NDArray[np.float64]
NODES = {"T4": "G4", "V100": "P3"}
"""Device types, by the beginnings of their names, and the nodes they were measured on."""


def layer_times(
    model: LayerGraph, cluster: Cluster, recorded: dict[str, Any], constants: Calibration
) -> tuple[LayerTime, ...]:
    """The record's forward times of one sample, with the backward that they imply.

    Of a forward, the host took what exceeds the device's work, at most a launch; its share of the
    backward is in proportion of the launches. The device's share is twice the forward's.
    """
    found = []
    for name, device in cluster.types.items():
        node = next((node for kind, node in NODES.items() if name.startswith(kind)), None)
        own = device_constants(constants, device)
        for tensor, row in recorded.get(f"{model.name}_{node}", {}).items():
            for layer, seconds in zip(model.layers, row, strict=True):
                work = device_seconds(layer, device, "fp16", int(tensor), 1, own)
                launch = launch_seconds(own)
                host = host_seconds(np.array([seconds, seconds]), work[0], launch[0])[0]
                backward = host * launch[1] / launch[0] + 2 * (seconds - host)
                found.append(
                    LayerTime(
                        device=name,
                        signature=layer.signature,
                        precision="fp16",
                        tensor=int(tensor),
                        rows=1,
                        forward_seconds=seconds,
                        backward_seconds=backward,
                    )
                )
    return tuple(found)


class Predictor:
    """Predictions of one file's trials: layer times depend on the constants that split them."""

    def __init__(self, trials: Path, cluster: Path, profiles: Path) -> None:
        record = json.loads(trials.read_text(encoding="utf-8"))
        self.model = MODELS[record["model"]]()
        self.cluster = load_cluster(cluster)
        times = json.loads(profiles.read_text(encoding="utf-8"))
        self.recorded = times["forward_seconds_per_sample"]
        self.batch = record["global_batch_size"]
        self.rows = record["trials"]
        seconds = [row["measured_step_seconds"] for row in self.rows]
        self.measured = np.array([np.nan if each is None else each for each in seconds])
        self.trials = tuple(
            Trial(
                world=0,
                data=row["data_parallel"],
                tensor=row["tensor_parallel"],
                stages=row["pipeline_parallel"],
                rows=row["micro_batch_size"],
                batch=self.batch,
                bounds=tuple(row["stage_boundaries"]),
            )
            for row in self.rows
        )

    def world(self, constants: Calibration) -> World:
        job = Job(global_batch=self.batch, sequence=self.model.sequence, precision="fp16")
        layers = layer_times(self.model, self.cluster, self.recorded, constants)
        profile = Profile(model=self.model.name, sequence=self.model.sequence, layers=layers)
        return World(model=self.model, cluster=self.cluster, job=job, profile=profile)

    def seconds(self, constants: Calibration, runs: NDArray[np.int64]) -> Array:
        """Predicted seconds of the trials with these indices."""
        return predict([self.world(constants)], self.trials, constants, runs)

    def overfull(self, constants: Calibration) -> NDArray[np.bool_]:
        """Trials that our memory model refuses."""
        return excess_bytes([self.world(constants)], self.trials, constants) > 0
