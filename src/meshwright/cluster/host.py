"""Asks a machine about its hardware: through command line tools, files of the kernel, and
PyTorch."""

from __future__ import annotations

import os
import re
import selectors
import shutil
import signal
import socket
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any

import psutil

from meshwright.cluster.estimate import DriverFigures
from meshwright.records import Bytes, record
from meshwright.text import printable, shown

TOOL_SECONDS = 60.0
"""Time limit for one tool in seconds. Without persistence mode, nvidia-smi first wakes every
GPU."""
_FIRST_WORDS = 160
_CHUNK, _MOST_WRITTEN = 2**16, 2**23

_ELSEWHERE = {
    "nvidia-smi": "/usr/lib/wsl/lib",
    "rocm-smi": "/opt/rocm/bin",
    "amd-smi": "/opt/rocm/bin",
    "lspci": "/usr/sbin:/sbin",
}
"""Folders in which tools are installed that may be missing from PATH."""


@record
class ToolOutput:
    """Holds what one run of a command line tool printed, and how it ended."""

    tool: str
    text: str = ""
    errors: str = ""
    """Text that it wrote to stderr."""
    status: int | None = 0
    """Exit status; None if it could not be started or did not end."""
    installed: bool = True
    """False if the tool is not installed."""
    timed_out: bool = False
    """True if it did not end in time, or wrote without end."""

    @property
    def summary(self) -> str:
        """Sums the answer up on one line: how the command ended, and the first words of its
        output."""
        said = " ".join(f"{self.text}\n{self.errors}".split()) or "nothing"
        said = printable(said if len(said) <= _FIRST_WORDS else f"{said[:_FIRST_WORDS]} ...")
        if self.timed_out:
            return f"no answer from {self.tool} in time, or one without end"
        if self.status is None:
            return f"{self.tool} could not be started: {said}"
        return f"{self.tool} ended with exit status {self.status} and said: {said}"


@record
class GpuReading:
    """Holds what one source reports of one GPU or slice of one; None marks what it leaves out."""

    name: str | None = None
    memory: Bytes | None = None
    """Total memory in bytes, before anything is reserved."""
    capability: tuple[int, int] | None = None
    uuid: str | None = None
    slice: str | None = None
    """MIG profile of a slice, like `3g.20gb`."""
    whole_memory: Bytes | None = None
    """Total memory of the whole GPU in bytes, for a slice."""
    watts: float | None = None
    usual_watts: float | None = None
    figures: DriverFigures = DriverFigures()
    quoted: str = ""
    """Text that this was read from, kept if a part of it is missing."""
    trouble: str = ""
    """Why it cannot be used, quoted from the source."""


@record
class GpuSource:
    """Holds what one source of information about GPUs, for example nvidia-smi, reports."""

    name: str
    gpus: tuple[GpuReading, ...] = ()
    trouble: str = ""
    """How the source failed, or its words that could not be parsed."""
    notes: tuple[str, ...] = ()


@record
class Host:
    """Holds the functions that ask a machine about its hardware; tests replace them."""

    run: Callable[[tuple[str, ...]], ToolOutput]
    """Runs a tool and returns its output."""
    read: Callable[[str], str]
    """Reads a file of the kernel; empty if there is none."""
    names: Callable[[str], tuple[str, ...]]
    """Lists a folder of the kernel in order; empty if there is none."""
    torch: Callable[[], tuple[str, GpuSource] | None]
    """Returns the GPUs that PyTorch sees and whether it is built for `cuda` or `rocm`; None if for
    neither."""
    nvml: Callable[[], GpuSource | None]
    """Returns the GPUs that NVIDIA's library (NVML) reports; None if its Python bindings are not
    installed."""
    environment: Mapping[str, str]
    name: str
    cores: int
    memory: Bytes
    """Memory of the host in bytes, or the limit of the control group if that is lower."""


def this_host(seconds: float = TOOL_SECONDS) -> Host:
    """Returns the machine that this process runs on; each tool may take `seconds`."""
    cores: int = psutil.cpu_count(logical=False) or 1
    if sys.platform == "linux":
        cores = min(cores, len(os.sched_getaffinity(0)))
    name = re.sub(r"[^A-Za-z0-9_-]", "-", socket.gethostname().partition(".")[0])
    return Host(
        run=_asker(seconds),
        read=_file,
        names=_entries,
        torch=_torch,
        nvml=_nvml,
        environment=os.environ,
        name=name.strip("-_") or "machine",
        cores=cores,
        memory=_host_memory(),
    )


def _asker(seconds: float) -> Callable[[tuple[str, ...]], ToolOutput]:
    answers: dict[tuple[str, ...], ToolOutput] = {}
    hung: dict[str, ToolOutput] = {}

    def run(command: tuple[str, ...]) -> ToolOutput:
        tool = command[0]
        if tool in hung:
            return hung[tool]  # a tool that hung once is not waited for again
        if command not in answers:
            answers[command] = _answer(command, seconds)
        if answers[command].timed_out:
            hung[tool] = answers[command]
        return answers[command]

    return run


def _answer(command: tuple[str, ...], seconds: float) -> ToolOutput:
    tool = command[0]
    places = [os.environ.get("PATH", os.defpath), _ELSEWHERE.get(tool, "")]
    program = shutil.which(tool, path=os.pathsep.join(filter(None, places)))
    if program is None:
        return ToolOutput(tool=tool, installed=False, status=None)
    try:
        process = subprocess.Popen(
            (program, *command[1:]),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
        )
    except OSError as failure:
        return ToolOutput(tool=tool, errors=failure.strerror or "", status=None)
    with process.stdout or nullcontext(), process.stderr or nullcontext():
        written = _written(process, seconds)
    if written is None:
        with suppress(OSError):
            os.killpg(process.pid, signal.SIGKILL)
        # A tool that waits inside a hanging driver cannot even be killed.
        with suppress(subprocess.TimeoutExpired):
            process.wait(timeout=1)
        return ToolOutput(tool=tool, status=None, timed_out=True)
    return ToolOutput(tool=tool, text=written[0], errors=written[1], status=process.returncode)


def _written(process: subprocess.Popen[bytes], seconds: float) -> tuple[str, str] | None:
    """Returns what a process writes to stdout and stderr until it ends; None if it does not end in
    time or writes without end."""
    ends = time.monotonic() + seconds
    written: dict[Any, bytearray] = {process.stdout: bytearray(), process.stderr: bytearray()}
    with selectors.DefaultSelector() as open_ones:
        for stream in written:
            open_ones.register(stream, selectors.EVENT_READ)
        while open_ones.get_map():
            ready = open_ones.select(max(ends - time.monotonic(), 0.0))
            for key, _ in ready:
                chunk = os.read(key.fd, _CHUNK)
                written[key.fileobj] += chunk
                if not chunk:
                    open_ones.unregister(key.fileobj)
            if not ready or sum(map(len, written.values())) > _MOST_WRITTEN:
                return None
    try:
        process.wait(timeout=max(ends - time.monotonic(), 0.0))
    except subprocess.TimeoutExpired:
        return None
    text, errors = (part.decode(errors="replace") for part in written.values())
    return text.replace("\r\n", "\n"), errors.replace("\r\n", "\n")


def _file(path: str) -> str:
    try:
        return Path(path).read_text(errors="replace")
    except OSError:
        return ""


def _entries(path: str) -> tuple[str, ...]:
    try:
        return tuple(sorted(os.listdir(path)))
    except OSError:
        return ()


def _host_memory() -> Bytes:
    limits: list[int] = [psutil.virtual_memory().total]
    for place in ("memory.max", "memory/memory.limit_in_bytes"):
        text = _file(f"/sys/fs/cgroup/{place}")
        limits += [int(text)] if text.strip().isdigit() else []
    return min(limits)


def _torch() -> tuple[str, GpuSource] | None:
    how = "PyTorch"
    try:
        import torch
    except ModuleNotFoundError:
        return None
    except (ImportError, OSError) as failure:
        return "cuda", GpuSource(name=how, notes=(f"PyTorch cannot be imported: {_said(failure)}",))
    kind = "cuda" if torch.version.cuda else "rocm" if torch.version.hip else None
    if kind is None:
        return None
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        try:
            count = torch.cuda.device_count() if torch.cuda.is_available() else 0
            found = [torch.cuda.get_device_properties(index) for index in range(count)]
        except Exception as failure:  # drivers fail in many ways
            return kind, GpuSource(name=how, trouble=f"PyTorch: {_said(failure)}")
    seen = tuple(
        GpuReading(
            name=printable(each.name),
            memory=each.total_memory,
            # On ROCm these two numbers count AMD's generations, not CUDA's.
            capability=(each.major, each.minor) if kind == "cuda" else None,
            uuid=f"GPU-{uuid}" if (uuid := getattr(each, "uuid", None)) else None,
            figures=_torch_figures(each),
        )
        for each in found
    )
    said = f"PyTorch sees no GPU: {_said(told[0].message)}" if told and not seen else ""
    return kind, GpuSource(name=how, gpus=seen, notes=(said,) if said else ())


def _torch_figures(properties: Any) -> DriverFigures:
    """Returns the figures that PyTorch tells; clocks (kHz) and width only from version 2.8 on."""
    chip = str(getattr(properties, "gcnArchName", "")).partition(":")[0]
    count = getattr(properties, "multi_processor_count", None)
    clock = getattr(properties, "clock_rate", None)
    memory_clock = getattr(properties, "memory_clock_rate", None)
    width = getattr(properties, "memory_bus_width", None)
    if count and re.match(r"gfx1\d\d\d", chip):
        count *= 2  # here ROCm counts pairs of compute units
    return DriverFigures(
        multiprocessors=count,
        clock=clock * 1e3 if clock else None,
        memory_rate=memory_rate(memory_clock * 1e3, width) if memory_clock and width else None,
        chip=chip if chip.startswith("gfx") else None,
    )


def memory_rate(clock: float, width: float) -> float:
    """Returns the bytes per second of a memory clock in Hz and a bus of `width` bits: two bits a
    clock on each line."""
    return 2 * clock * width / 8


def _said(failure: object) -> str:
    return shown(" ".join(str(failure).split()), _FIRST_WORDS)


def _nvml() -> GpuSource | None:
    how = "NVML"
    try:
        import pynvml  # type: ignore[import-not-found,unused-ignore]
    except ImportError:
        return None
    try:
        pynvml.nvmlInit()
        seen = tuple(_nvml_seen(pynvml))
    except pynvml.NVMLError as failure:
        return GpuSource(name=how, trouble=f"NVML: {_said(failure)}")
    return GpuSource(name=how, gpus=seen)


def _nvml_seen(nvml: Any) -> Iterator[GpuReading]:
    for index in range(nvml.nvmlDeviceGetCount()):
        try:
            handle = nvml.nvmlDeviceGetHandleByIndex(index)
            name = nvml.nvmlDeviceGetName(handle)
            memory = nvml.nvmlDeviceGetMemoryInfo(handle).total
            major, minor = nvml.nvmlDeviceGetCudaComputeCapability(handle)
            figures = _nvml_figures(nvml, handle, (major, minor))
        except nvml.NVMLError as failure:
            yield GpuReading(trouble=f"NVML: {_said(failure)}")
        else:
            text = name.decode(errors="replace") if isinstance(name, bytes) else name
            yield GpuReading(
                name=printable(text), memory=memory, capability=(major, minor), figures=figures
            )


def _nvml_figures(nvml: Any, handle: Any, capability: tuple[int, int]) -> DriverFigures:
    def told(call: str, *arguments: Any) -> float | None:
        try:
            return float(getattr(nvml, call)(handle, *arguments))
        except (AttributeError, nvml.NVMLError):
            return None

    cores = told("nvmlDeviceGetNumGpuCores")
    clock = told("nvmlDeviceGetMaxClockInfo", getattr(nvml, "NVML_CLOCK_SM", 1))
    memory_clock = told("nvmlDeviceGetMaxClockInfo", getattr(nvml, "NVML_CLOCK_MEM", 2))
    width = told("nvmlDeviceGetMemoryBusWidth")
    of_each = 64 if capability in ((6, 0), (7, 0), (7, 2), (7, 5), (8, 0)) else 128
    return DriverFigures(
        multiprocessors=round(cores / of_each) if cores else None,
        clock=clock * 1e6 if clock else None,
        memory_rate=memory_rate(memory_clock * 1e6, width) if memory_clock and width else None,
    )
