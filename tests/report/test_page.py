"""The page stands alone, says what it was given, and is the same every time."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import pytest
import steps_on_paper as paper
from hypothesis import given
from hypothesis import strategies as st

from meshwright.cluster.spec import DirectLink, Link, Site
from meshwright.plan.spec import Pipeline, Stage
from meshwright.report.charts import loss_svg, ticks
from meshwright.report.page import Rival, report_html, write_report
from meshwright.report.palette import KINDS, ink_on, stage_colours
from meshwright.report.plan_drawing import layers_text, plan_svg
from meshwright.simulate.compare_timelines import compare_timelines

_RIVALS = (
    Rival(name="even plan", predicted_seconds=0.015, measured_seconds=0.016),
    Rival(name="plan found", predicted_seconds=0.0073, measured_seconds=0.008),
)
_VOID = {"meta", "link", "br", "hr", "img", "input"}


def _page(*, full: bool = True) -> str:
    return report_html(
        paper.plan(),
        paper.cluster(),
        paper.model(),
        predicted=paper.timeline(),
        measured=paper.measured() if full else None,
        losses={"even plan": (3.0, 2.0, 1.5), "plan found": (3.0, 2.0, 1.5)} if full else {},
        rivals=_RIVALS if full else (),
    )


def test_a_comparison_names_every_operation() -> None:
    compared = compare_timelines(paper.timeline(), paper.measured())
    page = report_html(
        paper.plan(),
        paper.cluster(),
        paper.model(),
        predicted=paper.timeline(),
        measured=paper.measured(),
        losses={},
        rivals=(),
        comparison=compared,
    )
    assert compared.kinds
    assert all(f"<code>{each.op}</code>" in page for each in compared.kinds)


class _Balance(HTMLParser):
    """Every tag that opens closes, in order."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.texts: list[str] = []

    def handle_starttag(self, tag: str, attrs: object) -> None:  # noqa: ARG002
        if tag not in _VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: object) -> None:
        """`<path/>` opens nothing."""

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


@pytest.mark.parametrize("full", [True, False])
def test_the_page_is_well_formed(full: bool) -> None:
    parser = _Balance()
    parser.feed(_page(full=full))
    assert parser.open == []


@pytest.mark.parametrize("full", [True, False])
def test_the_page_needs_nothing_from_outside(full: bool) -> None:
    page = _page(full=full)
    for way_out in ("://", "src=", "href=", "@import", "url(", "fetch(", "<link", "<iframe"):
        assert way_out not in page


def test_the_same_inputs_make_the_same_bytes(tmp_path: Path) -> None:
    paths = [tmp_path / name for name in ("a.html", "b.html")]
    for path in paths:
        write_report(path, paper.plan(), paper.cluster(), paper.model(), predicted=paper.timeline())
    assert paths[0].read_bytes() == paths[1].read_bytes()


def test_the_page_says_what_it_was_given() -> None:
    parser = _Balance()
    parser.feed(_page())
    text = " ".join("".join(parser.texts).split())
    for expected in (
        "tiny on pair: a step takes 8 ms, or 32,000 tokens/s",
        "as fast as the even plan",
        "2.00×",
        "embedding … blocks.1",
        "does not fit: a:0 needs 40 GiB of 16 GiB",
        "16 candidates were not followed up",
        "0F0 rows=0:1 layers=0:3",
        "b:0 is the fullest device",
    ):
        assert expected in text


def test_without_a_run_the_recorded_step_is_the_measured_one() -> None:
    page = report_html(
        paper.plan(),
        paper.cluster(),
        paper.model(),
        predicted=paper.timeline(),
        measured=paper.measured(),
        losses={},
        rivals=(),
    )
    assert "a step takes 8.03 ms, or 31,880 tokens/s" in page


def test_names_from_files_cannot_become_markup() -> None:
    plan = replace(paper.plan(), name="</script><b>")
    page = report_html(
        plan,
        paper.cluster(),
        paper.model(),
        predicted=paper.timeline(),
        measured=None,
        losses={},
        rivals=(),
    )
    assert "<b>" not in page
    assert page.count("</script>") == 2
    assert "one &lt;device&gt;" in page


def test_both_timelines_are_in_the_page_to_the_nanosecond() -> None:
    found = re.search(r'id="data">(.*?)</script>', _page(), re.DOTALL)
    assert found
    data = json.loads(found[1])
    predicted, measured = data["timelines"]
    assert [t["name"] for t in data["timelines"]] == ["predicted", "measured"]
    assert predicted["end"] == 7300.0
    assert measured["end"] == 8030.0
    kinds = [kind["name"] for kind in data["kinds"]]
    assert [kinds.index("forward"), 0.0, 1000.0, "0F0"] in predicted["ranks"][0]
    assert [kinds.index("send"), 1000.0, 1100.0, "0SEND_F0", 1, 4096] in predicted["ranks"][0]
    assert sum(map(len, measured["ranks"])) == len(paper.measured().intervals)
    assert data["ranks"][1] == {"device": "b:0", "type": "slow", "stage": 1}


def test_the_drawing_is_a_picture_of_its_own() -> None:
    root = ElementTree.fromstring(
        plan_svg(paper.plan(), paper.cluster(), paper.model(), standalone=True)
    )
    words = [element.text or "" for element in root.iter()]
    assert {"a", "b", "160 Gbit/s", "10 Gbit/s"} <= set(words)
    assert sum(word.startswith("stage ") for word in words) == 2
    assert words.count("not used") == 1


def test_the_drawing_shows_sites_and_direct_links() -> None:
    cluster = replace(
        paper.cluster(),
        sites=(Site(name="here"), Site(name="far", uplink=Link(bandwidth=1.25e8))),
        direct=(DirectLink(between=("a", "b"), link=Link(bandwidth=5e9)),),
    )
    far = replace(cluster.nodes[1], site="far")
    svg = plan_svg(paper.plan(), replace(cluster, nodes=(cluster.nodes[0], far)), paper.model())
    assert "site far — uplink 1 Gbit/s" in svg
    assert "direct link a – b: 40 Gbit/s" in svg


def test_a_large_cluster_is_drawn_small() -> None:
    cluster = paper.cluster()
    node = replace(cluster.nodes[1], devices=("slow",) * 8)
    many = tuple(replace(node, name=f"n-{index}") for index in range(100))
    svg = plan_svg(paper.plan(), replace(cluster, nodes=(*cluster.nodes, *many)), paper.model())
    assert svg.count("8 × slow, not used") == 100
    assert len(svg) < 100_000


def test_long_names_of_devices_end_where_their_box_ends() -> None:
    """Fourteen letters fit into a box of a node of five devices."""
    name = "a-card-of-the-longest-name"
    cluster = paper.cluster()
    types = {**cluster.types, name: replace(cluster.types["slow"], name=name)}
    nodes = (cluster.nodes[0], replace(cluster.nodes[1], devices=(name,) * 5))
    svg = plan_svg(paper.plan(), replace(cluster, types=types, nodes=nodes), paper.model())
    assert ">0  a-card-of-…<" in svg
    assert len("0  a-card-of-…") == 14


def test_shares_of_rows_and_layers_are_drawn() -> None:
    wide = Stage(layers=(0, 4), devices=(("a:0", "b:0"), ("b:1", "b:2")), rows=(3, 1))
    plan = replace(
        paper.plan(),
        devices=("a:0", "b:0", "b:1", "b:2"),
        pipelines=(Pipeline(micro_batches=1, rows=4, stages=(wide,)),),
    )
    cluster = paper.cluster()
    nodes = (cluster.nodes[0], replace(cluster.nodes[1], devices=("slow",) * 3))
    svg = plan_svg(plan, replace(cluster, nodes=nodes), paper.model())
    for share in ("0:3 tp 1/2", "0:3 tp 2/2", "3:4 tp 1/2", "3:4 tp 2/2"):
        assert f">{share}<" in svg


def test_runs_of_layers_have_short_names() -> None:
    model = paper.model()
    assert layers_text(model, (1, 3)) == "blocks.0–1"
    assert layers_text(model, (0, 2)) == "embedding … blocks.0"
    assert layers_text(model, (3, 4)) == "head"


def _luminance(colour: str) -> float:
    channels = (int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5))
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return sum(w * c for w, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


@given(st.integers(1, 200))
def test_writing_on_a_stage_can_be_read(count: int) -> None:
    """WCAG 2 asks for a contrast of 4.5."""
    for colour in stage_colours(count):
        ink = _luminance(ink_on(colour))
        low, high = sorted((ink, _luminance(colour)))
        assert (high + 0.05) / (low + 0.05) >= 4.5


@given(st.integers(2, 64))
def test_stages_are_told_apart_by_lightness_alone(count: int) -> None:
    light = [_luminance(colour) for colour in stage_colours(count)]
    assert light == sorted(light)
    assert len(set(light)) == count


def test_every_kind_of_work_has_its_colour() -> None:
    assert len(set(KINDS.values())) == len(KINDS)


@given(st.floats(-1e3, 1e3), st.floats(1e-6, 1e6), st.integers(2, 12))
def test_ticks_are_few_round_and_inside(place: float, span: float, count: int) -> None:
    """`place` is where the axis begins, in spans: a loss never stands still to nine digits."""
    low, high = place * span, (place + 1) * span
    marks = ticks(low, high, count)
    assert len(marks) <= count + 1
    slack = 1e-6 * span
    assert all(low - slack <= mark <= high + slack for mark in marks)


def test_a_loss_that_is_not_a_number_leaves_the_rest_of_the_curve() -> None:
    svg = loss_svg({"run": (2.0, float("nan"), 1.0)})
    points = re.search(r'points="([^"]*)"', svg)
    assert points
    assert len(points[1].split()) == 2
    assert "nan" not in points[1]


def test_a_curve_falls_evenly_between_the_edges_of_its_axes() -> None:
    """The axes are at 52 and 624 across, and at 14 and 226 down, with a margin of a twentieth."""
    svg = loss_svg({"run": (5.0, 4.0, 3.0)})
    points = re.search(r'points="([^"]*)"', svg)
    assert points
    places = [tuple(map(float, each.split(","))) for each in points[1].split()]
    assert [x for x, _ in places] == [52.0, 338.0, 624.0]
    edge = 212 * 0.05 / 1.1
    assert [y for _, y in places] == pytest.approx([14 + edge, 120.0, 226 - edge], abs=0.1)


def _rectangles(svg: str) -> list[tuple[str, tuple[float, float, float, float]]]:
    """Kind and edges (left, top, right, bottom) of the site's, the nodes' and the devices'."""
    found = []
    for element in ElementTree.fromstring(svg).iter():
        if element.tag.endswith("rect") and element.get("height") != "3":
            x, y, width, height = (float(element.attrib[k]) for k in ("x", "y", "width", "height"))
            kind = element.get("class", "device").replace("unused", "device")
            found.append((kind, (x, y, x + width, y + height)))
    return found


@pytest.mark.parametrize("devices", [1, 2, 5, 8, 21])
def test_devices_stand_side_by_side_in_their_nodes_and_these_in_the_picture(devices: int) -> None:
    cluster = paper.cluster()
    nodes = (cluster.nodes[0], replace(cluster.nodes[1], devices=("slow",) * devices))
    idle = replace(nodes[1], name="a node with a long name", devices=("slow",) * 3)
    sites = (Site(name="here"), Site(name="far"))
    spread = (*nodes, replace(idle, site="far"), replace(idle, site="far", name="idle"))
    svg = plan_svg(paper.plan(), replace(cluster, nodes=spread, sites=sites), paper.model())
    root = ElementTree.fromstring(svg)
    _, _, right, bottom = map(float, root.attrib["viewBox"].split())
    found = _rectangles(svg)
    around = {"site": [(0.0, 0.0, right, bottom)]}
    around["node"] = [edges for kind, edges in found if kind == "site"]
    around["device"] = [edges for kind, edges in found if kind == "node"]
    assert len(around["node"]) == 2
    assert len(around["device"]) == 4
    for kind, edges in found:
        inside = [
            outer
            for outer in around[kind]
            if outer[0] <= edges[0] and outer[1] <= edges[1]
            and edges[2] <= outer[2] and edges[3] <= outer[3]
        ]  # fmt: skip
        assert len(inside) == 1, (kind, edges)
        for other, beside in found:
            if other == kind and beside != edges:
                apart = edges[2] <= beside[0] or beside[2] <= edges[0]
                assert apart or edges[3] <= beside[1] or beside[3] <= edges[1], (edges, beside)
    assert sum(kind == "device" for kind, _ in found) == len(cluster.nodes[0].devices) + devices
    # Seven pixels a letter, and a margin on each side.
    wide = max(float(e.attrib["width"]) for e in root.iter() if e.get("class") == "node")
    assert wide > 7 * len("a node with a long name" + "3 × slow, not used") + 24
