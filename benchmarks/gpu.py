"""Checks and figures from a machine with one CUDA GPU, in at most 8 minutes: make gpu

    python benchmarks/gpu.py [--list] [--only NAME ...] [--device cuda|cpu] [--json OUT]

Each case runs in a process of its own, for at most a minute; one that fails or takes longer is said
to, and the others go on. All tables go to one JSON file (gpu.json) with the device's name, the
versions and the commit. To have them in docs/accuracy.md: copy the file to benchmarks/measured/ and
run docs/generate.py. --device cpu runs a tiny form of every case that needs no GPU. The exit status
is 1 if a case has failed.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import psutil
from gpu_findings import Findings, lines

CASE_SECONDS = 60.0
"""From the start of its process, imports included, to its end."""
ALL_SECONDS = 450.0
"""For all chosen cases; those that would begin later are said to be left out."""
GRACE_SECONDS = 3.0
"""Between the request to end and the end of a process that does not follow it."""
LAST_LINES = 12
"""Of what a failed case printed."""
SKIPPED = "needs CUDA: skipped"


@dataclass(frozen=True, kw_only=True)
class Case:
    """What can be chosen by name."""

    name: str
    says: str
    runs: str
    """Module and function: it is given a torch.device and Findings."""
    needs_cuda: bool = False


CASES = {
    case.name: case
    for case in (
        Case(
            name="runtime", runs="gpu_runtime:eager",
            says="step seconds and losses beside a plain PyTorch loop, bf16",
        ),
        Case(
            name="compiled", runs="gpu_runtime:compiled",
            says="the same with torch.compile on both sides, layer by layer",
        ),
        Case(
            name="processes", runs="gpu_processes:processes",
            says="two and four processes on one device, gloo between them: losses as of one",
        ),
        Case(
            name="layers", runs="gpu_layers:against_datasheet",
            says="layer times as a profile measures them beside the datasheet's, 1 to 8 rows",
        ),
        Case(
            name="memory", runs="gpu_memory:against_allocator",
            says="predicted memory beside the allocator's peak, with and without recomputation",
        ),
        Case(
            name="nccl", runs="gpu_streams:nccl", needs_cuda=True,
            says="an NCCL world of one: start, collectives, and its place among the streams",
        ),
        Case(
            name="streams", runs="gpu_streams:streams",
            says="what collectives and copies of the runtime follow and run beside",
        ),
        Case(
            name="host", runs="gpu_layers:host",
            says="host time of layers and instructions beside the constants that state it",
        ),
        Case(
            name="read", runs="gpu_runtime:read",
            says="the read at the end of a step: its wait, and how long the device then idles",
        ),
    )
}  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the chosen cases; returns the exit status."""
    options = parsed(arguments)
    if options.list:
        for case in CASES.values():
            needs = " (needs CUDA)" if case.needs_cuda else ""
            print(f"{case.name:12}{case.says}{needs}")
        return 0
    if options.describe:
        print(json.dumps(describe_here(options.device)))
        return 0
    if options.case:
        run_here(CASES[options.case], options.device, options.json)
        return 0
    began = time.monotonic()
    chosen = [*dict.fromkeys(options.only or CASES)]
    results = {"format": 1, **described(options.device), "command": command_of(options)}
    results["cases"] = {}
    print(f"{results['device']}, torch {results['versions'].get('torch')}", flush=True)
    with ended_on_signals():
        for name in chosen:
            left = min(CASE_SECONDS, ALL_SECONDS - (time.monotonic() - began))
            results["cases"][name] = found = result_of(CASES[name], options.device, left)
            print("\n".join(["", *told(CASES[name], found)]), flush=True)
            results["seconds"] = round(time.monotonic() - began, 1)
            options.json.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    bad = [name for name, found in results["cases"].items() if found["state"] in FAILED]
    print(f"\n{results['seconds']} s; wrote {options.json}" + (f"; failed: {bad}" if bad else ""))
    return int(bool(bad))


FAILED = ("failed", "timed out", "no time left")


def parsed(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The options; cases and device are checked."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--list", action="store_true", help="print the names of all cases")
    parser.add_argument("--only", nargs="+", choices=CASES, metavar="NAME", help="these cases")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--json", type=Path, default=Path("gpu.json"), metavar="OUT")
    parser.add_argument("--case", choices=CASES, help=argparse.SUPPRESS)
    parser.add_argument("--describe", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def run_here(case: Case, kind: str, out: Path) -> None:
    """One case in this process."""
    import torch

    device = torch.device(kind, *((0,) if kind == "cuda" else ()))
    if kind == "cuda":
        torch.cuda.set_device(device)
    else:
        torch.set_num_threads(1)
    module, _, function = case.runs.partition(":")
    getattr(import_module(module), function)(device, Findings(out))
    sys.stdout.flush()
    os._exit(0)  # threads of gloo and NCCL need not be taken apart


def result_of(case: Case, kind: str, seconds: float) -> dict[str, Any]:
    """State, seconds, and what the case has found, as far as it came."""
    if case.needs_cuda and kind == "cpu":
        return {"state": "skipped", "problems": [SKIPPED]}
    if seconds <= 0:
        return {"state": "no time left", "problems": [f"all cases have {ALL_SECONDS:.0f} s"]}
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="meshwright-gpu-") as folder:
        out, log = Path(folder) / "found.json", Path(folder) / "log"
        command = (sys.executable, __file__, "--case", case.name, "--device", kind)
        status = run_for([*command, "--json", str(out)], log, seconds)
        found = json.loads(out.read_text(encoding="utf-8")) if out.exists() else {}
        printed = log.read_text(encoding="utf-8", errors="replace").splitlines()
    problems = found.pop("problems", [])
    if status is None:
        problems.append(f"ended after {seconds:.0f} s")
    elif status:
        problems += [f"exit status {status}", *printed[-LAST_LINES:]]
    state = "timed out" if status is None else "failed" if problems else "done"
    return {
        "state": state,
        "seconds": round(time.monotonic() - began, 1),
        **found,
        "problems": problems,
    }


def run_for(command: Sequence[str], log: Path, seconds: float) -> int | None:
    """The exit status of a command; None if it took too long. No process of its is left."""
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT,
            start_new_session=True,
        )  # fmt: skip
    try:
        return process.wait(seconds)
    except subprocess.TimeoutExpired:
        return None
    finally:
        end(process)


def end(process: subprocess.Popen[bytes]) -> None:
    """End a process, its group, and all that it has started, whatever their groups."""
    started: list[psutil.Process] = []
    with suppress(psutil.NoSuchProcess):
        started = psutil.Process(process.pid).children(recursive=True)
    for number in (signal.SIGTERM, signal.SIGKILL):
        with suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        for each in started:
            with suppress(psutil.NoSuchProcess):
                each.send_signal(number)
        with suppress(subprocess.TimeoutExpired):
            process.wait(GRACE_SECONDS)
        psutil.wait_procs(started, GRACE_SECONDS if number == signal.SIGTERM else 1)


@contextmanager
def ended_on_signals() -> Iterator[None]:
    """A request to end is an exception here, so that the running case is ended too."""

    def stop(number: int, _: object) -> None:
        raise SystemExit(128 + number)

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def told(case: Case, found: dict[str, Any]) -> list[str]:
    """The lines that are printed of a case."""
    if found["state"] == "skipped":
        return [f"{case.name}: {SKIPPED}"]
    printed = [f"{case.name}: {case.says}"]
    if found.get("rows"):
        printed += [f"  {line}" for line in lines(found["columns"], found["rows"])]
    printed += [f"  {note}" for note in found.get("notes", [])]
    printed += [f"  {found['state'].upper()}: {problem}" for problem in found["problems"]]
    return [*printed, f"  {found['state']}, {found.get('seconds', 0)} s"]


def described(kind: str) -> dict[str, Any]:
    """The device, what drives it, and the code that was run; a process of its own looks, since
    this one must not hold the device."""
    command = [sys.executable, __file__, "--describe", "--device", kind]
    seen = subprocess.run(command, capture_output=True, text=True, check=False)
    if seen.returncode:
        sys.exit(seen.stderr.strip().splitlines()[-1])
    driver = "nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"
    return {
        **json.loads(seen.stdout),
        "driver": said(driver) if kind == "cuda" else None,
        "commit": commit(),
        "date": time.strftime("%Y-%m-%d"),
    }


def describe_here(kind: str) -> dict[str, Any]:
    """What PyTorch says of the device and of itself."""
    import torch

    cuda = kind == "cuda"
    if cuda and not torch.cuda.is_available():
        sys.exit("PyTorch sees no CUDA device: make gpu says what to install")
    device = torch.cuda.get_device_properties(0) if cuda else None
    return {
        "device": device.name if device else "CPU",
        "memory_bytes": device.total_memory if device else None,
        "multiprocessors": device.multi_processor_count if device else None,
        "versions": {
            "torch": torch.__version__,
            "python": platform.python_version(),
            "cuda": torch.version.cuda,
            "nccl": ".".join(map(str, torch.cuda.nccl.version())) if cuda else None,
        },
    }


def command_of(options: argparse.Namespace) -> str:
    """What to type for the same figures."""
    words = [f"--device {options.device}"] if options.device != "cuda" else []
    words += [f"--only {' '.join(options.only)}"] if options.only else []
    return " ".join(["python benchmarks/gpu.py", *words])


def commit() -> str | None:
    """Of the code that runs, and whether it has been changed since."""
    git = "git", "-C", str(Path(__file__).parent)
    changed = said((*git, "status", "--porcelain", "--untracked-files=no"))
    head = said((*git, "rev-parse", "HEAD"))
    return f"{head}, changed" if head and changed else head


def said(command: Sequence[str]) -> str | None:
    """The first line that a command prints; None if it is not there or fails."""
    with suppress(OSError, subprocess.TimeoutExpired):
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=20)
        if done.returncode == 0 and done.stdout.strip():
            return done.stdout.splitlines()[0].strip()
    return None


if __name__ == "__main__":
    sys.exit(main())
