"""The size of the source, room by room, and the names that stand in it twice.

    python benchmarks/size.py [--baseline COMMIT]

For each folder of `src/meshwright` it prints files, lines, functions, functions of more than 40
lines and classes; then the names of files and classes that occur more than once. With `--baseline`,
the same figures of another commit of this repository stand beside them.
"""

from __future__ import annotations

import argparse
import ast
import io
import subprocess
import tarfile
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

ROOT = Path(__file__).parents[1]
PACKAGE = PurePosixPath("src/meshwright")
LONG_FUNCTION_LINES = 40


@dataclass
class Room:
    """What one folder of the package holds."""

    files: int = 0
    lines: int = 0
    functions: int = 0
    long_functions: int = 0
    classes: list[str] = field(default_factory=list)
    modules: list[str] = field(default_factory=list)


def sources(commit: str | None) -> Iterator[tuple[PurePosixPath, str]]:
    """Yields path and text of each Python file of the package: of the working tree, or of a
    commit."""
    if commit is None:
        for path in sorted((ROOT / PACKAGE).rglob("*.py")):
            yield PurePosixPath(path.relative_to(ROOT).as_posix()), path.read_text()
        return
    command = ["git", "-C", str(ROOT), "archive", commit, str(PACKAGE)]
    packed = subprocess.run(command, check=True, capture_output=True).stdout
    with tarfile.open(fileobj=io.BytesIO(packed)) as archive:
        for member in archive:
            text = archive.extractfile(member) if member.name.endswith(".py") else None
            if text is not None:
                yield PurePosixPath(member.name), text.read().decode()


def measure(commit: str | None) -> dict[str, Room]:
    """Returns the figures of each room by name; files in no folder count as `top level`."""
    rooms: dict[str, Room] = defaultdict(Room)
    for path, text in sources(commit):
        inside = path.relative_to(PACKAGE).parts
        room = rooms[inside[0] if len(inside) > 1 else "top level"]
        room.lines += len(text.splitlines())
        if path.name != "__init__.py":
            room.files += 1
            room.modules.append(path.stem)
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.ClassDef):
                room.classes.append(node.name)
            elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                room.functions += 1
                length = (node.end_lineno or node.lineno) - node.lineno + 1
                room.long_functions += length > LONG_FUNCTION_LINES
    return dict(rooms)


def figures(room: Room) -> tuple[int, ...]:
    """Returns the columns of one room."""
    return room.files, room.lines, room.functions, room.long_functions, len(room.classes)


def table(now: dict[str, Room], before: dict[str, Room] | None) -> Iterator[str]:
    """Yields the lines of the table; figures of the baseline stand in brackets."""
    heads = ("files", "lines", "functions", "over 40", "classes")
    yield f"{'room':14}" + "".join(f"{head:>18}" for head in heads)
    totals: list[Counter[int]] = [Counter(), Counter()]
    for name in sorted({*now, *(before or {})}):
        pairs = [figures(rooms.get(name, Room())) for rooms in (now, before) if rooms is not None]
        for total, columns in zip(totals, pairs, strict=False):
            total.update(dict(enumerate(columns)))
        yield f"{name:14}" + "".join(map(_cell, zip(*pairs, strict=True)))
    sums = [tuple(total[i] for i in range(len(heads))) for total in totals if total]
    yield f"{'all':14}" + "".join(map(_cell, zip(*sums, strict=True)))


def _cell(values: tuple[int, ...]) -> str:
    now, *before = (f"{value:,}" for value in values)
    return f"{now + ''.join(f' ({each})' for each in before):>18}"


def repeated(rooms: dict[str, Room], kind: str) -> list[str]:
    """Returns the names of classes or modules that occur more than once, with their count."""
    names = Counter(name for room in rooms.values() for name in getattr(room, kind))
    return [f"{name} {count}" for name, count in sorted(names.items()) if count > 1]


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--baseline", metavar="COMMIT", help="stands beside, in brackets")
    options = parser.parse_args()
    now = measure(None)
    print("\n".join(table(now, measure(options.baseline) if options.baseline else None)))
    for kind in ("modules", "classes"):
        print(f"\n{kind} that share a name: {', '.join(repeated(now, kind)) or 'none'}")


if __name__ == "__main__":
    main()
