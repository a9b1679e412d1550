"""Opens what every verb of the command line needs: a model, a cluster, a job, and measured
times."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import cast, get_args

from meshwright import files
from meshwright.cluster.figures import cluster_warnings
from meshwright.cluster.files import load_cluster
from meshwright.cluster.spec import Cluster, Precision
from meshwright.cost.out_of_memory import memory_problems
from meshwright.cost.priced_plan import PricedPlan
from meshwright.cost.profile import Profile, check_profile, load_profile
from meshwright.cost.runtimes import UNMEASURED
from meshwright.errors import ClusterError, FitError, ModelError, PlanError, Problem
from meshwright.model.load import load_model
from meshwright.model.spec import LayerGraph
from meshwright.plan.files import load_plan
from meshwright.plan.spec import Job, Plan, PlanInput, Prediction, RuntimeName
from meshwright.plan.validate import validate_plan
from meshwright.program.check import check_program
from meshwright.program.timeline import Timeline
from meshwright.records import PositiveSeconds, Share, checked, fingerprint, record
from meshwright.search.incumbent import Progress, ignore
from meshwright.search.planner import baseline_plan, find_plan
from meshwright.simulate.critical_path import step_breakdown
from meshwright.simulate.simulator import simulate
from meshwright.stopping import never
from meshwright.units import format_seconds

_SHORTEST_FIRST: tuple[Precision, ...] = ("bf16", "fp16", "fp32", "fp64")


@record
class Session:
    """Holds the inputs of planning and simulation, with the files they came from."""

    model: LayerGraph
    cluster: Cluster
    job: Job
    profile: Profile | None
    model_source: str
    cluster_source: str
    profile_source: str
    warnings: tuple[str, ...]


@record
class SearchLimits:
    """Says which options a search leaves out, and after which time it ends."""

    forbidden: tuple[str, ...] = ()
    """Names of options (`OPTION_NAMES` in `search/options`) that it does not try."""
    budget_seconds: PositiveSeconds | None = None
    """The time after which it stops improving; None: it ends when it is done."""
    margin: Share | None = None
    """The share by which predicted steps must differ to be told apart; None: INDISTINCT if nothing
    was measured, else 0."""


INDISTINCT = 0.03
"""The margin of predictions without measurements. Where the plan with more pieces of work was
predicted to be faster by less, it was so in 46 % of 148 pairs of published runs
(`benchmarks/without_fit.py --pairs`)."""


NO_LIMITS = SearchLimits()


def open_session(  # noqa: PLR0913
    *,
    model: str,
    cluster: Path,
    profile: Path | None,
    global_batch: int,
    sequence: int,
    precision: str | None,
    optimizer: str,
    runtime: str = "meshwright",
    compiled: bool = False,
) -> Session:
    """Reads and checks all inputs. Raises the MeshwrightError of the first file at fault."""
    machines = load_cluster(cluster)
    chosen = _precision(precision, machines, str(cluster))
    job = checked(
        Job,
        {"global_batch": "--global-batch", "sequence": "--sequence"},
        global_batch=global_batch,
        sequence=sequence,
        precision=chosen,
        optimizer=optimizer,
        runtime=runtime,
        compiled=compiled,
    )
    graph = load_model(model, job.sequence, chosen)
    times = load_profile(profile) if profile else None
    if times:
        check_profile(times, graph, machines, source=str(profile))
    return Session(
        model=graph,
        cluster=machines,
        job=job,
        profile=times,
        model_source=model,
        cluster_source=str(cluster),
        profile_source=str(profile or ""),
        warnings=cluster_warnings(machines),
    )


def _precision(wanted: str | None, cluster: Cluster, source: str) -> Precision:
    """Returns the requested precision, else the shortest that every device type in use supports and
    computes faster than fp32."""
    if wanted:
        return cast("Precision", wanted)
    used = {kind: cluster.types[kind] for node in cluster.nodes for kind in node.devices}
    common = set.intersection(*(set(kind.peak) for kind in used.values()))
    for choice in (each for each in _SHORTEST_FIRST if each in common):
        pays = all(kind.peak[choice] > kind.peak.get("fp32", 0.0) for kind in used.values())
        if pays or choice in ("fp32", "fp64"):
            return choice
    found = "; ".join(f"{name}: {', '.join(kind.peak)}" for name, kind in sorted(used.items()))
    wanted_text = f"one of {', '.join(get_args(Precision))} that all device types offer"
    raise ClusterError(Problem(source, "device.peak", found, wanted_text))


def search_plan(
    session: Session,
    limits: SearchLimits = NO_LIMITS,
    *,
    progress: Progress | None = None,
    stop: Callable[[], bool] = never,
    found: Callable[[float], None] = ignore,
) -> Plan:
    """Finds a plan for a session; `progress`, `stop` and `found` are those of `find_plan`. Raises
    FitError if nothing fits, PlanError if the search had to end before a plan was found."""
    usual = INDISTINCT if session.profile is None else 0.0
    best = find_plan(
        session.model,
        session.cluster,
        session.job,
        session.profile,
        forbidden=limits.forbidden,
        budget_seconds=limits.budget_seconds,
        margin=usual if limits.margin is None else limits.margin,
        progress=progress,
        stop=stop,
        found=found,
    )
    return with_sources(session, best)


def manual_plan(session: Session, name: str) -> Plan:
    """Returns the best baseline plan of a kind that people write by hand: `ddp`, `even` or
    `amp`."""
    found = baseline_plan(name, session.model, session.cluster, session.job, session.profile)
    return with_sources(session, found)


def with_sources(session: Session, plan: Plan) -> Plan:
    """Returns the plan with the sources of its model, cluster and profile filled in."""
    return replace(
        plan,
        model=replace(plan.model, source=session.model_source),
        cluster=replace(plan.cluster, source=session.cluster_source),
        profile=_profile_subject(session),
    )


def _profile_subject(session: Session) -> PlanInput | None:
    if session.profile is None:
        return None
    return PlanInput(
        name=session.profile.model,
        fingerprint=fingerprint(session.profile),
        source=session.profile_source,
    )


def reopen_plan(
    plan_file: Path,
    *,
    cluster: Path | None = None,
    profile: Path | None = None,
    runtime: RuntimeName | None = None,
    compiled: bool | None = None,
) -> tuple[Session, PricedPlan]:
    """Opens a plan and the inputs that it was made from, for another runtime, compiled or not, if
    that is named. Raises PlanError if they do not belong together."""
    plan = load_plan(plan_file)
    if runtime is not None:
        plan = replace(plan, job=replace(plan.job, runtime=runtime))
    if compiled is not None:
        plan = replace(plan, job=replace(plan.job, compiled=compiled))
    if not plan.model.source:
        mend = "name the model: a known name, a config.json or a model.toml"
        raise PlanError(Problem(str(plan_file), "model.source", "nothing", "a source", mend))
    cluster_file = cluster or _beside(plan_file, plan.cluster.source, "cluster.source")
    profile_file = profile
    if profile is None and plan.profile is not None:
        profile_file = _beside(plan_file, plan.profile.source, "profile.source")
    try:
        session = open_session(
            model=plan.model.source,
            cluster=cluster_file,
            profile=profile_file,
            global_batch=plan.job.global_batch,
            sequence=plan.job.sequence,
            precision=plan.job.precision,
            optimizer=plan.job.optimizer,
            runtime=plan.job.runtime,
            compiled=plan.job.compiled,
        )
    except ModelError as error:
        wanted = "a known name, or a config.json or model.toml that can be read"
        led = Problem(str(plan_file), "model.source", repr(plan.model.source), wanted)
        raise ModelError(*error.problems, led) from None
    checked = plan if cluster is None else replace(plan, cluster=PlanInput(name="", fingerprint=""))
    validate_plan(checked, session.model, session.cluster, source=str(plan_file))
    FitError.check(memory_problems(plan, session.model, session.cluster))
    found = priced(session, plan)
    check_program(found.program, source=str(plan_file))
    return session, found


def _beside(plan_file: Path, source: str, field: str) -> Path:
    """Finds a source of a plan: at its own path, or next to the plan."""
    for path in (Path(source), plan_file.parent / source, plan_file.parent / Path(source).name):
        if source and files.is_file(path):
            return path
    mend = "correct the field, or name the file on the command line"
    found = repr(source) if source else "nothing"
    raise PlanError(Problem(str(plan_file), field, found, "a file that exists", mend))


def priced(session: Session, plan: Plan) -> PricedPlan:
    """Returns a plan with the session's model, cluster and measured times."""
    return PricedPlan(plan, session.model, session.cluster, session.profile)


def with_prediction(found: PricedPlan) -> Plan:
    """Returns the plan with a prediction from the simulator."""
    timeline = simulate_priced(found)
    prediction = Prediction(
        step_seconds=timeline.step_seconds, parts=step_breakdown(timeline), memory=found.memory
    )
    return replace(found.plan, prediction=prediction)


def simulate_priced(found: PricedPlan) -> Timeline:
    """Simulates one step of a plan."""
    return simulate(found.program, found.prices)


def error_text(session: Session, seconds: float) -> str:
    """Says how certain a predicted step time is; empty if the profile is calibrated without an
    error bar, or measured and not calibrated."""
    if session.profile is None:
        bar, known = (
            UNMEASURED,
            f"nine of ten of {UNMEASURED.runs} published runs not measured before",
        )
    else:
        fitted = session.profile.calibration
        if fitted is None or fitted.error is None:
            return ""
        bar = fitted.error
        known = f"four of five of the {bar.runs} runs that it was calibrated on"
    low, high = seconds * bar.low, seconds * bar.high
    return f"step between {format_seconds(low)} and {format_seconds(high)}, as {known}"
