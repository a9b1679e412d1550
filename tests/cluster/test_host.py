"""Tools as they are asked: those that fail, hang, cannot be started or print nonsense."""

from __future__ import annotations

import os
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from actors import gone
from meshwright.cluster import host as host_module
from meshwright.cluster.discover import hardware_cluster, read_hardware
from meshwright.cluster.host import GpuReading, GpuSource, Host, ToolOutput, this_host
from meshwright.errors import MachineError

Tools = Callable[[str], Host]

OLD_DRIVER = """#!/bin/sh
case "$*" in
*compute_cap*) echo 'Field "compute_cap" is not a valid field to query.'; exit 2;;
topo*) exit 1;;
esac
echo 'Tesla V100-SXM2-32GB, 32510'
echo 'Tesla V100-SXM2-32GB, 32510'
"""


@pytest.fixture
def with_tool(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Tools:
    """A host on which `nvidia-smi` is the given program, and that shows nothing else."""

    def make(program: str | bytes) -> Host:
        path = tmp_path / "nvidia-smi"
        path.write_bytes(program if isinstance(program, bytes) else program.encode())
        path.chmod(0o755)
        monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
        return replace(
            this_host(seconds=0.5),
            torch=lambda: None,
            nvml=lambda: None,
            read=lambda _: "",
            names=lambda _: (),
        )

    return make


def refused(host: Host) -> str:
    with pytest.raises(MachineError) as caught:
        read_hardware(host)
    return str(caught.value)


@pytest.mark.heavy
def test_an_old_driver_is_asked_again_without_the_field(with_tool: Tools) -> None:
    cluster, _ = hardware_cluster(read_hardware(with_tool(OLD_DRIVER)))
    assert cluster.nodes[0].devices == ("V100-32", "V100-32")


@pytest.mark.heavy
def test_a_tool_that_hangs_is_left_with_its_children_and_not_asked_again(
    with_tool: Tools, tmp_path: Path
) -> None:
    pid = tmp_path / "pid"
    host = with_tool(f"#!/bin/sh\nsleep 600 &\necho $! >> {pid}\nwait\n")
    began = time.monotonic()
    assert "no answer from nvidia-smi in time" in refused(host)
    assert time.monotonic() - began < 5
    (child,) = pid.read_text().split()
    assert gone([int(child)])


@pytest.mark.heavy
def test_a_tool_that_hangs_is_waited_for_once(with_tool: Tools, tmp_path: Path) -> None:
    asked = tmp_path / "asked"
    host = with_tool(f"#!/bin/sh\necho $1 >> {asked}\nexec sleep 600\n")
    cards = GpuSource(
        name="PyTorch", gpus=(GpuReading(name="NVIDIA L4", memory=23034 * 2**20),) * 2
    )
    found = read_hardware(replace(host, torch=lambda: ("cuda", cards)))
    assert hardware_cluster(found)[0].nodes[0].devices == ("L4", "L4")
    assert any("no answer from nvidia-smi" in note for note in found.notes)
    assert len(asked.read_text().split()) == 1


@pytest.mark.heavy
def test_a_tool_that_never_stops_writing_is_not_read_to_its_end(with_tool: Tools) -> None:
    host = replace(with_tool("#!/bin/sh\nexec yes Tesla T4, 15360\n"), run=this_host(60).run)
    began = time.monotonic()
    assert "one without end" in refused(host)
    assert time.monotonic() - began < 20


@pytest.mark.heavy
def test_windows_line_ends_are_read(with_tool: Tools) -> None:
    """As from nvidia-smi.exe, called from Linux."""
    program = "#!/bin/sh\ncase $1 in --query*cap*) printf 'Tesla T4, 15360, 7.5\\r\\n';; esac\n"
    assert [gpu.name for gpu in read_hardware(with_tool(program)).gpus] == ["Tesla T4"]


@pytest.mark.heavy
@pytest.mark.parametrize(
    ("program", "words"),
    [
        ("#!/bin/sh\nkill -SEGV $$\n", "exit status -11 and said: nothing"),
        (
            "#!/bin/sh\necho out; echo to errors >&2; exit 9\n",
            "exit status 9 and said: out to errors",
        ),
        ("#!/bin/sh\nprintf 'A\\377B\\033[2J, 1024\\n, , ,'\n", "not understood"),
        ("#!/bin/sh\n", "exit status 0 and said: nothing"),
        ("#!/nowhere/at/all\n", "could not be started"),
        (b"\x7fELF\0\0\0", "could not be started"),
    ],
)
def test_a_tool_that_fails_is_never_a_machine_without_gpus(
    with_tool: Tools, program: str | bytes, words: str
) -> None:
    told = refused(with_tool(program))
    assert words in told
    assert "meshwright discover --cpus" in told
    assert "\x1b" not in told


def torch_with(*gpus: SimpleNamespace, cuda: str | None = "12.8", hip: str | None = None):
    """A PyTorch that sees some GPUs, if it is asked as the real one is."""

    def properties(index: int) -> SimpleNamespace:
        if isinstance(gpus[index], Exception):
            raise gpus[index]
        return gpus[index]

    def is_available() -> bool:
        if not gpus:
            warnings.warn("The driver is too old", stacklevel=1)
        return bool(gpus)

    return SimpleNamespace(
        version=SimpleNamespace(cuda=cuda, hip=hip),
        cuda=SimpleNamespace(
            is_available=is_available,
            device_count=lambda: len(gpus),
            get_device_properties=properties,
        ),
    )


CARD = SimpleNamespace(name="NVIDIA L4", total_memory=22 * 2**30, major=8, minor=9, uuid="5a10")


@pytest.mark.parametrize(
    ("torch", "seen"),
    [
        (
            torch_with(CARD),
            (
                "cuda",
                GpuReading(
                    name="NVIDIA L4", memory=22 * 2**30, capability=(8, 9), uuid="GPU-5a10"
                ),
            ),
        ),
        (
            torch_with(SimpleNamespace(name="AMD\x1b", total_memory=9, major=9, minor=4), cuda=None,
                       hip="6.2"),
            ("rocm", GpuReading(name="AMD\\x1b", memory=9)),
        ),
    ],
)  # fmt: skip
def test_pytorch_is_asked_for_what_it_sees(monkeypatch, torch, seen) -> None:
    monkeypatch.setitem(sys.modules, "torch", torch)
    assert this_host().torch() == (seen[0], GpuSource(name="PyTorch", gpus=(seen[1],)))


def test_what_pytorch_says_instead_is_kept(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", torch_with())
    note = "PyTorch sees no GPU: The driver is too old"
    assert this_host().torch() == ("cuda", GpuSource(name="PyTorch", notes=(note,)))
    monkeypatch.setitem(sys.modules, "torch", torch_with(RuntimeError("CUDA error:\nlost")))
    assert this_host().torch() == (
        "cuda",
        GpuSource(name="PyTorch", trouble="PyTorch: CUDA error: lost"),
    )
    monkeypatch.setitem(sys.modules, "torch", torch_with(CARD, cuda=None))
    assert this_host().torch() is None
    monkeypatch.setitem(sys.modules, "torch", None)
    assert this_host().torch() is None


def test_a_pytorch_that_cannot_be_imported_is_no_gpu_that_cannot_be_read(
    monkeypatch, tmp_path: Path
) -> None:
    (tmp_path / "torch.py").write_text("raise ImportError('libcudart.so.12: not\\nfound')")
    monkeypatch.delitem(sys.modules, "torch", raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    note = "PyTorch cannot be imported: libcudart.so.12: not found"
    assert this_host().torch() == ("cuda", GpuSource(name="PyTorch", notes=(note,)))


class NVMLError(Exception):
    """As the bindings raise it."""


def nvml_with(*names: str | bytes | None, starts: bool = True) -> SimpleNamespace:
    def start() -> None:
        if not starts:
            raise NVMLError("Driver Not Loaded")

    def name_of(handle: int) -> str | bytes:
        name = names[handle]
        if name is None:
            raise NVMLError("GPU is lost")
        return name

    return SimpleNamespace(
        NVMLError=NVMLError,
        nvmlInit=start,
        nvmlDeviceGetCount=lambda: len(names),
        nvmlDeviceGetHandleByIndex=lambda index: index,
        nvmlDeviceGetName=name_of,
        nvmlDeviceGetMemoryInfo=lambda _: SimpleNamespace(total=2**34),
        nvmlDeviceGetCudaComputeCapability=lambda _: (8, 6),
    )


def test_nvidia_s_library_is_asked_where_python_has_it(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", nvml_with("RTX A4000", b"RTX A4000", None))
    known = GpuReading(name="RTX A4000", memory=2**34, capability=(8, 6))
    lost = GpuReading(trouble="NVML: GPU is lost")
    assert this_host().nvml() == GpuSource(name="NVML", gpus=(known, known, lost))
    monkeypatch.setitem(sys.modules, "pynvml", nvml_with(starts=False))
    assert this_host().nvml() == GpuSource(name="NVML", trouble="NVML: Driver Not Loaded")
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert this_host().nvml() is None


def test_a_control_group_bounds_the_memory_of_the_host(monkeypatch) -> None:
    whole = this_host().memory
    for place, text, memory in (
        ("/sys/fs/cgroup/memory.max", "1073741824\n", 2**30),
        ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "1073741824\n", 2**30),
        ("/sys/fs/cgroup/memory.max", "max\n", None),
    ):
        files = {place: text}
        monkeypatch.setattr(host_module, "_file", lambda path, files=files: files.get(path, ""))
        assert this_host().memory == (memory or max(whole, this_host().memory))


@pytest.mark.parametrize(
    ("called", "name"),
    [("gpu-7.example.org", "gpu-7"), ("a b\x1b", "a-b"), ("-.org", "machine"), ("", "machine")],
)
def test_a_host_s_name_can_stand_in_a_cluster_file(monkeypatch, called: str, name: str) -> None:
    monkeypatch.setattr(host_module.socket, "gethostname", lambda: called)
    assert this_host().name == name


def test_only_the_first_words_of_a_long_answer_are_told() -> None:
    words = ToolOutput(tool="tool", text="word \n" * 100, status=3).summary
    assert words.startswith("tool ended with exit status 3 and said: word word word")
    assert words.endswith(" ...")
    assert len(words) < 250
    short = ToolOutput(tool="tool", text="one\n", errors="two", status=3).summary
    assert short == "tool ended with exit status 3 and said: one two"
