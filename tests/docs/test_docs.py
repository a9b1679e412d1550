"""The pages say what the code says."""

from __future__ import annotations

import json
import re
import runpy
import tomllib
from pathlib import Path

import pytest

from meshwright.cluster.files import cluster_from
from meshwright.cluster.spec import devices_of
from meshwright.errors import PlanError
from meshwright.model.files import from_table
from meshwright.model.load import load_model
from meshwright.plan.spec import Plan
from meshwright.records import parse

ROOT = Path(__file__).parents[2]
PAGES = sorted((ROOT / "docs").glob("*.md"))
generated = runpy.run_path(str(ROOT / "docs" / "generate.py"))["generated"]


@pytest.mark.parametrize("page", [ROOT / "README.md", *PAGES], ids=lambda path: path.name)
def test_generated_parts_are_up_to_date(page: Path) -> None:
    """Otherwise: python docs/generate.py"""
    text = page.read_text(encoding="utf-8")
    assert generated(text) == text


@pytest.mark.parametrize("page", [*PAGES, *ROOT.glob("*.md")], ids=lambda path: path.name)
def test_links_lead_somewhere(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", text):
        if "://" not in target:
            assert (page.parent / target).exists(), target
    anchors = {
        re.sub(r"[^\w\- ]", "", title.lower()).strip().replace(" ", "-")
        for title in re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    }
    for anchor in re.findall(r"\]\(#([^)]+)\)", text):
        assert anchor in anchors, anchor


def _example(page: str, language: str) -> str:
    """The first example of a language on a page."""
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    found = re.search(rf"```{language}\n(.*?)```", text, re.DOTALL)
    assert found
    return found[1]


def test_the_examples_are_read_as_they_stand() -> None:
    cluster = cluster_from(tomllib.loads(_example("cluster.md", "toml")), source="cluster.md")
    assert len(devices_of(cluster)) == 16
    table = tomllib.loads(_example("model.md", "toml"))
    model = from_table(table, "model.md", sequence=1, precision="fp32")
    assert [layer.name for layer in model.layers] == ["enc0", "enc1", "enc2", "dec"]
    data = json.loads(_example("plan.md", "json"))
    plan = parse(data, Plan, source="plan.md", error=PlanError)
    gpt2 = load_model(plan.model.source, plan.job.sequence, plan.job.precision)
    assert plan.pipelines[0].stages[-1].layers[1] == len(gpt2.layers)


def test_every_page_is_in_the_menu() -> None:
    menu = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    assert set(re.findall(r"(\S+\.md)$", menu, re.MULTILINE)) == {page.name for page in PAGES}
