"""Schedules: closed forms beside the simulator, and the list scheduler beside the optimum.

python benchmarks/schedules.py forms            # bubbles and memory of every closed form
python benchmarks/schedules.py large            # 64 stages x 1,024 micro-batches: CPU seconds
python benchmarks/schedules.py optimum --cases 100   # against CP-SAT (needs ortools)
python benchmarks/schedules.py named --cases 1000    # against every named schedule
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from random import Random

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "search"))

from listings import best_named, random_work

from meshwright.cost.collective import Traffic
from meshwright.cost.pricing import Prices
from meshwright.cost.pricing_context import Price
from meshwright.plan.ranks import StageLayout
from meshwright.plan.spec import ScheduleName
from meshwright.program.actions import Action, peak_held
from meshwright.program.instructions import Instruction, Program
from meshwright.program.operations import Op
from meshwright.program.schedules import schedule_orders
from meshwright.program.work import Work, fits, seconds
from meshwright.search.list_scheduler.listing import best_order
from meshwright.simulate.simulator import simulate

FREE = Price(traffic=Traffic(bytes_by_resource={}))
UNIT = {Op.FORWARD: 1.0, Op.BACKWARD: 2.0, Op.BACKWARD_INPUT: 1.0, Op.BACKWARD_WEIGHT: 1.0}


def simulated(
    schedule: ScheduleName, layout: StageLayout, count: int
) -> tuple[float, float, float]:
    """The full simulator on equal stages, F = I = W = 1 s, free transfers: idle seconds of the
    step, of the group that idles most between its first and last action, and micro-batches held."""
    found = schedule_orders(schedule, layout, count)
    group = {s: g for g, held in enumerate(layout) for s in held}
    ranks = [[x for a in order for x in _instructions(a, group)] for order in found]
    prices = tuple(tuple(_price(i) for i in rank) for rank in ranks)
    timeline = simulate(
        Program(ranks=tuple(map(tuple, ranks))),
        Prices(
            ranks=prices,
            bandwidth={},
            devices=tuple(f"n:{g}" for g in range(len(layout))),
            static_bytes=(0,) * len(layout),
        ),
    )
    busy = 3.0 * count * len(layout[0])
    spans = []
    for g in range(len(layout)):
        own = [i for i in timeline.intervals if i.rank == g and i.stream == "compute"]
        spans.append(max(i.end_seconds for i in own) - min(i.start_seconds for i in own))
    held = max(peak_held(order, _one, _one) for order in found)
    return timeline.step_seconds - busy, max(spans) - busy, held / len(layout[0])


def _one(_stage: int) -> float:
    return 1.0


def _instructions(a: Action, group: dict[int, int]) -> list[Instruction]:
    """An action with its messages, whose receive is posted right ahead of it."""
    forward, weight = a.op is Op.FORWARD, a.op is Op.BACKWARD_WEIGHT
    source, target = (a.stage - 1, a.stage + 1) if forward else (a.stage + 1, a.stage - 1)
    one = a.last == a.first + 1
    own = Instruction(
        op=a.op,
        stage=a.stage,
        micro_batch=a.first if one else None,
        micro_batches=None if one else (a.first, a.last),
    )
    found = [own]
    if not weight and group.get(source, group[a.stage]) != group[a.stage]:
        op = Op.RECV_F if forward else Op.RECV_B
        message = Instruction(op=op, stage=a.stage, micro_batch=a.first, peer=group[source])
        found.insert(0, message)
    if not weight and group.get(target, group[a.stage]) != group[a.stage]:
        op = Op.SEND_F if forward else Op.SEND_B
        message = Instruction(op=op, stage=a.stage, micro_batch=a.first, peer=group[target])
        found.append(message)
    return found


def _price(i: Instruction) -> Price:
    if i.op not in UNIT:
        return FREE
    count = 1 if i.micro_batches is None else i.micro_batches[1] - i.micro_batches[0]
    return Price(seconds=UNIT[i.op] * count)


def forms() -> None:
    """Every closed form, for 2 to 8 stages."""
    one: Callable[[int], StageLayout] = lambda n: tuple((s,) for s in range(n))  # noqa: E731
    fold: Callable[[int], StageLayout] = lambda n: tuple((s, 2 * n - 1 - s) for s in range(n))  # noqa: E731
    deal: Callable[[int], StageLayout] = lambda n: tuple((s, s + n) for s in range(n))  # noqa: E731
    print("2BP: share of the step that is idle (T_F = T_p1 = T_p2)")
    rows: list[tuple[ScheduleName, str, Callable[[int], int], Callable[[int], float]]] = [
        ("gpipe", "naive, 1 micro-batch", lambda _: 1, lambda n: (n - 1) / n),
        ("gpipe-2bp", "naive, 1 micro-batch", lambda _: 1, lambda n: 2 * (n - 1) / (2 * n + 1)),
        ("gpipe", "M = N", lambda n: n, lambda n: (n - 1) / (2 * n - 1)),
        ("gpipe-2bp", "M = N", lambda n: n, lambda n: 2 * (n - 1) / (2 * (n - 1) + 3 * n)),
        ("1f1b", "M = N", lambda n: n, lambda n: (n - 1) / (2 * n - 1)),
        ("1f1b-2bp", "M = N", lambda n: n, lambda n: (n - 1) / (4 * n - 1)),
        ("1f1b", "M = 2N", lambda n: 2 * n, lambda n: (n - 1) / (3 * n - 1)),
        ("1f1b-2bp", "M = 2N", lambda n: 2 * n, lambda n: (n - 1) / (7 * n - 1)),
    ]
    for name, what, count, form in rows:
        for n in (2, 4, 8):
            idle, _, _ = simulated(name, one(n), count(n))
            share = idle / (idle + 3 * count(n))
            print(f"  {name:10} {what:21} N={n}  closed form {form(n):.6f}  simulated {share:.6f}")
    print("Idle seconds and micro-batches held, M = 4N (F = I = W = 1 s)")
    family: list[
        tuple[ScheduleName, Callable[[int], StageLayout], int, int, Callable[[int], int]]
    ] = [
        ("1f1b", one, 0, 3, lambda n: n),
        ("zb-h1", one, 0, 1, lambda n: n),
        ("zb-h2", one, 1, 0, lambda n: 2 * n - 1),
        ("zb-v", fold, 1, 0, lambda n: n),
        ("interleaved-1f1b", deal, 0, 3, lambda _: 0),
    ]
    for name, layout, kind, each, held in family:
        for n in (2, 4, 8):
            found = simulated(name, layout(n), 4 * n)
            memory = f"{held(n)}" if held(n) else "-"
            print(
                f"  {name:16} N={n}  closed form {(n - 1) * each:2d} s, holds {memory:2}"
                f"  simulated {found[kind]:4.1f} s, holds {found[2]:.1f}"
            )


def large() -> None:
    """64 stages x 1,024 micro-batches of unequal times, at three memory limits."""
    for room in (150.0, 400.0, 1e9):
        work = _large(Random(3), room)
        began = time.process_time()
        codes = best_order(work)
        took = time.process_time() - began
        assert codes is not None
        least = 1024 * max(f + b for f, b in zip(work.forward, work.whole, strict=True))
        print(f"room {room:g}: {took:.2f} CPU s, step {seconds(work, codes):g} s (>= {least:g} s)")


def _large(random: Random, room: float) -> Work:
    stages = 64

    def draw(low: int, high: int, count: int = stages) -> tuple[float, ...]:
        return tuple(float(random.randint(low, high)) for _ in range(count))

    inputs, weights = draw(1, 12), draw(1, 10)
    return Work(
        layout=tuple((s,) for s in range(stages)),
        micro_batches=1024,
        forward=draw(1, 10),
        whole=tuple(i + w for i, w in zip(inputs, weights, strict=True)),
        inputs=inputs,
        weights=weights,
        onward=draw(0, 4, stages - 1),
        back=draw(0, 4, stages - 1),
        full=(1.0,) * stages,
        half=(1.5,) * stages,
        room=(room,) * stages,
    )


def named(cases: int) -> None:
    """How far ahead of the best named schedule that fits."""
    gains, behind, alone = [], 0, 0
    for seed in range(cases):
        work = random_work(Random(seed))
        codes = best_order(work, 100_000)
        assert codes is not None
        assert fits(work, codes)
        best = best_named(work)
        behind += seconds(work, codes) > best
        alone += best == float("inf")
        if best < float("inf"):
            gains.append(best / seconds(work, codes))
    print(
        f"{cases} cases: behind in {behind}; faster by {statistics.median(gains):.3f}x (median), "
        f"{max(gains):.2f}x (most); no named schedule fits in {alone}"
    )


def optimum(cases: int, limit: float) -> None:
    """Distance from what CP-SAT proves to be the least possible."""
    from optimum import least_seconds

    gaps, proofs = [], 0
    for seed in range(cases):
        work = random_work(Random(seed))
        codes = best_order(work)
        assert codes is not None
        took = seconds(work, codes)
        least, proven = least_seconds(work, took, limit)
        gaps.append(took / least - 1)
        proofs += proven
        how = "" if proven else ", not proven"
        size = f"{len(work.forward)} x {work.micro_batches}"
        print(f"{seed}: {size}, {gaps[-1]:.2%}{how}", flush=True)
    print(
        f"{cases} cases: worst {max(gaps):.2%}, mean {statistics.mean(gaps):.3%}, "
        f"within 3 %: {sum(gap <= 0.03 for gap in gaps)}; optimum proven in {proofs}"
    )


def main() -> None:
    """Print what is asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("forms", "large", "named", "optimum"))
    parser.add_argument("--cases", type=int, default=100)
    parser.add_argument("--limit", type=float, default=20.0, help="seconds of CP-SAT for one case")
    options = parser.parse_args()
    if options.what == "forms":
        forms()
    elif options.what == "large":
        large()
    elif options.what == "named":
        named(options.cases)
    else:
        optimum(options.cases, options.limit)


if __name__ == "__main__":
    main()
