"""Profiles that cannot be true, or are of something else, are refused with every mistake named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from meshwright.cost.profile import Profile, check_profile, load_profile
from meshwright.errors import ProfileError
from meshwright.records import dumps, parse
from worlds import even_model, one_node

ENTRY = {
    "device": "g",
    "signature": "s",
    "precision": "fp32",
    "tensor": 1,
    "rows": 2,
    "forward_seconds": 0.1,
    "backward_seconds": 0.2,
}
OPTIMIZER = {"device": "g", "optimizer": "adamw", "seconds_per_parameter": 1e-9}
GOOD = {"model": "even", "sequence": 1, "layers": [ENTRY], "optimizers": [OPTIMIZER]}


def read(tmp_path: Path, data: dict[str, Any]) -> Profile:
    path = tmp_path / "profile.json"
    path.write_text(json.dumps(data))
    return load_profile(path)


def test_a_good_profile_is_read_back_and_accepted(tmp_path: Path) -> None:
    profile = read(tmp_path, GOOD)
    (tmp_path / "again.json").write_text(dumps(profile))
    assert load_profile(str(tmp_path / "again.json")) == profile
    check_profile(profile, even_model(2), one_node(1))


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"layers": [{**ENTRY, "forward_seconds": -1.0}]}, "layers[0].forward_seconds"),
        ({"layers": [{**ENTRY, "forward_seconds": 0.0}]}, "layers[0].forward_seconds"),
        ({"layers": [{**ENTRY, "backward_seconds": float("nan")}]}, "layers[0].backward_seconds"),
        ({"layers": [{**ENTRY, "backward_seconds": float("inf")}]}, "layers[0].backward_seconds"),
        ({"layers": [ENTRY, {**ENTRY, "rows": 0}]}, "layers[1].rows"),
        ({"layers": [{**ENTRY, "tensor": 0}]}, "layers[0].tensor"),
        ({"layers": [{**ENTRY, "spread": -0.1}]}, "layers[0].spread"),
        ({"layers": [{**ENTRY, "precision": "int8"}]}, "layers[0].precision"),
        ({"layers": [{"device": "g"}]}, "layers[0].signature"),
        (
            {"optimizers": [{**OPTIMIZER, "seconds_per_parameter": 0.0}]},
            "optimizers[0].seconds_per_parameter",
        ),
        (
            {"optimizers": [{**OPTIMIZER, "overhead_seconds": -1.0}]},
            "optimizers[0].overhead_seconds",
        ),
        ({"links": {"network": {"bandwidth": 0.0}}}, "links.network.bandwidth"),
        ({"links": {"site": {"bandwidth": 1.0, "latency": -1.0}}}, "links.site.latency"),
        ({"links": {"all_reduce_latency": -1e-6}}, "links.all_reduce_latency"),
        ({"step_overhead_seconds": -1.0}, "step_overhead_seconds"),
        ({"format": 2}, "format"),
        ({"extra": 1}, "extra"),
    ],
)
def test_nonsense_is_named(tmp_path: Path, change: dict[str, Any], field: str) -> None:
    with pytest.raises(ProfileError) as failure:
        read(tmp_path, {**GOOD, **change})
    assert field in [problem.field for problem in failure.value.problems]


def test_all_mistakes_are_reported_at_once(tmp_path: Path) -> None:
    wrong = {**ENTRY, "forward_seconds": -1.0, "backward_seconds": 0.0, "rows": -3}
    with pytest.raises(ProfileError) as failure:
        read(tmp_path, {**GOOD, "layers": [wrong], "step_overhead_seconds": -1.0})
    assert len(failure.value.problems) == 4


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"model": "other"}, "model"),
        ({"sequence": 2048}, "sequence"),
        ({"layers": [{**ENTRY, "precision": "bf16"}]}, "layers[0].precision"),
        ({"layers": [ENTRY, {**ENTRY, "signature": "x"}]}, "layers[1].signature"),
        ({"layers": [{**ENTRY, "device": "T4"}]}, "layers[].device"),
    ],
)
def test_a_profile_of_something_else_is_refused(change: dict[str, Any], field: str) -> None:
    profile = parse({**GOOD, **change}, Profile, source="p", error=ProfileError)
    with pytest.raises(ProfileError) as failure:
        check_profile(profile, even_model(2), one_node(1))
    assert [problem.field for problem in failure.value.problems] == [field]
    assert all(problem.wanted and problem.mend for problem in failure.value.problems)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ProfileError, match=r"nowhere\.json"):
        load_profile(tmp_path / "nowhere.json")
