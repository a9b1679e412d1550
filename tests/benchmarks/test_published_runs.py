"""The benchmarks on FSDP and Megatron runs take other files of the same form: a GPU type that was
never fitted, several nodes."""

import json
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))
try:
    import fsdp_runs
    import vtrain_runs
finally:
    sys.path.remove(str(BENCHMARKS))

FSDP = (
    "Model,SeqLen (T),# GPUs,GPU,MicroBatchSize,GradAccum,Throughput (T/s),GlobalBatchSize (T),"
    "Precision,Sharding Strategy,Activation Checkpointing"
)
VTRAIN = (
    "# GPUs,global batch,micro batch,hidden size,attention heads,# layers,sequence length,"
    "tensor parallelism,data parallelism,pipeline parallelism,iteration time (ms)"
)


def figures(module, monkeypatch, folder, lines, *more):
    path, out = folder / "runs.csv", folder / "out.json"
    path.write_text("\n".join(lines) + "\n")
    command = [module.__name__, "--runs", str(path), "--json", str(out), *more]
    monkeypatch.setattr(sys, "argv", command)
    assert module.main() == 0
    return json.loads(out.read_text())


@pytest.mark.parametrize("gpu", ["a100_40gb", "h200_141gb", "v100_32gb", "mi300x", "l40s"])
def test_a_gpu_type_that_was_never_fitted_is_predicted(tmp_path, monkeypatch, gpu):
    runs = [
        f"7b,2048,64,{gpu},4,2,300000,1048576,amp_bf16,FULL_SHARD,True",
        f"7b,2048,64,{gpu},8,1,310000,1048576,amp_bf16,FULL_SHARD,True",
        f"1b,2048,8,{gpu},8,1,200000,131072,amp_bf16,SHARD_GRAD_OP,False",
    ]
    found = figures(fsdp_runs, monkeypatch, tmp_path, [FSDP, *runs])
    assert found["runs"] == 3
    assert 0 <= found["mean_relative_error"] < 3


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("a100_40gb", "A100-40"),
        ("NVIDIA A100-SXM4-80GB", "A100-80"),
        ("a100_80gb_pcie", "A100-80-PCIe"),
        ("NVIDIA H100 80GB HBM3", "H100"),
        ("h100_pcie", "H100-PCIe"),
        ("v100_16gb", "V100-16"),
        ("h200_141gb", "H200"),
        ("MI300X 192GB", "MI300X"),
        ("rtx_4090", "RTX4090"),
        ("a10g_24gb", "A10G"),
    ],
)
def test_gpus_are_known_by_many_names(text, name):
    assert fsdp_runs.device_name(text) == name


def test_an_unknown_gpu_is_refused():
    with pytest.raises(SystemExit, match="unknown GPU 'abacus_v4'"):
        fsdp_runs.device_name("abacus_v4")


def test_runs_on_several_nodes_wait_for_the_network(tmp_path, monkeypatch):
    """8 GPUs do not care; 64 in data parallel do, and a slow network shows as longer steps."""
    one = "8,64,4,2048,16,24,1024,8,1,1,1000"
    many = ["64,512,4,2048,16,24,1024,1,64,1,1000", "64,512,4,2048,16,24,1024,8,2,4,1000"]
    alone = [
        figures(vtrain_runs, monkeypatch, tmp_path, [VTRAIN, one], "--network", speed)["bias"]
        for speed in ("800 Gbit/s", "50 Gbit/s")
    ]
    assert alone[0] == alone[1]
    far = [
        figures(vtrain_runs, monkeypatch, tmp_path, [VTRAIN, *many], "--network", speed)
        for speed in ("800 Gbit/s", "50 Gbit/s")
    ]
    assert far[0]["runs"] == 2
    assert far[1]["bias"] > far[0]["bias"] + 0.05
