"""Defines the verb `discover`, which describes this machine or merges the files of several.

Heavy imports are inside the functions.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from meshwright.cli.options import app, check_outputs, say


@app.command()
def discover(
    given: Annotated[
        list[Path] | None,
        typer.Argument(metavar="FILES", help="With --merge: the cluster files of the hosts."),
    ] = None,
    merge: Annotated[
        bool, typer.Option("--merge", help="Merge the cluster files of several hosts.")
    ] = False,
    cpus: Annotated[
        bool, typer.Option("--cpus", help="Take the processor's cores, and look for no GPU.")
    ] = False,
    partial: Annotated[
        bool, typer.Option("--partial", help="Leave out the GPUs that cannot be read.")
    ] = False,
    output: Annotated[Path, typer.Option("--output", "-o", help="Where to write it.")] = Path(
        "cluster.toml"
    ),
) -> None:
    """Describe this machine as a cluster file; with --merge, join the files of several machines.

    The file lists every GPU of the machine. If one cannot be read, an error says which and why, and
    nothing is written.
    """
    from meshwright import files
    from meshwright.errors import OptionError, Problem

    check_outputs(output)
    if merge or given:
        if not merge or cpus or partial:
            found = "with files" if given and not merge else "with --cpus or --partial"
            wanted = "files with --merge, and neither --cpus nor --partial beside it"
            raise OptionError(Problem("--merge", "", found, wanted))
        text, notes = _merged(given or [], output)
    else:
        text, notes = _described(cpus=cpus, partial=partial)
    files.write_text(output, text)
    for note in notes:
        say(f"note: {note}", to_errors=True)
    say(f"wrote {output}", to_errors=str(output).startswith("/dev/"))


def _described(*, cpus: bool, partial: bool) -> tuple[str, tuple[str, ...]]:
    from meshwright.cluster.discover import discover_toml, read_hardware

    found = read_hardware(cpus=cpus, partial=partial)
    return discover_toml(found), found.notes


def _merged(given: list[Path], output: Path) -> tuple[str, tuple[str, ...]]:
    from os.path import realpath

    from meshwright.cluster.merge import merged_toml
    from meshwright.errors import OptionError, Problem

    if not given:
        raise OptionError(Problem("--merge", "", "no file", "a cluster file of every host"))
    if realpath(output) in map(realpath, given):
        mend = "choose another name with -o"
        raise OptionError(Problem("--output", "", f"{output}, which is merged", "a new file", mend))
    return merged_toml(given)
