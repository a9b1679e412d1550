"""Runs gpu.py with a Python whose PyTorch sees CUDA, and with what the project needs besides.

    python benchmarks/gpu_environment.py PYTHON ... -- [options of gpu.py]

The first of these Pythons that has such a PyTorch is taken. PyTorch is used as it is: it is never
installed, replaced or upgraded. Requirements of the project that this Python lacks are installed
into .gpu-packages, from which only this script reads. Needs nothing but the standard library.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGES = ROOT / ".gpu-packages"
NEVER = ("torch", "triton", "nvidia-", "cuda-")
"""Beginnings of the names that are not to be installed."""
LOOK = """
import importlib.metadata, json, sys
import torch
def version(name):
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None
print(json.dumps({"cuda": torch.cuda.is_available(), "torch": torch.__version__,
                  "has": {name: version(name) for name in sys.argv[1:]}}))
"""
ABSENT = """\
No PyTorch that sees a CUDA device was found. Asked: {asked}.

`nvidia-smi` must list a GPU. Then install PyTorch {wanted} for your driver's CUDA as its own
instructions say (https://pytorch.org/get-started/locally), for instance here:

    python3 -m venv .venv && .venv/bin/pip install 'torch{wanted}'

and run `make gpu` again; or name another Python that has it: make gpu PYTHON=/path/to/python
"""
OLD = (
    "{python} has PyTorch {found}; this project needs {wanted}. Nothing was installed or replaced."
)


def main(arguments: Sequence[str]) -> int:
    """Find a Python, install what it lacks, and become gpu.py."""
    split = arguments.index("--") if "--" in arguments else len(arguments)
    pythons, options = list(dict.fromkeys(arguments[:split])), list(arguments[split + 1 :])
    needs = requirements((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    without_gpu = bool({"cpu", "--device=cpu", "--list"} & {*options})
    python, seen = chosen(pythons, needs, without_gpu=without_gpu)
    if python is None or seen is None:
        sys.stderr.write(ABSENT.format(asked=", ".join(pythons), wanted=needs["torch"]))
        return 2
    if not enough(str(seen["torch"]), needs["torch"]):
        told = OLD.format(python=python, found=seen["torch"], wanted=f"torch{needs['torch']}")
        sys.stderr.write(told + "\n")
        return 2
    lacking = missing(seen["has"], needs)
    if lacking:
        failed = installed(python, lacking)
        if failed:
            return failed
    paths = [str(ROOT / "src"), str(PACKAGES), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    script = str(ROOT / "benchmarks" / "gpu.py")
    return subprocess.run([python, script, *options], env=environment, check=False).returncode


def requirements(pyproject: str) -> dict[str, str]:
    """What the project needs: names, each with the condition on its version."""
    listed = tomllib.loads(pyproject)["project"]["dependencies"]
    pairs = (re.fullmatch(r"([\w.-]+?)((?:[<>=!~]=?).*)?", each) for each in listed)
    return {pair[1]: pair[2] or "" for pair in pairs if pair}


def enough(version: str | None, condition: str) -> bool:
    """Whether a version is there, and not below the one after `>=`."""
    if version is None:
        return False
    return _numbers(version) >= _numbers(condition.removeprefix(">="))


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(map(int, re.findall(r"\d+", re.split(r"[a-z+]", version)[0])))


def chosen(
    pythons: Sequence[str], needs: Mapping[str, str], *, without_gpu: bool
) -> tuple[str, dict] | tuple[None, None]:
    """The first whose PyTorch sees CUDA (or that has one), and what it says of itself."""
    for python in pythons:
        try:
            said = subprocess.run(
                [python, "-c", LOOK, *needs], capture_output=True, text=True, check=False
            )
        except OSError:
            continue
        if said.returncode == 0:
            seen = json.loads(said.stdout.splitlines()[-1])
            if seen["cuda"] or without_gpu:
                return python, seen
    return None, None


def missing(has: Mapping[str, str | None], needs: Mapping[str, str]) -> list[str]:
    """The requirements besides PyTorch that are not met; what was installed before counts."""
    own = {path.name for path in PACKAGES.glob("*.dist-info")}
    return [
        f"{name}{condition}"
        for name, condition in needs.items()
        if name != "torch"
        and not enough(has.get(name), condition)
        and not any(each.startswith(f"{name.replace('-', '_')}-") for each in own)
    ]


def constraints(text: str) -> str:
    """Those of the project without PyTorch and its libraries, and that it must not be installed."""
    kept = [line for line in text.splitlines() if not line.startswith(NEVER)]
    return "\n".join([*kept, "torch<0", ""])


def installed(python: str, lacking: Sequence[str]) -> int:
    """pip's exit status for what is lacking, in a folder of its own."""
    with tempfile.TemporaryDirectory() as folder:
        bounds = Path(folder) / "constraints.txt"
        text = (ROOT / "constraints.txt").read_text(encoding="utf-8")
        bounds.write_text(constraints(text), encoding="utf-8")
        command = [python, "-m", "pip", "install", "--target", str(PACKAGES), "--upgrade"]
        command += ["--constraint", str(bounds), *lacking]
        print("+", shlex.join(command), flush=True)
        return subprocess.run(command, check=False).returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
