"""Faults are planted one at a time, in copies, and those that no test notices are named."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest
from test_resharding import BENCHMARKS, load

mutations = load("mutations")

SOURCE = '''\
"""A limit: 1 + 1."""
LIMIT = 3


def held(a: int = 0, *, strict: bool = False) -> int:
    """Returns 2 * a, if that is not more than the limit."""
    assert a > 0, "1 + 1"
    if 2 * a <= LIMIT and a not in (7, 9):
        return min(a, LIMIT, key=lambda each: -each)
    return list(zip([a], "b" + f"{a + 1}", strict=True))[0][0]
'''
FAULTS = [
    (0, "LIMIT = 3", "LIMIT = 4"),
    (0, "a: int=0, *, strict: bool=False", "a: int=0, *, strict: bool=True"),
    (0, "a: int=0, *, strict: bool=False", "a: int=1, *, strict: bool=False"),
    (8, "2 * a <= LIMIT and a not in (7, 9)", "2 * a <= LIMIT or a not in (7, 9)"),
    (8, "2 * a <= LIMIT", "2 * a < LIMIT"),
    (8, "2 * a", "2 / a"),
    (8, "2 * a", "3 * a"),
    (8, "a not in (7, 9)", "a in (7, 9)"),
    (8, "(7, 9)", "(8, 9)"),
    (8, "(7, 9)", "(7, 10)"),
    (9, "min(a, LIMIT, key=lambda each: -each)", "max(a, LIMIT, key=lambda each: -each)"),
    (9, "-each", "each"),
]
"""Lines of statements that calls run, and what is planted there."""


def test_faults_are_planted_in_what_is_computed_and_in_no_text_or_check_of_ours() -> None:
    found = [(each.statement, each.old, each.new) for each in mutations.mutations(SOURCE, "a.py")]
    assert found[: len(FAULTS)] == FAULTS
    rest = {(statement, new) for statement, _, new in found[len(FAULTS) :]}
    assert {statement for statement, _ in rest} == {10}
    assert not any("strict=False" in new or " - f" in new or "a - 1" in new for _, new in rest)


def test_a_planted_fault_is_what_its_description_says() -> None:
    whole = ast.unparse(ast.parse(SOURCE))
    described = mutations.mutations(SOURCE, "a.py")
    for number, each in enumerate(described):
        changed = ast.unparse(mutations.planted(SOURCE, number))
        assert changed != whole
        assert each.new in changed
    assert len({each.key for each in described}) == len(described)


PROJECT = {
    "pyproject.toml": """\
[tool.pytest.ini_options]
testpaths = ["tests"]
markers = ["slow: s"]
""",
    "src/shop/prices/vat.py": '''\
"""Sums of money."""
RATE = 2


def gross(net):
    """Adds a tax to what is above ten."""
    if net > 10:
        return net + RATE
    return net


def halved(net):
    """Nobody asks for this."""
    return net / 2


def emptied(purse):
    """Takes coin by coin."""
    while purse > 0:
        purse = purse - 1
    return purse
''',
    "src/shop/sales/till.py": '''\
"""Sells."""
from shop.prices.vat import gross


def bill(nets):
    """Sums up."""
    return sum(map(gross, nets)) if nets or True else None
''',
    "tests/prices/test_vat.py": """\
from shop.prices.vat import emptied, gross


def test_gross():
    assert (gross(5), gross(20)) == (5, 22)


def test_emptied():
    assert emptied(3) == 0
""",
    "tests/sales/test_till.py": """\
import pytest
from shop.sales.till import bill


def test_bill():
    assert bill([1, 11]) == 14


@pytest.mark.slow
def test_empty_bill():
    assert bill([]) == 0
""",
}


@pytest.mark.heavy
@pytest.mark.slow
def test_what_becomes_of_faults_is_counted_by_room_and_survivors_are_named(tmp_path: Path) -> None:
    """One fault is noticed by another room alone, one makes a loop endless, a function is not run,
    and the fault at the boundary of a comparison is seen by no test."""
    for name, text in PROJECT.items():
        (tmp_path / "shop" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "shop" / name).write_text(text)
    command = [sys.executable, str(BENCHMARKS / "mutants.py"), "--tree", "shop", "--work", "work"]
    options = ["--package", "shop", "--rooms", "prices", "sales", "--selection", "not slow"]
    environment = {**os.environ, "PYTHONPATH": ""}
    before = sorted((tmp_path / "shop").rglob("*"))

    def run() -> list[str]:
        done = subprocess.run(
            [*command, *options], cwd=tmp_path, env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        return done.stdout.splitlines()

    told = run()
    survivors = {line.partition("  (")[0] for line in told if " -> " in line}
    assert survivors == {
        "prices/vat.py:7: net > 10 -> net >= 10",
        "prices/vat.py:14: net / 2 -> net * 2",
        "prices/vat.py:14: net / 2 -> net / 3",
        "sales/till.py:7: nets or True -> nets or False",
        "sales/till.py:7: nets or True -> nets and True",
    }
    prices, sales, both = (line.split() for line in told[-4:-1])
    assert prices == ["prices", "10", "6", "1", "3", "0", "70.0%"]
    assert sales == ["sales", "2", "0", "0", "2", "0", "0.0%"]
    assert both[:2] == ["all", "12"]
    assert sorted((tmp_path / "shop").rglob("*")) == before
    assert run()[-4:-1] == told[-4:-1], "what is known is read from the results"
