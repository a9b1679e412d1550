"""Writes the parts of these pages that say what the code says: python docs/generate.py

A part stands between `<!-- generated: NAME -->` and `<!-- end -->`. NAME is a record (its fields
become a table), or one of PARTS, such as the tree of files. Records are read from their source,
where the text under a field is its explanation.
"""

from __future__ import annotations

import ast
import json
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from importlib import import_module
from inspect import getsource
from pathlib import Path
from runpy import run_path
from textwrap import dedent, fill
from typing import Annotated, Any, get_args, get_origin, get_type_hints

from meshwright import errors
from meshwright.cluster.catalog import catalog
from meshwright.cluster.link_rates import link_rates
from meshwright.cluster.spec import LinkKind, Precision
from meshwright.export import accelerate, deepspeed, megatron, torchtitan
from meshwright.export.answers import LABEL, PARTS_OF_IT, Answers, known_properties
from meshwright.model.config import NAMED
from meshwright.model.transformer.families import FAMILIES
from meshwright.model.transformer.fields import IGNORED, REFUSED, read_fields
from meshwright.plan.spec import BoundaryKind, RuntimeName, StateLevel
from meshwright.program.operations import operations as op_table
from meshwright.testbed.spec import Mode
from meshwright.units import format_bytes, format_flops, format_throughput

HERE = Path(__file__).parent
PACKAGE = HERE.parent / "src" / "meshwright"
MEASURED = HERE.parent / "benchmarks" / "measured"
PART = re.compile(r"(<!-- generated: (\S+) -->\n).*?(<!-- end -->)", re.DOTALL)

CHOICES = {
    "Precision": Precision,
    "Mode": Mode,
    "BoundaryKind": BoundaryKind,
    "StateLevel": StateLevel,
    "LinkKind": LinkKind,
    "RuntimeName": RuntimeName,
}


def _one_of(values: Iterable[object]) -> str:
    *others, last = (f"`{value}`" for value in values)
    return f"{', '.join(others)} or {last}" if others else last


WORDS = {
    "str": "text",
    "int": "whole number",
    "float": "number",
    "bool": "true or false",
    "Name": "text",
    "Rope": "table",
    "Blocks": "list of whole numbers",
    "Kinds": "list of text",
    "Any": "anything",
    "Line": "text",
    "Text": "text",
    "Actions": "text",
    "Format": "`1`",
    "PartName": "part of a step",
    "LayerIndex": "whole number",
    "Bytes": 'bytes, or `"80 GiB"`',
    "Seconds": 'seconds, or `"50 us"`',
    "PositiveSeconds": 'seconds, or `"50 us"`, above 0',
    "Flops": 'FLOP/s, or `"312 TFLOP/s"`',
    "Work": 'FLOP, or `"12 GFLOP"`',
    "BytesPerSecond": 'bytes/s, or `"25 Gbit/s"`',
    "SizeText": '`"80 GiB"`',
    "RateText": '`"25 Gbit/s"`',
    "FlopsText": '`"312 TFLOP/s"`',
    "TimeText": '`"50 us"`',
    "PriceText": '`"3.20 USD/h"`',
    "ClusterSource": "path, or a table as in a cluster file",
    "ScheduleName": "name of a [schedule](schedules.md)",
    **{name: _one_of(get_args(kind)) for name, kind in CHOICES.items()},
}


BEYOND = 1e15
"""A limit above this hinders no user, and is not listed."""


def limits(kind: object) -> str:
    """What the numbers of an annotated type may be: `, 1 to 100`."""
    marks = [mark for each in get_args(kind)[1:] for mark in getattr(each, "metadata", ())]
    found = {
        name: f"{getattr(mark, name):,}".removesuffix(".0")
        for mark in marks
        for name in ("ge", "gt", "le", "lt")
        if abs(getattr(mark, name, 2 * BEYOND)) < BEYOND
    }
    if "gt" in found:
        found.pop("ge", None)
    if {"ge", "le"} <= found.keys():
        return f", {found['ge']} to {found['le']}"
    told = {"gt": "above", "ge": "at least", "lt": "below", "le": "at most"}
    return "".join(f", {word} {found[name]}" for name, word in told.items() if name in found)


def named(name: str, names: Mapping[str, object]) -> str:
    """The words for a type by its name: a known one, one with limits, or a record of the page."""
    if name in WORDS:
        return WORDS[name]
    kind = names.get(name)
    if get_origin(kind) is Annotated:
        return WORDS[get_args(kind)[0].__name__] + limits(kind)
    return f"[{name}](#{name.lower()})"


def _evaluated(annotation: ast.expr, names: Mapping[str, object]) -> Any:
    """The type that an annotation in a module with these names means."""
    holder = type("Holder", (), {"__annotations__": {"kind": ast.unparse(annotation)}})
    return get_type_hints(holder, dict(names), include_extras=True)["kind"]


def words(annotation: ast.expr, names: Mapping[str, object]) -> str:
    """A field's type for people who write files; `names` are those of the record's module."""
    match annotation:
        case ast.BinOp(left=left, right=ast.Constant(value=None)):
            return words(left, names)
        case ast.BinOp(left=left, right=right):
            return f"{words(left, names)}, or {words(right, names)}"
        case ast.Subscript(value=ast.Name(id="Annotated"), slice=ast.Tuple(elts=[first, *_])):
            kind = _evaluated(annotation, names)
            if isinstance(first, ast.Name) and get_origin(names.get(first.id)) is Annotated:
                return WORDS.get(first.id, WORDS[get_args(kind)[0].__name__]) + limits(kind)
            return words(first, names) + limits(kind)
        case ast.Subscript(value=ast.Name(id="Literal"), slice=options):
            values = options.elts if isinstance(options, ast.Tuple) else [options]
            return _one_of(ast.literal_eval(value) for value in values)
        case ast.Subscript(
            value=ast.Name(id="tuple"),
            slice=ast.Tuple(elts=[one, ast.Constant(value=value)]),
        ) if value is ...:
            return f"list of: {words(one, names)}"
        case ast.Subscript(value=ast.Name(id="tuple"), slice=ast.Tuple(elts=each)):
            return "[" + ", ".join(words(one, names) for one in each) + "]"
        case ast.Subscript(value=ast.Name(id="dict"), slice=ast.Tuple(elts=[key, value])):
            return f"table: {words(key, names)} → {words(value, names)}"
        case ast.Name(id=name):
            return named(name, names)
    raise ValueError(f"no words for {ast.unparse(annotation)}")


def _alias(annotation: ast.expr) -> str | None:
    """The name in the file of a field that Python would not let us call so."""
    for node in ast.walk(annotation):
        if isinstance(node, ast.keyword) and node.arg == "alias":
            return str(ast.literal_eval(node.value))
    return None


def _default(value: ast.expr | None) -> str:
    if value is None:
        return "required"
    text = ast.unparse(value)
    if text in ("None", "()", "''") or text.startswith("field("):
        return "optional"
    return f"`{text.lower() if text in ('True', 'False') else text.strip(chr(39))}`"


def _explained(body: list[ast.stmt]) -> Iterator[tuple[ast.AnnAssign, str]]:
    """Fields, each with the text that follows it."""
    for statement, after in zip(body, [*body[1:], None], strict=True):
        if isinstance(statement, ast.AnnAssign):
            text = ""
            if isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant):
                text = " ".join(str(after.value.value).split())
            yield statement, text


def fields(path: str) -> str:
    """The table of a record's fields."""
    module, _, name = path.rpartition(".")
    tree = ast.parse(dedent(getsource(getattr(import_module(module), name)))).body[0]
    assert isinstance(tree, ast.ClassDef)
    lines = ["| field | value | default | |", "| --- | --- | --- | --- |"]
    for field, text in _explained(tree.body):
        assert isinstance(field.target, ast.Name)
        title = _alias(field.annotation) or field.target.id
        value = words(field.annotation, vars(import_module(module)))
        lines.append(f"| `{title}` | {value} | {_default(field.value)} | {text} |")
    return "\n".join(line.replace("|  |", "| |") for line in lines)


def device_types() -> str:
    """The catalogue of device types."""
    lines = ["| type | memory | its bandwidth | peak, dense | source |", "| --- " * 5 + "|"]
    for name, entry in catalog().items():
        peaks = ", ".join(f"{p} {format_flops(v)}" for p, v in entry.type.peak.items())
        memory = format_bytes(entry.type.memory)
        rate = format_throughput(entry.type.memory_bandwidth)
        lines.append(f"| `{name}` | {memory} | {rate} | {peaks} | {entry.type.source} |")
    return "\n".join(lines)


def link_rate_table() -> str:
    """The kinds of links, with what is reached of them and its source."""
    rows = ["| kind | of the bandwidth | all-reduces in a switch | source |",
            "| --- | ---: | ---: | --- |"]  # fmt: skip
    for kind, rate in link_rates().items():
        sums = f"{rate.all_reduce_share:.0%}" if rate.all_reduce_share else ""
        rows.append(f"| `{kind}` | {rate.share:.0%} | {sums} | {rate.source} |")
    return "\n".join(rows)


def model_names() -> str:
    """Models that need no file."""
    return ", ".join(f"`{name}`" for name in NAMED)


def config_fields() -> str:
    """What is followed in a config.json, by the way of writing it, and in which families."""
    kinds: dict[type, list[str]] = {}
    for name, family in FAMILIES.items():
        kinds.setdefault(family.config, []).append(name)
    parts = []
    for config, names in kinds.items():
        title = (config.__doc__ or "").partition("config.json of ")[2].removesuffix(".")
        parts += [f"#### {title}", "", f"`model_type`: {', '.join(f'`{n}`' for n in names)}", ""]
        lines = fields(f"{config.__module__}.{config.__name__}").splitlines()
        followers = {
            field: [n for n in names if field in read_fields(FAMILIES[n])]
            for field in (line.split("`")[1] for line in lines[2:])
        }
        if any(len(each) < len(names) for each in followers.values()):
            lines[0], lines[1] = lines[0] + " in |", lines[1] + " --- |"
            for number, each in enumerate(followers.values()):
                told = "all" if len(each) == len(names) else ", ".join(each)
                lines[number + 2] += f" {told} |"
        parts += [*lines, ""]
    return "\n".join(parts).rstrip()


def config_rest() -> str:
    """Fields of a config.json that are passed over, and those that are refused."""
    reasons: dict[str, list[str]] = {}
    for name, why in IGNORED.items():
        reasons.setdefault(why, []).append(f"`{name}`")
    lines = ["| passed over | because |", "| --- | --- |"]
    lines += [f"| {', '.join(names)} | {why} |" for why, names in reasons.items()]
    lines += ["", "| refused | unless | because |", "| --- | --- | --- |"]
    for name, (allowed, why) in REFUSED.items():
        unless = " or ".join(f"`{json.dumps(each)}`" for each in allowed) or "`null`"
        lines.append(f"| `{name}` | {unless} | {why} |")
    return "\n".join(lines)


def error_tree() -> str:
    """The tree of errors, as drawn at the top of its module."""
    assert errors.__doc__ is not None
    return "```text\n" + errors.__doc__.partition("\n\n")[2].strip() + "\n```"


EXPORTS: dict[str, Answers] = {
    "torchtitan": torchtitan.ANSWERS,
    "Megatron-LM": megatron.ANSWERS,
    "DeepSpeed": deepspeed.ANSWERS,
    "accelerate": accelerate.OWN,
    "its Megatron-LM plugin": accelerate.PLUGIN,
}


def export_answers() -> str:
    """What becomes of every property of a training, by tool."""
    lines = [f"| | {' | '.join(EXPORTS)} |", "| --- " * (len(EXPORTS) + 1) + "|"]
    for name in known_properties():
        told = [answers[name].told for answers in EXPORTS.values()]
        if not {LABEL, PARTS_OF_IT} & {*told}:
            lines.append(f"| `{name}` | {' | '.join(told)} |")
    return "\n".join(lines)


def operations() -> str:
    """The vocabulary of programs."""
    return ", ".join(f"`{word}`" for word in op_table())


def rooms() -> str:
    """The folders of the package, with the first sentence of what each says of itself."""
    folders = sorted(path.parent for path in PACKAGE.glob("*/__init__.py"))
    lines = [f"{f'{folder.name}/':<13}{_sentence(folder / '__init__.py')}" for folder in folders]
    return "```text\n" + "\n".join(lines) + "\n```"


def floors() -> str:
    """The floors of the package, lowest first, as the test of the architecture holds them."""
    test = ast.parse((HERE.parent / "tests" / "test_layers.py").read_text(encoding="utf-8"))
    values = {
        target.id: node.value
        for node in test.body
        if isinstance(node, ast.Assign)
        for target in node.targets
        if isinstance(target, ast.Name)
    }
    names = ast.literal_eval(values["FLOORS"])
    return fill(", ".join(f"`{name}`" for name in names) + ".", 100)


def tree() -> str:
    """Every file of the package, with the first sentence of what it says of itself."""
    lines = []
    for folder in (PACKAGE, *sorted(path.parent for path in PACKAGE.rglob("*/__init__.py"))):
        depth = "  " * len(folder.relative_to(PACKAGE).parts)
        lines.append(f"{depth + folder.name + '/':<24}{_sentence(folder / '__init__.py')}")
        lines += [
            f"{depth + '  ' + path.name:<24}{_sentence(path)}"
            for path in sorted(folder.glob("*.py"))
            if path.name != "__init__.py"
        ]
    return "```text\n" + "\n".join(lines) + "\n```"


def measured_on_gpus(folder: Path = MEASURED) -> str:
    """The tables of every device that `make gpu` has measured and whose file is kept."""
    page_of = run_path(str(HERE.parent / "benchmarks" / "gpu_findings.py"))["page_of"]
    pages = [
        page_of(json.loads(path.read_text(encoding="utf-8")))
        for path in sorted(folder.glob("*.json"))
    ]
    if not pages:
        return "No device has been measured yet."
    return "\n\n".join("\n".join(page) for page in pages)


def _sentence(path: Path) -> str:
    """The first sentence of a module's docstring, without its full stop."""
    text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    first = " ".join(text.partition("\n\n")[0].split())
    return re.split(r"(?<=[.?])(?<! al\.)(?<!\.\.\.)\s", first)[0].removesuffix(".")


PARTS: dict[str, Callable[[], str]] = {
    "device-types": device_types,
    "link-rates": link_rate_table,
    "model-names": model_names,
    "config-fields": config_fields,
    "config-rest": config_rest,
    "error-tree": error_tree,
    "export-answers": export_answers,
    "floors": floors,
    "measured-on-gpus": measured_on_gpus,
    "operations": operations,
    "rooms": rooms,
    "tree": tree,
}


def generated(page: str) -> str:
    """A page with its generated parts as they must be."""

    def part(match: re.Match[str]) -> str:
        name = match[2]
        text = PARTS[name]() if name in PARTS else fields(name)
        return f"{match[1]}\n{text}\n\n{match[3]}"

    return PART.sub(part, page)


def main() -> int:
    """Rewrite the pages that differ."""
    for path in (HERE.parent / "README.md", *sorted(HERE.glob("*.md"))):
        page = path.read_text(encoding="utf-8")
        if generated(page) != page:
            path.write_text(generated(page), encoding="utf-8")
            sys.stdout.write(f"wrote {path.name}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
