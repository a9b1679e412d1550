"""How the command line ends: a message and a status of its own for whatever happens outside."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from meshwright import cli
from meshwright.cli.options import INTERRUPTED_STATUS
from meshwright.errors import ClusterError, Problem
from meshwright.workflows.train import _kept_model

CLUSTER = """\
format = 1
name = "pair"
[[node]]
name = "here"
devices = ["2 x cpu"]
"""
PLAN = {
    "format": 1,
    "name": "by hand",
    "model": {"name": "gpt-tiny", "fingerprint": "", "source": "gpt-tiny"},
    "cluster": {"name": "pair", "fingerprint": "", "source": "cluster.toml"},
    "job": {"global_batch": 4, "sequence": 16, "precision": "fp32"},
    "devices": ["here:0"],
    "pipelines": [
        {"micro_batches": 4, "rows": 1, "stages": [{"layers": [0, 10], "devices": [["here:0"]]}]}
    ],
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With a plan by hand."""
    folder = tmp_path_factory.mktemp("endings")
    (folder / "cluster.toml").write_text(CLUSTER)
    (folder / "plan.json").write_text(json.dumps(PLAN))
    return folder


def piped(folder: Path, *arguments: str, **rest) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "meshwright", *arguments],
        cwd=folder,
        stderr=subprocess.PIPE,
        timeout=120,
        check=False,
        **rest,
    )


@pytest.mark.heavy
def test_a_reader_that_leaves_ends_it_in_silence(folder: Path) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer) as output:
        done = piped(folder, "explain", "plan.json", stdout=output)
    assert (done.returncode, done.stderr) == (cli.UNREAD, b"")


@pytest.mark.heavy
@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs the device that is always full")
def test_a_full_output_is_named(folder: Path) -> None:
    with open("/dev/full", "w") as output:
        done = piped(folder, "explain", "plan.json", stdout=output)
    assert done.returncode == cli.MISTAKE
    assert done.stderr.startswith(b"MachineError:\nstandard output: found no space left")
    assert b"Exception ignored" not in done.stderr


@pytest.mark.heavy
def test_letters_that_the_terminal_lacks_are_numbers(folder: Path) -> None:
    poor = {**os.environ, "PYTHONIOENCODING": "ascii"}
    done = piped(folder, "explain", "plan.json", stdout=subprocess.PIPE, env=poor)
    assert done.returncode == 0, done.stderr
    assert b"\\u2022" in done.stdout


@pytest.mark.heavy
def test_ctrl_c_is_no_traceback(folder: Path) -> None:
    code = "import os, signal, sys; from meshwright import cli\n"
    code += "from meshwright.workflows import session\n"
    code += f"session.reopen_plan = lambda *_, **__: os.kill(os.getpid(), {int(signal.SIGINT)})\n"
    code += "sys.argv = ['meshwright', 'explain', 'plan.json']; cli.main()"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == INTERRUPTED_STATUS
    assert done.stderr == "stopped by Ctrl-C\n"


@pytest.mark.parametrize(
    ("raised", "status", "words"),
    [
        (
            ClusterError(Problem("c.toml", "name", "x\x1b[2J", "y")),
            2,
            "c.toml: name: found x\\x1b[",
        ),
        (OSError(5, "Input/output error", "/some/file"), 2, "/some/file: found Input/output error"),
        (FileNotFoundError(2, "No such file", "sh"), 2, "sh: found No such file"),
        (MemoryError(), 2, "no memory left"),
        (BrokenPipeError(32, "Broken pipe"), 1, ""),
        (SystemExit(7), 7, ""),
    ],
)
def test_every_failure_from_outside_has_a_status(raised, status, words, monkeypatch, capsys):
    def fail() -> None:
        raise raised

    monkeypatch.setattr(cli, "app", fail)
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == status
    told = capsys.readouterr().err
    assert words in told
    assert bool(words) == bool(told)


def test_a_mistake_of_ours_is_not_hidden(monkeypatch):
    def fail() -> None:
        raise KeyError("ours")

    monkeypatch.setattr(cli, "app", fail)
    with pytest.raises(KeyError):
        cli.main()


@pytest.fixture
def said(folder, monkeypatch, capsys):
    """Runs a verb in this process; its status, and what it told."""
    monkeypatch.chdir(folder)

    def run(line: str, *last: str) -> tuple[object, str, str]:
        monkeypatch.setattr(sys, "argv", ["meshwright", *line.split(), *last])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        told = capsys.readouterr()
        return ended.value.code, told.out, told.err

    return run


OUTPUTS = (
    "simulate plan.json --trace {}",
    "simulate plan.json --program {}",
    "simulate plan.json --report {}",
    "compare plan.json plan.json --report {}",
    "plan --model gpt-tiny --cluster cluster.toml --global-batch 4 --sequence 16 -o {}",
    "reorder plan.json -o {}",
    "whatif plan.json --without here:1 -o {}",
    "profile --model gpt-tiny --sequence 16 -o {}",
    "calibrate run -o {}",
    "discover -o {}",
)
TRAINING = ("train plan.json --report {}", "train plan.json -o {}")
FOLDERS = (
    "export plan.json --to megatron -o {}",
    "calibrate --propose 1 --model gpt-tiny --cluster cluster.toml --sequence 16 -o {}",
    "verify plan.json -o {}",
    "demo -o {}",
)


STARTING = tuple(pytest.param(line, marks=pytest.mark.heavy) for line in TRAINING)


@pytest.mark.parametrize("line", [*OUTPUTS, *FOLDERS, *STARTING])
def test_outputs_that_cannot_be_are_refused_before_the_work(said, folder: Path, line: str) -> None:
    (folder / "file").write_text("a file")
    long = "x" * 300
    folder_wanted = line in (*FOLDERS, TRAINING[1])
    bad = ("file", "file/deep", long) if folder_wanted else (".", "/dev/zero", "file/x", long)
    for each in bad:
        status, out, err = said(line.format(each))
        assert (status, out) == (cli.MISTAKE, "")
        assert err.startswith(f"OutputError:\n{each}: found ")


def test_nothing_is_kept_where_nothing_is_wanted(said, folder: Path) -> None:
    before = sorted(folder.iterdir())
    status, out, err = said("simulate plan.json --trace /dev/null --program /dev/null")
    assert (status, err) == (0, "")
    assert out.count("wrote /dev/null") == 2
    assert sorted(folder.iterdir()) == before


def test_commands_that_are_printed_can_be_given_to_a_shell(said, folder: Path) -> None:
    line = "calibrate --propose 1 --model gpt-tiny --cluster cluster.toml --sequence 16"
    status, out, _ = said(f"{line} --precision fp32 -o", "my $plans")
    assert status == 0
    first, then = out.splitlines()
    command = shlex.split(first)
    assert command[:2] == ["meshwright", "train"]
    assert (folder / command[2]).parent == folder / "my $plans"
    assert (folder / command[2]).is_file()
    assert "'my $plans'/run-*" in then


@pytest.mark.parametrize("name", ["plan.json", "run.json", "config.json"])
def test_a_config_in_a_run_folder_takes_the_name_of_nothing_else(tmp_path: Path, name: str) -> None:
    own, run = tmp_path / name, tmp_path / "run"
    own.write_text("{}")
    run.mkdir()
    kept = Path(_kept_model(str(own), run))
    assert kept.read_text() == "{}"
    assert kept.name == (name if name == "config.json" else "model-config.json")
    assert _kept_model("gpt2", run) == "gpt2"
