"""Measured times: fits that recover what they were made of, and a real measurement."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from meshwright.cluster.spec import Device
from meshwright.cost.profile import LayerTime, OptimizerTime, Profile, check_profile, load_profile
from meshwright.emulation import core_speed
from meshwright.errors import LaunchError
from meshwright.model.load import load_model
from meshwright.model.zoo.build import build_model
from meshwright.profiling.layer_times import (
    DeviceStopwatch,
    LayerBenchmark,
    distinct_layers,
    layer_times,
)
from meshwright.profiling.link_times import representative_pairs
from meshwright.profiling.measure_profile import (
    ProfileSettings,
    layer_cases,
    merged_layers,
    merged_optimizers,
)
from meshwright.records import dumps
from meshwright.workflows import profile_model
from meshwright.workflows.profile_model import profile_here


def test_one_pair_stands_for_each_level():
    places = [("a", "x"), ("a", "x"), ("b", "x"), ("c", "y")]
    devices = [
        Device(name=f"{node}:{i}", type="cpu", node=node, site=site)
        for i, (node, site) in enumerate(places)
    ]
    pairs = representative_pairs(devices)
    assert pairs == {"inside": (0, 1), "network": (0, 2), "site": (0, 3)}
    assert list(representative_pairs(devices[:1])) == []
    joined = [replace(device, island="a:0") for device in devices[:2]]
    third = Device(name="a:2", type="cpu", node="a", site="x")
    assert representative_pairs([*joined, third]) == {"islands": (0, 1), "inside": (0, 2)}


def time_of(forward: float, **changes: object) -> LayerTime:
    fields = {"device": "T4", "signature": "s", "precision": "fp32", "tensor": 1, "rows": 1}
    return LayerTime(**{**fields, **changes}, forward_seconds=forward, backward_seconds=2 * forward)


def test_ranks_of_a_type_are_merged_into_their_median():
    parts = [{"input_seconds": s, "weight_seconds": 2 * s} for s in (5.0, 7.0, 6.0)]
    measured = [time_of(s, **part) for s, part in zip((1.0, 3.0, 2.0), parts, strict=True)]
    merged = merged_layers([*measured, time_of(9.0, device="V100")])
    assert [(m.device, m.forward_seconds) for m in merged] == [("T4", 2.0), ("V100", 9.0)]
    assert [(m.input_seconds, m.weight_seconds) for m in merged] == [(6.0, 12.0), (None, None)]
    steps = [
        OptimizerTime(device="T4", optimizer="adamw", seconds_per_parameter=s) for s in (1, 2, 9)
    ]
    assert [m.seconds_per_parameter for m in merged_optimizers(steps)] == [2]


def settings(tmp_path, **changes: object) -> ProfileSettings:
    fields = {
        "model": "gpt-tiny",
        "sequence": 16,
        "rows": (1, 2),
        "precision": "fp32",
        "output": str(tmp_path / "profile.json"),
        "repeats": 3,
    }
    return ProfileSettings(**{**fields, **changes})


def test_equal_layers_are_measured_once_and_illegal_widths_not_at_all(tmp_path):
    graph = load_model("gpt-tiny", 16, "fp32")
    distinct = distinct_layers(graph)
    assert len(distinct) == 3
    chosen = settings(tmp_path, tensor=(1, 3), rows=(1,))
    found = [
        (n, case.tensor)
        for case in layer_cases(chosen, graph, distinct.values())
        for n in case.layers
    ]
    blocks = distinct[graph.layers[1].signature]
    assert (blocks, 1) in found
    assert (blocks, 3) not in found


class Operations(DeviceStopwatch):
    """Counts floating-point operations in place of seconds, one at least."""

    def seconds(self, act: Callable[[], object]) -> float:
        with FlopCounterMode(display=False) as counter:
            act()
        return float(counter.get_total_flops() or 1)


def operations(at: int) -> LayerTime:
    def make_model() -> nn.Module:
        with torch.device("meta"):
            return build_model("gpt-tiny", 16)

    tokens = torch.zeros((1, 16), dtype=torch.long)
    bench = LayerBenchmark(
        make_model=make_model,
        graph=load_model("gpt-tiny", 16, "fp32"),
        inputs=(tokens, tokens),
        device_type="cpu",
        stopwatch=Operations(torch.device("cpu")),
        repeats=2,
    )
    # The counter does not know every fused attention that a processor may have.
    with sdpa_kernel(SDPBackend.MATH):
        (found,) = layer_times(bench, layers=[at], rows=3, tensor=1)
    return found


def test_the_parts_of_a_backward_are_measured_and_do_its_work_between_them():
    block = operations(1)
    assert block.input_seconds is not None
    assert block.weight_seconds is not None
    # Every product of the forward has a weight, but those of attention's scores.
    assert block.forward_seconds > block.weight_seconds > 0.5 * block.forward_seconds
    assert block.input_seconds + block.weight_seconds == block.backward_seconds


def test_more_processes_than_devices_are_refused(tmp_path):
    cluster = tmp_path / "c.toml"
    cluster.write_text('format = 1\nname = "c"\n[[node]]\nname = "a"\ndevices = ["cpu"]\n')
    with pytest.raises(LaunchError, match="at most 1, the devices of c"):
        profile_here(settings(tmp_path, cluster=str(cluster)), processes=2)


def test_more_than_the_memory_holds_is_refused_before_it_is_measured(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(
        "psutil.virtual_memory", lambda: SimpleNamespace(available=2**31, total=2**32)
    )
    with pytest.raises(LaunchError, match=r"rows: found 1048576 rows.*at most the 2 GiB"):
        profile_here(settings(tmp_path, rows=(2**20,)), 1)
    with pytest.raises(LaunchError, match="processes: found 7; wanted at most 5"):
        profile_here(settings(tmp_path), 7)


@pytest.fixture
def made_up(monkeypatch):
    """In place of measurements: what is tested is whether they are made, not what they say."""

    def instead(asked, *_):
        profile = Profile(model=asked.model, sequence=asked.sequence)
        Path(asked.output).write_text(dumps(profile))

    monkeypatch.setattr(profile_model, "_measure_in_processes", instead)


@pytest.mark.usefixtures("made_up")
def test_what_was_measured_otherwise_is_measured_again(tmp_path):
    one, _ = profile_here(settings(tmp_path), processes=1)
    assert profile_here(settings(tmp_path), processes=1) == (one, True)
    for changed in (settings(tmp_path, rows=(1,)), settings(tmp_path, repeats=4)):
        assert profile_here(changed, processes=1)[1] is False
    assert profile_here(settings(tmp_path, repeats=4), processes=1, again=True)[1] is False
    (tmp_path / "profile.json").write_text("{}")
    assert profile_here(settings(tmp_path, repeats=4), processes=1)[1] is False


@pytest.mark.usefixtures("made_up")
def test_emulated_devices_are_measured_again_where_their_speed_refers_to_another(
    tmp_path, monkeypatch
):
    emulated = settings(tmp_path, shares={"cpu": 0.5})
    one, _ = profile_here(emulated, processes=1)
    assert profile_here(emulated, processes=1) == (one, True)
    usual = core_speed.usual_seconds()
    monkeypatch.setattr(core_speed, "usual_seconds", lambda: 2 * usual)
    assert profile_here(emulated, processes=1)[1] is False


@pytest.mark.slow
def test_two_processes_measure_layers_optimizer_and_links(tmp_path):
    cluster = tmp_path / "c.toml"
    cluster.write_text(
        'format = 1\nname = "c"\n[device.slow]\nlike = "cpu"\n'
        '[[node]]\nname = "a"\ndevices = ["cpu", "slow"]\n'
    )
    asked = settings(tmp_path, cluster=str(cluster), tensor=(1, 2), shares={"slow": 0.1})
    made, known = profile_here(asked, processes=2)
    assert not known
    assert profile_here(asked, processes=2) == (made, True)
    graph = load_model("gpt-tiny", 16, "fp32")
    from meshwright.cluster.files import load_cluster

    check_profile(made, graph, load_cluster(cluster))
    assert load_profile(tmp_path / "profile.json") == made
    assert {(t.device, t.tensor, t.rows) for t in made.layers} == {
        (d, t, r) for d in ("cpu", "slow") for t in (1, 2) for r in (1, 2)
    }
    by_type = {
        kind: sum(t.backward_seconds for t in made.layers if t.device == kind)
        for kind in ("cpu", "slow")
    }
    assert by_type["slow"] > 3 * by_type["cpu"]
    assert all(t.weight_seconds for t in made.layers)
    assert made.links is not None
    assert made.links.inside is not None
    assert {o.device for o in made.optimizers} == {"cpu", "slow"}
