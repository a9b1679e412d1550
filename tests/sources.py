"""The Python files of the repository, each read and parsed once for all tests that look into it."""

import ast
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src"
PACKAGE = SOURCE / "meshwright"


def files_below(folder: Path) -> list[Path]:
    """Gives all Python files of a folder and those inside it, in the order of their names."""
    return sorted(folder.rglob("*.py"))


@cache
def text_of(file: Path) -> str:
    """Reads a file."""
    return file.read_text(encoding="utf-8")


@cache
def tree_of(file: Path) -> ast.Module:
    """Parses a file."""
    return ast.parse(text_of(file))
