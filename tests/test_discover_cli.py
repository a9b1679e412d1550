"""`meshwright discover` as it is typed: files, words on stderr, exit statuses."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from meshwright import cli
from meshwright.cluster import host
from meshwright.cluster.files import load_cluster

BROKEN = "#!/bin/sh\necho 'Failed to initialize NVML: Unknown Error'\nexit 255\n"
HALF = """#!/bin/sh
case "$*" in
*compute_cap*) echo 'NVIDIA L4, 23034, 8.9'; echo 'NVIDIA L4, [GPU is lost], [GPU is lost]';;
*) exit 3;;
esac
"""


@pytest.fixture
def said(tmp_path, monkeypatch, capsys):
    """Runs the verb in an empty folder of a machine that shows nothing but its `nvidia-smi`."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    for name, nothing in (("_torch", None), ("_nvml", None)):
        monkeypatch.setattr(host, name, lambda nothing=nothing: nothing)
    monkeypatch.setattr(host, "_file", lambda _: "")
    monkeypatch.setattr(host, "_entries", lambda _: ())

    def run(*line: str) -> tuple[object, str, str]:
        monkeypatch.setattr(sys, "argv", ["meshwright", "discover", *line])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        told = capsys.readouterr()
        return ended.value.code, told.out, told.err

    return run


def nvidia_smi(program: str) -> None:
    path = Path("bin/nvidia-smi")
    path.parent.mkdir()
    path.write_text(program)
    path.chmod(0o755)


def kinds(path: str) -> tuple[str, ...]:
    return load_cluster(path).nodes[0].devices


@pytest.mark.heavy
def test_a_broken_tool_ends_in_an_error_that_names_the_way_to_the_cores(said) -> None:
    nvidia_smi(BROKEN)
    status, out, err = said()
    assert (status, out) == (cli.MISTAKE, "")
    assert err.startswith("MachineError:\nnvidia-smi: found nvidia-smi ended with exit status 255")
    assert "Unknown Error" in err
    assert not Path("cluster.toml").exists()
    assert "meshwright discover --cpus" in err
    assert said("--cpus") == (0, "wrote cluster.toml\n", "")
    assert set(kinds("cluster.toml")) == {"cpu"}


@pytest.mark.heavy
def test_gpus_that_can_be_read_are_taken_when_that_is_asked_for(said) -> None:
    nvidia_smi(HALF)
    status, _, err = said()
    assert status == cli.MISTAKE
    assert "meshwright discover --partial" in err
    status, out, err = said("--partial", "-o", "some.toml")
    assert (status, out) == (0, "wrote some.toml\n")
    assert "note: LEFT OUT, as asked: nvidia-smi: NVIDIA L4, [GPU is lost], [GPU is lost]" in err
    assert kinds("some.toml") == ("L4",)
    assert "# LEFT OUT" in Path("some.toml").read_text()


def test_hosts_are_put_together(said) -> None:
    assert said("-o", "a.toml")[0] == 0
    text = Path("a.toml").read_text()
    name = load_cluster("a.toml").nodes[0].name
    Path("b.toml").write_text(text.replace(f'"{name}"', '"other"'))
    assert said("--merge", "a.toml", "b.toml", "-o", "both.toml") == (0, "wrote both.toml\n", "")
    assert [node.name for node in load_cluster("both.toml").nodes] == [name, "other"]
    status, out, _ = said("--merge", "a.toml", "b.toml", "-o", "/dev/stdout")
    assert status == 0
    assert "wrote" not in out


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("--merge", "found no file"),
        ("a.toml", "found with files; wanted"),
        ("--merge a.toml --cpus", "found with --cpus or --partial"),
        ("--merge a.toml -o ./a.toml", "a.toml, which is merged"),
        ("--merge none.toml", "none.toml: found no such file"),
    ],
)
def test_options_that_make_no_sense_are_refused(said, line: str, words: str) -> None:
    assert said("-o", "a.toml")[0] == 0
    status, out, err = said(*line.split())
    assert (status, out) == (cli.MISTAKE, "")
    assert words in err
    assert not Path("cluster.toml").exists()
