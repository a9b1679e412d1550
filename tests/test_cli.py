"""The command line as a user meets it: the whole way from files to a run, and mistakes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from typer.main import get_command

from commands import meshwright, refused
from meshwright.cli import app
from meshwright.search.options import OPTION_NAMES

pytestmark = pytest.mark.heavy

EXAMPLES = Path(__file__).parents[1] / "examples" / "clusters"
LAPTOP = """\
format = 1
name = "laptop"
[[node]]
name = "here"
devices = ["2 x cpu"]
"""


@pytest.fixture(scope="module")
def planned(tmp_path_factory) -> Path:
    """A folder with a cluster of two processes and a plan for it."""
    folder = tmp_path_factory.mktemp("planned")
    (folder / "cluster.toml").write_text(LAPTOP)
    done = meshwright(
        *("plan", "--model", "gpt-tiny", "--cluster", "cluster.toml"),
        *("--global-batch", "4", "--sequence", "16", "--precision", "fp32"),
        cwd=folder,
    )
    assert done.returncode == 0, done.stderr
    return folder


def test_planning_a_published_model_takes_no_torch(tmp_path):
    """The README's first command, with a poisoned torch on the path."""
    poison = tmp_path / "torch.py"
    poison.write_text("raise SystemExit('planning imported torch')")
    arguments = ["plan", "--model", "gpt2-xl", "--cluster", str(EXAMPLES / "v100-t4.toml")]
    arguments += ["--global-batch", "32", "--sequence", "1024", "-o", str(tmp_path / "plan.json")]
    paths = os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run(
        [sys.executable, "-m", "meshwright", *arguments],
        env={**os.environ, "PYTHONPATH": paths},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "plan.json").read_text())["prediction"]["step_seconds"] > 0


def test_a_plan_is_explained_and_simulated(planned):
    told = meshwright("explain", "plan.json", cwd=planned)
    assert told.returncode == 0, told.stderr
    assert "here:0" in told.stdout
    done = meshwright(
        *("simulate", "plan.json", "--trace", "step.json"),
        *("--program", "program.txt", "--report", "report.html"),
        cwd=planned,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads((planned / "step.json").read_text())["traceEvents"]
    assert (planned / "program.txt").read_text().startswith("rank 0")
    assert "<html" in (planned / "report.html").read_text()


@pytest.mark.slow
def test_a_plan_is_made_for_the_system_that_runs_it_and_simulated_for_another(planned):
    done = meshwright(
        *("plan", "--model", "gpt-tiny", "--cluster", "cluster.toml", "--runtime", "deepspeed"),
        *("--global-batch", "4", "--sequence", "16", "--precision", "fp32", "-o", "there.json"),
        cwd=planned,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads((planned / "there.json").read_text())["job"]["runtime"] == "deepspeed"

    def step(*options: str) -> str:
        told = meshwright("simulate", "there.json", *options, cwd=planned)
        assert told.returncode == 0, told.stderr
        return next(line for line in told.stdout.splitlines() if "step" in line)

    assert step() == step("--runtime", "deepspeed")
    assert step() != step("--runtime", "meshwright")


def test_every_verb_that_searches_takes_the_same_limits():
    verbs = get_command(app).commands
    for option in ("budget", "forbid"):
        told = [{p.name: p.help for p in verbs[verb].params} for verb in ("plan", "whatif", "demo")]
        assert len({found[option] for found in told}) == 1
    for name in OPTION_NAMES:
        assert name in told[0]["forbid"]


@pytest.mark.parametrize("verb", ["plan", "whatif", "demo"])
def test_an_option_that_does_not_exist_cannot_be_forbidden(planned, verb):
    given = {"plan": "--model gpt-tiny --cluster cluster.toml --global-batch 4 -o no.json",
             "whatif": "plan.json --without here:1", "demo": "-o no"}  # fmt: skip
    refused(f"{verb} {given[verb]} --forbid zero", ("--forbid", "divided-states"), cwd=planned)
    refused(f"{verb} {given[verb]} --budget 0s", ("--budget", "more than 0"), cwd=planned)
    assert not (planned / "no").exists()


def test_the_same_input_gives_the_same_bytes(planned):
    first = (planned / "plan.json").read_bytes()
    done = meshwright(
        *("plan", "--model", "gpt-tiny", "--cluster", "cluster.toml"),
        *("--global-batch", "4", "--sequence", "16", "--precision", "fp32", "-o", "again.json"),
        cwd=planned,
    )
    assert done.returncode == 0, done.stderr
    assert (planned / "again.json").read_bytes() == first


def test_a_plan_is_trained_and_leaves_its_traces(planned):
    done = meshwright(
        *("train", "plan.json", "--steps", "4", "-o", "run"),
        *("--save-weights", "--report", "run.html"),
        cwd=planned,
    )
    assert done.returncode == 0, done.stderr
    assert "predicted" in done.stdout, "how far off the prediction was"
    lines = [json.loads(line) for line in (planned / "run/metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [0, 1, 2, 3]
    assert lines[-1]["loss"] < lines[0]["loss"]
    assert all(line["tokens_per_second"] > 0 and line["memory_bytes"] > 0 for line in lines)
    timeline = json.loads((planned / "run/timeline.json").read_text())
    assert timeline["source"] == "measured"
    assert (planned / "run/model.safetensors").stat().st_size > 1_000_000
    assert "<html" in (planned / "run.html").read_text()


@pytest.mark.slow
def test_the_attention_that_a_model_was_named_with_stays_with_its_plan(planned):
    """Plans, runs and exports reopen it; what is saved grows by the scores."""
    (planned / "config.json").write_text(json.dumps(
        {"model_type": "gpt2", "vocab_size": 256, "n_positions": 64, "n_embd": 32, "n_layer": 2,
         "n_head": 4}
    ))  # fmt: skip
    memory = {}
    for choice in ("fused", "unfused,attention_dropout=0.1"):
        done = meshwright(
            *("plan", "--model", f"config.json:{choice}", "--cluster", "cluster.toml"),
            *("--global-batch", "4", "--sequence", "64", "--precision", "fp32"),
            *("-o", f"{choice[:5]}.json"),
            cwd=planned,
        )
        assert done.returncode == 0, done.stderr
        plan = json.loads((planned / f"{choice[:5]}.json").read_text())
        assert plan["model"]["source"] == f"config.json:{choice}"
        memory[choice] = sum(each["activations"] for each in plan["prediction"]["memory"])
    assert memory["unfused,attention_dropout=0.1"] > memory["fused"]
    told = meshwright("simulate", "unfus.json", cwd=planned)
    assert told.returncode == 0, told.stderr
    done = meshwright("train", "unfus.json", "--steps", "2", "-o", "dropped", cwd=planned)
    assert done.returncode == 0, done.stderr
    kept = json.loads((planned / "dropped/plan.json").read_text())["model"]["source"]
    assert kept.endswith("config.json:unfused,attention_dropout=0.1")
    assert str(planned) in kept or kept.startswith("dropped")
    done = meshwright("export", "unfus.json", "--to", "megatron", "-o", "out", cwd=planned)
    assert done.returncode == 0, done.stdout + done.stderr
    arguments = (planned / "out/arguments.txt").read_text()
    assert "--attention-backend unfused" in arguments
    assert "--attention-dropout 0.1" in arguments


def test_dry_run_only_prints_the_commands(planned):
    done = meshwright("train", "plan.json", "--dry-run", "-o", "dry", cwd=planned)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "meshwright launch dry --node here\n"
    assert not (planned / "dry/metrics.jsonl").exists()


PRICES = """\
format = 1
currency = "USD"
date = "2026-11-28"
source = "our own meter"
[device]
cpu = "0.10 USD/h"
"""


@pytest.fixture(scope="module")
def with_prices(planned) -> Path:
    """The folder, with hourly prices."""
    (planned / "prices.toml").write_text(PRICES)
    return planned


def _plan(folder: Path, *more: str):
    done = meshwright(
        *("plan", "--model", "gpt-tiny", "--cluster", "cluster.toml"),
        *("--global-batch", "4", "--sequence", "16", "--precision", "fp32", *more),
        cwd=folder,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_prices_say_what_a_plan_costs_and_change_no_byte_of_it(with_prices):
    told = _plan(with_prices, "--prices", "prices.toml", "-o", "told.json")
    plain = _plan(with_prices, "-o", "plain.json")
    assert (with_prices / "told.json").read_bytes() == (with_prices / "plan.json").read_bytes()
    assert (with_prices / "plain.json").read_bytes() == (with_prices / "plan.json").read_bytes()
    assert "USD" not in plain
    assert "our own meter, 2026-11-28" in told
    assert " USD an hour, " in told


def test_a_plan_is_chosen_by_cost_and_the_front_is_drawn(with_prices):
    told = _plan(
        with_prices,
        *("--prices", "prices.toml", "--objective", "cost", "-o", "cheap.json"),
        *("--front", "front.svg"),
    )
    assert "<- best" in told
    assert "<svg" in (with_prices / "front.svg").read_text()
    for verb in ("explain cheap.json", "simulate cheap.json --report page.html"):
        done = meshwright(*verb.split(), "--prices", "prices.toml", cwd=with_prices)
        assert done.returncode == 0, done.stderr
        assert "USD per million tokens" in done.stdout.replace("\n", " ")
    assert "our own meter" in (with_prices / "page.html").read_text()


def test_whatif_answers_in_money(with_prices):
    done = meshwright(
        *("whatif", "plan.json", "--without", "here:1", "--prices", "prices.toml"),
        *("--objective", "cost", "--json"),
        cwd=with_prices,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["expense_after"]["currency"] == "USD"
    assert found["options"][3]["expense"]["per_hour"] == 0.1


PLAN = "plan --model gpt-tiny --cluster cluster.toml --sequence 16"
PRICED = f"{PLAN} --global-batch 4 --precision fp32 -o no.json --prices"
MONEY = {
    "no prices": (f"{PLAN} --global-batch 4 --objective cost", "--objective", "--prices"),
    "a limit without prices": (f"{PLAN} --global-batch 4 --limit 2s", "--limit", "--prices"),
    "a front without prices": (f"{PLAN} --global-batch 4 --front f.svg", "--front", "--prices"),
    "no such prices": (f"{PRICED} none.toml", "none.toml", "no such file"),
    "no price": (f"{PRICED} other.toml", "other.toml", "device.cpu", "no price"),
    "an unknown type": (f"{PRICED} wrong.toml", "wrong.toml", "'cpus'", "Did you mean 'cpu'"),
    "negative": (f"{PRICED} negative.toml", "negative.toml", "device.cpu", "at least 0"),
    "another currency": (f"{PRICED} prices.toml --limit 3EUR/h", "--limit", "USD"),
    "no limit at all": (f"{PRICED} prices.toml --limit 0USD/h", "--limit", "above 0"),
    "no time at all": (f"{PRICED} prices.toml --objective cost --budget 0s", "--budget", "0"),
    "a limit that nothing keeps": (
        f"{PRICED} prices.toml --limit 0.01USD/h",
        *("--limit", "the nearest, for 1 x cpu, has 0.1 USD/h", "at most 0.01USD/h"),
    ),
}


@pytest.mark.parametrize("name", MONEY)
def test_mistakes_of_money_end_with_their_message(with_prices, name):
    for file, old, new in (
        ("other", "cpu =", "T4 ="),
        ("wrong", "cpu =", "cpus ="),
        ("negative", '"0.10', '"-0.10'),
    ):
        (with_prices / f"{file}.toml").write_text(PRICES.replace(old, new))
    line, *words = MONEY[name]
    refused(line, words, cwd=with_prices)
    assert not (with_prices / "no.json").exists()


MISTAKES = {
    "no such plan": ("explain none.json", "none.json", "no such file"),
    "no such cluster": (
        "plan --model gpt-tiny --cluster none.toml --global-batch 4",
        *("none.toml", "no such file"),
    ),
    "unknown model": (
        "plan --model gpt2-xll --cluster cluster.toml --global-batch 4",
        *("gpt2-xll", "gpt2-xl"),
    ),
    "unknown attention": (
        "plan --model gpt-tiny:unfussed --cluster cluster.toml --global-batch 4",
        *("attention", "'unfussed'", "fused or unfused"),
    ),
    "no rows": (f"{PLAN} --global-batch 0", "--global-batch", "at least 1"),
    "sequence too long": (
        "plan --model gpt2 --cluster cluster.toml --global-batch 4 --sequence 4096",
        *("4096", "1024"),
    ),
    "precision not offered": (
        f"plan --model gpt-tiny --cluster {EXAMPLES / 'v100-t4.toml'} --global-batch 4"
        " --sequence 16 --precision bf16",
        *("bf16", "fp16"),
    ),
    "fits nowhere": (
        "plan --model llama-2-70b --cluster cluster.toml --global-batch 2 --sequence 64"
        " --precision fp32",
        *("GiB", "What would help"),
    ),
    "no such corpus": ("train plan.json --data none.txt", "none.txt", "no such file"),
    "corpus too short": ("train plan.json --data short.txt", "short.txt", "at least"),
    "another cluster": (
        f"simulate plan.json --cluster {EXAMPLES / 'h100-8.toml'}",
        *("here:0", "a device of"),
    ),
    "no such runtime to simulate": (
        "simulate plan.json --runtime megatrn",
        *("--runtime", "megatrn", "megatron"),
    ),
    "no such runtime to plan for": (
        "plan --model gpt-tiny --cluster cluster.toml --global-batch 4 --runtime megatrn",
        *("--runtime", "megatrn", "megatron"),
    ),
    "no such runtime in a plan": ("simulate other.json", "job.runtime", "megatrn", "megatron"),
    "no such profile": ("simulate plan.json --profile p.json", "p.json", "no such"),
    "more processes than devices": (
        "profile --model gpt-tiny --sequence 16 --cluster cluster.toml --processes 3",
        *("3 processes", "at most 2"),
    ),
    "rows are no numbers": ("profile --model gpt-tiny --rows a", "--rows", "1,2,4"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_ends_with_its_message_and_no_traceback(planned, name):
    line, *words = MISTAKES[name]
    (planned / "short.txt").write_text("short")
    plan = json.loads((planned / "plan.json").read_text())
    plan["job"]["runtime"] = "megatrn"
    (planned / "other.json").write_text(json.dumps(plan))
    refused(line, words, cwd=planned)


def test_help_tells_every_verb(tmp_path):
    done = meshwright("--help", cwd=tmp_path)
    verbs = ("plan", "explain", "simulate", "profile", "train", "discover", "demo")
    assert all(verb in done.stdout for verb in verbs)


def test_this_machine_describes_itself(tmp_path):
    assert meshwright("discover", cwd=tmp_path).returncode == 0
    done = meshwright(
        *("plan", "--model", "gpt-tiny", "--cluster", "cluster.toml"),
        *("--global-batch", "4", "--sequence", "16"),
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
