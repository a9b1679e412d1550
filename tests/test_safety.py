"""What the code never does: it unpickles nothing, runs no text, and listens only where it must."""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterator
from functools import cache

from sources import ROOT, files_below, tree_of

FILES = {
    str(path.relative_to(ROOT)): path
    for folder in ("src", "benchmarks", "examples", "docs")
    for path in files_below(ROOT / folder)
}

UNPICKLING_MODULES = {"pickle", "cPickle", "_pickle", "cloudpickle", "dill", "joblib", "marshal",
                      "shelve"}  # fmt: skip
UNPICKLING_CALLS = {
    "all_gather_object", "gather_object", "broadcast_object_list", "scatter_object_list",
    "send_object_list", "recv_object_list", "load_state_dict_from_url",
}  # fmt: skip
RUNNING_CALLS = {"eval", "exec", "compile", "system", "popen", "execl", "spawnl"}
LISTENING = {"create_server", "listen", "bind", "TCPStore"}
MAY_LISTEN = {"src/meshwright/launch/store.py", "src/meshwright/runtime/rendezvous.py"}


def _name(function: ast.expr) -> str:
    return function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")


@cache
def called(tree: ast.AST) -> tuple[tuple[str, ast.Call], ...]:
    """The last name of everything that is called, and the call."""
    return tuple((_name(n.func), n) for n in ast.walk(tree) if isinstance(n, ast.Call))


def keyword(call: ast.Call, name: str) -> object:
    """The constant that a call gives to a keyword; None if it gives none."""
    found = [k.value for k in call.keywords if k.arg == name]
    return found[0].value if found and isinstance(found[0], ast.Constant) else None


def unpickling(tree: ast.Module) -> Iterator[ast.AST]:
    """Imports of modules that unpickle, and calls of functions that do."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names = {(node.module or "").partition(".")[0]}
        else:
            continue
        if names & UNPICKLING_MODULES:
            yield node
    for name, call in called(tree):
        target = ast.unparse(call.func) if name == "load" else ""
        safe = target not in ("np.load", "numpy.load") or keyword(call, "allow_pickle") is False
        if name in UNPICKLING_CALLS or target == "torch.load" or not safe:
            yield call


def running(tree: ast.Module) -> Iterator[ast.AST]:
    """Calls that run a text as code, or by a shell."""
    for name, call in called(tree):
        target = ast.unparse(call.func) if name in RUNNING_CALLS else "self."
        runs = not target.startswith(("re.", "torch.", "self."))
        if runs or keyword(call, "shell") is True:
            yield call


def listening(tree: ast.Module) -> Iterator[ast.AST]:
    """Calls that wait for whoever comes."""
    for name, call in called(tree):
        if name in LISTENING and "self." not in ast.unparse(call.func):
            yield call


def places(look: Callable[[ast.Module], Iterator[ast.AST]]) -> list[str]:
    """All that is found in the files of the repository, as file:line."""
    found = ((file, node) for file, path in FILES.items() for node in look(tree_of(path)))
    return [f"{file}:{getattr(node, 'lineno', 0)}" for file, node in found]


def test_nothing_is_unpickled() -> None:
    assert not places(unpickling)


def test_no_text_is_run_as_code_or_by_a_shell() -> None:
    assert not places(running)


def test_only_the_rendezvous_listens() -> None:
    assert {place.partition(":")[0] for place in places(listening)} == MAY_LISTEN


def test_the_checks_see_what_they_look_for() -> None:
    """Each kind, as it would be written."""
    bad = ast.parse(
        "import pickle\ndist.all_gather_object(a, b)\ntorch.load(f)\nnp.load(f)\n"
        "subprocess.run(x, shell=True)\nos.system(x)\nsocket.create_server(x)"
    )
    assert [node.lineno for node in unpickling(bad)] == [1, 2, 3, 4]
    assert [node.lineno for node in running(bad)] == [5, 6]
    assert [node.lineno for node in listening(bad)] == [7]
