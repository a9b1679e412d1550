"""Names and docstrings: one idea has one name, and an explanation is a sentence."""

from __future__ import annotations

import ast
import builtins
import re
from collections import defaultdict
from collections.abc import Iterator
from itertools import pairwise

from sources import PACKAGE, files_below, tree_of

PATHS = [path.relative_to(PACKAGE) for path in files_below(PACKAGE)]
IN_EVERY_ROOM = {"__init__.py", "__main__.py", "spec.py", "files.py", "validate.py"}
"""Files whose room says what they are about: its records, a user's files, and their checks."""
OF_BOTH_MODELS = {"Attention", "Block"}
"""Modules that GPT-2 and Llama have in common by name only."""
NO_SENTENCE = {"And", "As", "At", "By", "From", "In", "Of"} | {
    "Until",
    "When",
    "Where",
    "Whether",
    "With",
}
"""First words after which a reader must guess the rest of the sentence from the code."""
NO_VERB = {"Its", "This", "These", "Various"}
"""First words that end as verbs do, and are none."""
AFTER_A_NOUN = {"of", "per", "that", "which", "whose", "with", "without", "behind", "between"}
"""Words that follow a noun, and few verbs: `Stages that ...`, `Seconds per ...`."""
BEFORE_A_CLAUSE = {"Checks", "Connects", "Describes", "Notes", "Returns", "Says"}
"""Verbs that one of these words may follow: `Checks that ...`."""
CLASS = re.compile(r"`(?:[a-z_]+\.)*([A-Z]\w*[a-z]\w*)(?:\.\w+)*`")
FILE = re.compile(r"`(?:\w+/)*([a-z_]+\.py)`")
WRITES_FILES = "export"
"""The room whose docstrings name files that it writes for other tools."""
IMPERATIVE = {"cli"}
"""Rooms whose functions are verbs of the command line, explained to users in its help."""


def _homes(found: Iterator[tuple[str, str]]) -> dict[str, list[str]]:
    homes = defaultdict(list)
    for name, home in found:
        homes[name].append(home)
    return {name: found for name, found in homes.items() if len(found) > 1}


def test_no_file_name_stands_for_two_things() -> None:
    files = (
        (path.name, str(path))
        for path in PATHS
        if path.name not in IN_EVERY_ROOM and path.parts[0] != "techniques"
    )
    assert not _homes(files)


def test_no_class_name_stands_for_two_things() -> None:
    classes = (
        (node.name.lstrip("_"), str(path))
        for path in PATHS
        for node in tree_of(PACKAGE / path).body
        if isinstance(node, ast.ClassDef) and node.name not in OF_BOTH_MODELS
    )
    assert not _homes(classes)


def _docstrings(tree: ast.Module) -> Iterator[tuple[str, str]]:
    """The docstrings of a module, its classes and functions, and the texts under its fields."""
    yield "", ast.get_docstring(tree) or ""
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield node.name, ast.get_docstring(node) or ""
        for one, other in _pairs(node):
            if isinstance(one, ast.Assign | ast.AnnAssign) and isinstance(other, ast.Expr):
                text = getattr(other.value, "value", None)
                if isinstance(text, str):
                    yield ast.unparse(one).split("=")[0], text


def _pairs(node: ast.AST) -> Iterator[tuple[ast.AST, ast.AST]]:
    body = getattr(node, "body", [])
    if isinstance(body, list):
        yield from pairwise(body)


def test_docstrings_begin_as_sentences_do() -> None:
    found = ((path, *each) for path in PATHS for each in _docstrings(tree_of(PACKAGE / path)))
    for path, name, text in found:
        first = text.split(maxsplit=1)[0] if text.strip() else "Nothing"
        lower = first[0].islower() and not first.startswith("torch")
        assert not lower, f"{path}:{name} begins in the middle: {text[:60]!r}"
        assert first.rstrip(",:") not in NO_SENTENCE, f"{path}:{name} is no sentence: {text[:60]!r}"


def _begins_with_a_verb(text: str) -> bool:
    """Tells whether a text begins as `Holds the layers of ...` does; a noun phrase does not."""
    first, second = (word.rstrip(",") for word in text.split(maxsplit=2)[:2])
    is_noun = second in AFTER_A_NOUN and first not in BEFORE_A_CLAUSE
    return first.endswith("s") and first not in NO_VERB and not is_noun


def test_classes_and_functions_are_explained_by_sentences_with_a_verb() -> None:
    for path in PATHS:
        for node in ast.walk(tree_of(PACKAGE / path)):
            is_class = isinstance(node, ast.ClassDef)
            if not is_class and not isinstance(node, ast.FunctionDef):
                continue
            text = ast.get_docstring(node) or ""
            assert text or not is_class, f"{path}:{node.name} has no docstring"
            told = path.parts[0] in IMPERATIVE and not is_class
            if text and not told and not text.startswith("True if "):
                assert _begins_with_a_verb(text), f"{path}:{node.name} has no verb: {text[:60]!r}"


def test_docstrings_name_classes_and_files_that_exist() -> None:
    trees = {path: tree_of(PACKAGE / path) for path in PATHS}
    nodes = [node for tree in trees.values() for node in ast.walk(tree)]
    classes = {node.name for node in nodes if isinstance(node, ast.ClassDef)} | {*dir(builtins)}
    files = {path.name for path in PATHS}
    for path, tree in trees.items():
        own = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
        for name, text in _docstrings(tree):
            unknown = {*CLASS.findall(text)} - classes - own
            if path.parts[0] != WRITES_FILES:
                unknown |= {*FILE.findall(text)} - files
            assert not unknown, f"{path}:{name} names what does not exist: {sorted(unknown)}"
