"""What a backward in two parts gains on four stages, simulated and measured.

    python benchmarks/two_bp.py [--turns 7] [--share 0.2] [--rows 2] [--json OUT]

A small Llama is cut into four stages, each in a process of its own that has `share` of a core:
arithmetic is real, then the process sleeps. Messages go over loopback. Layers and links are
measured as `meshwright profile` does; the simulator knows nothing else. All plans live in the same
processes and take turns, step by step. A gain is the ratio of the median seconds of a step without
and with the backward in two parts; the unit gain is the closed form for F = I = W and no transfers.

batched: weight gradients of several micro-batches at the end of a step together. Others on the
machine must leave the stages their shares: lower `share` where they are many. Ends with 1 where a
measured gain is less than 0.9 of the simulated one.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from statistics import median, quantiles

from meshwright.cluster.files import cluster_from, dump_cluster
from meshwright.cluster.spec import Cluster
from meshwright.cost.profile import Profile
from meshwright.launch.local import Launcher
from meshwright.model.load import load_model
from meshwright.model.spec import LayerGraph
from meshwright.plan.files import load_plan, save_plan
from meshwright.plan.spec import Job, Pipeline, Plan, PlanInput, ScheduleName, Stage
from meshwright.profiling.measure_profile import ProfileSettings
from meshwright.runtime.failure import rank_process
from meshwright.runtime.run_folder import METRICS
from meshwright.simulate.simulator import simulate_plan
from meshwright.testbed.cpu_load import CpuLoadMeter
from meshwright.workflows.profile_model import profile_here

STAGES = 4
BLOCKS = 8
SEQUENCE = 64
WARM_UP = 2
WANTED = 0.9
CONFIG = {
    "model_type": "llama",
    "vocab_size": 256,
    "max_position_embeddings": SEQUENCE,
    "hidden_size": 256,
    "num_hidden_layers": BLOCKS,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "intermediate_size": 704,
}


@dataclass(frozen=True, slots=True)
class Case:
    """An order of work, and those that do the same with backwards in two parts."""

    name: str
    plain: ScheduleName
    micro_batches: int
    split: tuple[ScheduleName, ...]
    left: int
    """Of each stage but one: unit parts that still idle in the closed form."""

    @property
    def unit_gain(self) -> float:
        """In units of F = I = W: 3 (M + N - 1) over 3 M and what idles."""
        count, others = self.micro_batches, STAGES - 1
        return 3 * (count + others) / (3 * count + self.left * others)


CASES = (
    Case("naive", "gpipe", 1, ("gpipe-2bp",), 2),
    Case("GPipe", "gpipe", STAGES, ("gpipe-2bp", "gpipe-2bp-batched"), 2),
    Case("1F1B", "1f1b", STAGES, ("1f1b-2bp", "1f1b-2bp-batched", "zb-h1"), 1),
    Case("1F1B", "1f1b", 2 * STAGES, ("1f1b-2bp", "1f1b-2bp-batched", "zb-h1"), 1),
)

Key = tuple[ScheduleName, int]
"""Order of work, micro-batches."""


def keys() -> list[Key]:
    """Everything that is run, in the order of turns."""
    return [(name, c.micro_batches) for c in CASES for name in (c.plain, *c.split)]


def here() -> Cluster:
    """This machine as the planner sees it; the profile has its real figures."""
    node = {
        "name": "here",
        "devices": [f"{STAGES} x slice"],
        "inside": {"bandwidth": "10 Gbit/s", "latency": "50 us", "shared": True},
    }
    data = {"format": 1, "name": "here", "device": {"slice": {"like": "cpu"}}, "node": [node]}
    return cluster_from(data, source="here")


def plan_of(key: Key, graph: LayerGraph, rows: int) -> Plan:
    """As many blocks in each stage; the embedding in the first, the head in the last."""
    schedule, count = key
    each = BLOCKS // STAGES
    ends = [1 + each * (s + 1) for s in range(STAGES - 1)]
    cuts = [0, *ends, len(graph.layers)]
    devices = tuple(f"here:{s}" for s in range(STAGES))
    stages = tuple(
        Stage(layers=(first, last), devices=((device,),))
        for first, last, device in zip(cuts, cuts[1:], devices, strict=False)
    )
    return Plan(
        name=f"{schedule}, {count} micro-batches",
        model=PlanInput(name=graph.name, fingerprint=""),
        cluster=PlanInput(name="here", fingerprint=""),
        job=Job(global_batch=count * rows, sequence=SEQUENCE, precision="fp32", optimizer="sgd"),
        schedule=schedule,
        devices=devices,
        pipelines=(Pipeline(micro_batches=count, rows=rows, stages=stages),),
    )


def profiled(folder: Path, share: float, rows: int) -> tuple[LayerGraph, Profile]:
    """Layers alone and with the rows of several micro-batches, and the links, measured here."""
    config = folder / "config.json"
    config.write_text(json.dumps(CONFIG))
    (folder / "cluster.toml").write_text(dump_cluster(here()))
    settings = ProfileSettings(
        model=str(config),
        sequence=SEQUENCE,
        rows=(rows, 2 * rows, STAGES * rows),
        precision="fp32",
        cluster=str(folder / "cluster.toml"),
        output=str(folder / "profile.json"),
        shares={"slice": share},
        optimizer="sgd",
        repeats=11,
    )
    return load_model(config, SEQUENCE, "fp32"), profile_here(settings, STAGES, again=True)[0]


def measured(folder: Path, options: argparse.Namespace) -> dict[Key, list[float]]:
    """Seconds of the steps of every plan, turn by turn."""
    job = {"share": options.share, "turns": options.turns}
    (folder / "job.json").write_text(json.dumps(job))
    os.environ["PYTHONPATH"] = os.pathsep.join(
        [str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    )
    found: dict[Key, list[float]] = {key: [] for key in keys()}

    def note(line: dict[str, float]) -> None:
        if line["turn"] >= WARM_UP:
            found[keys()[int(line["plan"])]].append(line["seconds"])

    with Launcher() as launcher:
        devices = [f"here:{rank}" for rank in range(STAGES)]
        launcher.run(devices, folder, module="two_bp", on_metrics=note)
    return found


def worker(folder: Path) -> None:
    """One stage of all plans: a step of each in turn."""
    import torch
    import torch.distributed as dist

    from meshwright.emulation.dilation import Dilation, Dilator, dilation_observer
    from meshwright.model.zoo.build import build_model
    from meshwright.runtime.engine import Engine
    from meshwright.runtime.run_folder import TrainingOptions
    from meshwright.runtime.training_loop import sgd

    torch.set_num_threads(1)
    job = json.loads((folder / "job.json").read_text())
    engines: list[Engine] = []
    for number in range(len(keys())):
        with torch.device("meta"):
            model = build_model(folder / "config.json", SEQUENCE)
        example = torch.zeros((1, SEQUENCE), dtype=torch.long)
        engine = Engine(
            model,
            load_plan(folder / f"plan-{number}.json"),
            inputs=(example, example),
            optimizer=sgd(1e-3),
            options=TrainingOptions(clip_norm=0),
            observer=dilation_observer(Dilator(Dilation(share=job["share"]))),
            world=engines[0].world if engines else None,
        )
        engines.append(engine)
    tokens = torch.randint(CONFIG["vocab_size"], (engines[-1].plan.job.global_batch, SEQUENCE + 1))

    def rows(first: int, last: int) -> tuple[torch.Tensor, ...]:
        return tokens[first:last, :-1].contiguous(), tokens[first:last, 1:].contiguous()

    for turn in range(WARM_UP + job["turns"]):
        for number, engine in enumerate(engines):
            dist.barrier()
            seconds = engine.step(rows).seconds
            if dist.get_rank() == 0:
                line = {"turn": turn, "plan": number, "seconds": seconds}
                with (folder / METRICS).open("a") as lines:
                    lines.write(json.dumps(line) + "\n")
    dist.barrier()


def table(expected: dict[Key, float], found: dict[Key, list[float]]) -> list[dict[str, object]]:
    """Prints a line for every order with a backward in two parts."""
    print(
        f"{'order':18}{'M':>3}{'unit gain':>11}{'simulated':>11}{'measured':>10}{'quartiles':>14}"
        f"{'measured/simulated':>20}{'step: s simulated':>19}{'measured':>10}"
    )
    lines = []
    for case in CASES:
        plain = case.plain, case.micro_batches
        for name in case.split:
            key = name, case.micro_batches
            turns = [a / b for a, b in zip(found[plain], found[key], strict=True)]
            low, _, high = quantiles(turns, n=4)
            gain = median(found[plain]) / median(found[key])
            simulated = expected[plain] / expected[key]
            print(
                f"{name:18}{case.micro_batches:3}{case.unit_gain:11.2f}{simulated:11.3f}{gain:10.3f}"
                f"{f'{low:.3f}-{high:.3f}':>14}{gain / simulated:20.3f}"
                f"{expected[key]:19.3f}{median(found[key]):10.3f}",
                flush=True,
            )
            lines.append(
                {
                    "order": name,
                    "micro_batches": case.micro_batches,
                    "unit_gain": case.unit_gain,
                    "simulated_gain": simulated,
                    "measured_gain": gain,
                    "simulated_seconds": [expected[plain], expected[key]],
                    "measured_seconds": [found[plain], found[key]],
                }
            )
    return lines


def compare(folder: Path, options: argparse.Namespace) -> list[dict[str, object]]:
    """Measure layers, simulate every plan, run every plan."""
    graph, profile = profiled(folder, options.share, options.rows)
    plans = {key: plan_of(key, graph, options.rows) for key in keys()}
    for number, plan in enumerate(plans.values()):
        save_plan(plan, folder / f"plan-{number}.json")
    expected = {
        key: simulate_plan(plan, graph, here(), profile).step_seconds for key, plan in plans.items()
    }
    watch = CpuLoadMeter()
    found = measured(folder, options)
    foreign = watch.foreign_share()
    lines = table(expected, found)
    print(f"others used {foreign:.0%} of the machine; more than half leaves the stages no share")
    return lines


def main() -> int:
    """The table; 1 where a gain is missed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--turns", type=int, default=7)
    parser.add_argument("--share", type=float, default=0.2, help="of a core, for each stage")
    parser.add_argument("--rows", type=int, default=2, help="of a micro-batch")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--work", type=Path, help="folder to keep profile and plans in")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = (options.work or Path(scratch)).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        lines = compare(folder, options)
    if options.json:
        options.json.write_text(json.dumps(lines, indent=1))
    missed = [line for line in lines if line["measured_gain"] < WANTED * line["simulated_gain"]]
    print(f"{len(missed)} of {len(lines)} gains below {WANTED} of the simulated")
    return 1 if missed else 0


if __name__ == "__main__":
    if "RANK" in os.environ:
        with rank_process(Path(sys.argv[1])):
            worker(Path(sys.argv[1]))
    sys.exit(main())
