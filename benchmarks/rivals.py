"""Meshwright's plans against those of other planners and of hand-written rules, on mixed clusters.

    python benchmarks/rivals.py [--only NAME ...] [--anchors FOLDER] [--random N] [--first SEED]
        [--rivals NAME ...] [--keep FOLDER] [--markdown OUT.md]

Every plan is timed by Meshwright's simulator under Meshwright's costs. `ddp`, `even` and `amp` are
the baselines that every search compares with; the others are restricted searches: rival_metis.py
and its like. `--anchors`: also over the cases of a folder that anchors.py reads. `--random N`:
clusters that are drawn, by number, instead of the examples. Fails when one of them is faster than
Meshwright's plan.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from anchors import jobs_in
from random_clusters import draw
from rival_harp import harp
from rival_metis import metis
from rival_sailor import sailor
from rival_searches import Found
from rival_zorse import zorse

from meshwright.cluster.files import load_cluster
from meshwright.cluster.spec import Cluster, Precision
from meshwright.cost.memory import device_memory, total_bytes
from meshwright.errors import FitError, PlanError
from meshwright.model.load import load_model
from meshwright.model.spec import LayerGraph
from meshwright.plan.files import save_plan
from meshwright.plan.ranks import describe_plan
from meshwright.plan.spec import Job, Plan
from meshwright.plan.validate import validate_plan
from meshwright.search.costs import Costs, costs_of
from meshwright.search.planner import baseline_plan, find_plan

HERE = Path(__file__).parent
CLUSTERS = HERE.parent / "examples" / "clusters"
UNEVEN = str(HERE / "uneven.toml")

BASELINES = ("ddp", "even", "amp")
RIVALS: dict[str, Callable[[Costs], Found | None]] = {
    "metis": metis,
    "sailor": sailor,
    "harp": harp,
    "zorse": zorse,
}
RECOMPUTING = {"harp", "zorse"}
"""Those whose authors let stages recompute."""
COLUMNS = (*BASELINES, *RIVALS)

TIE = 1e-9
"""Relative difference of seconds below which two plans are as fast as each other."""


@dataclass(frozen=True, slots=True)
class Case:
    """A cluster, and what is trained on it."""

    cluster: str
    model: str
    sequence: int
    batch: int
    precision: Precision = "fp16"
    where: Cluster | None = None
    """None: the example of that name."""

    @property
    def name(self) -> str:
        return f"{self.cluster} {self.model_name}"

    @property
    def model_name(self) -> str:
        """Of a file `folder/config.json` that of the folder."""
        path = Path(self.model)
        return path.parent.name if path.name == "config.json" else path.stem


CASES = (
    Case("v100-t4", "gpt2-medium", 1024, 32),
    Case("v100-t4", UNEVEN, 1024, 64),
    Case("a100-v100-16", "gpt2-xl", 1024, 128),
    Case("a100-v100-32", "gpt2-xl", 1024, 256),
    Case("a100-v100-128", "llama-2-7b", 2048, 256),
    Case("workstations", "gpt2-xl", 1024, 96),
    Case("a100-v100-t4", "gpt2-xl", 1024, 128),
    Case("two-sites", "llama-2-7b", 2048, 256, "bf16"),
    Case("h100-a100", "llama-2-13b", 4096, 128, "bf16"),
    Case("a10g-t4", "gpt2-medium", 1024, 64),
    Case("mi250x-mi300x", "mixtral-8x7b", 4096, 64, "bf16"),
    Case("unequal-nodes", "llama-3-8b", 2048, 64),
    Case("irregular", "gpt2-large", 1024, 48),
    Case("t4-16", "gpt2-medium", 1024, 32),
    Case("h100-8", "llama-3-8b", 4096, 64, "bf16"),
)
"""The last two are controls: even clusters."""


@dataclass(slots=True)
class Row:
    """What came out of one case, seconds of a step each."""

    case: Case
    ours: float
    bound: float
    planning: float
    """Processor seconds of the search."""
    others: dict[str, float | None] = field(default_factory=dict)
    """None: nothing of that kind fits, or none can be expressed."""
    plans: dict[str, Plan] = field(default_factory=dict)
    """The plans of the restricted searches."""
    partly: tuple[str, ...] = ()
    """Searches that ran into their limits before all of their space was excluded."""

    @property
    def best_rival(self) -> float | None:
        return min((s for s in self.others.values() if s is not None), default=None)

    @property
    def ratio(self) -> float:
        """Of the best rival's seconds to ours; infinite where no rival fits."""
        return self.best_rival / self.ours if self.best_rival else float("inf")

    @property
    def lost_to(self) -> list[str]:
        limit = self.ours * (1 - TIE)
        return [name for name, s in self.others.items() if s is not None and s < limit]


def run(case: Case, rivals: Iterable[str] = RIVALS) -> Row | None:
    """Plan a case with everything there is; None where nothing fits."""
    model = load_model(case.model, case.sequence, case.precision)
    cluster = case.where or load_cluster(CLUSTERS / f"{case.cluster}.toml")
    job = Job(global_batch=case.batch, sequence=case.sequence, precision=case.precision)
    began = time.process_time()
    try:
        plan = find_plan(model, cluster, job)
    except FitError:
        return None
    planning = time.process_time() - began
    assert plan.prediction is not None
    assert plan.prediction.lower_bound_seconds is not None
    _check(plan, model, cluster)
    row = Row(case, plan.prediction.step_seconds, plan.prediction.lower_bound_seconds, planning)
    for name in BASELINES:
        row.others[name] = _baseline(name, model, cluster, job)
    for name in rivals:
        found = RIVALS[name](costs_of(model, cluster, job, recomputation=name in RECOMPUTING))
        row.others[name] = found.seconds if found else None
        if found:
            row.plans[name] = found.plan
            _check(found.plan, model, cluster)
            row.partly += () if found.complete else (name,)
    return row


def random_case(seed: int) -> Case:
    """The random cluster of this number."""
    drawn = draw(seed)
    return Case(
        drawn.cluster.name, drawn.model, drawn.sequence, drawn.batch, drawn.precision, drawn.cluster
    )


def anchor_cases(folder: Path) -> Iterator[Case]:
    """The cases of a folder that anchors.py reads."""
    for name, case in jobs_in(folder).items():
        model = folder / case["model"]
        yield Case(
            name,
            str(model) if model.exists() else case["model"],
            case["sequence"],
            case["global_batch"],
            case["precision"],
            load_cluster(folder / case["cluster"]),
        )


def _baseline(name: str, model: LayerGraph, cluster: Cluster, job: Job) -> float | None:
    try:
        plan = baseline_plan(name, model, cluster, job)
    except (FitError, PlanError):
        return None
    assert plan.prediction is not None
    return plan.prediction.step_seconds


def _check(plan: Plan, model: LayerGraph, cluster: Cluster) -> None:
    """Every plan of this benchmark is legal and fits."""
    validate_plan(plan, model, cluster)
    over = [m for m in device_memory(plan, model, cluster) if total_bytes(m) > m.capacity]
    if over:
        raise AssertionError(f"{plan.name} does not fit: {over[0]}")


def _cells(row: Row) -> list[str]:
    cells = [row.case.cluster, f"{row.case.model_name}, {row.case.batch} rows", f"{row.ours:.4g}"]
    for name in COLUMNS:
        seconds = row.others.get(name)
        mark = "+" if name in row.partly else ""
        cells.append("-" if seconds is None else f"{seconds:.4g}{mark}")
    ratio = "-" if row.best_rival is None else f"{row.ratio:.2f}"
    return [*cells, ratio, f"{row.bound:.4g}", f"{row.planning:.1f}"]


HEADINGS = ["cluster", "model", "meshwright", *COLUMNS, "best rival / ours", "bound", "planning"]


def markdown(rows: list[Row]) -> str:
    """The table as it stands in the documentation."""
    lines = [HEADINGS, ["---"] * len(HEADINGS), *map(_cells, rows)]
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


def main() -> int:
    """Print one line per case as it is done; 1 if any rival was faster."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--only", nargs="+", default=[], help="clusters or anchors")
    options.add_argument("--anchors", type=Path, help="folder of further cases")
    options.add_argument("--random", type=int, default=0, help="number of random clusters")
    options.add_argument("--first", type=int, default=0, help="number of the first of them")
    options.add_argument("--rivals", nargs="*", default=list(RIVALS), choices=list(RIVALS))
    options.add_argument("--keep", type=Path, help="folder for the plans of faster rivals")
    options.add_argument("--markdown", type=Path, help="file for the table")
    chosen = options.parse_args()
    rows = []
    sys.stdout.write(" | ".join(HEADINGS) + "\n")
    for case in _cases(chosen):
        row = run(case, chosen.rivals)
        if row is None:
            sys.stdout.write(f"{case.name}: nothing fits\n")
        else:
            rows.append(row)
            sys.stdout.write(" | ".join(_cells(row)) + "\n" + _losses(row))
            sys.stdout.flush()
            if chosen.keep:
                _keep(row, chosen.keep)
    if chosen.markdown:
        chosen.markdown.write_text(markdown(rows), encoding="utf-8")
    lost = [f"{row.case.name}: slower than {', '.join(row.lost_to)}" for row in rows if row.lost_to]
    sys.stdout.write("\n".join(lost) + "\n" if lost else "never slower than any of them\n")
    return 1 if lost else 0


def _cases(chosen: argparse.Namespace) -> list[Case]:
    """The cases that are asked for."""
    if chosen.random:
        return [random_case(chosen.first + i) for i in range(chosen.random)]
    every = [*CASES, *(anchor_cases(chosen.anchors) if chosen.anchors else ())]
    return [case for case in every if not chosen.only or case.cluster in chosen.only]


def _losses(row: Row) -> str:
    """A line for each rival that is faster, with its plan."""
    lines = []
    for name in row.lost_to:
        share = 1 - (row.others[name] or 0.0) / row.ours
        plan = row.plans.get(name)
        lines.append(f"    {name} is {share:.3%} faster: {describe_plan(plan) if plan else ''}\n")
    return "".join(lines)


def _keep(row: Row, folder: Path) -> None:
    """Store the plans of rivals that are faster."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in row.lost_to:
        if name in row.plans:
            save_plan(row.plans[name], folder / f"{row.case.cluster}-{name}.json")


if __name__ == "__main__":
    sys.exit(main())
