"""`export` as a user meets it: files, refusals, and the nearest plan."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from commands import meshwright, refused
from meshwright.export.tools import RUNTIME_OF

pytestmark = pytest.mark.heavy

CLUSTER = """\
format = 1
name = "pair"
[links]
network = { bandwidth = "1 Gbit/s", latency = "50 us" }
[[node]]
name = "n"
count = 2
devices = ["1 x V100-16"]
"""


@pytest.fixture(scope="module")
def planned(tmp_path_factory) -> Path:
    """A plan whose layers are cut 9 to 5, which not every tool can be told."""
    folder = tmp_path_factory.mktemp("exported")
    (folder / "pair.toml").write_text(CLUSTER)
    done = meshwright(
        *("plan", "--model", "gpt2", "--cluster", "pair.toml", "--sequence", "256"),
        *("--global-batch", "8", "--precision", "fp16"),
        cwd=folder,
    )
    assert done.returncode == 0, done.stderr
    plan = json.loads((folder / "plan.json").read_text())
    stages = [
        {"layers": [0, 9], "devices": [["n-0:0"]]},
        {"layers": [9, 14], "devices": [["n-1:0"]]},
    ]
    plan["pipelines"] = [{"micro_batches": 8, "rows": 1, "stages": stages}]
    plan |= {"prediction": None, "schedule": "1f1b", "devices": ["n-0:0", "n-1:0"]}
    (folder / "uneven.json").write_text(json.dumps(plan))
    return folder


@pytest.mark.parametrize(
    ("tool", "files"),
    [
        ("megatron", ["NOT_EXPRESSED.md", "arguments.txt", "launch.sh"]),
        ("pipelining-csv", ["NOT_EXPRESSED.md", "schedule.csv"]),
    ],
)
def test_files_for_a_tool(planned, tool, files):
    done = meshwright("export", "uneven.json", "--to", tool, "-o", tool, cwd=planned)
    assert done.returncode == 0, done.stderr
    assert sorted(path.name for path in (planned / tool).iterdir()) == files
    assert all(f"wrote {tool}/{name}" in done.stdout for name in files)
    there = meshwright("simulate", "uneven.json", "--runtime", RUNTIME_OF[tool], cwd=planned)
    (told,) = re.findall(r"predicted there: (\S+ \w+) a step", done.stdout)
    assert there.returncode == 0, there.stderr
    assert told in there.stdout
    listed = (planned / tool / "NOT_EXPRESSED.md").read_text()
    sentences = [line[2:] for line in listed.splitlines() if line.startswith("- ")]
    assert sentences
    assert all(f"not expressed: {sentence}" in done.stdout for sentence in sentences)


def test_what_cannot_be_expressed_is_refused_and_the_nearest_named_and_written(planned):
    done = meshwright("export", "uneven.json", "--to", "deepspeed", "-o", "ds", cwd=planned)
    assert done.returncode == 2
    assert "layers 9|5; wanted 7|7 (uniform)" in done.stderr
    assert "the nearest that it takes" in done.stderr
    assert not (planned / "ds").exists()
    done = meshwright(
        *("export", "uneven.json", "--to", "deepspeed", "-o", "ds", "--nearest"), cwd=planned
    )
    assert done.returncode == 0, done.stderr
    told = meshwright("simulate", "ds/plan.json", "--cluster", "pair.toml", cwd=planned)
    assert told.returncode == 0, told.stderr


MISTAKES = {
    "tool": ("export uneven.json --to megatrn", "--to", "Did you mean 'megatron'"),
    "no tool": ("export uneven.json", "--to"),
    "file": ("export nothing.json --to megatron", "no such file"),
    "model": ("export uneven.json --to torchtitan", "no GPT-2", "no other plan"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_ends_with_its_message_and_no_traceback(planned, name):
    line, *words = MISTAKES[name]
    refused(line, words, cwd=planned)
