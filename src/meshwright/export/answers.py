"""Defines how each property of a training is exported to a tool: written into a file, refused or
listed in the notes.

Every exporter has a table of Answers, with one for each field of the model, the job and the plan,
and for each of ASSUMED. A test checks that no field is missing. A field that a table lacks all the
same is refused by name if it is not at its default.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import MISSING, dataclass, fields, is_dataclass, replace
from typing import Any

from meshwright.errors import Problem
from meshwright.export.grid import RegularGrid
from meshwright.model.config import LanguageModel
from meshwright.model.transformer.defaults import architecture_of, differences
from meshwright.plan.spec import Job, Pipeline, Plan, Stage
from meshwright.techniques import provided

ASSUMED: dict[str, object] = {
    "model.dropout": 0.0,
    "model.initial_std": 0.02,
    "model.auxiliary_loss": 0.0,
    "training.clip_norm": 1.0,
    "training.gradient_sums": "fp32",
    "training.attention_within_documents": False,
    "training.sharded_weights": False,
    "training.sequence_parallel": False,
    "training.optimizer_settings": None,
}
"""Properties that plans assume, or leave open (None), and that no record states. A field of a
record with the same name takes precedence."""
RECORDS = {"model": LanguageModel, "job": Job, "plan": Plan, "pipeline": Pipeline, "stage": Stage}
"""Records whose fields must be covered, by the first word of a property's name."""
NOTES = "NOT_EXPRESSED.md"
LABEL = "a label"
PARTS_OF_IT = "field by field"


@dataclass(frozen=True, slots=True)
class ExportedTraining:
    """Holds the training that a tool shall express."""

    plan: Plan
    grid: RegularGrid
    language: LanguageModel


def _no_lines(value: Any, asked: ExportedTraining) -> Iterable[str]:  # noqa: ARG001
    return ()


def _no_words(value: Any, asked: ExportedTraining) -> str:  # noqa: ARG001
    return ""


@dataclass(frozen=True, slots=True)
class PropertyAnswer:
    """Says how a tool expresses one property; the functions take its value and the whole
    training."""

    told: str
    """What the table in the docs says."""
    write: Callable[[Any, ExportedTraining], Iterable[str]] = _no_lines
    """Returns the lines of the tool's file."""
    wanted: Callable[[Any, ExportedTraining], str] = _no_words
    """Returns what the tool can express instead, as a refusal words it; empty if it can express
    this value."""
    note: Callable[[Any, ExportedTraining], str] = _no_words
    """Returns the sentence for the notes on what the tool's files do not express; empty if they
    do."""
    own_code: bool = False
    """True if the note names a property of the user's own code; such notes are joined into one."""


Answers = Mapping[str, PropertyAnswer]


def written(*patterns: str, told: str = "") -> PropertyAnswer:
    """Writes the value in place of `{}` in these lines."""
    first = " ".join(patterns[0].replace("{}", "").split()).strip("= ")
    return PropertyAnswer(
        told or f"`{first}`",
        write=lambda value, _: [pattern.format(format_value(value)) for pattern in patterns],
    )


def switch(line: str, *, when: object) -> PropertyAnswer:
    """Writes a line if the value is `when`, and nothing otherwise."""
    return PropertyAnswer(f"`{line}`", write=lambda value, _: [line] * (value == when))


def written_by(
    told: str, write: Callable[[Any, ExportedTraining], Iterable[str]]
) -> PropertyAnswer:
    """Writes the lines that a function returns."""
    return PropertyAnswer(told, write=write)


def planned(told: str) -> PropertyAnswer:
    """Leaves the property to the code of the exporter that writes degrees, cuts, batches and
    schedule."""
    return PropertyAnswer(told)


def only(*values: object, lacks: str) -> PropertyAnswer:
    """Refuses the plan unless the value is one of these; `lacks` says what the tool does not have,
    like `no dropout`."""
    has = " or ".join(format_value(value) for value in values)
    return PropertyAnswer(
        f"only {has}",
        wanted=lambda value, _: "" if value in values else f"{has}: {lacks}",
    )


def listed_in_notes(sentence: str, *, unless: object = MISSING) -> PropertyAnswer:
    """Lists the property in the notes; `{}` in the sentence is the value."""
    return PropertyAnswer(
        "listed",
        note=lambda value, _: (
            "" if value == unless else sentence.replace("{}", format_value(value))
        ),
    )


@dataclass(frozen=True, slots=True)
class StageSwitch:
    """Describes a property that every stage of a plan has or lacks, while tools that know it have
    one switch for all stages."""

    field: str
    """The field of `Stage`."""
    is_on: Callable[[Any], bool] = bool
    """Returns whether a value of the field stands for having the property."""
    mend: str = ""
    """How to get a plan without the property; it ends every refusal."""


def switch_of_none(of: StageSwitch, lacks: str) -> PropertyAnswer:
    """Refuses a property of stages; `lacks` says what the tool does not have."""
    return PropertyAnswer(
        "refused",
        wanted=lambda value, _: f"none: {lacks}{of.mend}" if of.is_on(value) else "",
    )


def switch_of_all(
    of: StageSwitch,
    told: str,
    tool: str,
    write: Callable[[bool, ExportedTraining], Iterable[str]],
    lacks: Callable[[ExportedTraining], str] = lambda _: "",
) -> PropertyAnswer:
    """Writes the lines of a tool's one switch for a property of stages, on or off; `lacks` says why
    the tool cannot turn it on, if so."""

    def wanted(value: Any, asked: ExportedTraining) -> str:
        if not of.is_on(value):
            return ""
        if not all(of.is_on(getattr(stage, of.field)) for stage in asked.plan.stages):
            return f"all stages or none: {tool} has one switch for all{of.mend}"
        missing = lacks(asked)
        return f"none: {missing}{of.mend}" if missing else ""

    return PropertyAnswer(
        f"{told}, all stages or none",
        write=lambda value, asked: write(of.is_on(value), asked),
        wanted=wanted,
    )


def irrelevant(why: str) -> PropertyAnswer:
    """Ignores a property that does not affect training, for the reason `why`."""
    return PropertyAnswer(why)


def own_code(name: str) -> PropertyAnswer:
    """Lists a property that the user's own model code must have.

    A number or a kind that is at its empty default, since the model has nothing of that sort, is
    not listed.
    """
    words = name.partition(".")[2].replace("_", " ")
    default = known_properties()[name]
    absent = default is None or (type(default) is int and default == 0)

    def note(value: Any, _: ExportedTraining) -> str:
        if isinstance(value, bool):
            return words if value else f"not {words}"
        return "" if absent and value == default else f"{words} {format_value(value)}"

    return PropertyAnswer("listed: your own code", note=note, own_code=True)


def is_rotary(c: LanguageModel) -> bool:
    """True if positions are encoded by rotary embeddings of queries and keys."""
    return c.family != "u-transformer" and architecture_of(c).position == "rotary"


def block_answers(
    tool: str,
    told: str,
    always: Callable[[ExportedTraining], Iterable[str]],
    expressed: Mapping[str, Callable[[Any, ExportedTraining], Iterable[str] | None]],
) -> PropertyAnswer:
    """Writes the lines in `always`; for each property of the blocks that differs from the default,
    also the lines that its function in `expressed` returns. The function returns None for a value
    that the tool cannot express; the plan is then refused."""

    def said(name: str, value: Any, asked: ExportedTraining) -> Iterable[str] | None:
        return expressed[name](value, asked) if name in expressed else None

    def wanted(value: dict[str, Any], asked: ExportedTraining) -> str:
        other = [name for name, own in value.items() if said(name, own, asked) is None]
        return f"nothing else than usual: {tool} is not told of {', '.join(other)}" if other else ""

    def write(value: dict[str, Any], asked: ExportedTraining) -> Iterable[str]:
        further = [line for name, own in value.items() for line in said(name, own, asked) or ()]
        return [*always(asked), *further]

    return PropertyAnswer(told, write=write, wanted=wanted)


def own_model_answers() -> dict[str, PropertyAnswer]:
    """Returns the answers of a tool whose files do not describe the model, which is all the user's
    own code."""
    found = {name: own_code(name) for name in known_properties() if name.startswith("model.")}
    found["model.name"] = irrelevant(LABEL)
    base, loss = found["model.rotary_base"], found["model.auxiliary_loss"]
    found["model.rotary_base"] = replace(
        base, note=lambda v, asked: base.note(v, asked) if is_rotary(asked.language) else ""
    )
    found["model.architecture"] = replace(
        found["model.architecture"],
        note=lambda v, _: ", ".join(f"{each} {format_value(what)}" for each, what in v.items()),
    )
    found["model.auxiliary_loss"] = replace(
        loss, note=lambda v, asked: loss.note(v, asked) if asked.language.experts else ""
    )
    return found


def grid_answers(tool: str) -> dict[str, PropertyAnswer]:
    """Returns the answers that all tools with a regular grid have in common."""
    label = irrelevant(LABEL)

    def boundary(value: str | None, _: ExportedTraining) -> str:
        own = f"how tensors cross from stage to stage ({value}): {tool} has a way of its own"
        return "" if value in (None, "direct") else own

    return {
        "plan.format": label,
        "plan.name": label,
        "plan.model": label,
        "plan.cluster": label,
        "plan.profile": label,
        "plan.prediction": label,
        "plan.job": planned(PARTS_OF_IT),
        "plan.pipelines": planned(PARTS_OF_IT),
        "plan.devices": planned("launch.sh"),
        "plan.schedule": planned("schedule, else refused"),
        "pipeline.micro_batches": planned("micro-batches"),
        "pipeline.rows": planned("rows of each replica"),
        "pipeline.stages": planned(PARTS_OF_IT),
        "pipeline.actions": planned("refused, as the schedules that need them"),
        "stage.layers": planned("cuts"),
        "stage.devices": planned("degrees, and launch.sh"),
        "stage.rows": planned("equal shares, else refused"),
        **of_techniques(tool),
        "stage.boundary": PropertyAnswer("direct, else listed", note=boundary),
        "job.global_batch": planned("rows of a step"),
        "job.sequence": planned("length of a row"),
        "job.precision": planned("precision"),
        "job.optimizer": planned("optimizer"),
        "job.runtime": label,
        "job.compiled": label,
        "training.optimizer_settings": listed_in_notes(
            "learning rate, its schedule, betas, weight decay, number of steps and data: a plan "
            "says nothing of them"
        ),
    }


def of_techniques(tool: str) -> dict[str, PropertyAnswer]:
    """Returns the answers of all techniques for the fields that they have in a plan."""
    return {
        name: a for answers in provided("export", "answers") for name, a in answers(tool).items()
    }


def format_value(value: object) -> str:
    """Formats a value for tools and people: `0`, `1e-05`, `4096`."""
    if isinstance(value, dict):
        return (
            ", ".join(f"{name} = {format_value(own)}" for name, own in value.items()) or "the usual"
        )
    if is_dataclass(value):
        told = ((each.name, getattr(value, each.name)) for each in fields(value))
        return " ".join(f"{name} {format_value(own)}" for name, own in told if own)
    return repr(value).removesuffix(".0") if isinstance(value, float) else str(value)


def known_properties() -> dict[str, object]:
    """Returns every property that must be covered, with its default; MISSING if it has none."""
    own = {
        f"{kind}.{field.name}": field.default
        for kind, cls in RECORDS.items()
        for field in fields(cls)
    }
    return {**own, **{name: value for name, value in ASSUMED.items() if name not in own}}


def property_values(asked: ExportedTraining) -> Iterator[tuple[str, Any]]:
    """Yields every property with its value; a property of pipelines or stages comes once for each
    distinct value."""
    plan = asked.plan
    held: dict[str, tuple[object, ...]] = {
        "model": (asked.language,),
        "job": (plan.job,),
        "plan": (plan,),
        "pipeline": plan.pipelines,
        "stage": plan.stages,
    }
    for name in known_properties():
        kind, _, field = name.partition(".")
        owners = [each for each in held.get(kind, ()) if hasattr(each, field)]
        values = [getattr(each, field) for each in owners] or [ASSUMED[name]]
        if name == "model.architecture":
            values = [differences(asked.language)]
        yield from ((name, value) for n, value in enumerate(values) if value not in values[:n])


def export_refusals(tool: str, answers: Answers, asked: ExportedTraining) -> Iterator[Problem]:
    """Yields a Problem for every property with a value that the tool cannot express."""
    source, defaults = asked.plan.name, known_properties()
    for name, value in property_values(asked):
        if name in answers:
            wanted = answers[name].wanted(value, asked)
        else:
            known = value == defaults[name]
            wanted = "" if known else f"another: nothing of this is written for {tool}"
        if wanted:
            yield Problem(source, name, format_value(value), wanted)


def answer_lines(answers: Answers, asked: ExportedTraining, *kinds: str) -> list[str]:
    """Returns the lines to write for the properties of these kinds."""
    return [
        line
        for name, value in property_values(asked)
        if name.partition(".")[0] in kinds and name in answers
        for line in answers[name].write(value, asked)
    ]


def export_notes(answers: Answers, asked: ExportedTraining) -> tuple[str, ...]:
    """Returns one sentence for each property that the tool's files do not express."""
    own: list[str] = []
    others: list[str] = []
    for name, value in property_values(asked):
        answer = answers.get(name)
        if answer and (note := answer.note(value, asked)):
            (own if answer.own_code else others).append(note)
    code = [f"the model, which is your own code; the plan's has {', '.join(own)}"] if own else []
    return tuple(dict.fromkeys([*code, *others]))


def notes_file(tool: str, sentences: Iterable[str]) -> dict[str, str]:
    """Returns the notes as a file of the export; no file if there are none."""
    text = "\n".join(f"- {sentence}" for sentence in sentences)
    if not text:
        return {}
    head = f"# Not expressed\n\nWhat {tool} is not told by these files, and is yours to see to:\n\n"
    return {NOTES: head + text + "\n"}
