"""Find the fastest way to train a model on the machines you have, and train it that way.

    graph = meshwright.trace(model, batch, precision="fp32", sequence=1, name="mine")
    plan = meshwright.find_plan(graph, cluster, meshwright.Job(global_batch=64, sequence=1))
    options = meshwright.TrainingOptions(steps=100)
    meshwright.train(model, plan, dataset, loss=loss, optimizer=optimizer, options=options)

Names are imported when they are first used: planning needs no torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from meshwright.cluster.discover import discover as discover
    from meshwright.cluster.files import load_cluster as load_cluster
    from meshwright.cost.profile import load_profile as load_profile
    from meshwright.errors import MeshwrightError as MeshwrightError
    from meshwright.launch.script import launch as launch
    from meshwright.model.load import load_model as load_model
    from meshwright.model.loss import WithLoss as WithLoss
    from meshwright.model.trace import trace as trace
    from meshwright.plan.files import load_plan as load_plan
    from meshwright.plan.files import save_plan as save_plan
    from meshwright.plan.spec import Job as Job
    from meshwright.plan.spec import Plan as Plan
    from meshwright.report.tables import explain as explain
    from meshwright.runtime.run_folder import TrainingOptions as TrainingOptions
    from meshwright.runtime.training_loop import train as train
    from meshwright.search.planner import find_plan as find_plan
    from meshwright.simulate.simulator import simulate_plan as simulate_plan

__version__ = "0.1.0"

_HOME = {
    "MeshwrightError": "errors",
    "discover": "cluster.discover",
    "load_cluster": "cluster.files",
    "load_profile": "cost.profile",
    "load_model": "model.load",
    "WithLoss": "model.loss",
    "trace": "model.trace",
    "load_plan": "plan.files",
    "save_plan": "plan.files",
    "Job": "plan.spec",
    "Plan": "plan.spec",
    "explain": "report.tables",
    "TrainingOptions": "runtime.run_folder",
    "train": "runtime.training_loop",
    "launch": "launch.script",
    "find_plan": "search.planner",
    "simulate_plan": "simulate.simulator",
}

__all__ = [*_HOME, "__version__"]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
