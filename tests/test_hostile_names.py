"""Names from files stay names: in the code, the settings, the scripts, the pages and the terminals
that they reach, and nothing in them is run."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import tomllib
from dataclasses import dataclass, replace
from functools import lru_cache
from html.parser import HTMLParser
from io import StringIO
from pathlib import Path
from xml.etree import ElementTree

import pytest
import yaml
from hypothesis import example, given, settings
from hypothesis import strategies as st
from rich.console import Console

from meshwright.cluster.files import cluster_from, dump_cluster
from meshwright.cluster.spec import Cluster, DeviceType, DirectLink, Link, Node, Site
from meshwright.cost.links import LinkReport, PairTimes
from meshwright.cost.priced_plan import PricedPlan
from meshwright.errors import ClusterError, PlanError
from meshwright.export.tools import TOOLS, export_files
from meshwright.model.load import load_model
from meshwright.model.spec import LayerGraph
from meshwright.plan.files import load_plan, save_plan
from meshwright.plan.spec import Pipeline, Plan, PlanInput, Prediction, RunnerUp, Stage
from meshwright.program.timeline import Timeline
from meshwright.report.chrome_trace import chrome_trace
from meshwright.report.comparison import print_comparison, write_comparison
from meshwright.report.page import Rival, report_html
from meshwright.report.plan_drawing import plan_svg
from meshwright.report.tables import explain, timeline_summary
from meshwright.report.verification import fitted_links_table, strategies_table
from meshwright.report.whatif import WhatIf, WhatIfOption, print_whatif, whatif_json
from meshwright.simulate.plan_figures import compare_plans, simulate_figures
from meshwright.simulate.simulator import simulate_plan
from meshwright.text import forbidden_character
from soaks import portion
from sources import PACKAGE, files_below, tree_of
from worlds import plan_by_hand

SENTINEL = "meshwright-was-here"
PAYLOADS = (
    f'"""\nimport os; os.system("touch {SENTINEL}")\n"""',
    f"'''\nimport os; os.system('touch {SENTINEL}')\n'''",
    f'\\"""; __import__("os").system("touch {SENTINEL}") #',
    f"n\ntouch {SENTINEL}\n#",
    f"$(touch {SENTINEL})",
    f"`touch {SENTINEL}`",
    f"'; touch {SENTINEL}; '",
    f'"; touch {SENTINEL}; "',
    f"a) ;; *) touch {SENTINEL} ;; b",
    "}; rm -rf x; ${",
    "a: [b, *c]\n- !!python/object/apply:os.system ['id']",
    "*", "?", "-rf", "--help", "%s", "{0}", "\\", '"', "'", "#", "", " ", "a b", "../../x",
    "</script><script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "<!--", "]]>", "{{ 7 * 7 }}", "{% raw %}",
    "[link=https://example.org]here[/link]", "[/bold]", "[red]", ":boom:",
    "\x1b]0;title\x07", "\x1b[2J\x1b[1;1H", "\x9b31m", "\rover", "\u202egnp.exe", "\u2066x",
    "\u2028", "\u200b", "\x7f", "\x00",
)  # fmt: skip
NAMES = st.sampled_from(PAYLOADS) | st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
STEERING = re.compile(r"\x1b\[[0-9;]*m")
"""Colours, which rich writes itself."""


@dataclass(frozen=True)
class World:
    """A plan on its cluster, with its step."""

    plan: Plan
    cluster: Cluster
    model: LayerGraph
    timeline: Timeline


@lru_cache
def model() -> LayerGraph:
    return load_model("llama-tiny", 16, "bf16")


@lru_cache(maxsize=64)
def world(name: str) -> World:
    """One in which everything that a file names has this name; a number tells the nodes apart."""
    kind = DeviceType(
        name=name,
        memory=2**34,
        memory_bandwidth=1e12,
        peak={"fp32": 1e13, "bf16": 1e14},
        source=name,
    )
    link = Link(bandwidth=1e9, latency=1e-5)
    nodes = tuple(
        Node(name=f"{name}{i}", site=name, devices=(name, name), inside=link, network=link)
        for i in range(2)
    )
    cluster = Cluster(
        name=name,
        types={name: kind},
        nodes=nodes,
        sites=(Site(name=name, uplink=link), Site(name="other")),
        direct=(DirectLink(between=(nodes[0].name, nodes[1].name), link=link),),
    )
    stages = tuple(
        Stage(layers=layers, devices=tuple((f"{node.name}:{i}",) for i in range(2)))
        for node, layers in zip(nodes, ((0, 5), (5, 10)), strict=True)
    )
    plan = plan_by_hand(
        Pipeline(micro_batches=4, rows=2, stages=stages),
        sequence=16,
        precision="bf16",
        name=name,
        model=PlanInput(name=name, fingerprint=name, source="llama-tiny"),
        cluster=PlanInput(name=name, fingerprint=name, source=name),
    )
    timeline = simulate_plan(plan, model(), cluster, None)
    told = simulate_figures(name, PricedPlan(plan, model(), cluster)).figures
    prediction = Prediction(
        step_seconds=timeline.step_seconds,
        parts=told.parts,
        memory=(told.fullest,),
        runners_up=(RunnerUp(name=name, step_seconds=1.0, reason=name),),
        dropped={name: 3},
        bound_reason=name,
    )
    return World(replace(plan, prediction=prediction), cluster, model(), timeline)


def files_for(tool: str, name: str) -> dict[str, str] | None:
    """What a tool is given; None where a name is refused."""
    plan = world(name).plan
    graph = replace(world(name).model, name=name)
    if not forbidden_character(name):
        return export_files(plan, graph, tool)
    with pytest.raises(PlanError, match="names that a script can hold"):
        export_files(plan, graph, tool)
    return None


@given(NAMES)
def test_exported_python_has_the_name_in_its_docstring_and_nowhere_else(name: str) -> None:
    for tool in ("torchtitan", "deepspeed"):
        ordinary = files_for(tool, "n")
        files = files_for(tool, name)
        assert ordinary is not None
        for file in [each for each in files or () if each.endswith(".py")]:
            found, known = ast.parse(files[file]), ast.parse(ordinary[file])
            if tool == "torchtitan":
                told = f"{name}: llama-tiny on {name}, as torchtitan takes it."
                assert ast.get_docstring(found, clean=False) == told
            assert ast.dump(ast.Module(found.body[1:], [])) == ast.dump(
                ast.Module(known.body[1:], [])
            )


@given(NAMES)
def test_exported_settings_are_what_they_are_under_any_name(name: str) -> None:
    for tool, file, read in (
        ("accelerate", "accelerate.yaml", yaml.safe_load),
        ("deepspeed", "ds_config.json", json.loads),
        ("megatron", "arguments.txt", str),
        ("pipelining-csv", "schedule.csv", str),
    ):
        ordinary, files = files_for(tool, "n"), files_for(tool, name)
        assert ordinary is not None
        assert files is None or read(files[file]) == read(ordinary[file])


STUB = '#!/bin/sh\nprintf "%s\\n" "$MASTER_ADDR" "$CUDA_VISIBLE_DEVICES" > started\n'


@pytest.mark.heavy
@pytest.mark.parametrize("tool", ["torchtitan", "megatron", "deepspeed", "accelerate"])
@settings(max_examples=portion(25))
@given(data=st.data())
def test_exported_scripts_start_on_a_node_of_any_name(tmp_path_factory, tool, data) -> None:
    name = data.draw(NAMES.filter(lambda name: not forbidden_character(name)))
    folder = tmp_path_factory.mktemp("script")
    files = files_for(tool, name)
    assert files is not None
    for file, text in files.items():
        (folder / file).write_text(text)
    for command in ("torchrun", "accelerate", "python"):
        (folder / command).write_text(STUB)
        (folder / command).chmod(0o755)
    path = f"{folder}:/usr/bin:/bin"
    environment = {"PATH": path, "MEGATRON": "m", "MODULE": "m", "CONFIG": "c"}
    script = ["bash", "launch.sh", f"{name}1"]
    done = subprocess.run(
        script, cwd=folder, env=environment, capture_output=True, text=True, timeout=20, check=False
    )
    assert done.returncode == 0, done.stderr
    assert (folder / "started").read_text() == f"{name}0\n0,1\n"
    assert {p.name for p in folder.iterdir()} == {
        *files, "torchrun", "accelerate", "python", "started"
    }  # fmt: skip
    stranger = subprocess.run([*script[:2], "x"], cwd=folder, capture_output=True, check=False)
    assert stranger.returncode == 2


@pytest.mark.heavy
@pytest.mark.parametrize("name", PAYLOADS)
@pytest.mark.parametrize("tool", TOOLS)
def test_importing_and_sourcing_what_is_exported_runs_nothing(tmp_path, tool, name) -> None:
    files = files_for(tool, name) or {}
    for file, text in files.items():
        (tmp_path / file).write_text(text)
        if file.endswith(".py"):
            exec(compile(text, file, "exec"), {})
        if file.endswith(".sh"):
            subprocess.run(["bash", "-n", file], cwd=tmp_path, check=True)
    assert {p.name for p in tmp_path.iterdir()} == set(files)
    assert not Path(SENTINEL).exists()


@given(NAMES)
@example("a.b")
def test_a_cluster_file_holds_any_name(name: str) -> None:
    cluster = world(name).cluster
    table = tomllib.loads(dump_cluster(cluster))
    assert table["name"] == name
    assert list(table["device"]) == [name]
    assert table["device"][name]["source"] == name
    assert {node["site"] for node in table["node"]} == {name}
    assert table["link"][0]["between"] == [f"{name}0", f"{name}1"]
    if re.fullmatch("[A-Za-z0-9][A-Za-z0-9._-]*", name):
        assert cluster_from(table, source="c") == cluster
    else:
        with pytest.raises(ClusterError, match=r"letters, digits|printable text"):
            cluster_from(table, source="c")


@given(NAMES)
def test_a_plan_holds_any_name_and_is_read_if_it_is_printable(tmp_path_factory, name) -> None:
    path = tmp_path_factory.mktemp("plans") / "plan.json"
    plan = world(name).plan
    save_plan(plan, path)
    assert json.loads(path.read_text(encoding="utf-8"))["name"] == name
    if forbidden_character(name):
        with pytest.raises(PlanError):
            load_plan(path)
    else:
        assert load_plan(path) == plan


class _Tags(HTMLParser):
    """What a browser would make of a page: tags with the names of their attributes, and texts."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[object] = []
        self.texts: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs) -> None:
        self.tags.append((tag, [name for name, _ in attrs]))

    def handle_endtag(self, tag) -> None:
        self.tags.append(tag)

    def handle_data(self, data) -> None:
        self.texts.append(data)

    def handle_comment(self, data) -> None:
        self.tags.append(f"comment {data}")

    def handle_decl(self, decl) -> None:
        self.tags.append(f"declaration {decl}")

    def unknown_decl(self, data) -> None:
        self.tags.append(f"declaration {data}")

    def handle_pi(self, data) -> None:
        self.tags.append(f"instruction {data}")


def page(name: str) -> str:
    w = world(name)
    return report_html(
        w.plan,
        w.cluster,
        replace(w.model, name=name),
        predicted=w.timeline,
        measured=replace(w.timeline, source="measured"),
        losses={name: (3.0, 2.0), f"{name}2": (3.0, 2.5)},
        rivals=(
            Rival(name=name, predicted_seconds=1.0),
            Rival(name=f"{name}2", predicted_seconds=2.0, measured_seconds=2.0),
        ),
    )


def compared(name: str, path: Path) -> str:
    w = world(name)
    one, two = (
        simulate_figures(n, PricedPlan(w.plan, w.model, w.cluster)) for n in (name, f"{name}2")
    )
    write_comparison(path, one, two, compare_plans(one, two))
    return path.read_text(encoding="utf-8")


@pytest.mark.heavy
@settings(max_examples=portion(40))
@given(NAMES)
def test_pages_and_drawings_take_no_name_for_markup(tmp_path_factory, name: str) -> None:
    folder = tmp_path_factory.mktemp("pages")
    for make in (page, lambda each: compared(each, folder / "c.html")):
        found, known = _Tags(make(name)), _Tags(make("n"))
        assert found.tags == known.tags
        assert not any(forbidden_character(text, lines=True) for text in found.texts)
    data = re.search(r'<script type="application/json" id="data">(.*?)</script>', page(name))
    assert data is not None
    assert json.loads(data[1])["ranks"][0]["device"] == f"{name}0:0"
    w = world(name)
    drawing = plan_svg(w.plan, w.cluster, w.model, standalone=True)
    known = plan_svg(world("n").plan, world("n").cluster, w.model, standalone=True)
    shapes = [[e.tag for e in ElementTree.fromstring(d).iter()] for d in (drawing, known)]
    assert shapes[0] == shapes[1]


@pytest.mark.heavy
@settings(max_examples=portion(40))
@given(NAMES)
def test_terminals_are_not_steered_and_take_no_name_for_markup(name: str) -> None:
    w = world(name)
    one, two = (
        simulate_figures(n, PricedPlan(w.plan, w.model, w.cluster)) for n in (name, f"{name}2")
    )
    pair = PairTimes(
        between=(f"{name}0:0", f"{name}1:0"), latency=1e-5, bandwidth=1e9, residual=0.0, points=()
    )
    found = WhatIf(
        edits=(name,),
        options=(WhatIfOption(name=name, reason=name),),
        seconds_before=1.0,
        seconds_after=1.0,
        best=w.plan,
        busiest=None,
    )
    out = StringIO()
    console = Console(file=out, force_terminal=True, width=4000, color_system="truecolor")
    explain(w.plan, console)
    timeline_summary(w.plan, w.timeline, console)
    print_comparison(one, two, compare_plans(one, two), console)
    print_whatif(found, console)
    console.print(fitted_links_table(LinkReport(pairs=(pair,))))
    console.print(strategies_table([(name, name, 1.0, 1.0, 0.0)]))
    text = STEERING.sub("", out.getvalue())
    assert forbidden_character(text, lines=True) == ""
    if not forbidden_character(name) and name == name.strip():
        assert text.count(name) >= 10
    assert json.loads(whatif_json(found))["edits"] == [name]


@given(NAMES)
def test_a_trace_holds_any_name(name: str) -> None:
    events = json.loads(json.dumps(chrome_trace(world(name).timeline)))["traceEvents"]
    named = [e["args"]["name"] for e in events if e["name"] == "process_name"]
    assert named[0] == f"rank 0 on {name}0:0"


PRINTERS = {"print", "rule", "echo", "add_task"}


def test_whatever_is_printed_goes_through_one_function() -> None:
    """Text that is put together for a terminal is given to `words` or `say` first."""
    raw = [
        f"{path.name}:{node.lineno}"
        for path in files_below(PACKAGE)
        for node in ast.walk(tree_of(path))
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and node.func.attr in PRINTERS
        and any(isinstance(argument, ast.JoinedStr) for argument in node.args)
    ]
    assert raw == []
