"""What numbers and texts of files and options may be stands beside their fields, without a gap."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from enum import Enum
from operator import attrgetter
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

import pytest
from pydantic import AfterValidator
from typer.main import get_command

from meshwright.cli import app
from meshwright.cli.running import SETTINGS
from meshwright.cluster import entries
from meshwright.cluster.files import load_cluster
from meshwright.cost.links import LinkReport
from meshwright.cost.profile import Profile, load_profile
from meshwright.emulation.virtual_times import VirtualTimes
from meshwright.errors import MeshwrightError, OptionError, PlanError, Problem, ProfileError
from meshwright.export.answers import ASSUMED
from meshwright.export.deepspeed import LEARNING_RATE
from meshwright.model.files import ModelFile
from meshwright.model.transformer.families import FAMILIES
from meshwright.plan.files import load_plan
from meshwright.plan.spec import Job, Plan
from meshwright.profiling.measure_profile import ProfileSettings
from meshwright.program.operations import Op
from meshwright.program.timeline import Timeline
from meshwright.records import Rows, checked, checked_value, dumps, parse, plain, record
from meshwright.runtime.run_folder import Metrics, RunSettings, TrainingOptions, load_settings
from meshwright.testbed.spec import TestbedFile, load_testbed
from meshwright.workflows.calibrate import run_seconds

READ = (
    Plan,
    Profile,
    LinkReport,
    ModelFile,
    *dict.fromkeys(family.config for family in FAMILIES.values()),
    TestbedFile,
    RunSettings,
    Metrics,
    Timeline,
    ProfileSettings,
    VirtualTimes,
    entries.NodeEntry,
    entries.SiteEntry,
    entries.LinksEntry,
    entries.DeviceEntry,
    entries.PairEntry,
    entries.MatrixEntry,
)
"""Records that are read from files of users, or made of options."""
UNIT_BY_UNIT = (entries.SizeText, entries.RateText, entries.FlopsText, entries.TimeText)
"""Quantities whose range `cluster.figures` tells in their own units."""


def leaves(kind: Any, place: str, marks: tuple[Any, ...] = ()) -> Iterator[tuple[str, Any, Any]]:
    """Every type inside a type that holds a number or a text, with its marks."""
    if kind in UNIT_BY_UNIT:
        return
    origin, inside = get_origin(kind), get_args(kind)
    if origin is Annotated:
        yield from leaves(inside[0], place, (*marks, *inside[1:]))
    elif origin in (Union, UnionType):
        for each in inside:
            yield from leaves(each, place, marks)
    elif origin in (tuple, dict):
        for index, each in enumerate(inside):
            yield from leaves(each, f"{place}[{index}]")
    elif is_dataclass(kind):
        hints = get_type_hints(kind, include_extras=True)
        for each in fields(kind):
            yield from leaves(hints[each.name], f"{place}.{each.name}")
    elif kind not in (bool, NoneType, Ellipsis, Any) and origin is not Literal:
        yield place, kind, marks


def bounds(marks: tuple[Any, ...]) -> set[str]:
    each = [limit for mark in marks for limit in getattr(mark, "metadata", ())]
    names = {"ge": "low", "gt": "low", "le": "high", "lt": "high", "max_length": "high"}
    return {side for limit in each for name, side in names.items() if hasattr(limit, name)}


ANYTHING = {"Metrics.gradient_norm"}
"""Of a step that overflowed it is infinite, or no number."""


@pytest.mark.parametrize("kind", READ, ids=lambda kind: kind.__name__)
def test_every_number_has_two_ends_and_every_text_one(kind: type) -> None:
    gaps = []
    for place, of, marks in leaves(kind, kind.__name__):
        if of in (int, float):
            complete = bounds(marks) == {"low", "high"} or place in ANYTHING
        elif of is str:  # a text may also be one of a few words
            chosen = any(isinstance(m, AfterValidator) for m in marks)
            complete = "high" in bounds(marks) or chosen
        else:
            complete = issubclass(of, Enum | Op)
        if not complete:
            gaps.append(place)
    assert gaps == [], "give each a range beside its field: records.py has types for it"


def test_the_test_above_sees_a_gap() -> None:
    @record
    class Gapped:
        count: int
        name: str
        share: Annotated[float, "no range"]

    found = [place for place, of, marks in leaves(Gapped, "g") if not bounds(marks)]
    assert found == ["g.count", "g.name", "g.share"]


PLAN = {
    "format": 1,
    "name": "p",
    "model": {"name": "gpt-tiny", "fingerprint": "", "source": "gpt-tiny"},
    "cluster": {"name": "c", "fingerprint": "", "source": "c.toml"},
    "job": {"global_batch": 4, "sequence": 16, "precision": "fp32"},
    "devices": ["a:0"],
    "pipelines": [
        {"micro_batches": 4, "rows": 1, "stages": [{"layers": [0, 10], "devices": [["a:0"]]}]}
    ],
}
METRICS = {
    "step": 0,
    "loss": 5.0,
    "gradient_norm": 2.0,
    "learning_rate": 1e-4,
    "step_seconds": 0.5,
    "tokens_per_second": 100.0,
    "memory_bytes": 1000,
}


def replaced(data: Any, place: tuple[int | str, ...], value: object) -> Any:
    """A copy of plain data with another value somewhere."""
    if not place:
        return value
    copy = data.copy()
    copy[place[0]] = replaced(data[place[0]] if len(place) > 1 else None, place[1:], value)
    return copy


@pytest.mark.parametrize("value", [True, 1.0, "1", 0, -1, None, [1], 10**400])
def test_a_format_is_the_number_one_in_every_kind_of_file(tmp_path: Path, value: object) -> None:
    told = json.dumps(value)
    readers = {
        "plan.json": (json.dumps({**PLAN, "format": value}), load_plan),
        "profile.json": (f'{{"format": {told}, "model": "m", "sequence": 1}}', load_profile),
        "calibrated.json": (
            f'{{"model": "m", "sequence": 1, "calibration": {{"format": {told}}}}}',
            load_profile,
        ),
    }
    if value is not None:
        head = f'format = {told}\nname = "n"\n'
        readers["cluster.toml"] = (f'{head}[[node]]\nname = "a"\ndevices = ["T4"]', load_cluster)
        readers["testbed.toml"] = (f'{head}mode = "virtual"\ncluster = "none.toml"', load_testbed)
    for name, (text, read) in readers.items():
        path = tmp_path / name
        path.write_text(text)
        with pytest.raises(MeshwrightError) as caught:
            read(path)
        assert "format" in [p.field.rpartition(".")[2] for p in caught.value.problems], name


def test_a_newer_format_is_said_to_be_one(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    path.write_text(json.dumps({**PLAN, "format": 2}))
    with pytest.raises(PlanError, match="newer version of meshwright"):
        load_plan(path)


@pytest.mark.parametrize(
    ("place", "value", "words"),
    [
        (("job", "global_batch"), 2**21, "at most 1,048,576"),
        (("job", "global_batch"), 4.0, "a whole number"),
        (("job", "sequence"), 10**30, "at most 134,217,728"),
        (("pipelines", 0, "micro_batches"), True, "a whole number"),
        (("pipelines", 0, "rows"), -1, "at least 1"),
        (("pipelines", 0, "stages", 0, "layers"), [0, -1], "at least 0"),
        (("name",), "x" * 201, "at most 200 letters"),
        (("name",), "a\nb", "one line of printable text"),
        (("devices",), ["a:0", "b\n:0"], "one line of printable text"),
        (("prediction",), {"step_seconds": 0, "parts": {}, "memory": []}, "more than 0"),
        (("prediction",), {"step_seconds": 1, "parts": {"x": 1}, "memory": []}, "one of compute"),
    ],
)
def test_numbers_and_texts_of_a_plan(tmp_path: Path, place, value, words) -> None:
    path = tmp_path / "plan.json"
    path.write_text(json.dumps(replaced(PLAN, place, value)))
    with pytest.raises(PlanError) as caught:
        load_plan(path)
    told = [p for p in caught.value.problems if p.field.startswith(str(place[0]))]
    assert any(words in str(problem) for problem in told), str(caught.value)


@pytest.mark.parametrize(
    ("field", "values"),
    [
        ("step_seconds", [0, -1, math.nan, math.inf, "1", True, None, 10**400]),
        ("tokens_per_second", [-1, math.nan]),
        ("loss", [math.nan, math.inf]),
        ("step", [-1, 0.5, True]),
        ("memory_bytes", [-1, 1e29, 2**80]),
        ("mfu", [math.nan, -0.5]),
    ],
)
def test_steps_that_cannot_have_been_are_not_calibrated_to(tmp_path: Path, field, values) -> None:
    path = tmp_path / "metrics.jsonl"
    good = [json.dumps({**METRICS, "step": step}) for step in range(6)]
    for value in values:
        path.write_text("\n".join([*good[:4], json.dumps({**METRICS, field: value}), *good[5:]]))
        with pytest.raises(ProfileError, match=r"metrics\.jsonl:5: ") as caught:
            run_seconds(tmp_path)
        assert caught.value.problems[0].field in ("", field)
    path.write_text("\n".join(good))
    assert run_seconds(tmp_path) == 0.5


def test_a_step_of_fp16_that_overflowed_is_an_ordinary_one(tmp_path: Path) -> None:
    lines = [{**METRICS, "gradient_norm": norm} for norm in (math.inf, math.nan, 1.0, 1.0)]
    (tmp_path / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
    assert run_seconds(tmp_path) == 0.5


@pytest.mark.parametrize(
    "line", ["", '{"step": 5, "los', "[" * 5000, '{"step": ' + "9" * 6000 + "}", "null", "\x00"]
)
def test_broken_lines_of_metrics_are_named_by_number(tmp_path: Path, line: str) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text("\n".join([json.dumps(METRICS)] * 4 + [line, ""]))
    with pytest.raises(ProfileError, match=r"metrics\.jsonl(:5)?: ") as caught:
        run_seconds(tmp_path)
    assert "line" in str(caught.value)


def test_options_are_told_by_their_own_names() -> None:
    names = {**SETTINGS, "shares": "--shares"}
    good = checked(RunSettings, names, model="m", options={"steps": 3, "clip_norm": 0})
    wanted = TrainingOptions(steps=3, clip_norm=0)
    assert good == RunSettings(model="m", options=wanted)
    told = {"steps": 0, "clip_norm": -1.0}
    with pytest.raises(OptionError) as caught:
        checked(RunSettings, names, model="m", options=told, shares={"a:0": 2.0})
    assert caught.value.problems == (
        Problem("--shares", ".a:0", "2.0", "at most 1"),
        Problem("--steps", "", "0", "at least 1"),
        Problem("--clip-norm", "", "-1.0", "at least 0"),
    )
    with pytest.raises(OptionError, match="--rows: found 0; wanted at least 1"):
        checked_value(Rows, 0, "--rows")


def test_each_option_of_train_sets_one_field_and_has_its_default() -> None:
    """A new field of TrainingOptions is an option of the command line too."""
    shown = {one.opts[0]: one.default for one in get_command(app).commands["train"].params}
    settings = RunSettings(model="m")
    for path, option in SETTINGS.items():
        assert shown[option] == attrgetter(path)(settings), option
    assert ASSUMED["training.clip_norm"] == settings.options.clip_norm
    assert settings.learning_rate == LEARNING_RATE
    of_training = {path.removeprefix("options.") for path in SETTINGS if "." in path}
    assert of_training == {each.name for each in fields(TrainingOptions)}


@pytest.mark.parametrize(
    ("field", "values"),
    [
        ("options.steps", [0, -3, 1.5, 10**10]),
        ("learning_rate", [math.nan, math.inf, -1.0, 0.0, 1e9]),
        ("warmup_steps", [-1]),
        ("weight_decay", [-0.1, math.nan]),
        ("options.clip_norm", [-1.0, math.nan, math.inf]),
        ("options.seed", [-1, 2**63, 10**40]),
        ("options.timeout_seconds", [-1.0, 0.0, math.nan, 1e300]),
        ("shares", [{"a": 0.0}, {"a": math.nan}, {"a": 1.1}]),
    ],
)
def test_what_a_run_cannot_be_told(field: str, values: list[object], tmp_path: Path) -> None:
    """Nor can a run folder tell it, be it as it is written now or as it once was."""
    table, _, name = field.rpartition(".")
    for value in values:
        told = {table: {name: value}} if table else {name: value}
        with pytest.raises(OptionError):
            checked(RunSettings, {}, model="m", **told)
        for written in (told, {name: value}):
            (tmp_path / "run.json").write_text(json.dumps({"model": "m", **written}))
            with pytest.raises(MeshwrightError, match=name):
                load_settings(tmp_path, error=MeshwrightError)


def test_an_older_run_folder_has_its_options_among_its_settings(tmp_path: Path) -> None:
    options = {"steps": 7, "clip_norm": 0.0, "seed": 3, "timeout_seconds": 60.0}
    path = tmp_path / "run.json"
    path.write_text(json.dumps({"model": "m", "learning_rate": 0.5, **options}))
    wanted = RunSettings(model="m", learning_rate=0.5, options=TrainingOptions(**options))
    assert load_settings(tmp_path, error=MeshwrightError) == wanted
    path.write_text(dumps(wanted))
    assert load_settings(tmp_path, error=MeshwrightError) == wanted
    path.write_text(json.dumps({"model": "m", "steps": 7, "options": {"seed": 3}}))
    with pytest.raises(MeshwrightError, match="steps: found an unknown field"):
        load_settings(tmp_path, error=MeshwrightError)


def test_what_is_written_at_the_ends_of_the_ranges_is_read_back() -> None:
    job = Job(global_batch=2**20, sequence=2**27, precision="bf16")
    assert parse(plain(job), Job, source="j", error=PlanError) == job
    options = TrainingOptions(seed=2**63 - 1, steps=10**9)
    run = RunSettings(model="m", learning_rate=1e3, options=options)
    assert parse(plain(run), RunSettings, source="r", error=PlanError) == run
