"""A longer search has more of every allowance."""

import ast
from importlib import import_module
from pathlib import Path

import pytest

LONGER = Path(__file__).parents[2] / "benchmarks" / "longer.py"


def allowances():
    """The list in the script, which imports too much to be loaded here."""
    for node in ast.parse(LONGER.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.AnnAssign) and getattr(node.target, "id", "") == "ALLOWANCES":
            return ast.literal_eval(node.value)
    raise AssertionError("benchmarks/longer.py has no ALLOWANCES")


@pytest.mark.parametrize(("module", "name", "power"), allowances())
def test_every_allowance_is_a_number_of_the_search(module, name, power):
    value = getattr(import_module(f"meshwright.search.{module}"), name)
    assert all(isinstance(each, int) for each in (value if isinstance(value, tuple) else (value,)))
    assert 0 < power <= 1
