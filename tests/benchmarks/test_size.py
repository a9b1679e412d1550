"""benchmarks/size.py: the figures of the source, checked on a package made for it."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))
try:
    import size
finally:
    sys.path.remove(str(BENCHMARKS))


def test_counts_lines_functions_and_names_by_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / size.PACKAGE
    for room in ("cost", "plan"):
        (package / room).mkdir(parents=True)
        (package / room / "spec.py").write_text("class Stage:\n    pass\n")
    long = "def walk():\n" + "    pass\n" * 40
    (package / "units.py").write_text("def short():\n    pass\n\n\n" + long)
    monkeypatch.setattr(size, "ROOT", tmp_path)

    rooms = size.measure(None)

    assert size.figures(rooms["cost"]) == (1, 2, 0, 0, 1)
    assert size.figures(rooms["top level"]) == (1, 45, 2, 1, 0)
    assert size.repeated(rooms, "classes") == ["Stage 2"]
    assert size.repeated(rooms, "modules") == ["spec 2"]
    assert list(size.table(rooms, rooms))[-1].split() == [
        "all", "3", "(3)", "49", "(49)", "2", "(2)", "1", "(1)", "2", "(2)",
    ]  # fmt: skip
