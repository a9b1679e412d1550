"""A small world of good files, one of every kind that meshwright reads, for fuzz.py to spoil."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from meshwright.cluster.files import load_cluster
from meshwright.cost.constants import Calibration, DeviceConstants, ErrorBar, SystemConstants
from meshwright.cost.links import CollectiveTimes, LinkReport, MessageTime, PairTimes
from meshwright.cost.profile import LayerTime, LinkTimes, OptimizerTime, Profile
from meshwright.launch.nodes import write_nodes
from meshwright.model.load import load_model
from meshwright.plan.files import load_plan
from meshwright.records import plain
from meshwright.runtime.run_folder import Metrics, RunSettings, TrainingOptions
from meshwright.workflows.session import reopen_plan, simulate_priced, with_prediction

CLUSTER = """\
format = 1
name = "pair"
[links]
network = { bandwidth = "10 Gbit/s", latency = "50 us" }
inside = { bandwidth = "80 Gbit/s", latency = "10 us", shared = true }
uplink = { bandwidth = "5 Gbit/s", latency = "1 ms" }
[device.fast]
like = "cpu"
memory = "4 GiB"
memory_bandwidth = "20 GB/s"
peak = { fp32 = "100 GFLOP/s" }
matmul_efficiency = 0.5
source = "by hand"
[[site]]
name = "here"
[[site]]
name = "there"
uplink = { bandwidth = "2 Gbit/s", latency = "2 ms" }
[[node]]
name = "a"
site = "here"
devices = ["1 x fast"]
[[node]]
name = "b"
count = 1
site = "there"
devices = ["1 x cpu"]
[[link]]
between = ["a", "b-0"]
bandwidth = "1 Gbit/s"
latency = "100 us"
"""
MATRIX = """\
format = 1
name = "irregular"
[links]
network = { bandwidth = "10 Gbit/s", latency = "50 us" }
[[node]]
name = "a"
count = 2
devices = ["1 x T4"]
[[node]]
name = "b"
devices = ["2 x V100-16"]
[matrix]
nodes = ["a-0", "a-1", "b"]
bandwidth = [["-", "1 Gbit/s", "2 Gbit/s"], ["1 Gbit/s", "-", "-"], ["2 Gbit/s", "-", "-"]]
latency = "20 us"
"""
MODEL = """\
name = "u-shape"
[[layer]]
name = "enc"
count = 3
forward = "12 GFLOP"
attention = "1 GFLOP"
parameters = 400_000
output = "2 MiB"
saved = "9 MiB"
workspace = "1 MiB"
tensor_units = 4
[[layer]]
name = "dec"
forward = "20 GFLOP"
backward = "41 GFLOP"
parameters = 600_000
output = "2 MiB"
traffic = "8 MiB"
[[skip]]
from = "enc0"
to = "dec"
[[tied]]
name = "table"
layers = ["enc0", "dec"]
parameters = 1_000
"""
CONFIG: dict[str, Any] = {
    "model_type": "llama",
    "_name_or_path": "tiny",
    "vocab_size": 256,
    "max_position_embeddings": 64,
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 64,
    "rope_theta": 10000.0,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "architectures": ["LlamaForCausalLM"],
}
BED = """\
format = 1
name = "bed"
mode = "virtual"
compute_scale = 0.01
bandwidth_scale = 0.1
latency_scale = 2.0
attempts = 2
[cluster]
format = 1
name = "pair"
[[cluster.node]]
name = "a"
devices = ["1 x T4"]
network = { bandwidth = "1 Gbit/s", latency = "50 us" }
[[cluster.node]]
name = "b"
devices = ["1 x V100-16"]
network = { bandwidth = "1 Gbit/s", latency = "50 us" }
"""
PLAN: dict[str, Any] = {
    "format": 1,
    "name": "by-hand",
    "model": {"name": "gpt-tiny", "fingerprint": "", "source": "gpt-tiny"},
    "cluster": {"name": "pair", "fingerprint": "", "source": "cluster.toml"},
    "job": {"global_batch": 8, "sequence": 16, "precision": "fp32", "optimizer": "adamw"},
    "schedule": "1f1b",
    "devices": ["a:0", "b-0:0"],
    "pipelines": [
        {
            "micro_batches": 4,
            "rows": 2,
            "stages": [
                {"layers": [0, 6], "devices": [["a:0"]], "recompute": True},
                {"layers": [6, 10], "devices": [["b-0:0"]], "rows": [2], "boundary": "direct"},
            ],
        }
    ],
}
STEPS = 8
WORDS = b"It was a bright cold day in April, and the clocks were striking thirteen. " * 40


@dataclass(frozen=True)
class Kind:
    """A kind of file: where a good one stands, and the verbs that read it."""

    name: str
    path: str
    verbs: tuple[str, ...]
    form: str = "json"
    """json, toml, lines (of JSON), text or bytes."""
    strict: bool = True
    """Unknown fields are refused."""


EXPORTS = tuple(
    f"export plan.json --to {tool} --nearest -o out"
    for tool in ("torchtitan", "megatron", "deepspeed", "accelerate", "pipelining-csv")
)
PLANNING = "--global-batch 4 --sequence 16 --precision fp32 --budget 2s -o out.json"
CALIBRATE = "calibrate run run2 -o out.json"
KINDS = (
    Kind(
        "cluster",
        "cluster.toml",
        (
            f"plan --model gpt-tiny --cluster cluster.toml {PLANNING}",
            "explain plan.json",
            "whatif plan.json --set link.network=1Gbit/s -o out.toml",
            "discover --merge cluster.toml -o out.toml",
        ),
        "toml",
    ),
    Kind(
        "matrix",
        "matrix.toml",
        (f"plan --model gpt-tiny --cluster matrix.toml {PLANNING}",),
        "toml",
    ),
    Kind("model", "model.toml", (f"plan --model model.toml --cluster cluster.toml {PLANNING}",),
         "toml"),
    Kind(
        "config",
        "config.json",
        (
            f"plan --model config.json --cluster cluster.toml {PLANNING}",
            "simulate config-plan.json",
            "train config-plan.json --dry-run -o out",
            "export config-plan.json --to megatron -o out",
        ),
        strict=False,
    ),
    Kind(
        "plan",
        "plan.json",
        (
            "explain plan.json",
            "simulate plan.json --trace out.json --program out.txt --report out.html",
            "compare plan.json other.json --report out.html",
            "compare other.json plan.json --json",
            "whatif plan.json --without b",
            "reorder plan.json --order gpipe -o out.json",
            "train plan.json --dry-run -o out",
            *EXPORTS,
        ),
    ),
    Kind(
        "profile",
        "profile.json",
        (
            f"plan --model gpt-tiny --cluster cluster.toml --profile profile.json {PLANNING}",
            "simulate plan.json --profile profile.json",
        ),
    ),
    Kind("calibrated", "calibrated.json", ("simulate plan.json --profile calibrated.json",)),
    Kind("links", "links.json", ("@links links.json",)),
    Kind("run settings", "run/run.json", (CALIBRATE,)),
    Kind("run plan", "run/plan.json", (CALIBRATE,)),
    Kind("metrics", "run/metrics.jsonl", (CALIBRATE,), "lines"),
    Kind("timeline", "run/timeline.json", ("@timeline run/timeline.json",)),
    Kind("testbed", "bed.toml", ("testbed run bed.toml --dry-run -- meshwright explain plan.json",),
         "toml"),
    Kind("order", "order.csv", ("reorder plan.json --csv order.csv -o out.json",), "text"),
    Kind("tokens", "tokens.bin", ("train plan.json --data tokens.bin --dry-run -o out",), "bytes"),
    Kind("array", "tokens.npy", ("train plan.json --data tokens.npy --dry-run -o out",), "bytes"),
    Kind("corpus", "corpus.txt", ("train plan.json --data corpus.txt --dry-run -o out",), "bytes"),
)  # fmt: skip


def make_world(folder: Path) -> None:
    """Write all of it."""
    for name, text in (
        ("cluster.toml", CLUSTER),
        ("matrix.toml", MATRIX),
        ("model.toml", MODEL),
        ("bed.toml", BED),
        ("order.csv", "0F0,0F1,0B0,0F2,0B1,0F3,0B2,0B3\n1F0,1B0,1F1,1B1,1F2,1B2,1F3,1B3\n"),
    ):
        (folder / name).write_text(text)
    own = {"name": "tiny", "fingerprint": "", "source": "config.json"}
    stages = [{"layers": [0, 6], "devices": [["a:0"]]}]
    single = [{"micro_batches": 4, "rows": 2, "stages": stages}]
    for name, data in (
        ("config.json", CONFIG),
        ("plan.json", PLAN),
        ("config-plan.json", {**PLAN, "model": own, "devices": ["a:0"], "pipelines": single}),
        ("other.json", {**PLAN, "name": "other", "schedule": "gpipe"}),
    ):
        (folder / name).write_text(json.dumps(data, indent=1))
    _tokens(folder)
    _measurements(folder)
    for run in ("run", "run2"):
        _run(folder, run)


def _tokens(folder: Path) -> None:
    tokens = np.frombuffer(WORDS, dtype=np.uint8)
    tokens.astype(np.uint16).tofile(folder / "tokens.bin")
    np.save(folder / "tokens.npy", tokens.astype(np.int32))
    (folder / "corpus.txt").write_bytes(WORDS)


def _measurements(folder: Path) -> None:
    """Profiles and links as they are measured, and a plan that is predicted from them."""
    cluster = load_cluster(folder / "cluster.toml")
    graph = load_model("gpt-tiny", 16, "fp32")
    layers = tuple(
        LayerTime(
            device=kind,
            signature=signature,
            precision="fp32",
            tensor=1,
            rows=rows,
            forward_seconds=1e-3 * rows,
            backward_seconds=2e-3 * rows,
            spread=0.01,
        )
        for kind in cluster.types
        for signature in dict.fromkeys(layer.signature for layer in graph.layers)
        for rows in (1, 2)
    )
    measured = Profile(
        model=graph.name,
        sequence=16,
        versions={"torch": "2"},
        source="fuzz",
        layers=layers,
        optimizers=(OptimizerTime(device="cpu", optimizer="adamw", seconds_per_parameter=1e-9),),
        links=LinkTimes(network=cluster.nodes[0].network, all_reduce_latency=1e-5),
    )
    fitted = Calibration(
        source="fuzz",
        devices={"cpu": DeviceConstants(matmul_efficiency=0.5, memory_efficiency=0.7)},
        system=SystemConstants(step=1e-3),
        error=ErrorBar(low=0.9, high=1.1, runs=2),
    )
    points = tuple(MessageTime(bytes=10**n, seconds=1e-5 + 10**n / 1e8) for n in (3, 5, 7))
    pair = PairTimes(
        between=("a:0", "b-0:0"), latency=1e-5, bandwidth=1e8, residual=0.01, points=points
    )
    whole = CollectiveTimes(points=points, step_latency=1e-5, residuals=(0.1, 0.0, -0.1))
    calibrated = replace(measured, layers=(), optimizers=(), calibration=fitted)
    for name, record in (
        ("profile.json", measured),
        ("calibrated.json", calibrated),
        ("links.json", LinkReport(pairs=(pair,), all_reduce=whole)),
    ):
        (folder / name).write_text(json.dumps(plain(record)))
    _, found = reopen_plan(folder / "plan.json")
    (folder / "plan.json").write_text(json.dumps(plain(with_prediction(found)), indent=1))


def _run(folder: Path, run: str) -> None:
    """What a training run leaves behind."""
    home = folder / run
    home.mkdir()
    plan = load_plan(folder / "plan.json")
    session, found = reopen_plan(folder / "plan.json")
    (home / "plan.json").write_text(json.dumps(plain(plan)))
    write_nodes(home, plan.devices, session.cluster, 29500)
    settings = RunSettings(
        model="gpt-tiny", peak_flops={"a:0": 1e11}, options=TrainingOptions(steps=STEPS)
    )
    (home / "run.json").write_text(json.dumps(plain(settings)))
    timeline = replace(simulate_priced(found), source="measured")
    (home / "timeline.json").write_text(json.dumps(plain(timeline)))
    lines = (
        Metrics(
            step=step,
            loss=5.5 - 0.1 * step,
            gradient_norm=2.0,
            learning_rate=1e-4,
            step_seconds=0.1 + 0.001 * step,
            tokens_per_second=1280.0,
            memory_bytes=10**8,
        )
        for step in range(STEPS)
    )
    (home / "metrics.jsonl").write_text("".join(json.dumps(plain(line)) + "\n" for line in lines))
