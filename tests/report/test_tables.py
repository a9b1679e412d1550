"""Tables for the terminal say what the plan and the step say."""

from __future__ import annotations

from dataclasses import replace
from io import StringIO

import steps_on_paper as paper
from rich.console import Console

from meshwright.plan.spec import DeviceMemory, Pipeline, RunnerUp, Stage
from meshwright.report.sentences import error_sentence, memory_sentence, parts_sentence, verdict
from meshwright.report.tables import (
    comparison_table,
    device_memory_table,
    devices_text,
    explain,
    parts_table,
    plan_table,
    timeline_summary,
)


def _console() -> Console:
    return Console(width=160, record=True, file=StringIO(), color_system=None)


def _text(thing: object) -> str:
    console = _console()
    console.print(thing)
    return console.export_text()


def test_explain_tells_everything_the_plan_knows() -> None:
    console = _console()
    explain(paper.plan(), console)
    text = console.export_text()
    for expected in (
        "dp1 tp1 pp2 [3|1] 2x1 1f1b",
        "tiny on pair: 2 rows of 128 a step, fp32, adamw",
        "10 ms a step, 25,600 tokens/s",
        "60%",  # 6 of 10 ms are computing
        "14 GiB  16 GiB",
        "even",
        "+50.0%",
        "does not fit: a:0 needs 40 GiB of 16 GiB",
        "9  data width does not divide the batch",
    ):
        assert expected in text


def test_explain_of_a_plan_without_prediction_says_who_holds_what() -> None:
    console = _console()
    explain(replace(paper.plan(), prediction=None), console)
    text = console.export_text()
    assert "0:3" in text
    assert "runner-up" not in text


def test_names_with_brackets_are_printed_as_they_are() -> None:
    runner = RunnerUp(name="[red]", step_seconds=None, reason="no [/] here")
    plan = replace(
        paper.plan(),
        model=replace(paper.plan().model, name="[bold]tiny"),
        prediction=replace(paper.prediction(), runners_up=(runner,)),
    )
    console = _console()
    explain(plan, console)
    text = console.export_text()
    assert "[bold]tiny on pair" in text
    assert "[red]" in text
    assert "no [/] here" in text


def test_plan_table_shows_widths_uneven_rows_and_pipelines() -> None:
    wide = Stage(layers=(0, 4), devices=(("b:0", "b:1"), ("b:2", "b:3")), rows=(3, 1))
    second = Pipeline(micro_batches=3, rows=4, stages=(wide,))
    devices = ("a:0", "b:0", "b:1", "b:2", "b:3")
    first = replace(paper.plan().pipelines[0], stages=(Stage(layers=(0, 4), devices=(("a:0",),)),))
    plan = replace(paper.plan(), devices=devices, pipelines=(first, second))
    text = _text(plan_table(plan))
    assert "pipeline 1: 12 rows a step" in text
    assert text.count("rows a step") == 2
    assert "pipeline" not in _text(plan_table(paper.plan()))
    assert "2 x 2" in text
    assert "4 = 3 + 1" in text
    assert "b:0-3" in text


def test_devices_that_count_up_share_a_word() -> None:
    assert devices_text(("a:0", "a:1", "a:2", "b:0", "b:2")) == "a:0-2 b:0 b:2"


def test_equal_devices_share_a_line_of_memory() -> None:
    memory = paper.prediction().memory[0]
    alike = tuple(replace(memory, device=f"a:{index}") for index in range(3))
    text = _text(device_memory_table(alike))
    assert "a:0-2" in text
    assert text.count("14 GiB") == 1


def test_memory_bars_are_as_long_as_they_are_full() -> None:
    full = DeviceMemory(
        device="a:0", parameters=1, gradients=1, optimizer=1, activations=1, buffers=0, capacity=8
    )
    line = _text(device_memory_table((full,))).splitlines()[1]
    assert line.count("█") == line.count("·") == 14


def test_a_narrow_terminal_gets_whole_lines() -> None:
    console = Console(width=80, record=True, file=StringIO(), color_system=None)
    console.print(device_memory_table(paper.prediction().memory, wide=False))
    _, *lines, caption = console.export_text().splitlines()
    assert caption.split() == ["parameters", "gradients", "optimizer", "activations", "buffers"]
    assert [line.split()[0] for line in lines] == ["a:0", "b:0"]


def test_what_limits_the_step_is_named() -> None:
    text = parts_sentence({"compute": 0.4, "bubble": 0.1, "reductions": 0.5})
    assert "40% of the step is what the busiest device computes" in text
    assert "(reductions): 500 ms, 50%" in text
    assert "Faster links" in text
    assert parts_sentence({"compute": 1.0, "bubble": 0.0}).endswith("; nothing else takes time.")


def test_the_fullest_device_is_named_and_whether_it_limits() -> None:
    tight, loose = paper.prediction().memory[1], paper.prediction().memory[0]
    assert "b:0 is the fullest device: 9 GiB of 9 GiB (100%)" in memory_sentence((loose, tight))
    assert "memory limits" in memory_sentence((tight,))
    assert "leaves room" in memory_sentence((loose,))


def test_errors_are_measured_against_what_was_measured() -> None:
    assert error_sentence(0.9, 1.0) == "the prediction of 900 ms is 10.0% below that"
    assert error_sentence(1.1, 1.0) == "the prediction of 1.1 s is 10.0% above that"
    assert error_sentence(1.0, 1.0) == "as predicted"


def test_the_verdict_counts_tokens_of_the_measured_step() -> None:
    assert "7.3 ms, or 35,068 tokens/s" in verdict(paper.plan(), 0.0073, None)
    assert "8.03 ms, or 31,880 tokens/s" in verdict(paper.plan(), 0.0073, 0.00803)


def test_a_step_is_summed_up_by_device() -> None:
    console = _console()
    timeline_summary(paper.plan(), paper.timeline(), console)
    text = console.export_text()
    assert (
        "6.5 ms    89%        3 GiB" in text
    )  # 2 forwards, 2 backwards and the optimizer of rank 0
    assert "3.2 ms    44%" in text


def test_predicted_stands_beside_measured() -> None:
    text = _text(comparison_table(paper.timeline(), paper.measured()))
    step = next(line for line in text.splitlines() if line.startswith("step"))
    assert step.split() == ["step", "7.3", "ms", "8.03", "ms", "-9.1%"]


def test_parts_that_a_step_has_are_listed_with_their_share_and_others_are_not() -> None:
    steps = {"predicted": {"compute": 0.03, "bubble": 0.0}, "measured": {"compute": 0.06}}
    steps["measured"] |= {"bubble": 0.02}
    lines = [line.split() for line in _text(parts_table(steps)).splitlines()[1:]]
    assert [line[:7] for line in lines if line] == [
        ["compute", "30", "ms", "100%", "60", "ms", "75%"],
        ["bubble", "0", "s", "0%", "20", "ms", "25%"],
    ]
