"""benchmarks/gpu.py: its cases in their tiny form, and what it does with those that fail."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import psutil
import pytest
import torch
import torch.distributed as dist

from meshwright.cost.constants import DEFAULT_DEVICE
from meshwright.program.timeline import Timeline
from meshwright.records import parse
from meshwright.runtime.launch_variables import interface_variables
from meshwright.runtime.torch_compile import COMPILERS
from meshwright.runtime.world import connect

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))
try:
    import gpu
    import gpu_findings
    import gpu_layers
    import gpu_memory
    import gpu_processes
    import gpu_runtime
    import gpu_staged_group
    import gpu_streams
    import gpu_training
finally:
    sys.path.remove(str(BENCHMARKS))

CPU = torch.device("cpu")
TINY = gpu_training.SHAPES["tiny"]
NAMES = [
    "runtime", "compiled", "processes", "layers", "memory", "nccl", "streams", "host", "read",
]  # fmt: skip


@pytest.fixture(autouse=True)
def _own_world(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A case that runs in this process makes it a world of one, which ends with the test."""
    for name, value in interface_variables(None, os.environ).items():
        monkeypatch.setenv(name, value)
    yield
    if dist.is_initialized():
        dist.destroy_process_group()


@pytest.fixture
def found(tmp_path: Path) -> gpu_findings.Findings:
    """For a case that runs in this process."""
    return gpu_findings.Findings(tmp_path / "found.json")


def by_first(found: gpu_findings.Findings) -> dict[str, dict[str, object]]:
    """Rows by their first figures up to one that is no word."""
    return {str(row[0]): dict(zip(found.columns, row, strict=True)) for row in found.rows}


# What is run, and how.


def test_every_case_is_listed_by_name(capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu.main(["--list"]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in printed] == NAMES
    assert [line.split()[0] for line in printed if "(needs CUDA)" in line] == ["nccl"]


def test_every_case_names_a_function_that_is_there() -> None:
    for case in gpu.CASES.values():
        module, _, function = case.runs.partition(":")
        assert callable(getattr(sys.modules[module], function))


@pytest.mark.slow
@pytest.mark.heavy
def test_a_run_prints_tables_and_leaves_them_in_one_file(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "gpu.json"
    options = ["--device", "cpu", "--json", str(out), "--only", "nccl", "host"]
    assert gpu.main(options) == 0
    printed = capfd.readouterr().out
    assert "nccl: needs CUDA: skipped" in printed
    assert "blocks.0, backward" in printed
    results = json.loads(out.read_text())
    assert results["device"] == "CPU"
    assert results["versions"]["torch"] == torch.__version__
    assert results["command"] == "python benchmarks/gpu.py --device cpu --only nccl host"
    assert results["cases"]["nccl"] == {"state": "skipped", "problems": [gpu.SKIPPED]}
    host = results["cases"]["host"]
    assert (host["state"], host["problems"]) == ("done", [])
    rows = {row[0]: dict(zip(host["columns"], row, strict=True)) for row in host["rows"]}
    assert rows["blocks.0, backward"]["operations"] > rows["blocks.0, forward"]["operations"] > 20
    stated = 1e6 * DEFAULT_DEVICE.launch_forward
    assert rows["head, forward"]["stated, us"] == pytest.approx(stated)
    assert rows["instruction F"]["processor, us"] > rows["instruction F"]["host, us"]
    assert "**CPU**" in "\n".join(gpu_findings.page_of(results))


@pytest.mark.heavy
def test_without_cuda_the_run_says_so_and_ends(tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a CUDA device here")
    with pytest.raises(SystemExit, match="sees no CUDA device"):
        gpu.main(["--json", str(tmp_path / "gpu.json")])


@pytest.mark.heavy
def test_a_case_that_fails_says_why_and_the_next_one_goes_on() -> None:
    broken = gpu.Case(name="no such case", says="", runs="")
    result = gpu.result_of(broken, "cpu", 60.0)
    assert result["state"] == "failed"
    assert result["problems"][0] == "exit status 2"
    assert "no such case" in "\n".join(result["problems"])
    assert gpu.told(broken, result)[1].strip().startswith("FAILED: exit status 2")


def test_a_case_that_takes_too_long_keeps_the_rows_that_it_had(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def slow(command: list[str], log: Path, _: float) -> None:
        log.write_text("on the way")
        found = gpu_findings.Findings(Path(command[-1]))
        found.table("model", "ms")
        found.row("small", 1.5)

    monkeypatch.setattr(gpu, "run_for", slow)
    result = gpu.result_of(gpu.CASES["layers"], "cpu", 7.0)
    assert (result["state"], result["rows"]) == ("timed out", [["small", 1.5]])
    assert result["problems"] == ["ended after 7 s"]
    assert gpu.result_of(gpu.CASES["layers"], "cpu", 0.0)["state"] == "no time left"


def test_cases_after_the_last_second_are_left_out_and_the_status_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(gpu, "ALL_SECONDS", 0.0)
    monkeypatch.setattr(gpu, "described", lambda _: {"device": "none", "versions": {}})
    out = tmp_path / "gpu.json"
    assert gpu.main(["--device", "cpu", "--only", "read", "nccl", "--json", str(out)]) == 1
    states = {name: case["state"] for name, case in json.loads(out.read_text())["cases"].items()}
    assert states == {"read": "no time left", "nccl": "skipped"}
    assert "failed: ['read']" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.heavy
def test_no_process_of_a_case_is_left_whatever_its_session(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu, "GRACE_SECONDS", 0.2)
    pids = tmp_path / "pids"
    script = (
        'trap "" TERM; sleep 600 & own=$!; setsid sleep 600 & apart=$!; '
        'echo $$ $own $apart > "$1"; wait'
    )
    status = gpu.run_for(["sh", "-c", script, "sh", str(pids)], tmp_path / "log", 3.0)
    assert status is None
    started = [int(pid) for pid in pids.read_text().split()]
    assert len(started) == 3
    assert not [pid for pid in started if is_running(pid)]
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def is_running(pid: int) -> bool:
    return psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE


@pytest.mark.heavy
def test_a_command_that_ends_gives_its_status(tmp_path: Path) -> None:
    command = [sys.executable, "-c", "print('said'); raise SystemExit(3)"]
    assert gpu.run_for(command, tmp_path / "log", 60.0) == 3
    assert (tmp_path / "log").read_text() == "said\n"


# What the cases find.


@pytest.mark.heavy
def test_the_runtime_learns_what_a_plain_loop_learns(found: gpu_findings.Findings) -> None:
    gpu_runtime.eager(CPU, found)
    assert found.problems == []
    row = by_first(found)["tiny"]
    assert row["plain"] == pytest.approx(row[found.columns[6]], rel=1e-3)
    assert row["ours / plain"] > 0


def test_unequal_losses_are_a_problem(found: gpu_findings.Findings) -> None:
    found.table(*(f"{n}" for n in range(10)))
    seconds = {"ours": [2.0, 2.0], "plain": [1.0, 1.0]}
    losses = {"ours": [4.0, 3.0], "plain": [4.0, 3.1]}
    gpu_runtime.report(found, "tiny", seconds, seconds, losses)
    assert found.problems == ["tiny: losses differ by up to 3.2 %"]
    assert found.rows[0][3] == 2.0


def test_losses_are_compared_before_rounding_has_grown(found: gpu_findings.Findings) -> None:
    found.table(*(f"{n}" for n in range(10)))
    once = {"ours": [1.0, 1.0], "plain": [1.0, 1.0]}
    steps = gpu_runtime.LOSS_STEPS
    losses = {"ours": [4.0] * steps + [9.0], "plain": [4.0] * steps + [1.0]}
    gpu_runtime.report(found, "tiny", once, once, losses)
    assert found.problems == []


@pytest.mark.slow
@pytest.mark.skipif(not any(map(shutil.which, COMPILERS)), reason="needs a C++ compiler")
def test_compiled_layers_learn_the_same() -> None:
    result = gpu.result_of(gpu.CASES["compiled"], "cpu", 280.0)
    assert (result["state"], result["problems"]) == ("done", [])
    assert [row[0] for row in result["rows"]] == ["tiny"]


@pytest.mark.heavy
def test_the_read_is_measured_with_and_without(found: gpu_findings.Findings) -> None:
    gpu_runtime.read(CPU, found)
    waits = {row[1]: row[3] for row in found.rows}
    assert list(waits) == ["ours", "plain, reading", "plain, not reading"]
    assert waits["ours"] > 0
    assert all(row[5] is None for row in found.rows), "a CPU is never idle between steps"


@pytest.mark.heavy
def test_layers_stand_beside_their_prediction(found: gpu_findings.Findings) -> None:
    gpu_layers.against_datasheet(CPU, found)
    assert [row[1:3] for row in found.rows] == [
        (layer, rows) for rows in (1, 2) for layer in ("embedding", "blocks.0", "head")
    ]
    for row in found.rows:
        assert row[5] == pytest.approx(row[4] / row[3])
        assert row[8] == pytest.approx(row[7] / row[6])


@pytest.mark.slow
def test_predicted_memory_is_that_of_a_step(found: gpu_findings.Findings) -> None:
    gpu_memory.against_allocator(CPU, found)
    assert found.problems == []
    kept, recomputed = (row[2] for row in found.rows)
    assert recomputed < kept


@pytest.mark.heavy
def test_collectives_of_the_runtime_follow_the_program(found: gpu_findings.Findings) -> None:
    gpu_streams.streams(CPU, found)
    assert found.problems == []
    assert [row[:3] for row in found.rows] == [
        ("sums", "REDUCE_GRAD", 3),
        ("divided states", "REDUCE_SCATTER", 3),
        ("divided states", "GATHER_PARAMETERS", 3),
    ]
    assert "needs CUDA: skipped" in found.notes[0]


def test_a_collective_out_of_order_is_a_problem(found: gpu_findings.Findings) -> None:
    def interval(op: str, start: float, end: float) -> dict[str, object]:
        stream = "reduce" if op.startswith("REDUCE") else "compute"
        return {
            "rank": 0, "stream": stream, "op": op, "stage": 0, "label": op,
            "start_seconds": start, "end_seconds": end,
        }  # fmt: skip

    steps = [("F", 0.0, 1.0), ("B", 1.0, 3.0), ("REDUCE_GRAD", 0.5, 5.0)]
    steps.append(("OPTIMIZER_STEP", 4.0, 6.0))
    table = {
        "source": "measured", "devices": ["here:0"], "step_seconds": 6.0,
        "intervals": [interval(*each) for each in steps],
    }  # fmt: skip
    timeline = parse(table, Timeline, source="test", error=ValueError)
    found.table("a", "b", "c", "d", "e", "f", "g")
    gpu_streams._rows("sums", timeline, [each[0] for each in steps], found)
    assert found.rows == [("sums", "REDUCE_GRAD", 1, 4.5e6, 1, False, False)]
    assert len(found.problems) == 2


def test_collectives_in_a_world_of_one_change_nothing() -> None:
    gpu_training.start_alone(CPU)
    assert gpu_streams.collectives_are_identities(CPU, 1) == []


@pytest.mark.slow
def test_two_processes_learn_what_one_learns(found: gpu_findings.Findings) -> None:
    gpu_processes.processes(CPU, found)
    assert found.problems == []
    assert [row[:3] for row in found.rows] == [(2, "pipeline", "fp32"), (2, "data", "fp32")]


# Messages by way of the host: see also test_gpu_staged_group.py.


def test_the_runtime_works_over_the_staged_group() -> None:
    """Every group that `connect` makes is of the backend that it is told."""
    plan, batch = gpu_training.plan_of(TINY, "fp32"), gpu_training.batch_of(TINY)
    gpu_training.start_alone(CPU)
    with gpu_training.engine_of(TINY, plan, CPU) as engine:
        wanted = gpu_training.engine_step(engine, batch)
    dist.destroy_process_group()
    gpu_staged_group.register()
    backend = gpu_staged_group.BACKEND
    dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    world = partial(connect, timeout_seconds=60, device="cpu", backend=backend)
    with gpu_training.engine_of(TINY, plan, CPU, world=world) as engine:
        assert dist.get_backend(engine.world.forward) == backend
        assert gpu_training.engine_step(engine, batch) == wanted


# Tables.


def test_findings_are_in_their_file_after_every_row(tmp_path: Path) -> None:
    found = gpu_findings.Findings(tmp_path / "found.json")
    found.table("model", "ms", "fits")
    found.row("small", 12345.6, True)
    found.note("a note")
    found.check(True, "never said")
    found.check(False, "does not fit")
    assert json.loads((tmp_path / "found.json").read_text()) == {
        "columns": ["model", "ms", "fits"],
        "rows": [["small", 12345.6, True]],
        "notes": ["a note"],
        "problems": ["does not fit"],
    }
    with pytest.raises(AssertionError):
        found.row("small", 1.0)


@pytest.mark.parametrize(
    ("value", "text"),
    [(None, "-"), (True, "yes"), (False, "no"), (0.012345, "0.0123"), (12345.6, "12,346"),
     (1234, "1,234"), ("word", "word")],
)  # fmt: skip
def test_cells_have_three_digits(value: gpu_findings.Value, text: str) -> None:
    assert gpu_findings.cell(value) == text


def test_words_stand_left_and_figures_right() -> None:
    assert gpu_findings.lines(["name", "figure"], [["a", 1], ["longer", None]]) == [
        "name    figure",
        "a            1",
        "longer       -",
    ]
    assert gpu_findings.lines(["name"], []) == ["name"]
