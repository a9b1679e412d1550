"""Checks that a plan can run through torch.compile on this machine."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator

import torch

from meshwright.errors import LaunchError, PlanError, Problem
from meshwright.plan.mesh import mesh_of
from meshwright.plan.spec import Plan
from meshwright.program.instructions import Program
from meshwright.program.operations import Op

COMPILERS = ("g++", "clang++")
"""C++ compilers that torch.compile finds by itself."""


def check_compilable(plan: Plan, program: Program) -> None:
    """Raises PlanError for a plan whose layers cannot run compiled, LaunchError if no C++ compiler
    is found."""
    PlanError.check(_problems(plan, program))
    compilers = (os.environ.get("CXX", ""), *COMPILERS)
    if not torch.cuda.is_available() and not any(map(shutil.which, filter(None, compilers))):
        found = f"none of {', '.join(COMPILERS)} on the PATH"
        mend = "install one, set CXX, or train without `compile`"
        raise LaunchError(Problem("environment", "CXX", found, "a C++ compiler", mend))


def _problems(plan: Plan, program: Program) -> Iterator[Problem]:
    source = f"plan {plan.name}"
    if any(i.op is Op.BACKWARD_WEIGHT for own in program.ranks for i in own):
        found = f"{plan.schedule}, with backwards in two parts"
        wanted = "one whose backwards are whole: compiled code makes all gradients at once"
        yield Problem(source, "schedule", found, wanted, "train without `compile`")
    for p, pipeline in enumerate(plan.pipelines):
        for s, stage in enumerate(pipeline.stages):
            width = mesh_of(stage).width("tensor")
            if width > 1:
                where = f"pipelines[{p}].stages[{s}].devices"
                wanted = "1: sums inside a layer are not compiled"
                mend = "train without `compile`"
                found = f"tensor width {width}"
                yield Problem(source, where, found, wanted, mend, each=("stage", ""))
