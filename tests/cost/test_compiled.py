"""Predictions for layers whose elementwise operations a compiler fuses."""

from __future__ import annotations

from dataclasses import replace

import pytest

from meshwright.cluster.catalog import catalog
from meshwright.cost.compute import layer_seconds, optimizer_seconds
from meshwright.cost.profile import Profile
from meshwright.cost.runtimes import RUNTIMES, as_run_by, compiled_constants
from meshwright.model.config import NAMED
from meshwright.model.transformer.counted_graph import counted_graph
from meshwright.plan.spec import Job

JOB = Job(global_batch=480, sequence=1024)
GPT2 = counted_graph(NAMED["gpt2"], 1024, "bf16")


def step_seconds(device: str, job: Job, micro_batches: int) -> float:
    """Seconds of a step of GPT-2 in micro-batches of 12 rows on one device."""
    kind = catalog()[device].type
    profile = as_run_by(job.runtime, None, GPT2, compiled=job.compiled)
    layers = layer_seconds(GPT2, kind, 1, 12, profile)
    parameters = sum(each.parameters for each in (*GPT2.layers, *GPT2.tied))
    work = float(layers.forward.sum() + layers.backward.sum())
    return micro_batches * work + optimizer_seconds(kind, "adamw", parameters, profile)


def test_a_compiled_step_of_gpt2_takes_what_was_posted_for_an_rtx_4090() -> None:
    """4.62 s for 480 rows (karpathy/nanoGPT, discussion 225), which is compiled."""
    eager = step_seconds("RTX4090", JOB, 40)
    compiled = step_seconds("RTX4090", replace(JOB, compiled=True), 40)
    assert compiled == pytest.approx(4.62, rel=0.15)
    assert eager > 1.2 * compiled


def test_what_was_fitted_is_not_changed_and_every_system_can_be_compiled() -> None:
    told = as_run_by("meshwright", None, GPT2, compiled=True)
    assert told is not None
    assert as_run_by("meshwright", told, GPT2, compiled=True) is told
    assert as_run_by("meshwright", None, GPT2) is None
    for runtime in RUNTIMES.values():
        fused = compiled_constants(runtime.device)
        assert fused.activation_traffic < runtime.device.activation_traffic
        assert fused.launch_forward < runtime.device.launch_forward
        assert fused.weight_traffic == runtime.device.weight_traffic


def test_measured_layers_keep_their_times() -> None:
    own = Profile(model="gpt2", sequence=1024)
    told = as_run_by("meshwright", own, GPT2, compiled=True)
    assert told is not None
    assert told.layers == own.layers
