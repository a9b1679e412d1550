"""The same mistake on many devices is told once: with their number, and which they are."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshwright.cluster.files import load_cluster
from meshwright.cost.out_of_memory import memory_problems
from meshwright.errors import PROBLEMS_KEPT, FitError, MeshwrightError, PlanError, Problem
from meshwright.model.load import load_model
from meshwright.plan.spec import Pipeline, Plan, PlanInput, Stage
from meshwright.plan.validate import validate_plan
from meshwright.text import name_ranges
from worlds import plan_by_hand

NODES, EACH = 8, 8
DEVICES = tuple(f"n-{node}:{index}" for node in range(NODES) for index in range(EACH))
CLUSTER = """
format = 1
name = "many"
[[node]]
name = "n"
count = 8
devices = ["8 x T4"]
inside = { bandwidth = "10 GB/s", latency = "8 us" }
network = { bandwidth = "100 Gbit/s", latency = "20 us" }
"""


def on(device: str, found: str = "3 GiB", field: str = "pipelines[0]") -> Problem:
    text = f"{found} on {device}, 1 GiB too much"
    return Problem("plan p", field, text, "2 GiB", f"spare {device}", each=("device", device))


def told(problems: Iterator[Problem] | list[Problem]) -> list[str]:
    with pytest.raises(MeshwrightError) as caught:
        PlanError.check(problems)
    return str(caught.value).splitlines()


def test_problems_that_differ_in_the_device_alone_are_one_with_their_number():
    assert told([on(device) for device in DEVICES]) == [
        "plan p: pipelines[0]: found 3 GiB on 64 devices (n-0:0 to n-7:7), 1 GiB too much;"
        " wanted 2 GiB",
        "    spare 64 devices (n-0:0 to n-7:7)",
    ]


def test_one_device_is_told_by_its_name_alone():
    assert "found 3 GiB on n-0:1, 1 GiB too much" in told([on("n-0:1")])[0]


def test_other_numbers_and_other_fields_stay_lines_of_their_own_in_the_order_of_the_first():
    problems = [on("a:0"), on("b:0", "4 GiB"), on("a:1"), on("b:1", "4 GiB"), on("c:0", field="x")]
    lines = [line for line in told(problems) if line.startswith("plan")]
    assert [line.partition(" on ")[0].partition("found ")[2] for line in lines] == [
        "3 GiB", "4 GiB", "3 GiB"
    ]  # fmt: skip
    assert "2 devices (a:0 to a:1)" in lines[0]
    assert "2 devices (b:0 to b:1)" in lines[1]
    assert "x: found 3 GiB on c:0" in lines[2]


def test_pipelines_that_differ_in_their_index_alone_are_one():
    fields = [f"pipelines[{p}].stages[{s}]" for p in range(64) for s in range(2)]
    assert "pipelines[0-63].stages[0-1]: " in told([on("a:0", field=f) for f in fields])[0]
    fields.remove("pipelines[3].stages[1]")
    line = told([on("a:0", field=f) for f in fields])[0]
    assert "pipelines[0-63].stages[0], pipelines[0-2, 4-63].stages[1]: " in line


def test_what_stands_alone_stays_alone():
    problem = replace(on("a:0"), each=("", ""))
    assert len(told([problem, problem])) == 4


def test_as_many_devices_as_there_are_take_one_line_and_no_room_from_others():
    many = [on(f"n-{node}:{index}") for node in range(PROBLEMS_KEPT) for index in range(8)]
    lines = told([*many, on("x:0", "5 GiB")])
    assert "8,000 devices (n-0:0 to n-999:7)" in lines[0]
    assert "5 GiB on x:0" in lines[2]


def test_a_name_is_not_found_inside_a_longer_one():
    problems = [
        Problem("p", "f", f"{name} beside a:10", "w", each=("device", name))
        for name in ("a:1", "b:1")
    ]
    assert told(problems) == ["p: f: found 2 devices (a:1, b:1) beside a:10; wanted w"]


@given(st.sets(st.tuples(st.integers(0, 12), st.integers(0, 12)), min_size=1))
def test_a_span_counts_up_and_leaves_no_name_out(places):
    names = {f"n-{node}:{index}" for node, index in places}
    found: list[str] = []
    for part in name_ranges(names).split(", "):
        first, _, last = part.partition(" to ")
        (node, index), (other, end) = (
            map(int, name.removeprefix("n-").split(":")) for name in (first, last or first)
        )
        found += [f"n-{n}:{i}" for n in range(node, other + 1) for i in range(index, end + 1)]
    assert sorted(found) == sorted(names)


def test_a_span_of_names_that_are_no_numbers_lists_them():
    assert name_ranges(["b", "a", "n-9", "n-10"]) == "a, b, n-9 to n-10"
    assert name_ranges(["x" + "9" * 5000]).startswith("x999")


def replicas(tmp_path: Path) -> tuple[Plan, Path]:
    path = tmp_path / "c.toml"
    path.write_text(CLUSTER)
    stage = Stage(layers=(0, 14), devices=tuple((device,) for device in DEVICES))
    pipeline = Pipeline(micro_batches=1, rows=64 * 64, stages=(stage,))
    plan = plan_by_hand(
        pipeline,
        sequence=1024,
        precision="fp16",
        model=PlanInput(name="gpt2", fingerprint="", source="gpt2"),
    )
    return plan, path


def test_64_replicas_that_are_too_large_are_one_problem(tmp_path):
    plan, path = replicas(tmp_path)
    model, cluster = load_model("gpt2", 1024, "fp16"), load_cluster(path)
    problems = memory_problems(plan, model, cluster)
    assert len(problems) == 64
    with pytest.raises(FitError) as caught:
        FitError.check(problems)
    (problem,) = caught.value.problems
    assert " on 64 devices (n-0:0 to n-7:7), " in problem.found
    single = tuple(
        Pipeline(
            micro_batches=1,
            rows=64,
            stages=(Stage(layers=(0, 14), devices=((device,),)),),
        )
        for device in DEVICES
    )
    with pytest.raises(FitError) as caught:
        FitError.check(memory_problems(replace(plan, pipelines=single), model, cluster))
    (problem,) = caught.value.problems
    assert problem.field == "pipelines[0-63].stages[0]"
    assert " on 64 devices (n-0:0 to n-7:7), " in problem.found


def test_64_devices_that_a_cluster_has_not_are_one_problem(tmp_path):
    plan, path = replicas(tmp_path)
    path.write_text(CLUSTER.replace('name = "n"', 'name = "m"'))
    with pytest.raises(PlanError) as caught:
        validate_plan(plan, load_model("gpt2", 1024, "fp16"), load_cluster(path))
    (problem,) = caught.value.problems
    assert problem.found == "64 devices (n-0:0 to n-7:7)"


def test_a_precision_that_64_devices_have_not_is_one_problem(tmp_path):
    plan, path = replicas(tmp_path)
    other = replace(plan, job=replace(plan.job, precision="bf16"))
    with pytest.raises(PlanError) as caught:
        validate_plan(other, load_model("gpt2", 1024, "bf16"), load_cluster(path))
    (problem,) = caught.value.problems
    assert problem.found == "bf16 on 64 devices (n-0:0 to n-7:7) (T4)"
