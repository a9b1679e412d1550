"""Adds ways of training on several devices; each has a room with what it adds to programs, prices
and ranks.

The files of a room are named after the part of the kernel that reads them. A room has those that it
needs, and may have others, which its own files read. Each is loaded when its part needs it, so only
`runtime.py` (or `runtime/`) may import PyTorch:

* `plan.py`: `problems`, what is wrong with its field of a plan; `stage_text`, its word in the
  one-line description of a plan; `without`, which returns a stage that does not use it;
* `operations.py`: OPERATIONS, the words that the technique adds to programs;
* `program.py`: `rewriting`, which returns what puts its instructions into the list of a rank;
* `price.py`: PRICES, what each of its operations costs; `layer_seconds`, which adds to the forward
  and backward of each layer what the technique does inside them; `inner_traffic`, the bytes of a
  step that it sends there;
* `memory.py`: `adjustment`, which returns what changes the bytes that a rank holds;
* `export.py`: `answers`, how another tool is told of its field, and `beside_the_schedule`, the
  sentences for a file that holds only the schedule;
* `options.py`: OPTION, what the search tries on its best plans;
* `report.py`: `sentences`, what is said of a plan that uses the technique;
* `runtime.py`: HANDLERS, what plays each of its operations on PyTorch; STARTS, how those that sum
  gradients begin; `prepare`, which lays out a bucket of gradients before the first step.
"""

from __future__ import annotations

from functools import cache
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType
from typing import Any

TECHNIQUES: tuple[str, ...] = (
    "pipeline_parallel",
    "tensor_parallel",
    "data_parallel",
    "backward_split",
    "activation_checkpointing",
    "state_division",
)
"""The rooms. A program is rewritten by each in this order."""


@cache
def rooms_with(part: str) -> tuple[ModuleType, ...]:
    """Returns the file of one name in every room that has one, in the order of TECHNIQUES."""
    names = (f"{__name__}.{room}.{part}" for room in TECHNIQUES)
    return tuple(import_module(name) for name in names if find_spec(name) is not None)


def provided(part: str, name: str) -> tuple[Any, ...]:
    """Returns what the rooms provide under a name in their file for a part of the kernel."""
    return tuple(getattr(room, name) for room in rooms_with(part) if hasattr(room, name))
