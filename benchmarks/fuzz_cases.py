"""The cases of fuzz.py: what is spoiled, which verb meets it, and what must become of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from pathlib import Path
from random import Random

import fuzz_mutations
import fuzz_nonsense
import fuzz_options
from fuzz_mutations import Spoiled, Verdict
from fuzz_world import KINDS, Kind

from meshwright.text import printable

SECONDS = 20.0
"""What a case may take."""
RUN_SECONDS = 90.0
"""What one may take that trains."""


@dataclass(frozen=True)
class Case:
    """One thing spoiled, and the verb that meets it."""

    index: int
    kind: str
    """Row of the table."""
    sort: str
    """Column of the table: the class of the mutation."""
    arguments: tuple[str, ...]
    change: str
    verdict: Verdict
    named: tuple[str, ...]
    """A refusal must name one of these."""
    spoil: Spoiled | None = None
    path: str = ""
    """Of the file that is spoiled."""
    seconds: float = SECONDS


Make = Callable[[int, Path, Random], Case]
"""A case of a number, in a world, by chance."""


@lru_cache
def strata() -> tuple[Make, ...]:
    """Everything that a case can be drawn from, in an order that mixes them."""
    found: list[Make] = []
    for kind in KINDS:
        classes = fuzz_mutations.classes_of(kind)
        found += [partial(_spoiled_file, kind=kind, name=name) for name in classes]
        for place, values in fuzz_nonsense.MUST.get(kind.name, {}).items():
            found += [partial(_nonsense, kind=kind, at=place, value=value) for value in values]
    for option in fuzz_options.OPTIONS:
        classes = {**fuzz_options.SORTS[option.sort]}
        classes |= {"zero": "0"} if option.sort == "number" else {}
        found += [partial(_spoiled_option, option=option, sort=s, value=v)
                  for s, v in classes.items()]  # fmt: skip
    for (verb, name), values in fuzz_nonsense.OPTIONS.items():
        found += [partial(_option, verb=verb, name=name, sort="nonsense", value=v) for v in values]
    for (verb, name, sort), value in fuzz_options.NO_CORPUS.items():
        found.append(partial(_option, verb=verb, name=name, sort=sort, value=value))
    Random(0).shuffle(found)
    return tuple(found)


def case_of(index: int, seed: int, world: Path) -> Case:
    """The case of a number."""
    known = strata()
    return known[index % len(known)](index, world, Random(f"{seed}:{index}"))


def runs() -> Iterator[Case]:
    """Those that start processes; their numbers are below zero."""
    for index, (line, verdict) in enumerate(fuzz_options.RUNS, start=1):
        named = ("--rows", "--processes", "rows", "processes")
        words = tuple(line.split())
        yield Case(-index, "runs", "ends of ranges", words, "nothing", verdict, named,
                   seconds=RUN_SECONDS)  # fmt: skip


NAMED = ("plan.json", "plan for", "gpt-tiny", "cluster", "devices")
"""What a plan says of itself where it no longer fits a file."""


def _on_file(index: int, kind: Kind, sort: str, spoil: Spoiled, chance: Random) -> Case:
    line = chance.choice(kind.verbs)
    if line.startswith("export") and spoil.verdict == "accepted":
        spoil = replace(spoil, verdict="either")  # not every tool can express the plan
    return Case(
        index=index,
        kind=kind.name,
        sort=sort,
        arguments=tuple(line.split()),
        change=spoil.change,
        verdict=spoil.verdict,
        named=(kind.path, *NAMED),
        spoil=spoil,
        path=kind.path,
    )


def _spoiled_file(index: int, world: Path, chance: Random, *, kind: Kind, name: str) -> Case:
    spoil = fuzz_mutations.spoiled(kind, name, world / kind.path, chance)
    return _on_file(index, kind, name, spoil, chance)


def _nonsense(
    index: int, world: Path, chance: Random, *, kind: Kind, at: str, value: object
) -> Case:
    spoil = fuzz_mutations.with_value(kind, world / kind.path, at, value)
    case = _on_file(index, kind, "nonsense", spoil, chance)
    return replace(case, named=(*case.named, str(value)[:100]))


def _spoiled_option(
    index: int, world: Path, chance: Random, *, option: fuzz_options.Option, sort: str, value: str
) -> Case:
    case = _option(index, world, chance, verb=option.verb, name=option.name, sort=sort, value=value)
    if sort == "zero":
        return replace(case, verdict=option.zero)
    harmless = (option.verb, sort) in fuzz_options.HARMLESS
    return replace(case, verdict="either", seconds=RUN_SECONDS) if harmless else case


def _option(
    index: int, _world: Path, _chance: Random, *, verb: str, name: str, sort: str, value: str
) -> Case:
    shown = (value, str(Path(value)), printable(value)) if value else ()
    return Case(
        index=index,
        kind=f"{verb} (options)",
        sort=sort,
        arguments=tuple(fuzz_options.line_with(verb, name, value)),
        change=f"{name} {value[:60]!r}",
        verdict="refused",
        named=(name, *fuzz_options.ALSO_NAMED.get(name, ()), *(each[:200] for each in shown)),
    )
