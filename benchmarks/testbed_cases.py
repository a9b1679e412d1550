"""Strategies on testbeds: which there are, what the simulator says of them, what they take.

Shared by testbed_accuracy.py and worth_it.py. Every measured step is a line of a JSON-lines file,
by which an interrupted suite goes on where it was.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import median

import numpy as np

from meshwright.cluster.files import cluster_from
from meshwright.cluster.spec import Cluster, devices_of
from meshwright.cost.links import LinkReport, fitted_cluster
from meshwright.cost.priced_plan import PricedPlan
from meshwright.cost.profile import LayerTime, LinkTimes, OptimizerTime, Profile
from meshwright.emulation.virtual_times import TIMES_FILE, virtual_times
from meshwright.errors import FitError, MeshwrightError, PlanError
from meshwright.model.spec import LayerGraph, without_division
from meshwright.plan.files import save_plan
from meshwright.plan.ranks import describe_plan
from meshwright.plan.spec import Job, Plan
from meshwright.profiling.measure_profile import ProfileSettings
from meshwright.records import dumps, fingerprint, load, parse, plain
from meshwright.search.baselines import BASELINES
from meshwright.search.candidate import CandidatePipeline, excess_bytes, plan_of
from meshwright.search.candidate_estimate import candidate_seconds
from meshwright.search.costs import Costs, costs_of
from meshwright.search.planner import baseline_plan, find_plan
from meshwright.search.regular import regular_pipelines, with_best_cuts
from meshwright.simulate.simulator import simulate_plan
from meshwright.testbed.cpu_load import CpuLoadMeter
from meshwright.testbed.launcher import TestbedLauncher, launcher_on_testbed
from meshwright.testbed.lifecycle import RunningTestbed, running_testbed
from meshwright.testbed.measurements import LINKS, profile_on
from meshwright.testbed.spec import Mode, Testbed, TestbedFile, make_testbed

HERE = Path(__file__).parent
SEQUENCE = 64
STEPS = {"dilation": 6, "virtual": 3}
"""Arithmetic takes longer in one step than in the next; sleeping does not."""
WARM_UP = 1
ROWS = (1, 2, 4, 8, 16)
SHARES = {"fast": 0.24, "mid": 0.12, "slow": 0.06}
"""Of a core, in dilation; virtual devices have the same ratio of speeds."""
CORE_FLOPS = 160e9
"""Peak of the whole core that virtual devices have shares of."""


@dataclass(frozen=True, slots=True)
class Place:
    """A cluster as a table: nodes as (name, devices, Mbit/s, site), uplinks in Mbit/s by site."""

    name: str
    nodes: tuple[tuple[str, str, float, str], ...]
    uplinks: dict[str, float] = field(default_factory=dict)

    @property
    def devices(self) -> int:
        return sum(int(devices.split(" x ")[0]) for _, devices, _, _ in self.nodes)


def cluster_of(place: Place) -> Cluster:
    """As a cluster file would give it."""
    used = {devices.split(" x ")[1] for _, devices, _, _ in place.nodes}
    inside = {"bandwidth": "16 Gbit/s", "latency": "50 us", "shared": True}
    data = {
        "format": 1,
        "name": place.name,
        "device": {
            kind: {"like": "cpu", "peak": {"fp32": f"{SHARES[kind] * CORE_FLOPS / 1e9} GFLOP/s"}}
            for kind in used
        },
        "site": [
            {"name": site, "uplink": {"bandwidth": f"{rate} Mbit/s", "latency": "0 us"}}
            for site, rate in place.uplinks.items()
        ],
        "node": [
            {
                "name": name,
                "devices": [devices],
                "network": {"bandwidth": f"{rate} Mbit/s", "latency": "0 us"},
                "inside": inside,
                "site": site,
            }
            for name, devices, rate, site in place.nodes
        ],
    }
    if not data["site"]:
        del data["site"]
    return cluster_from(data, source=place.name)


def bed_at(place: Place, mode: Mode, *, foreign_share: float, attempts: int) -> Testbed:
    """The testbed of a place."""
    cluster = cluster_of(place)
    used = {device.type for device in devices_of(cluster)}
    entry = TestbedFile(
        name=place.name,
        cluster="",
        mode=mode,
        shares={} if mode == "virtual" else {kind: SHARES[kind] for kind in used},
        foreign_share=foreign_share,
        attempts=attempts,
    )
    return make_testbed(entry, cluster, source=place.name)


@dataclass(frozen=True, slots=True)
class Setting:
    """One place, one model, one way to be slow."""

    place: Place
    mode: Mode
    model: str
    batch: int = 16

    @property
    def key(self) -> str:
        return f"{self.mode}/{self.place.name}/{self.model}"


@dataclass(slots=True)
class Known:
    """A setting with all that predictions need."""

    setting: Setting
    graph: LayerGraph
    cluster: Cluster
    profile: Profile | None
    job: Job

    @property
    def costs(self) -> Costs:
        return costs_of(self.graph, self.cluster, self.job, self.profile)


class Suite:
    """Settings one after the other: each testbed is brought up once for all that is done on it."""

    def __init__(self, work: Path, *, foreign_share: float, attempts: int) -> None:
        self.work, self.foreign_share, self.attempts = work, foreign_share, attempts
        work.mkdir(parents=True, exist_ok=True)
        self.results = work / "results.jsonl"
        self.done = {line["key"]: line for line in self.lines()}
        self._stack = ExitStack()
        self._up: tuple[tuple[str, str], TestbedLauncher] | None = None

    def lines(self) -> list[dict]:
        """Everything measured so far."""
        text = self.results.read_text().splitlines() if self.results.exists() else []
        found = []
        for line in text:
            with suppress(json.JSONDecodeError):  # cut off in the middle of a line
                found.append(json.loads(line))
        return found

    def close(self) -> None:
        """Takes the last testbed down."""
        self._stack.close()
        self._up = None

    def launcher(self, setting: Setting) -> TestbedLauncher:
        """On the setting's testbed, brought up if another one stands."""
        mark = (setting.place.name, setting.mode)
        if self._up is None or self._up[0] != mark:
            self.close()
            bed = bed_at(
                setting.place,
                setting.mode,
                foreign_share=self.foreign_share,
                attempts=self.attempts,
            )
            up: RunningTestbed = self._stack.enter_context(running_testbed(bed))
            self._up = mark, self._stack.enter_context(launcher_on_testbed(up))
        return self._up[1]

    def known(self, setting: Setting) -> Known:
        """Measured links and layers; kept in the work folder."""
        from testbed_rank import graph_of

        graph = without_division(graph_of(setting.model, SEQUENCE), "tensor")
        links = self._links(setting)
        bed = self.launcher(setting).testbed.testbed
        layers = self._layers(setting) if setting.mode != "virtual" else None
        step = links.all_reduce.step_latency if links.all_reduce else None
        profile = Profile(
            model=setting.model,
            sequence=SEQUENCE,
            links=LinkTimes(all_reduce_latency=step),
            layers=tuple(layers[0]) if layers else (),
            optimizers=tuple(layers[1]) if layers else (),
        )
        return Known(
            setting=setting,
            graph=graph,
            cluster=fitted_cluster(bed.cluster, links),
            profile=profile,
            job=Job(
                global_batch=setting.batch, sequence=SEQUENCE, precision="fp32", optimizer="sgd"
            ),
        )

    def _links(self, setting: Setting) -> LinkReport:
        folder = self.work / "links" / f"{setting.mode}-{setting.place.name}"
        settings = ProfileSettings(
            model="gpt-tiny", sequence=SEQUENCE, rows=(), precision="fp32", output=""
        )
        profile_on(self.launcher(setting), settings, folder)
        return load(folder / LINKS, LinkReport, error=MeshwrightError)

    def _layers(self, setting: Setting) -> tuple[list[LayerTime], list[OptimizerTime]]:
        """Measured on the first testbed that has these types of devices: elsewhere on this machine
        they are the same."""
        launcher = self.launcher(setting)
        devices = devices_of(launcher.testbed.testbed.cluster)
        types = [device.type for device in devices]
        folder = self.work / "layers" / "-".join((setting.model, *sorted(set(types))))
        path = folder / "layers.json"
        if not path.exists():
            names = tuple(device.name for device in devices)
            job = {
                "action": "measure",
                "model": setting.model,
                "sequence": SEQUENCE,
                "rows": ROWS,
                "repeats": 7,
                "devices": names,
                "types": types,
                "shares": launcher.testbed.shares,
            }
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "job.json").write_text(json.dumps(job))
            launcher.launcher.run(names, folder, module="testbed_rank")
        data = json.loads(path.read_text())
        return (
            [parse(t, LayerTime, source="", error=MeshwrightError) for t in data["layers"]],
            [parse(t, OptimizerTime, source="", error=MeshwrightError) for t in data["optimizers"]],
        )

    def measure(
        self, known: Known, name: str, plan: Plan, job: dict | None = None, mark: str = ""
    ) -> dict:
        """The result of one strategy: measured before, or now; predicted now. With a `system` in
        `job` PyTorch's own runs it (see torch_rank.py), and the plan is ours that is most like
        it. What has the same plan and `mark` (by default the name) is measured once."""
        same = fingerprint(replace(plan, name="", prediction=None))
        key = f"{known.setting.key}/{mark or name}/{same}"
        expected = expected_seconds(known, plan)
        if key in self.done:
            return self.done[key] | {"strategy": name, "predicted": expected}
        line = {"key": key, "setting": known.setting.key, "strategy": name,
                "plan": describe_plan(plan), "whole_plan": plain(plan)}  # fmt: skip
        best: dict | None = None
        for attempt in range(1, self.attempts + 1):
            seconds, foreign = self._train(known, plan, job or {})
            found = {
                "predicted": expected,
                "measured": median(seconds[min(WARM_UP, len(seconds) - 1) :]),
                "seconds": seconds,
                "foreign": foreign,
                "attempts": attempt,
            }
            best = found if best is None or foreign < best["foreign"] else best
            if foreign <= self.foreign_share:
                break
        line |= best or {}
        with self.results.open("a") as results:
            results.write(json.dumps(line) + "\n")
        self.done[key] = line
        return line

    def _train(self, known: Known, plan: Plan, changes: dict) -> tuple[list[float], float]:
        setting = known.setting
        launcher = self.launcher(setting)
        folder = self.work / "run"
        folder.mkdir(exist_ok=True)
        save_plan(replace(plan, prediction=None), folder / "plan.json")
        job = {
            "action": "train",
            "model": setting.model,
            "mode": setting.mode,
            "steps": STEPS[setting.mode],
            "shares": launcher.testbed.shares,
        } | changes
        (folder / "job.json").write_text(json.dumps(job))
        if setting.mode == "virtual":
            cluster = launcher.testbed.testbed.cluster
            table = virtual_times(PricedPlan(plan, known.graph, cluster, known.profile))
            (folder / TIMES_FILE).write_text(dumps(table))
        watch = CpuLoadMeter(launcher.launcher.processor_seconds)
        module = "torch_rank" if "system" in changes else "testbed_rank"
        launcher.launcher.run(plan.devices, folder, module=module)
        return json.loads((folder / "seconds.json").read_text()), watch.foreign_share()


def expected_seconds(known: Known, plan: Plan) -> float:
    """As the simulator sees one step."""
    return simulate_plan(plan, known.graph, known.cluster, known.profile).step_seconds


def hand_made(known: Known) -> Iterator[tuple[str, Plan]]:
    """The rivals, each with its best micro-batch; AMP's as AMP chooses."""
    for name in BASELINES:
        with suppress(FitError, PlanError):
            yield name, baseline_plan(name, known.graph, known.cluster, known.job, known.profile)


def even_plans(known: Known, count: int) -> list[tuple[str, Plan]]:
    """The `count` even grids that promise most, whatever their schedule and micro-batch."""
    costs = known.costs
    fitting = [each for each in BASELINES["even"](costs) if excess_bytes(costs, each, "1f1b") <= 0]
    ordered = [pipeline for _, pipeline in _rated(costs, fitting)]
    mark = fingerprint(known.cluster)
    return [
        (f"even-{n}", plan_of(costs, (each,), "1f1b", mark))
        for n, each in enumerate(ordered[:count])
    ]


def _rated(
    costs: Costs, pipelines: list[CandidatePipeline]
) -> list[tuple[float, CandidatePipeline]]:
    """With their seconds in 1F1B, fastest first."""
    rated = [(candidate_seconds(costs, (each,), "1f1b"), each) for each in pipelines]
    return sorted(rated, key=lambda pair: pair[0])


def sampled(known: Known, count: int, slowest: float = 4.0) -> list[tuple[str, Plan]]:
    """Strategies spread evenly, by the logarithm of their promised seconds, from the best to
    `slowest` times as slow."""
    costs = known.costs
    found = (with_best_cuts(costs, each, "1f1b") for each in regular_pipelines(costs, 400))
    rated = _rated(costs, [pipeline for pipeline in found if pipeline])
    near = [(seconds, each) for seconds, each in rated if seconds <= slowest * rated[0][0]]
    places = np.log([seconds for seconds, _ in near])
    goals = np.linspace(places[0], places[-1], count)
    picks = dict.fromkeys(int(np.argmin(np.abs(places - goal))) for goal in goals)
    mark = fingerprint(known.cluster)
    return [
        (f"sample-{n}", plan_of(costs, (near[i][1],), "1f1b", mark)) for n, i in enumerate(picks)
    ]


def best_plan(known: Known) -> Plan:
    """Meshwright's own."""
    return find_plan(known.graph, known.cluster, known.job, known.profile)


def distinct(plans: list[tuple[str, Plan]]) -> list[tuple[str, Plan]]:
    """Without those that only have another name."""
    found: dict[str, tuple[str, Plan]] = {}
    for name, plan in plans:
        found.setdefault(fingerprint(replace(plan, name="", prediction=None)), (name, plan))
    return list(found.values())


def say(text: str) -> None:
    """At once, also into a file."""
    sys.stdout.write(text + "\n")
    sys.stdout.flush()
