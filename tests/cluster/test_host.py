"""Tools as they are asked: those that fail, hang, cannot be started or print nonsense."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from meshwright.cluster.discover import describe, look
from meshwright.cluster.host import Host, this_host
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
        look(host)
    return str(caught.value)


def test_an_old_driver_is_asked_again_without_the_field(with_tool: Tools) -> None:
    cluster, _ = describe(look(with_tool(OLD_DRIVER)))
    assert cluster.nodes[0].devices == ("V100-32", "V100-32")


def test_a_tool_that_hangs_is_left_with_its_children_and_not_asked_again(
    with_tool: Tools, tmp_path: Path
) -> None:
    pid = tmp_path / "pid"
    host = with_tool(f"#!/bin/sh\nsleep 600 &\necho $! >> {pid}\nwait\n")
    began = time.monotonic()
    assert "no answer from nvidia-smi in time" in refused(host)
    assert time.monotonic() - began < 5
    (child,) = pid.read_text().split()
    status = Path(f"/proc/{child}/stat")
    assert not status.exists() or status.read_text().rpartition(")")[2].split()[0] == "Z"


def test_a_tool_that_never_stops_writing_is_not_read_to_its_end(with_tool: Tools) -> None:
    host = replace(with_tool("#!/bin/sh\nexec yes Tesla T4, 15360\n"), run=this_host(60).run)
    began = time.monotonic()
    assert "one without end" in refused(host)
    assert time.monotonic() - began < 20


def test_windows_line_ends_are_read(with_tool: Tools) -> None:
    """As from nvidia-smi.exe, called from Linux."""
    program = "#!/bin/sh\ncase $1 in --query*cap*) printf 'Tesla T4, 15360, 7.5\\r\\n';; esac\n"
    assert [gpu.name for gpu in look(with_tool(program)).gpus] == ["Tesla T4"]


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
