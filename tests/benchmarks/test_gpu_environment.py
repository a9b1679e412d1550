"""benchmarks/gpu_environment.py: which Python is taken, and that PyTorch is left alone."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.heavy

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))
try:
    import gpu_environment as environment
finally:
    sys.path.remove(str(ROOT / "benchmarks"))

NEEDS = environment.requirements((ROOT / "pyproject.toml").read_text())
ALL_THERE = dict.fromkeys(NEEDS, "99.0")


def python_that_says(folder: Path, *, cuda: bool, torch: str, has: dict[str, str | None]) -> str:
    """A Python whose PyTorch says this of itself; what it is asked to run, it only writes down."""
    folder.mkdir()
    path = folder / "python"
    seen = json.dumps({"cuda": cuda, "torch": torch, "has": has})
    path.write_text(
        f"#!/bin/sh\nif [ \"$1\" = -c ]; then\n  echo '{seen}'\nelse\n"
        f'  echo "$PYTHONPATH|$@" >> {folder}/ran\nfi\n'
    )
    path.chmod(0o700)
    return str(path)


def ran(python: str) -> list[str]:
    """The commands that it was asked to run."""
    path = Path(python).parent / "ran"
    return path.read_text().splitlines() if path.exists() else []


def test_the_first_python_that_sees_cuda_runs_the_cases(tmp_path: Path) -> None:
    blind = python_that_says(tmp_path / "a", cuda=False, torch="2.13.0", has=ALL_THERE)
    seeing = python_that_says(tmp_path / "b", cuda=True, torch="2.11.0+cu130", has=ALL_THERE)
    absent = str(tmp_path / "absent")
    assert environment.main([absent, blind, seeing, "--", "--only", "memory"]) == 0
    assert ran(blind) == []
    (line,) = ran(seeing)
    paths, _, command = line.partition("|")
    assert paths.split(os.pathsep)[:2] == [str(ROOT / "src"), str(environment.PACKAGES)]
    assert command == f"{ROOT}/benchmarks/gpu.py --only memory"


def test_without_cuda_it_says_what_to_install_and_installs_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    blind = python_that_says(tmp_path / "a", cuda=False, torch="2.13.0", has=ALL_THERE)
    assert environment.main([blind, "--"]) == 2
    told = capsys.readouterr().err
    assert blind in told
    assert "torch>=2.11" in told
    assert ran(blind) == []
    assert environment.main([blind, "--", "--device", "cpu"]) == 0
    assert len(ran(blind)) == 1


def test_an_older_pytorch_is_refused_not_replaced(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    old = python_that_says(tmp_path / "a", cuda=True, torch="2.9.1+cu126", has=ALL_THERE)
    assert environment.main([old, "--"]) == 2
    assert "has PyTorch 2.9.1+cu126; this project needs torch>=2.11" in capsys.readouterr().err
    assert ran(old) == []


def test_only_what_is_lacking_is_installed_apart_and_never_pytorch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(environment, "PACKAGES", tmp_path / "packages")
    bounds: list[str] = []

    def run(command: list[str], **_: object) -> subprocess.CompletedProcess[bytes]:
        bounds.append(Path(command[command.index("--constraint") + 1]).read_text())
        assert command[1:6] == ["-m", "pip", "install", "--target", str(tmp_path / "packages")]
        assert command[-2:] == ["pydantic>=2.11", "psutil>=6"]
        return subprocess.CompletedProcess(command, 5)

    monkeypatch.setattr(environment.subprocess, "run", run)
    has = {**ALL_THERE, "pydantic": "2.5.3", "psutil": None, "torch": None}
    lacking = environment.missing(has, NEEDS)
    assert environment.installed("python", lacking) == 5
    names = [line.partition("==")[0] for line in bounds[0].splitlines()]
    assert "pydantic" in names
    assert not [name for name in names if name.startswith(environment.NEVER) and name != "torch<0"]
    assert names[-1] == "torch<0"


def test_what_was_installed_before_is_not_installed_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(environment, "PACKAGES", tmp_path)
    (tmp_path / "psutil-7.0.dist-info").mkdir()
    assert environment.missing({**ALL_THERE, "psutil": None}, NEEDS) == []


@pytest.mark.parametrize(
    ("version", "condition", "holds"),
    [("2.11.0+cu130", ">=2.11", True), ("2.10.1", ">=2.11", False), (None, ">=6", False),
     ("13", ">=13", True), ("0.20.0rc1", ">=0.20", True), ("5.9.8", ">=6", False)],
)  # fmt: skip
def test_versions_are_compared_by_their_numbers(
    version: str | None, condition: str, holds: bool
) -> None:
    assert environment.enough(version, condition) is holds


def test_make_gpu_asks_the_projects_python_first() -> None:
    done = subprocess.run(
        ["make", "-n", "gpu", "VENV=own", "PYTHON=theirs", "ARGS=--list"],
        cwd=ROOT, capture_output=True, text=True, check=True,
        env={name: value for name, value in os.environ.items() if not name.startswith("MAKE")},
    )  # fmt: skip
    assert done.stdout.split() == [
        "theirs", "benchmarks/gpu_environment.py", "own/bin/python", "theirs", "--", "--list",
    ]  # fmt: skip
