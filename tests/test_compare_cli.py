"""`compare` and `whatif` as a user meets them, mistakes included."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from commands import meshwright, refused

pytestmark = pytest.mark.heavy

CLUSTER = """\
format = 1
name = "pair"
[links]
network = { bandwidth = "1 Gbit/s", latency = "50 us" }
[[node]]
name = "a"
devices = ["1 x V100-16"]
[[node]]
name = "b"
devices = ["1 x T4"]
"""


def make_plan(folder: Path, output: str, *, model: str = "gpt2", batch: int = 8) -> None:
    done = meshwright(
        *("plan", "--model", model, "--cluster", "pair.toml", "--sequence", "256"),
        *("--global-batch", str(batch), "--precision", "fp32", "-o", output),
        cwd=folder,
    )
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def planned(tmp_path_factory) -> Path:
    """Plans of two models and batches, and one on a single device."""
    folder = tmp_path_factory.mktemp("planned")
    (folder / "pair.toml").write_text(CLUSTER)
    make_plan(folder, "best.json")
    make_plan(folder, "other.json", model="gpt-tiny")
    alone = json.loads((folder / "best.json").read_text())
    alone["devices"] = ["b:0"]
    stage = {"layers": [0, 14], "devices": [["b:0"]]}
    alone["pipelines"] = [{"micro_batches": 8, "rows": 1, "stages": [stage]}]
    alone["prediction"] = None
    (folder / "alone.json").write_text(json.dumps(alone))
    return folder


def test_two_plans_side_by_side(planned):
    done = meshwright("compare", "best.json", "alone.json", "--report", "c.html", cwd=planned)
    assert done.returncode == 0, done.stderr
    assert max(map(len, done.stdout.splitlines())) <= 80
    assert "best.json is" in done.stdout
    assert "times as fast as alone.json" in " ".join(done.stdout.split())
    page = (planned / "c.html").read_text()
    assert page.count("<svg") == 2
    assert "http" not in page.replace("http://www.w3.org/2000/svg", "")


def test_the_same_as_data(planned):
    done = meshwright("compare", "alone.json", "best.json", "--json", cwd=planned)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    alone, best = found["plans"]
    assert found["verdict"]["winner"] == "best.json"
    assert found["verdict"]["speed_up"] == pytest.approx(
        alone["step_seconds"] / best["step_seconds"]
    )
    assert sum(best["parts"].values()) == pytest.approx(best["step_seconds"])
    planned_seconds = json.loads((planned / "best.json").read_text())["prediction"]["step_seconds"]
    assert best["step_seconds"] == pytest.approx(planned_seconds)
    assert alone["links"] == []


def test_what_a_faster_device_would_buy(planned):
    done = meshwright(
        *("whatif", "alone.json", "--set", "device.T4.matmul_efficiency=0.9"),
        *("--add", "1 x H100", "--without", "a", "--json", "-o", "edited.toml"),
        cwd=planned,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["seconds_after"] < found["seconds_before"]
    now, best, kept, after = (each["step_seconds"] for each in found["options"])
    assert now >= best
    assert kept < now
    assert found["seconds_after"] == pytest.approx(min(kept, after))
    assert any("new-0: 1 x H100" in edit for edit in found["edits"])
    again = meshwright(
        *("plan", "--model", "gpt2", "--cluster", "edited.toml", "--sequence", "256"),
        *("--global-batch", "8", "--precision", "fp32", "-o", "edited.json"),
        cwd=planned,
    )
    assert again.returncode == 0, again.stderr
    step = json.loads((planned / "edited.json").read_text())["prediction"]["step_seconds"]
    assert step == pytest.approx(after)


def test_a_plan_that_loses_its_devices_says_so(planned):
    done = meshwright("whatif", "alone.json", "--without", "b", cwd=planned)
    assert done.returncode == 0, done.stderr
    assert max(map(len, done.stdout.splitlines())) <= 80
    assert "cannot: devices: b:0" in done.stdout
    assert "the best plan for it" in done.stdout


MISTAKES = {
    "models": ("compare best.json other.json", "model", "gpt-tiny", "compare plans for one model"),
    "file": ("compare best.json nothing.json", "nothing.json", "no such file"),
    "no edit": ("whatif best.json", "--set, --without and --add"),
    "nothing left": ("whatif best.json --without a --without b", "--without", "at least one"),
    "field": ("whatif best.json --set link.ib=1Gbit/s", "--set", "link.ib", "network"),
    "unit": ("whatif best.json --set link.network=100", "link.network", "25 Gbit/s"),
    "all": ("whatif best.json --without c --add T5 --set x=1", "--without", "--add", "--set"),
    "memory": ("whatif best.json --set device.T4.memory=1MiB --without a", "FitError", "1 MiB"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_ends_with_its_message_and_no_traceback(planned, name):
    line, *words = MISTAKES[name]
    refused(line, words, cwd=planned)
