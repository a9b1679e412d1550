"""What a rank with frozen weights holds, against the runtime's own step on fake tensors."""

from __future__ import annotations

import pytest
import torch
from test_memory_peaks import memory

from adapters import Tuned, tokens
from meshwright.model.trace import trace

pytestmark = pytest.mark.heavy

Case = memory.Case
CASES = {
    "adapters, fp32": (Case("tuned", "fp32", "adamw", 64, 4), (0, 1, 2, 3), False),
    "adapters, bf16": (Case("tuned", "bf16", "adamw", 64, 4), (0, 1, 2, 3), False),
    "last of two stages, tp2": (
        Case("tuned", "bf16", "adamw", 64, 2, 1, 2, 2, 1, 4), (2, 3), False,
    ),
    "first of two, which trains nothing": (
        Case("tuned", "bf16", "adamw", 64, 4, 0, 2, 1, 1, 4), (3,), False,
    ),
    "last of two, frozen and tied": (
        Case("tuned", "fp32", "adamw", 64, 4, 1, 2, 1, 2, 4), (0,), True,
    ),
    "recomputed": (
        Case("tuned", "bf16", "adamw", 64, 8, 1, 2, 1, 1, 4, recompute=True), (1, 2), False,
    ),
    "in two parts, the head frozen": (
        Case("tuned", "bf16", "adamw", 64, 4, 1, 2, 1, 1, 4, "1f1b-2bp"), (0, 1, 2, 3), False,
    ),
    "in two parts, a stage that trains nothing": (
        Case("tuned", "fp32", "adamw", 64, 4, 1, 2, 1, 1, 4, "gpipe-2bp"), (0,), False,
    ),
    "two stages on a device": (
        Case("tuned", "bf16", "adamw", 64, 4, 0, 2, 1, 1, 4, "zb-v", chunks=2), (1, 3), False,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_peak_of_a_frozen_model_is_foreseen(name):
    case, adapted, tied = CASES[name]

    def make():
        with torch.device("meta"):
            return Tuned(vocabulary=2000, width=128, hidden=512, layers=4,
                         adapted=adapted, rank=8, tied=tied)  # fmt: skip

    inputs = tokens(2, case.sequence)
    graph = trace(make(), inputs, case.precision, case.sequence, case.model)
    plan = memory.plan_of(case, len(graph.layers))
    foreseen = sum(memory.predicted(case, graph, plan).values())
    measured = memory.measured_peak(make, inputs, plan, graph, memory.rank_of(case))
    assert -0.03 < foreseen / measured - 1 < 0.05, (foreseen, measured)
