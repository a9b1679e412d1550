"""What `make` and CI rely on."""

from __future__ import annotations

import os
import re
import tomllib
from pathlib import Path

import meshwright

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def _pins() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    return dict(line.partition(" ;")[0].split("==") for line in lines)


def test_constraints_hold_names_and_versions_only() -> None:
    """`+cpu` exists on no registry, and an address belongs to one machine."""
    text = (ROOT / "constraints.txt").read_text()
    assert "+" not in text
    assert "://" not in text


def test_every_dependency_is_pinned() -> None:
    wanted = [
        *PROJECT["project"]["dependencies"],
        *PROJECT["dependency-groups"]["dev"],
        *PROJECT["dependency-groups"]["docs"],
    ]
    names = {re.match(r"[A-Za-z0-9_-]+", each)[0].lower() for each in wanted}
    assert names <= set(_pins())


def test_torch_has_one_pin() -> None:
    assert PROJECT["tool"]["uv"]["constraint-dependencies"] == [f"torch=={_pins()['torch']}"]


def test_one_version_everywhere() -> None:
    version = PROJECT["project"]["version"]
    assert meshwright.__version__ == version
    assert f"version: {version}\n" in (ROOT / "CITATION.cff").read_text()
    assert f"## {version}" in (ROOT / "CHANGELOG.md").read_text()


def test_ci_can_be_started() -> None:
    assert os.access(ROOT / ".ci" / "run", os.X_OK)
