"""What the code never does: it unpickles nothing, runs no text, and listens only where it must."""

from __future__ import annotations

import ast
from functools import cache

import pytest

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


@pytest.mark.parametrize("file", FILES)
def test_nothing_is_unpickled(file: str) -> None:
    tree = tree_of(FILES[file])
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names = {(node.module or "").partition(".")[0]}
        else:
            continue
        assert not names & UNPICKLING_MODULES, f"{file}:{node.lineno}"
    for name, call in called(tree):
        assert name not in UNPICKLING_CALLS, f"{file}:{call.lineno} {name}"
        target = ast.unparse(call.func)
        assert target != "torch.load", f"{file}:{call.lineno}"
        if target in ("np.load", "numpy.load"):
            assert keyword(call, "allow_pickle") is False, f"{file}:{call.lineno}"


@pytest.mark.parametrize("file", FILES)
def test_no_text_is_run_as_code_or_by_a_shell(file: str) -> None:
    for name, call in called(tree_of(FILES[file])):
        target = ast.unparse(call.func)
        runs = name in RUNNING_CALLS and not target.startswith(("re.", "torch.", "self."))
        assert not runs, f"{file}:{call.lineno} {target}"
        assert keyword(call, "shell") is not True, f"{file}:{call.lineno}"


@pytest.mark.parametrize("file", [file for file in FILES if file not in MAY_LISTEN])
def test_only_the_rendezvous_listens(file: str) -> None:
    for name, call in called(tree_of(FILES[file])):
        assert name not in LISTENING or "self." in ast.unparse(call.func), f"{file}:{call.lineno}"


def test_the_checks_see_what_they_look_for() -> None:
    """Each kind, as it would be written."""
    bad = ast.parse(
        "import pickle\ndist.all_gather_object(a, b)\ntorch.load(f)\nnp.load(f)\n"
        "subprocess.run(x, shell=True)\nos.system(x)\nsocket.create_server(x)"
    )
    names = {name for name, _ in called(bad)}
    assert {"all_gather_object", "load", "system", "create_server"} <= names
    assert any(keyword(call, "shell") is True for _, call in called(bad))
