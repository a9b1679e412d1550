"""A technique is one room: what it calls its operations and its field occurs nowhere else.

So nothing outside can branch on it, and another technique is added without touching these files.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from meshwright.techniques import TECHNIQUES, rooms_with
from sources import PACKAGE, files_below, text_of, tree_of

ROOMS = PACKAGE / "techniques"
SHARED = {"plan/spec.py": "the field itself", "techniques/__init__.py": "the list of rooms"}
FIELDS: dict[str, tuple[str, ...]] = {
    "activation_checkpointing": ("recompute",),
    "state_division": ("states", "StateDivision", "StateLevel"),
}
"""The field of each technique in a plan, with the names of its types."""
CHOSEN = "the search chooses it stage by stage"
MESSAGES = "a rank sends and receives, and waits for what it has posted"
TRACED = "a layer is run as one of several tensor ranks, to find what they divide"
DIVIDED = "a rank holds slices of its layers, and its team sums inside them"
RECORDED = "a table of other tools' runs has a column for it"
ALLOWED: dict[str, dict[str, str]] = {
    "pipeline_parallel": {
        "program/compile.py": "messages stand around the actions that make and read tensors",
        "runtime/rank_model.py": MESSAGES,
        "runtime/agreement.py": MESSAGES,
        "search/quick_clock.py": "gathers behind a cut hold the stage that makes them",
    },
    "state_division": {
        "recorded/price.py": RECORDED,
    },
    "tensor_parallel": {
        "model/layer_record.py": TRACED,
        "model/trace.py": TRACED,
        "model/transformer/counted_graph.py": TRACED,
        "export/deepspeed.py": "DeepSpeed's own name of a setting",
        "runtime/rank_model.py": DIVIDED,
        "runtime/build_stages.py": DIVIDED,
        "profiling/layer_times.py": DIVIDED,
    },
    "data_parallel": {
        "runtime/rank_model.py": "a rank starts its reductions during the backward",
        "search/costs.py": "it estimates reductions without a program",
        "techniques/state_division/program.py": "divided states replace its all-reduces",
    },
    "backward_split": {
        "cost/times.py": "it keeps the seconds of both parts of a layer",
        "runtime/stage.py": "a stage runs the two parts of its backwards",
        "search/bound_choices.py": "it bounds the seconds of both parts",
        "search/costs.py": "strategies are compared in orders that split backwards",
    },
    "activation_checkpointing": {
        "cost/memory.py": "one table of bytes for stages that recompute, one for the others",
        "cost/pricing_context.py": "memory is kept by what it depends on",
        "cost/sharded.py": "the same field of another tool's run",
        "recorded/fit.py": RECORDED,
        "recorded/price.py": RECORDED,
        "runtime/build_stages.py": "a built stage knows which of its layers run again",
        "search/": CHOSEN,
    },
}
"""By technique: files and folders outside its room that have its words, with the reason."""

FILES = {path.relative_to(PACKAGE).as_posix(): path for path in files_below(PACKAGE)}


@cache
def _operations(room: str) -> frozenset[str]:
    """The words that a room adds to programs."""
    return frozenset(
        str(op)
        for part in rooms_with("operations")
        if part.__name__.split(".")[-2] == room
        for op in part.OPERATIONS
    )


@cache
def _names(file: Path) -> frozenset[str]:
    """All names of `_fields`, once for a file."""
    return frozenset(_fields(tree_of(file)))


@cache
def _words(file: Path) -> frozenset[str]:
    return frozenset(re.findall(r"\w+", text_of(file)))


def _fields(tree: ast.AST) -> Iterator[str]:
    """What a file reads, sets, imports or quotes: all names but those of its own variables."""
    for node in ast.walk(tree):
        match node:
            case ast.Attribute(attr=name) | ast.keyword(arg=str(name)) | ast.alias(name=name):
                yield name
            case ast.Name(id=name) if name[0].isupper():
                yield name
            case ast.Constant(value=str(text)):
                yield text.rpartition(".")[2]


def _found(room: str, file: Path) -> set[str]:
    """The words of a technique that a file has: its operations anywhere, its field in code."""
    anywhere = {room, *_operations(room)} & _words(file)
    return anywhere | ({*FIELDS.get(room, ())} & _names(file))


def _outside(room: str) -> dict[str, set[str]]:
    """The words of a technique by file, in all files that are not its own."""
    own = f"techniques/{room}/"
    found = {
        name: _found(room, file)
        for name, file in FILES.items()
        if not name.startswith(own) and name not in SHARED
    }
    return {name: words for name, words in found.items() if words}


@pytest.mark.parametrize("room", TECHNIQUES)
def test_the_words_of_a_technique_stay_in_its_room(room: str) -> None:
    allowed = tuple(ALLOWED.get(room, {}))
    stray = {n: words for n, words in _outside(room).items() if not n.startswith(allowed)}
    assert not stray, f"words of {room} outside techniques/{room}: {stray}"


@pytest.mark.parametrize("room", TECHNIQUES)
def test_no_exception_is_allowed_for_longer_than_it_lasts(room: str) -> None:
    outside = _outside(room)
    for name in ALLOWED.get(room, {}):
        assert any(each.startswith(name) for each in outside), name


@pytest.mark.parametrize("room", TECHNIQUES)
def test_words_are_found_where_they_are(room: str) -> None:
    """The room itself has them, and so do the files that all techniques share."""
    own = [file for name, file in FILES.items() if name.startswith(f"techniques/{room}/")]
    wanted = {*_operations(room), *FIELDS.get(room, ())}
    shared = [FILES[name] for name in SHARED]
    assert wanted | {room} <= set().union(*(_found(room, file) for file in (*own, *shared)))


def test_every_room_is_in_the_list() -> None:
    rooms = {path.name for path in ROOMS.iterdir() if (path / "__init__.py").exists()}
    assert rooms == {*TECHNIQUES}
    assert FIELDS.keys() <= rooms
    assert ALLOWED.keys() <= rooms
