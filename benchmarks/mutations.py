"""Finds the small faults that can be planted in a source: a comparison, an operator, a number.

`python benchmarks/mutants.py` plants them one at a time and looks whether the tests notice.
"""

from __future__ import annotations

import ast
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass

COMPARISONS: dict[type[ast.cmpop], type[ast.cmpop]] = {
    ast.Lt: ast.LtE,
    ast.LtE: ast.Lt,
    ast.Gt: ast.GtE,
    ast.GtE: ast.Gt,
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
    ast.In: ast.NotIn,
    ast.NotIn: ast.In,
    ast.Is: ast.IsNot,
    ast.IsNot: ast.Is,
}
ARITHMETIC: dict[type[ast.operator], type[ast.operator]] = {
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.Div,
    ast.Div: ast.Mult,
    ast.FloorDiv: ast.Mult,
    ast.Mod: ast.FloorDiv,
    ast.Pow: ast.Mult,
}
EXTREMES = {"min": "max", "max": "min"}
BOOLEANS: dict[type[ast.boolop], type[ast.boolop]] = {ast.And: ast.Or, ast.Or: ast.And}
SMALL = 16
"""Whole numbers beyond it are tables and limits more often than formulas."""
SHORT = 100
"""Characters of an expression that is shown whole around a constant."""
OF_OUR_OWN_BUGS = ("strict",)
"""Arguments that only make Python notice bugs of ours: `zip(a, b, strict=True)`."""


@dataclass(frozen=True)
class Mutation:
    """One fault: an expression, and what it is replaced by."""

    file: str
    function: str
    """Qualified name of the function or class that holds it; empty at the top of the file."""
    old: str
    new: str
    nth: int
    """Of the equal ones in that function, from 0."""
    line: int
    statement: int
    """The line on which its statement begins, if that is run when the function is called; 0 if it
    is run when the file is imported."""
    names: tuple[str, ...]
    """What that statement binds, if it is run at import: constants, or the class or function."""

    @property
    def key(self) -> str:
        """What it is known by when lines above it have moved."""
        return f"{self.file}|{self.function}|{self.old}|{self.new}|{self.nth}"


@dataclass(frozen=True)
class _Place:
    """Where a node stands."""

    parent: ast.AST
    put: Callable[[ast.AST], None]
    """Puts another node in its place."""
    statement: ast.stmt
    scope: tuple[str, ...]
    called: bool
    """Whether it is run by a call rather than by the import."""
    names: tuple[str, ...]


@dataclass(frozen=True)
class _Fault:
    """One fault in a tree, before and after it is planted."""

    node: ast.expr
    replacement: ast.AST
    place: _Place


def mutations(source: str, file: str) -> list[Mutation]:
    """Returns every fault that can be planted in a source, in the order of the source."""
    found, seen = [], Counter[tuple[str, str, str]]()
    for fault in _faults(ast.parse(source)):
        old, new = _texts(fault)
        function = ".".join(fault.place.scope)
        nth = seen[(function, old, new)]
        seen[(function, old, new)] += 1
        found.append(
            Mutation(
                file=file,
                function=function,
                old=old,
                new=new,
                nth=nth,
                line=fault.node.lineno,
                statement=fault.place.statement.lineno if fault.place.called else 0,
                names=() if fault.place.called else fault.place.names,
            )
        )
    return found


def planted(source: str, number: int) -> ast.Module:
    """Returns the tree of a source with the fault planted that `mutations` lists at a place."""
    tree = ast.parse(source)
    fault = list(_faults(tree))[number]
    fault.place.put(fault.replacement)
    return ast.fix_missing_locations(tree)


def _texts(fault: _Fault) -> tuple[str, str]:
    """The expression before and after; of a lone constant, what is around it, if that is short."""
    node: ast.AST = fault.node
    if isinstance(node, ast.Constant) and not isinstance(fault.place.parent, ast.Module):
        around = ast.unparse(fault.place.parent)
        if len(around) <= SHORT and "\n" not in around:
            fault.place.put(fault.replacement)
            changed = ast.unparse(fault.place.parent)
            fault.place.put(fault.node)
            return around, changed
    return ast.unparse(node), ast.unparse(fault.replacement)


def _faults(tree: ast.Module) -> Iterator[_Fault]:
    for node, place in _expressions(tree):
        for replacement in _replacements(node):
            yield _Fault(node, ast.copy_location(replacement, node), place)


def _replacements(node: ast.expr) -> Iterator[ast.expr]:
    match node:
        case ast.Compare(left=left, ops=ops, comparators=comparators):
            for i, op in enumerate(ops):
                changed = [*ops[:i], COMPARISONS[type(op)](), *ops[i + 1 :]]
                yield ast.Compare(left=left, ops=changed, comparators=comparators)
        case ast.BoolOp(op=op, values=values):
            yield ast.BoolOp(op=BOOLEANS[type(op)](), values=values)
        case ast.UnaryOp(op=ast.Not() | ast.USub(), operand=operand):
            if not isinstance(operand, ast.Constant):
                yield operand
        case ast.BinOp(left=left, op=op, right=right):
            if type(op) in ARITHMETIC and not _is_text(left) and not _is_text(right):
                yield ast.BinOp(left=left, op=ARITHMETIC[type(op)](), right=right)
        case ast.Call(func=ast.Name(id="min" | "max" as name), args=args, keywords=keywords):
            yield ast.Call(
                func=ast.Name(id=EXTREMES[name], ctx=ast.Load()), args=args, keywords=keywords
            )
        case ast.Constant(value=bool() as value):
            yield ast.Constant(value=not value)
        case ast.Constant(value=int() as value) if value <= SMALL:
            yield ast.Constant(value=value + 1)
        case ast.Constant(value=float() as value) if value in (0.0, 0.5, 1.0, 2.0):
            yield ast.Constant(value=value + 1.0)


def _is_text(node: ast.expr) -> bool:
    """Whether it is plainly text or a sequence, whose sum is no arithmetic."""
    if isinstance(node, ast.BinOp):
        return _is_text(node.left) or _is_text(node.right)
    literal = isinstance(node, ast.JoinedStr | ast.List | ast.Tuple)
    return literal or (isinstance(node, ast.Constant) and isinstance(node.value, str | bytes))


def _expressions(tree: ast.Module) -> Iterator[tuple[ast.expr, _Place]]:
    for statement in tree.body:
        yield from _inside(statement, statement, (), False, ())


def _inside(
    node: ast.AST,
    statement: ast.stmt,
    scope: tuple[str, ...],
    called: bool,
    names: tuple[str, ...],
) -> Iterator[tuple[ast.expr, _Place]]:
    """All expressions under a node in which a fault says something about behaviour."""
    for field, value in ast.iter_fields(node):
        within, runs, bound = scope, called, names
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            within = (*scope, node.name)
            runs = called or (field == "body" and not isinstance(node, ast.ClassDef))
            bound = names or (node.name,)
        elif isinstance(node, ast.stmt) and not called:
            bound = names or _bound(node)
        for i, child in enumerate(value if isinstance(value, list) else [value]):
            if not isinstance(child, ast.AST) or _says_nothing(node, field, child):
                continue
            if isinstance(child, ast.expr):
                put = _putter(node, field, i if isinstance(value, list) else None)
                yield child, _Place(node, put, statement, within, runs, bound)
            inner = child if isinstance(child, ast.stmt) else statement
            yield from _inside(child, inner, within, runs, bound)


def _says_nothing(node: ast.AST, field: str, child: ast.AST) -> bool:
    """Whether a part is an annotation, a decorator, a message, a docstring, or a check of ours."""
    if field in (
        "annotation",
        "returns",
        "decorator_list",
        "type_params",
        "pattern",
        "format_spec",
    ):
        return True
    if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
        return True
    if isinstance(node, ast.keyword) and node.arg in OF_OUR_OWN_BUGS:
        return True
    return isinstance(child, ast.Assert | ast.Import | ast.ImportFrom | ast.JoinedStr)


def _bound(statement: ast.stmt) -> tuple[str, ...]:
    """The names that a statement at the top of a file assigns to."""
    return tuple(
        node.id
        for node in ast.walk(statement)
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)
    )


def _putter(node: ast.AST, field: str, index: int | None) -> Callable[[ast.AST], None]:
    def put(child: ast.AST) -> None:
        if index is None:
            setattr(node, field, child)
        else:
            getattr(node, field)[index] = child

    return put
