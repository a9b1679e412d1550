"""Random pipelines to schedule: unequal stages, slow transfers, tight memory."""

from __future__ import annotations

from random import Random

from meshwright.program.codes import to_codes
from meshwright.program.schedules import schedule_orders
from meshwright.program.work import Work, fits, seconds
from meshwright.search.list_scheduler.listing import NAMES


def random_work(random: Random, most_stages: int = 4, most_micro_batches: int = 8) -> Work:
    """Whole seconds, so that an exact solver can be asked too; always room for 1F1B of depth 1."""
    stages = random.randint(2, most_stages)

    def draw(low: int, high: int, count: int = stages) -> tuple[float, ...]:
        return tuple(float(random.randint(low, high)) for _ in range(count))

    inputs, weights, full = draw(1, 12), draw(1, 10), draw(2, 6)
    half = tuple(each * random.choice((0.5, 1.0, 1.5)) for each in full)
    larger = [max(pair) for pair in zip(full, half, strict=True)]
    return Work(
        layout=tuple((s,) for s in range(stages)),
        micro_batches=random.randint(2, most_micro_batches),
        forward=draw(1, 10),
        whole=tuple(i + w for i, w in zip(inputs, weights, strict=True)),
        inputs=inputs,
        weights=weights,
        onward=draw(0, 4, stages - 1),
        back=draw(0, 4, stages - 1),
        full=full,
        half=half,
        room=tuple(each * random.choice((1.5, 2.0, 3.0, 5.0, 100.0)) for each in larger),
    )


def best_named(work: Work) -> float:
    """Seconds of the best schedule with a rule that fits; infinite if none does."""
    found = [
        to_codes(schedule_orders(name, work.layout, work.micro_batches))
        for name in NAMES
        if not name.startswith("interleaved") and name != "zb-v"
    ]
    return min((seconds(work, codes) for codes in found if fits(work, codes)), default=float("inf"))
