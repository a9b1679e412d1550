"""The pages say what the code says."""

from __future__ import annotations

import ast
import json
import re
import runpy
import shlex
import tomllib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from typer.core import TyperGroup as Group
from typer.main import get_command

import meshwright
from meshwright.cli.options import app
from meshwright.cluster.files import cluster_from, load_cluster
from meshwright.cluster.spec import devices_of
from meshwright.cost.memory import device_memory, total_bytes
from meshwright.errors import PlanError
from meshwright.model.files import model_from_table
from meshwright.model.load import load_model
from meshwright.plan.spec import Plan
from meshwright.records import parse
from meshwright.simulate.simulator import simulate_plan

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "src" / "meshwright"
PAGES = sorted((ROOT / "docs").glob("*.md"))
ALL_PAGES = [*PAGES, *sorted(ROOT.glob("*.md"))]
NAME = r"`[\w.]+`"
NAMES_IN_A_FILE = re.compile(
    rf"({NAME}(?:(?:,|,?\s+(?:and|or|of))\s+{NAME})*)\s+in\s+`([\w/.-]+\.(?:py|toml))`"
)
"""`Stage` in `plan/spec.py`, `F` and `G` in `x/y.py`, `layers` of `Stage` in `plan/spec.py`."""
IN_THE_PACKAGE = re.compile(r"`([\w-]+/[\w/-]+\.(?:py|toml))`")
IN_THE_REPOSITORY = re.compile(
    r"\b((?:benchmarks|examples|docs|tests|src)/[\w/.-]+\.(?:py|sh|toml))"
)
MODULE = re.compile(r"`meshwright((?:\.\w+)+)")
generate = runpy.run_path(str(ROOT / "docs" / "generate.py"))
generated = generate["generated"]


@pytest.mark.parametrize("page", [ROOT / "README.md", *PAGES], ids=lambda path: path.name)
def test_generated_parts_are_up_to_date(page: Path) -> None:
    """Otherwise: python docs/generate.py"""
    text = page.read_text(encoding="utf-8")
    assert generated(text) == text


def test_figures_of_a_gpu_name_device_versions_and_commit(tmp_path: Path) -> None:
    measured = generate["measured_on_gpus"]
    assert measured(tmp_path) == "No device has been measured yet."
    case = {
        "state": "failed", "columns": ["model", "ours, ms"], "rows": [["small", 12.345]],
        "notes": ["Of one step."], "problems": ["losses differ"],
    }  # fmt: skip
    results = {
        "device": "NVIDIA H200", "driver": "580.1", "commit": "abc", "date": "2026-12-01",
        "versions": {"torch": "2.13.0", "nccl": None}, "command": "python benchmarks/gpu.py",
        "cases": {"runtime": case, "nccl": {"state": "skipped", "problems": ["needs CUDA"]}},
    }  # fmt: skip
    (tmp_path / "h200.json").write_text(json.dumps(results))
    assert measured(tmp_path).splitlines() == [
        "**NVIDIA H200**: driver 580.1, torch 2.13.0; commit abc, 2026-12-01.", "",
        "`python benchmarks/gpu.py`", "",
        "`runtime`: failed.", "",
        "| model | ours, ms |", "| --- | --- |", "| small | 12.3 |", "",
        "Of one step.", "", "losses differ", "",
        "`nccl`: skipped.", "", "needs CUDA",
    ]  # fmt: skip


@pytest.mark.parametrize("page", ALL_PAGES, ids=lambda path: path.name)
def test_links_lead_somewhere(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", text):
        if "://" not in target:
            assert (page.parent / target).exists(), target
    for target, anchor in re.findall(r"\]\(([\w./-]*\.md|)#([^)]+)\)", text):
        assert anchor in _anchors(page.parent / target if target else page), f"{target}#{anchor}"


def _anchors(page: Path) -> set[str]:
    """The anchors of a page's titles."""
    text = page.read_text(encoding="utf-8")
    return {
        re.sub(r"[^\w\- ]", "", title.lower()).strip().replace(" ", "-")
        for title in re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    }


def _file(path: str) -> Path:
    """A file as pages name it: below the package, or below the repository."""
    return next((at for at in (PACKAGE / path, ROOT / path) if at.exists()), PACKAGE / path)


def _defined(path: Path) -> set[str]:
    """The names that a file defines: functions, classes, constants, and the members of classes."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".toml":
        return set(re.findall(r"[\w-]+", text))
    found = set()
    for node in ast.walk(ast.parse(text)):
        match node:
            case ast.FunctionDef(name=name) | ast.ClassDef(name=name):
                found.add(name)
            case ast.Assign(targets=targets):
                found |= {ast.unparse(target) for target in targets}
            case ast.AnnAssign(target=target):
                found.add(ast.unparse(target))
    return found


@pytest.mark.parametrize("page", ALL_PAGES, ids=lambda path: path.name)
def test_files_and_names_that_a_page_mentions_exist(page: Path) -> None:
    """A file that moves, or a function that gets another name, leaves no page behind."""
    text = page.read_text(encoding="utf-8")
    for path in (*IN_THE_PACKAGE.findall(text), *IN_THE_REPOSITORY.findall(text)):
        assert _file(path).is_file(), path
    for names, path in NAMES_IN_A_FILE.findall(text):
        defined = _defined(_file(path)) if _file(path).is_file() else set()
        wanted = [name.rpartition(".")[2] for name in re.findall(r"`([\w.]+)`", names)]
        missing = [name for name in wanted if name not in defined]
        assert not missing, f"{path} defines no {', '.join(missing)}"
    for dotted in MODULE.findall(text):
        place = PACKAGE.joinpath(*dotted.split(".")[1:])
        public = dotted.split(".")[1] in meshwright.__all__
        assert public or place.is_dir() or place.with_suffix(".py").is_file(), dotted


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("`Stage` in `plan/spec.py`", [("`Stage`", "plan/spec.py")]),
        ("`layers` of\n`Stage` in\n`plan/spec.py`", [("`layers` of\n`Stage`", "plan/spec.py")]),
        ("`F`, `G` and `H` in `x/y.py`", [("`F`, `G` and `H`", "x/y.py")]),
        ("`F` is named in `x/y.py`", []),
    ],
)
def test_names_are_found_in_the_text_of_a_page(text: str, found: list[tuple[str, str]]) -> None:
    assert NAMES_IN_A_FILE.findall(text) == found


def _commands(text: str) -> Iterator[list[str]]:
    """The words of every command of ours in the examples of a page, up to a further command."""
    for block in re.findall(r"```(?:sh|bash|text)?\n(.*?)```", text, re.DOTALL):
        for line in block.replace("\\\n", " ").splitlines():
            for part in re.split(r"\s--\s", line.partition(" #")[0]):
                if part.startswith("meshwright "):
                    yield shlex.split(part)[1:]


@pytest.mark.parametrize("page", ALL_PAGES, ids=lambda path: path.name)
def test_commands_have_the_verbs_and_options_that_a_page_shows(page: Path) -> None:
    for words in _commands(page.read_text(encoding="utf-8")):
        command = get_command(app)
        while isinstance(command, Group) and words:
            assert words[0] in command.commands, words
            command, *words = command.commands[words[0]], *words[1:]
        known = {option for each in command.params for option in each.opts}
        for word in words:
            option = word.partition("=")[0].strip("[]")
            assert not option.startswith("-") or option in known, f"{command.name} {option}"


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 110


def test_every_room_has_a_line_in_the_readme() -> None:
    rooms = {path.parent.name for path in PACKAGE.glob("*/__init__.py")}
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert set(re.findall(r"^(\w+)/ ", text, re.MULTILINE)) == rooms


def _example(page: str, language: str) -> str:
    """The first example of a language on a page."""
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    found = re.search(rf"```{language}\n(.*?)```", text, re.DOTALL)
    assert found
    return found[1]


def test_the_examples_are_read_as_they_stand() -> None:
    cluster = cluster_from(tomllib.loads(_example("cluster.md", "toml")), source="cluster.md")
    assert len(devices_of(cluster)) == 16
    table = tomllib.loads(_example("model.md", "toml"))
    model = model_from_table(table, "model.md", sequence=1, precision="fp32")
    assert [layer.name for layer in model.layers] == ["enc0", "enc1", "enc2", "dec"]
    data = json.loads(_example("plan.md", "json"))
    plan = parse(data, Plan, source="plan.md", error=PlanError)
    gpt2 = load_model(plan.model.source, plan.job.sequence, plan.job.precision)
    assert plan.pipelines[0].stages[-1].layers[1] == len(gpt2.layers)


def test_every_page_is_in_the_menu() -> None:
    menu = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    assert set(re.findall(r"(\S+\.md)$", menu, re.MULTILINE)) == {page.name for page in PAGES}


def test_the_figures_of_divided_states_are_those_that_compare_prints() -> None:
    plan = parse(
        json.loads(_example("state-division.md", "json")),
        Plan,
        source="state-division.md",
        error=PlanError,
    )
    cluster = load_cluster(ROOT / plan.cluster.source)
    model = load_model(plan.model.source, plan.job.sequence, plan.job.precision)
    (pipeline,) = plan.pipelines
    plain = replace(
        plan, pipelines=(replace(pipeline, stages=(replace(pipeline.stages[0], states=None),)),)
    )
    text = _example("state-division.md", "text")
    for title, figure in (
        ("step", lambda plan: simulate_plan(plan, model, cluster).step_seconds),
        ("holds", lambda plan: total_bytes(device_memory(plan, model, cluster)[0])),
    ):
        found = re.search(rf"^ *{title} +([\d.]+) (\w+) +([\d.]+) ", text, re.MULTILINE)
        assert found
        unit = {"ms": 1e-3, "GiB": 2**30}[found[2]]
        assert float(found[1]) == pytest.approx(figure(plain) / unit, rel=5e-4)
        assert float(found[3]) == pytest.approx(figure(plan) / unit, rel=5e-4)
