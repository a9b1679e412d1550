"""The benchmark on AMP's trials takes a mixed cluster, for either model, however little the files
say beside types, counts and nominal bandwidths."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))
try:
    import amp_trials
    from amp_models import MODELS
    from beliefs import shipped
finally:
    sys.path.remove(str(BENCHMARKS))

FULL = """
format = 1
name = "mixed"
[[node]]
name = "p3"
count = 3
devices = ["4 x V100"]
inside = { bandwidth = "170 Gbit/s", latency = "10 us" }
network = { bandwidth = "10 Gbit/s", latency = "50 us" }
[[node]]
name = "g4"
devices = ["4 x T4"]
inside = { bandwidth = "50 Gbit/s", latency = "10 us" }
network = { bandwidth = "50 Gbit/s", latency = "50 us" }
"""
NOMINAL = """
[[node]]
name = "p3"
count = 3
devices = ["4 x V100"]
inside = "170 Gbit/s"
network = { bandwidth = "10 Gbit/s" }
[[node]]
name = "g4"
devices = ["4 x T4"]
inside = "50 Gbit/s"
network = "50 Gbit/s"
"""
GRIDS = [(16, 1, 1, 1), (4, 1, 4, 1), (4, 1, 4, 2), (2, 1, 8, 1), (4, 2, 2, 1), (2, 4, 2, 4)]
"""data, tensor, stages, micro-batch"""
TOO_BIG = (1, 1, 16, 32)


def row(layers, grid, seconds):
    data, tensor, stages, rows = grid
    return {
        "stage_boundaries": [round(layers * s / stages) for s in range(stages + 1)],
        "micro_batch_size": rows,
        "tensor_parallel": tensor,
        "data_parallel": data,
        "pipeline_parallel": stages,
        "amp_predicted_step_seconds": 1.0 + data,
        "measured_step_seconds": seconds,
    }


def profiles(nodes):
    """Seconds of a forward by model and node: V100 nodes take three quarters of what T4 do."""
    times = {}
    for name, build in MODELS.items():
        for node in nodes[name]:
            pace = 5e-3 if node == "G4" else 3.75e-3
            times[f"{name}_{node}"] = {
                str(tensor): [
                    pace * (0.7 + 0.3 / tensor) if layer.forward_flops else 5e-5
                    for layer in build().layers
                ]
                for tensor in (1, 2, 4)
            }
    return {"source": "", "layers": {}, "forward_seconds_per_sample": times}


def written(folder, model, cluster, nodes):
    """Files in which every trial took 1.1 times what the shipped constants say."""
    record = {
        "source": "",
        "cluster": "3 nodes p3.8xlarge, 1 node g4dn.12xlarge",
        "model": model,
        "global_batch_size": 32,
        "trials": [row(len(MODELS[model]().layers), grid, None) for grid in (*GRIDS, TOO_BIG)],
    }
    paths = [folder / name for name in ("trials.json", "cluster.toml", "profiles.json")]
    paths[1].write_text(cluster)
    paths[2].write_text(json.dumps(profiles(nodes)))
    paths[0].write_text(json.dumps(record))
    runs = np.arange(len(GRIDS))
    seconds = amp_trials.Predictor(*paths).seconds(shipped("amp"), runs)
    for trial, predicted in zip(record["trials"], seconds, strict=False):
        trial["measured_step_seconds"] = float(predicted) * 1.1
    paths[0].write_text(json.dumps(record))
    return paths


BOTH = {"gpt2": ("G4", "P3"), "transgan": ("G4", "P3")}
AS_PUBLISHED = {"gpt2": ("G4", "P3"), "transgan": ("P3",)}


@pytest.mark.parametrize(
    ("model", "cluster", "nodes"),
    [
        ("gpt2", FULL, BOTH),
        ("gpt2", NOMINAL, AS_PUBLISHED),
        ("transgan", FULL, AS_PUBLISHED),
        ("transgan", NOMINAL, BOTH),
    ],
    ids=["gpt2-full-both", "gpt2-nominal-published", "transgan-full-published",
         "transgan-nominal-both"],
)  # fmt: skip
def test_a_mixed_cluster_is_judged_from_end_to_end(tmp_path, monkeypatch, model, cluster, nodes):
    trials, toml, times = written(tmp_path, model, cluster, nodes)
    out = tmp_path / "out.json"
    command = ["amp_trials.py", "--trials", str(trials), "--cluster", str(toml)]
    command += ["--profiles", str(times), "--json", str(out)]
    monkeypatch.setattr(sys, "argv", command)
    assert amp_trials.main() == 0
    found = json.loads(out.read_text())
    assert found["runs"] == len(GRIDS)
    assert found["spearman"] == pytest.approx(1.0)
    assert found["mean_relative_error"] == pytest.approx(1 - 1 / 1.1)
    assert found["median_relative_error"] == pytest.approx(1 - 1 / 1.1)
    assert found["failures_foreseen"] == found["failures"] == 1
    assert set(found) >= {"false_alarms", "regret"}


def test_nominal_bandwidths_mean_the_same_cluster(tmp_path):
    (tmp_path / "full.toml").write_text(FULL)
    (tmp_path / "nominal.toml").write_text(NOMINAL)
    full = amp_trials.machines(tmp_path / "full.toml")
    nominal = amp_trials.machines(tmp_path / "nominal.toml")
    assert full.nodes == nominal.nodes


def test_each_type_takes_the_times_of_its_own_node(tmp_path):
    found = amp_trials.Predictor(*written(tmp_path, "gpt2", FULL, BOTH))
    times = {
        entry.device: entry.forward_seconds
        for entry in found.world(shipped("amp")).profile.layers
        if entry.tensor == 1 and entry.signature == "gpt2.2"
    }
    assert times == {"T4": 5e-3, "V100": 3.75e-3}


def test_a_type_that_was_not_measured_is_slower_by_its_work_alone(tmp_path):
    """T4 without times of its own: the V100's host, and more device seconds."""
    constants = shipped("amp")
    found = amp_trials.Predictor(*written(tmp_path, "transgan", FULL, AS_PUBLISHED))
    times = found.recorded
    known = {
        k: amp_trials.forwards(found.model, found.cluster, k, times, constants)
        for k in ("T4", "V100")
    }
    lent = amp_trials.borrowed(found.model, found.cluster, "T4", known, constants)
    assert not known["T4"]
    for layer, (slow, host), (quick, theirs) in zip(
        found.model.layers, lent[1], known["V100"][1], strict=True
    ):
        assert host == theirs
        assert slow > quick if layer.forward_flops else slow == pytest.approx(quick)


@pytest.mark.parametrize("name", ["gpt2", "GPT-2 medium", "gpt2_medium", ""])
def test_models_are_known_by_many_names(name):
    record = {"model": name, "trials": [row(30, (16, 1, 1, 1), 1.0)]}
    assert amp_trials.model_of(record).name == "gpt2"


def test_an_unknown_model_is_refused():
    with pytest.raises(SystemExit, match="unknown model 'bert'"):
        amp_trials.model_of({"model": "bert", "trials": [row(30, (16, 1, 1, 1), 1.0)]})
