"""Runs files: what they say is read, and what cannot be is refused with line and column."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from recorded_cases import PLAIN, read_cells, write_cells

from meshwright.cluster.catalog import catalog
from meshwright.errors import ProfileError
from meshwright.recorded.files import COLUMNS, read_runs, runs_text
from meshwright.recorded.price import machines_of, prepare
from meshwright.recorded.spec import (
    forward_flops,
    micro_batches_of,
    seconds_at,
    shape_of,
    step_flops,
    step_seconds_of,
)
from meshwright.recorded.validate import device_problems
from meshwright.workflows.calibrate_recorded import prepared_runs

SHAPED = {"model": "own", "family": "llama", "layers": "4", "width": "512", "heads": "8"}
SHAPED |= {"kv_heads": "4", "hidden": "1408", "vocabulary": "32000"}


def test_a_run_is_read_with_its_units_and_defaults(tmp_path: Path) -> None:
    run = read_cells(tmp_path, network="400 Gbit/s", compiled="yes")
    assert (run.step, run.memory, run.network) == (0.9, 20 * 2**30, 50e9)
    assert (run.chunks, run.sharding, run.cut, run.tied) == (1, "none", "blocks", None)
    assert run.compiled
    assert micro_batches_of(run) == 8
    assert shape_of(run).layers == 12


def test_a_shape_is_read_from_its_columns(tmp_path: Path) -> None:
    shape = shape_of(read_cells(tmp_path, **SHAPED))
    assert (shape.layers, shape.width, shape.heads, shape.kv_heads) == (4, 512, 8, 4)
    assert (shape.head, shape.hidden, shape.vocabulary, shape.tied) == (64, 1408, 32000, False)


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    runs = [
        read_cells(tmp_path, network="100.5 Gbit/s", tied="no", **SHAPED),
        read_cells(tmp_path, run="b", step="", throughput="1.5 rows/s"),
    ]
    path = tmp_path / "again.csv"
    path.write_text(runs_text(runs), encoding="utf-8")
    assert read_runs(path) == tuple(runs)


@pytest.mark.parametrize(
    ("column", "cell", "said"),
    [
        ("devices", "16", "2 x 2 x 2 = 8"),
        ("devices", "eight", "a whole number"),
        ("devices", "-8", "a whole number"),
        ("devices_per_node", "3", "a multiple of devices_per_node = 3"),
        ("devices_per_node", "4", "the bandwidth of a node"),
        ("global_batch", "33", "a multiple of data x rows = 2 x 2"),
        ("rows", "0", "at least 1"),
        ("step", "900", "no such unit"),
        ("step", "0 s", "more than 0"),
        ("step", "fast", "a quantity like"),
        ("step", "", "a step, a throughput or a memory"),
        ("memory", "20", "no such unit"),
        ("throughput", "100", "one of tokens/s"),
        ("throughput", "0 rows/s", "more than 0"),
        ("throughput", "100 TFLOP/s/device", "model or hardware"),
        ("throughput", "3 rows/s", "as the column step says"),
        ("precision", "fp8", "fp16"),
        ("sharding", "zero9", "optimizer"),
        ("sharding", "full", "none or optimizer"),
        ("chunks", "2", "the bandwidth"),
        ("schedule", "interleaved-1f1b", "more than 1"),
        ("model", "unknown", "family, layers, width, heads, vocabulary"),
        ("tensor", "5", "a divisor of the 12 attention heads"),
        ("tied", "maybe", "yes or no"),
        ("run", "", "which is required"),
    ],
)
def test_a_mistake_is_named_with_line_and_column(tmp_path: Path, column, cell, said) -> None:
    cells = {column: cell}
    if column == "step" and not cell:
        cells["memory"] = ""
    if column == "chunks":  # a further mistake: several nodes need a network
        cells["devices_per_node"] = "4"
    path = write_cells(tmp_path / "runs.csv", [PLAIN, PLAIN | {"run": "b"} | cells])
    with pytest.raises(ProfileError) as failure:
        read_runs(path)
    assert said in str(failure.value)
    named = {"devices_per_node": ("devices", "network"), "chunks": ("network",)}
    named |= {"schedule": ("chunks",)}
    if said == "model or hardware":
        named["throughput"] = ("flops",)
    fields = {problem.field for problem in failure.value.problems}
    assert fields & set(named.get(column, (column,)))
    assert all(problem.source == f"{path}:3" for problem in failure.value.problems)


def test_all_mistakes_are_told_at_once(tmp_path: Path) -> None:
    rows = [PLAIN | {"devices": "4"}, PLAIN | {"run": "b", "step": "3"}]
    with pytest.raises(ProfileError) as failure:
        read_runs(write_cells(tmp_path / "runs.csv", rows))
    found = [(each.source.rpartition(":")[2], each.field) for each in failure.value.problems]
    assert found == [("2", "devices"), ("3", "step")]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "which is required"),
        ("run,step_seconds\n", "an unknown column"),
        ("run,run\n", "2 columns"),
        (",".join(PLAIN) + "\n", "no run"),
        (",".join(PLAIN) + "\na,b\n", "2 cells"),
        (",".join(PLAIN) + '\n"a', "unexpected end of data"),
    ],
)
def test_a_table_that_is_none_is_refused(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "runs.csv"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ProfileError, match=said):
        read_runs(path)


def test_names_of_runs_differ(tmp_path: Path) -> None:
    path = write_cells(tmp_path / "runs.csv", [PLAIN, PLAIN])
    with pytest.raises(ProfileError, match="a name of its own"):
        read_runs(path)


@pytest.mark.parametrize(
    ("cells", "column", "said"),
    [
        ({"step": "5 ms"}, "step", "at most the peak of V100-32"),
        ({"memory": "40 GiB"}, "memory", "at most what V100-32 has"),
        ({"precision": "bf16"}, "precision", "one that V100-32 offers"),
        ({"device": "V1000"}, "device", "--cluster"),
    ],
)
def test_what_a_device_cannot_do_is_refused(tmp_path: Path, cells, column, said) -> None:
    path = write_cells(tmp_path / "runs.csv", [PLAIN | cells])
    with pytest.raises(ProfileError, match=said) as failure:
        prepared_runs(path, machines_of())
    assert {problem.field for problem in failure.value.problems} == {column}
    assert {problem.source for problem in failure.value.problems} == {f"{path}:2"}


def test_a_run_at_the_peak_passes_and_one_beyond_it_does_not(tmp_path: Path) -> None:
    run = read_cells(tmp_path)
    kind = catalog()["V100-32"].type
    least = step_flops(run) / run.devices / kind.peak["fp16"]
    assert not list(device_problems(replace(run, step=least * 1.001), kind, "here"))
    assert list(device_problems(replace(run, step=least * 0.999), kind, "here"))


def test_throughputs_are_steps(tmp_path: Path) -> None:
    run = read_cells(tmp_path, step="")
    assert step_seconds_of(run) is None
    assert seconds_at(run, "16 rows/s") == 2.0
    assert seconds_at(run, "2 rows/s/device") == 2.0
    assert seconds_at(run, "16384 tokens/s") == 2.0
    assert seconds_at(run, "2048 tokens/s/device") == 2.0
    rate = step_flops(run) / 8 / 2.0 / 1e12
    assert seconds_at(run, f"{rate!r} TFLOP/s/device") == pytest.approx(2.0)
    assert step_seconds_of(replace(run, throughput="16 rows/s")) == 2.0


def test_operations_are_those_of_the_published_formula(tmp_path: Path) -> None:
    """Narayanan et al. 2021, equation 3: 96 B s l h^2 (1 + s / 6h + V / 16 l h), with full
    recomputation; the table's 1T model on 3,072 devices then takes 163 TFLOP/s for 502 PFLOP/s."""
    cells = {"model": "1t", "family": "gpt2", "layers": "128", "width": "25600", "heads": "160"}
    cells |= {"vocabulary": "51200", "sequence": "2048", "step": "", "memory": "1 GiB"}
    run = read_cells(tmp_path, **cells)
    batch, s, layers, h, words = 32, 2048, 128, 25600, 51200
    formula = 96 * batch * s * layers * h**2 * (1 + s / (6 * h) + words / (16 * layers * h))
    assert step_flops(run, repeated=True) == pytest.approx(formula, rel=1e-12)
    blocks, output = forward_flops(shape_of(run), s)
    assert step_flops(run) == pytest.approx(3 * (blocks + output) * batch * s)


def test_every_column_is_described_in_the_documentation() -> None:
    page = (Path(__file__).parents[2] / "docs" / "profile.md").read_text(encoding="utf-8")
    part = page.partition("## Runs of other tools")[2]
    assert [name for name in COLUMNS if f"| `{name}` |" not in part] == []


def test_a_device_of_a_cluster_file_is_known(tmp_path: Path) -> None:
    run = read_cells(tmp_path, device="mine")
    known = machines_of()
    with pytest.raises(ProfileError, match="one of"):
        prepare(run, known)
    kind = replace(known["V100-32"].type, name="mine")
    again = prepare(run, known | {"mine": replace(known["V100-32"], type=kind)})
    assert set(again.cluster.types) == {"mine"}
