"""An emulated device is as fast while the machine under it is slow."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import torch

from meshwright.emulation import core_speed
from meshwright.emulation.dilation import Dilation, Dilator


def test_what_is_usual_is_measured_once_on_a_machine(tmp_path: Path) -> None:
    threads = torch.get_num_threads()
    usual = core_speed.usual_seconds(tmp_path)
    assert usual >= core_speed.REFERENCE_SECONDS
    assert torch.get_num_threads() == threads
    assert core_speed.usual_seconds(tmp_path) == usual
    (tmp_path / core_speed.USUAL_SECONDS_FILE).write_text("0.25")
    assert core_speed.usual_seconds(tmp_path) == 0.25
    (tmp_path / core_speed.USUAL_SECONDS_FILE).write_text("0.0052e-")
    again = core_speed.usual_seconds(tmp_path)
    assert again >= core_speed.REFERENCE_SECONDS
    assert float((tmp_path / core_speed.USUAL_SECONDS_FILE).read_text()) == again


def test_the_median_of_the_last_samples_is_the_pace(monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = iter(
        [9.0] * core_speed.FIRST_CALLS + [2.0, 2.0, 50.0] + [3.0] * core_speed.RECENT_SAMPLES
    )
    monkeypatch.setattr(core_speed, "sample_seconds", lambda: next(seconds))
    found = core_speed.CoreSpeed(usual_seconds=2.0)
    assert found.slowness == 1.0
    for _ in range(3):
        found.sample()
    assert found.slowness == 1.0
    for _ in range(core_speed.RECENT_SAMPLES):
        found.sample()
    assert found.slowness == 1.5


@pytest.mark.parametrize("slowness", [1.0, 2.0])
def test_a_slow_spell_of_the_machine_is_none_of_the_device(
    monkeypatch: pytest.MonkeyPatch, slowness: float
) -> None:
    usual = core_speed.usual_seconds()
    monkeypatch.setattr(core_speed, "sample_seconds", lambda: slowness * usual)
    dilator = Dilator(Dilation(share=0.5))
    dilator.begin()
    end = time.thread_time() + 0.02 * slowness
    while time.thread_time() < end:
        pass
    assert dilator.stop() == pytest.approx(0.04, rel=0.1)
