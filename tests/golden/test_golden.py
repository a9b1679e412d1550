"""Moving and renaming changes nothing: 30 plans, their programs, steps and memory stay as they are.

A commit that means to change a price, a program or the search writes them anew by `artefacts.py`.
"""

from __future__ import annotations

import json

import pytest
from artefacts import CASES, DIGESTS, digests, find, plan_file, texts

from meshwright.records import dumps


@pytest.mark.parametrize(("cluster", "model"), CASES)
def test_program_step_and_memory_of_a_plan_are_as_they_were(cluster: str, model: str) -> None:
    kept = json.loads(DIGESTS.read_text(encoding="utf-8"))[f"{cluster}.{model}"]
    assert digests(texts(cluster, model)) == kept


@pytest.mark.slow
@pytest.mark.parametrize(("cluster", "model"), CASES)
def test_the_search_finds_the_plan_that_it_found(cluster: str, model: str) -> None:
    assert dumps(find(cluster, model)) == plan_file(cluster, model).read_text(encoding="utf-8")
