"""What one plan comes to, byte for byte: its program, its simulated step and its memory.

`python tests/golden/artefacts.py` searches every plan anew and writes plans and digests; with
`--keep-plans` only the digests. `--into FOLDER` also writes the texts that the digests are of, so
that two versions of the code can be compared line by line.
"""

from __future__ import annotations

import argparse
import hashlib
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from meshwright.cluster.files import load_cluster
from meshwright.cost.memory import device_memory
from meshwright.model.load import load_model
from meshwright.plan.files import load_plan, save_plan
from meshwright.plan.spec import Job, Plan
from meshwright.program.compile import compile_plan
from meshwright.program.instructions import format_program as program_text
from meshwright.program.timeline import Timeline
from meshwright.records import dumps
from meshwright.search.planner import find_plan
from meshwright.simulate.simulator import simulate_plan

HERE = Path(__file__).parent
CLUSTERS = HERE.parents[1] / "examples" / "clusters"
DIGESTS = HERE / "digests.json"
MODELS = ("gpt2-xl", "llama-2-7b")
JOB = Job(global_batch=64, sequence=1024, precision="fp16")
CASES = tuple((path.stem, model) for path in sorted(CLUSTERS.glob("*.toml")) for model in MODELS)


def plan_file(cluster: str, model: str) -> Path:
    """Where the plan of a case is kept."""
    return HERE / "plans" / f"{cluster}.{model}.json"


def find(cluster: str, model: str) -> Plan:
    """The plan that the search finds for a case today, without its counts of pruned candidates:
    how often a search looks at what it does not choose is free to change."""
    graph = load_model(model, JOB.sequence, JOB.precision)
    found = find_plan(graph, load_cluster(CLUSTERS / f"{cluster}.toml"), JOB)
    assert found.prediction is not None
    return replace(found, prediction=replace(found.prediction, dropped={}))


def texts(cluster: str, model: str) -> dict[str, str]:
    """Program, timeline and memory of the kept plan, as text. Numbers are written in full."""
    plan = load_plan(plan_file(cluster, model))
    graph = load_model(model, JOB.sequence, JOB.precision)
    machines = load_cluster(CLUSTERS / f"{cluster}.toml")
    return {
        "program": program_text(compile_plan(plan, graph)),
        "program without clipping": program_text(compile_plan(plan, graph, clipped=False)),
        "timeline": "\n".join(_lines(simulate_plan(plan, graph, machines))),
        "timeline without clipping": "\n".join(
            _lines(simulate_plan(plan, graph, machines, clipped=False))
        ),
        "memory": "\n".join(dumps(each) for each in device_memory(plan, graph, machines)),
    }


def _lines(timeline: Timeline) -> Iterator[str]:
    yield f"step {timeline.step_seconds!r}"
    for i in timeline.intervals:
        times = f"{i.start_seconds!r} {i.end_seconds!r}"
        yield f"{i.rank} {i.stream} {i.label} peer={i.peer} bytes={i.bytes} {times}"
    for point in timeline.memory:
        yield f"{point.rank} holds {point.bytes} from {point.seconds!r}"


def digests(found: dict[str, str]) -> dict[str, str]:
    """The first half of the SHA-256 of every text."""
    return {name: hashlib.sha256(text.encode()).hexdigest()[:32] for name, text in found.items()}


def main() -> None:
    """Write plans and digests anew."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--keep-plans", action="store_true", help="search no plan anew")
    parser.add_argument("--into", type=Path, help="a folder for the texts")
    options = parser.parse_args()
    kept = {}
    for cluster, model in CASES:
        if not options.keep_plans:
            save_plan(find(cluster, model), plan_file(cluster, model))
        found = texts(cluster, model)
        kept[f"{cluster}.{model}"] = digests(found)
        if options.into:
            options.into.mkdir(parents=True, exist_ok=True)
            for name, text in found.items():
                (options.into / f"{cluster}.{model}.{name.replace(' ', '-')}").write_text(text)
        print(cluster, model, flush=True)
    DIGESTS.write_text(json.dumps(kept, indent=1) + "\n")


if __name__ == "__main__":
    main()
