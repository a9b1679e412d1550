"""Plans ordinary clusters drawn at random, and checks every plan again: random_plans.py --count 500

Each case is a cluster file (nodes of one to eight devices of the catalogue or of a type of their
own, alike or not, at one or two sites, with or without explicit links or a matrix), a model (named,
or written by hand with skips and tied parameters), a batch, a sequence and a precision; now and
then there are measured times. Either the planner refuses it with an error that a user can read, or
the plan must be valid, run to its end, fit, take as long as it says, and not be faster than its
certificate.
"""

from __future__ import annotations

import argparse
import sys
import time
import tomllib
import traceback
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from math import isclose
from pathlib import Path
from random import Random
from tempfile import TemporaryDirectory

from meshwright.cluster.catalog import catalog
from meshwright.cluster.files import cluster_from
from meshwright.cluster.spec import Cluster, Link, Precision, devices_of
from meshwright.cost.memory import device_memory, total_bytes
from meshwright.cost.profile import LayerTime, LinkTimes, Profile
from meshwright.errors import MeshwrightError
from meshwright.model.files import model_from_table
from meshwright.model.load import load_model
from meshwright.model.spec import LayerGraph
from meshwright.plan.files import load_plan, save_plan
from meshwright.plan.spec import Job, Plan
from meshwright.plan.validate import validate_plan
from meshwright.program.check import check_program
from meshwright.program.compile import compile_plan
from meshwright.search.certificate import certificate
from meshwright.search.costs import costs_of
from meshwright.search.planner import find_plan
from meshwright.simulate.simulator import simulate_plan
from meshwright.simulate.symmetry import simulate_by_symmetry

BANDWIDTHS = ("1", "10", "25", "40", "100", "200", "400")
"""Gbit/s of networks and explicit links."""
LATENCIES = ("0 us", "1 us", "20 us", "50 us", "300 us", "2 ms")
TINY = ("gpt-tiny", "llama-tiny", "mixtral-tiny")
NAMED = ("gpt2", "gpt2-medium", "gpt2-xl", "llama-2-7b", "mixtral-8x7b")
SAME = 1e-12
"""Relative difference of a step that is played by all ranks from one played by one of every set of
identical ones: sums may be rounded in another order."""


@dataclass(frozen=True, slots=True)
class Case:
    """What is asked of the planner, as a user writes it."""

    number: int
    cluster: str
    """The text of the cluster file."""
    model: str
    """A name, or the text of a model file."""
    sequence: int
    batch: int
    precision: Precision
    optimizer: str
    measured: bool
    """There are measured times of some layers and links, which are drawn too."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of a case."""

    case: Case
    seconds: float
    found: str
    """`planned`, or the error with which it was refused."""
    failure: str
    """A traceback, or what is wrong with the plan; empty: nothing is."""


def draw(number: int) -> Case:
    """The case of this number, the same every time."""
    chance = Random(f"ordinary {number}")
    small = chance.random() < 0.8
    cluster = "\n".join(_cluster_lines(chance, 12 if small else chance.choice((20, 48, 120))))
    written = chance.random() < 0.3
    names = TINY if chance.random() < 0.5 else NAMED
    return Case(
        number=number,
        cluster=cluster,
        model="\n".join(_model_lines(chance)) if written else chance.choice(names),
        sequence=chance.choice((16, 64, 128, 512, 1024)),
        batch=chance.choice((1, 2, 3, 4, 6, 7, 8, 12, 16, 24, 32, 64, 100, 256)),
        precision=chance.choice(("fp64", "fp32", "fp16", "bf16", "fp16", "fp32", "bf16")),
        optimizer=chance.choice(("adamw", "adamw", "sgd")),
        measured=chance.random() < 0.15,
    )


def _link(chance: Random, *, shared: float = 0.15) -> str:
    words = [
        f'bandwidth = "{chance.choice(BANDWIDTHS)} Gbit/s"',
        f'latency = "{chance.choice(LATENCIES)}"',
    ]
    if chance.random() < shared:
        words.append("shared = true")
    return "{ " + ", ".join(words) + " }"


def _cluster_lines(chance: Random, most: int) -> Iterator[str]:
    yield 'format = 1\nname = "drawn"'
    kinds = chance.sample(sorted(catalog()), chance.choice((1, 1, 2, 2, 3)))
    if chance.random() < 0.15:
        yield f'[device.own]\nlike = "{kinds[0]}"\nmemory = "{chance.choice((4, 9, 20))} GiB"'
        kinds.append("own")
    sites = ("here", "there") if chance.random() < 0.25 else ("here",)
    for site in sites:
        uplink = f"\nuplink = {_link(chance)}" if chance.random() < 0.8 else ""
        yield f'[[site]]\nname = "{site}"{uplink}'
    nodes: list[str] = []
    left = chance.randint(1, most)
    inside, network = _link(chance, shared=0.4), _link(chance)
    while left > 0:
        width = min(left, chance.choice((1, 1, 2, 2, 3, 4, 4, 6, 8)))
        count = chance.randint(1, max(1, min(left // width, 8 if most > 20 else 3)))
        name = f"n{len(nodes)}"
        nodes += [f"{name}-{i}" for i in range(count)]
        yield f'[[node]]\nname = "{name}"\ncount = {count}\nsite = "{chance.choice(sites)}"'
        yield f"devices = [{', '.join(_devices(chance, kinds, width))}]"
        if chance.random() < 0.3:
            inside = _link(chance, shared=0.4)
        if chance.random() < 0.3:
            network = _link(chance)
        yield f"inside = {inside}\nnetwork = {network}"
        left -= width * count
    yield from _pair_lines(chance, nodes)


def _devices(chance: Random, kinds: list[str], width: int) -> list[str]:
    if width > 1 and chance.random() < 0.15:
        first = chance.randint(1, width - 1)
        return [f'"{n} x {chance.choice(kinds)}"' for n in (first, width - first)]
    return [f'"{width} x {chance.choice(kinds)}"']


def _pair_lines(chance: Random, nodes: list[str]) -> Iterator[str]:
    """Explicit links, of some pairs of nodes or as a matrix."""
    way = chance.random()
    if len(nodes) < 2 or way < 0.6:
        return
    chosen = chance.sample(nodes, min(len(nodes), chance.choice((2, 2, 3, 4))))
    if way < 0.85:
        for a, b in pairwise(chosen):
            words = _link(chance)[2:-2].replace(", ", "\n")
            yield f'[[link]]\nbetween = ["{a}", "{b}"]\n{words}'
        return
    cells = {frozenset((a, b)): _cell(chance) for a in chosen for b in chosen if a != b}
    yield f"[matrix]\nnodes = {[*chosen]}".replace("'", '"')
    rows = [[cells.get(frozenset((a, b)), "-") for b in chosen] for a in chosen]
    yield f"bandwidth = {rows}".replace("'", '"')
    yield f'latency = "{chance.choice(LATENCIES)}"'


def _cell(chance: Random) -> str:
    return "-" if chance.random() < 0.3 else f"{chance.choice(BANDWIDTHS)} Gbit/s"


def _model_lines(chance: Random) -> Iterator[str]:
    yield 'name = "drawn"'
    layers = chance.randint(1, 9)
    for i in range(layers):
        yield f'[[layer]]\nname = "l{i}"\nforward = "{chance.choice((1, 5, 40, 300))} GFLOP"'
        yield f"parameters = {chance.choice((0, 1000, 3_000_001, 90_000_000, 700_000_000))}"
        yield f'output = "{chance.choice((0, 1, 200, 30_000))} KiB"'
        if chance.random() < 0.5:
            yield f'saved = "{chance.choice((0, 1, 70, 900))} MiB"'
        if chance.random() < 0.3:
            yield f'attention = "{chance.choice((1, 20))} GFLOP"'
        if chance.random() < 0.3:
            yield f'workspace = "{chance.choice((1, 500))} MiB"'
        if chance.random() < 0.7:
            yield f"tensor_units = {chance.choice((1, 2, 4, 6, 12))}"
    if layers > 2:
        for _ in range(chance.choice((0, 0, 1, 2))):
            first = chance.randint(0, layers - 3)
            size = f'\nbytes = "{chance.choice((1, 64))} KiB"' if chance.random() < 0.5 else ""
            to = chance.randint(first + 2, layers - 1)
            yield f'[[skip]]\nfrom = "l{first}"\nto = "l{to}"{size}'
    if layers > 1 and chance.random() < 0.4:
        users = sorted(chance.sample(range(layers), chance.randint(2, min(3, layers))))
        named = ", ".join(f'"l{i}"' for i in users)
        split = "true" if chance.random() < 0.5 else "false"
        yield f'[[tied]]\nname = "shared"\nlayers = [{named}]\nparameters = 2_000_000'
        yield f"split = {split}"


def profile_of(case: Case, model: LayerGraph, where: Cluster) -> Profile | None:
    """Measured times of a case, if it has any."""
    if not case.measured:
        return None
    chance = Random(f"measured {case.number}")
    pace = {kind: 10 ** chance.uniform(-5, -2) for kind in where.types}
    layers = tuple(
        LayerTime(
            device=kind,
            signature=signature,
            precision=model.precision,
            tensor=tensor,
            rows=rows,
            forward_seconds=each * rows**0.9,
            backward_seconds=2 * each * rows**0.9,
            input_seconds=1.1 * each * rows**0.9 if split else None,
            weight_seconds=chance.choice((0.8, 1.0)) * each * rows**0.9 if split else None,
        )
        for kind in where.types
        for signature in dict.fromkeys(layer.signature for layer in model.layers)
        if chance.random() < 0.8
        for split in (chance.random() < 0.5,)
        for tensor in (1, 2)
        for each in (pace[kind] * chance.uniform(0.5, 2) / tensor,)
        for rows in (1, 2, 4, 8)
    )
    network = Link(bandwidth=chance.choice((1e8, 1e9, 1e10)), latency=chance.choice((1e-5, 1e-3)))
    links = LinkTimes(network=network, all_reduce_latency=chance.choice((None, 2e-5)))
    return Profile(
        model=model.name,
        sequence=model.sequence,
        layers=layers,
        links=chance.choice((None, links)),
        step_overhead_seconds=chance.choice((0.0, 1e-3)),
    )


def inputs(case: Case) -> tuple[LayerGraph, Cluster, Job]:
    """A case as the planner takes it. Raises MeshwrightError where it is refused."""
    where = cluster_from(tomllib.loads(case.cluster), source="drawn.toml")
    if "[[layer]]" in case.model:
        table = tomllib.loads(case.model)
        model = model_from_table(table, "model.toml", case.sequence, case.precision)
    else:
        model = load_model(case.model, case.sequence, case.precision)
    job = Job(
        global_batch=case.batch,
        sequence=case.sequence,
        precision=case.precision,
        optimizer="sgd" if case.optimizer == "sgd" else "adamw",
    )
    return model, where, job


def tried(case: Case, budget_seconds: float | None = None) -> Outcome:
    """Plan a case, in that time if it is given, and check the plan; whatever goes wrong is in the
    outcome."""
    began = time.perf_counter()
    found, failure = "planned", ""
    try:
        model, where, job = inputs(case)
        profile = profile_of(case, model, where)
        plan = find_plan(model, where, job, profile, budget_seconds=budget_seconds)
        failure = "\n".join(wrongs(plan, model, where, profile))
    except MeshwrightError as refusal:
        found = type(refusal).__name__
    except Exception:
        found, failure = "crashed", traceback.format_exc()
    return Outcome(case, time.perf_counter() - began, found, failure)


def wrongs(
    plan: Plan, model: LayerGraph, where: Cluster, profile: Profile | None = None
) -> Iterator[str]:
    """What a plan says of itself that is not so. Raises MeshwrightError where it is not valid."""
    said = plan.prediction
    assert said is not None
    try:
        validate_plan(plan, model, where)
        for clipped in (True, False):
            check_program(compile_plan(plan, model, clipped=clipped))
    except MeshwrightError as refusal:
        yield f"the plan is refused: {refusal}"
        return
    memory = device_memory(plan, model, where)
    if memory != said.memory:
        yield "memory is not as predicted"
    yield from (f"{m.device} is overfull" for m in memory if total_bytes(m) > m.capacity)
    again = simulate_by_symmetry(plan, model, where, profile).step_seconds
    if again != said.step_seconds:
        yield f"{said.step_seconds!r} s were predicted, and it takes {again!r} s"
    whole = simulate_plan(plan, model, where, profile).step_seconds
    if not isclose(whole, again, rel_tol=SAME):
        yield f"all ranks take {whole!r} s, one of every set of identical ones {again!r} s"
    bound = certificate(costs_of(model, where, plan.job, profile, recomputation=True)).seconds
    if bound > said.step_seconds * (1 + 1e-9) or not said.lower_bound_seconds:
        yield f"{said.step_seconds!r} s are below the certificate's {bound!r} s"
    with TemporaryDirectory() as folder:
        save_plan(plan, Path(folder) / "plan.json")
        if load_plan(Path(folder) / "plan.json") != plan:
            yield "read back, the plan is another"


def outcomes(
    numbers: Iterable[int], workers: int, budget_seconds: float | None = None
) -> Iterator[Outcome]:
    """Cases of these numbers, as they are done."""
    cases = [draw(number) for number in numbers]
    play = partial(tried, budget_seconds=budget_seconds)
    if workers < 2:
        yield from map(play, cases)
        return
    with ProcessPoolExecutor(workers) as pool:
        yield from pool.map(play, cases)


def main() -> None:
    """Try the cases asked for; the status is 1 if anything is wrong with one."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=500, help="how many cases")
    parser.add_argument("--first", type=int, default=0, help="number of the first one")
    parser.add_argument("--workers", type=int, default=2, help="processes")
    parser.add_argument("--budget", type=float, help="seconds for each; default: to the end")
    parser.add_argument("--show", type=int, help="print the files of this case, and try it alone")
    options = parser.parse_args()
    if options.show is not None:
        case = draw(options.show)
        print(case.cluster, case.model, sep="\n\n")
        print(f"\nbatch {case.batch}, sequence {case.sequence}, {case.precision}")
    first, count = (options.first, options.count) if options.show is None else (options.show, 1)
    kinds: Counter[str] = Counter()
    failed = 0
    show = partial(print, flush=True)
    found = outcomes(range(first, first + count), options.workers, options.budget)
    for done, each in enumerate(found, start=1):
        kinds[each.found] += 1
        if each.failure:
            failed += 1
            show(f"case {each.case.number}: {each.failure}")
        if done % 50 == 0 or each.seconds > 60:
            devices = len(devices_of(inputs(each.case)[1]))
            show(f"{done} done; case {each.case.number}: {devices} devices, {each.seconds:.1f} s")
    words = ", ".join(f"{number} {kind}" for kind, number in kinds.most_common())
    show(f"{count} cases: {words}; something is wrong with {failed}")
    sys.exit(failed > 0)


if __name__ == "__main__":
    main()
