"""Meshwright's plan against even strategies and AMP's, trained on emulated clusters.

    python benchmarks/worth_it.py [--work DIR] [--only SETTING ...] [--turns 3]

mixed     the AMP paper's mixed cluster: three nodes of four fast devices on slow adapters, one of
          four slower devices on a quick one; a GPT
uneven    its even cluster of sixteen, and a model whose layers grow steeply
even      the same cluster and a GPT: where nothing is to be gained, nothing may be lost

A slow device has a quarter of a fast one's speed, as T4 and V100 have by the catalogue's peaks and
efficiencies (65 x 0.35 and 125 x 0.71 TFLOP/s). Link rates keep the paper's ratio of communication
to arithmetic: 10 Gbit/s, V100 and 32 rows of 1,024 tokens become 75 Mbit/s, 0.4 of a slow core and
32 rows of 64. Devices are virtual. The even strategies are data parallelism and the three grids
(data x pipeline, any micro-batch, 1F1B) that promise most; the fastest measured one is the
baseline. All plans of a setting take turns. Tensor parallelism is left out on all sides, FSDP too:
the runtime has none. Ends with 1 where a limit is missed.
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

from meshwright.plan.ranks import describe
from meshwright.plan.spec import Plan

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


def contenders(known: Known) -> tuple[list[tuple[str, Plan]], str | None]:
    """Meshwright's plan first; and the name under which AMP's choice stands among them."""
    hand = dict(hand_made(known))
    rivals = [("ddp", hand["ddp"])] if "ddp" in hand else []
    rivals += even_plans(known, 3)
    if "amp" not in hand:
        return distinct([("meshwright", best_plan(known)), *rivals]), None
    every = distinct([("meshwright", best_plan(known)), *rivals, ("amp", hand["amp"])])
    amp = next(name for name, plan in every if plan.pipelines == hand["amp"].pipelines)
    return every, amp


def medians(
    suite: Suite, known: Known, plans: list[tuple[str, Plan]], turns: int
) -> dict[str, tuple[float, Plan]]:
    """Median over the turns; in each turn every plan is run once."""
    seconds: dict[str, list[float]] = {name: [] for name, _ in plans}
    for turn in range(turns):
        for name, plan in plans:
            line = suite.measure(known, f"{name}#{turn}", plan)
            seconds[name].append(line["measured"])
            error = line["predicted"] / line["measured"] - 1
            say(f"  {name:10} {line['measured']:8.3f} s  prediction {error:+.1%}")
    return {name: (median(seconds[name]), plan) for name, plan in plans}


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
            plans, amps = contenders(known)
            found = medians(suite, known, plans, options.turns)
            own, plan = found["meshwright"]
            amp = found[amps] if amps else None
            # Where nothing can be gained, Meshwright's plan may be the best even one itself.
            others = {n: s for n, (s, _) in found.items() if n not in ("meshwright", "amp")}
            best, even = min(((s, n) for n, s in others.items()), default=(own, "meshwright"))
            say(f"{name}: {own:.3f} s by {describe(plan)}")
            say(f"  {best / own:.2f} x as fast as {even} (wanted {limit})")
            if amp:
                say(f"  {amp[0] / own:.2f} x as fast as AMP's {describe(amp[1])}")
            slower_than_amp = amp is not None and amp[0] / own < 0.99
            if best / own < limit or slower_than_amp:
                missed.append(name)
    finally:
        suite.close()
    say(f"missed: {', '.join(missed)}" if missed else "all limits met")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
