"""Meshwright's plan against the even strategies that people use, trained on emulated clusters.

    python benchmarks/worth_it.py [--work DIR] [--only SETTING ...] [--turns 3]

mixed     the AMP paper's mixed cluster: three nodes of four fast devices on slow adapters, one of
          four slower devices on a quick one; a GPT
uneven    its even cluster of sixteen, and a model whose layers grow steeply
even      the same cluster and a GPT: where nothing is to be gained, nothing may be lost

A slow device has a quarter of a fast one's speed, as T4 and V100 have by the catalogue's peaks and
efficiencies (65 x 0.35 and 125 x 0.71 TFLOP/s). Link rates keep the paper's ratio of communication
to arithmetic: 10 Gbit/s, V100 and 32 rows of 1,024 tokens become 75 Mbit/s, 0.4 of a slow core and
32 rows of 64. Devices are virtual. The rivals are data parallelism and the three grids (data x
pipeline, any micro-batch, 1F1B) that promise most, on our runtime; and PyTorch's own DDP, FSDP2 and
pipelines (torch_rivals.py). The fastest measured one is the baseline. All take turns; after the
first one those that were not within a tenth of the best rival stay out. PyTorch's DDP must be about
as fast as our runtime's data parallelism, else something holds it back. Tensor parallelism is left
out on all sides: virtual devices have none. Ends with 1 where a limit is missed.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from statistics import median

from testbed_cases import (
    HERE,
    Known,
    Place,
    Setting,
    Suite,
    best_plan,
    distinct,
    even_plans,
    hand_made,
    say,
)
from torch_rivals import Rival, torch_rivals

from meshwright.plan.ranks import describe_plan

SLOW, QUICK = 75, 375
MIXED = Place(
    "mixed-16",
    (
        *((f"p3-{n}", "4 x fast", SLOW, "main") for n in range(3)),
        ("g4", "4 x slow", QUICK, "main"),
    ),
)
EVEN = Place("even-16", tuple((f"p3-{n}", "4 x fast", SLOW, "main") for n in range(4)))
SETTINGS = {
    "mixed": (Setting(MIXED, "virtual", "gpt-24", batch=32), 1.6),
    "uneven": (Setting(EVEN, "virtual", "uneven", batch=32), 1.8),
    "even": (Setting(EVEN, "virtual", "gpt-24", batch=32), 0.98),
}
"""With the least speed-up over the best even strategy that is wanted."""


NEAR = 1.1
"""Of the best rival's seconds: who is above in the first turn has no part in the others."""
ALIKE = 1.1
"""PyTorch's DDP over our data parallelism: what is the same work may differ by."""


FEW = {"steps": 3}
"""Of data parallelism, whose steps last for seconds."""


def contenders(known: Known) -> list[Rival]:
    """Meshwright's plan first, then our runtime's even plans and PyTorch's own systems."""
    hand = dict(hand_made(known))
    own = [("ddp", hand["ddp"])] if "ddp" in hand else []
    plans = distinct([*own, *even_plans(known, 3)])
    return [
        Rival("meshwright", best_plan(known)),
        *(Rival(name, plan, FEW if name == "ddp" else {}) for name, plan in plans),
        *torch_rivals(known),
    ]


def medians(suite: Suite, known: Known, rivals: list[Rival], turns: int) -> dict[str, float]:
    """Seconds by name, the median over the turns; in each turn everybody left is run once."""
    seconds: dict[str, list[float]] = {rival.name: [] for rival in rivals}
    for turn in range(turns):
        for rival in rivals:
            line = suite.measure(known, f"{rival.name}#{turn}", rival.plan, rival.job)
            seconds[rival.name].append(line["measured"])
            error = line["predicted"] / line["measured"] - 1
            like = "plan like it" if "system" in rival.job else "prediction"
            say(f"  {rival.name:26} {line['measured']:8.3f} s  {like} {error:+.1%}")
        own, *others = rivals
        best = min(seconds[rival.name][0] for rival in others)
        rivals = [own, *(o for o in others if seconds[o.name][0] <= NEAR * best)]
    return {name: median(found) for name, found in seconds.items()}


def judge(name: str, rivals: list[Rival], found: dict[str, float], limit: float) -> list[str]:
    """Prints who won by how much; what is not as it should be."""
    own = found["meshwright"]
    others = {n: s for n, s in found.items() if n != "meshwright"}
    best = min(others, key=lambda n: others[n])
    say(f"{name}: {own:.3f} s by {describe_plan(rivals[0].plan)}")
    say(f"  {others[best] / own:.2f} x as fast as {best} (wanted {limit})")
    missed = [name] if others[best] / own < limit else []
    if "ddp" in found:
        ratio = min(s for n, s in found.items() if n.startswith("torch-ddp")) / found["ddp"]
        say(f"  PyTorch's DDP takes {ratio:.2f} of the time of our data parallelism")
        if ratio > ALIKE:
            missed.append(f"{name}: PyTorch's DDP is held back")
    return missed


def main() -> int:
    """Measure what is not measured yet; 1 where a limit is missed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, default=Path("runs/worth-it"))
    parser.add_argument("--only", nargs="+", choices=SETTINGS, default=list(SETTINGS))
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--foreign", type=float, default=0.1, help="of the machine; 1: never mind")
    options = parser.parse_args()
    os.environ["PYTHONPATH"] = os.pathsep.join(
        [str(HERE), *filter(None, [os.environ.get("PYTHONPATH")])]
    )
    suite = Suite(options.work, foreign_share=options.foreign, attempts=3)
    missed = []
    try:
        for name in options.only:
            setting, limit = SETTINGS[name]
            known = suite.known(setting)
            say(f"{name}: {setting.place.name}, {setting.model}")
            rivals = contenders(known)
            missed += judge(name, rivals, medians(suite, known, rivals, options.turns), limit)
    finally:
        suite.close()
    say(f"missed: {', '.join(missed)}" if missed else "all limits met")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
