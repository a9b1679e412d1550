"""Describes a plan in sentences: the verdict, and what limits the step."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from meshwright.cluster.spec import Cluster, devices_of
from meshwright.cost.memory import total_bytes
from meshwright.plan.ranks import describe_plan, stage_layout
from meshwright.plan.spec import DeviceMemory, Plan
from meshwright.program.timeline import Timeline, busy_seconds
from meshwright.techniques import rooms_with
from meshwright.units import format_bytes, format_seconds

_LIMITS = {
    "compute": "computing",
    "bubble": "the pipeline filling, draining and waiting",
    "transfers": "activations and gradients on their way between stages",
    "reductions": "summing gradients that no backward hides",
    "optimizer": "the optimizer step",
    "overhead": "what lies outside all instructions",
}
_REMEDIES = {
    "bubble": "more micro-batches, or stages of more equal length, would shorten it",
    "transfers": "a faster link between stages, or a cut through smaller tensors, would shorten it",
    "reductions": "faster links between ranks that hold the same parameters would shorten it",
    "optimizer": "more devices to share the parameters would shorten it",
    "overhead": "a larger batch would make it matter less",
}
TIGHT = 0.95
"""Share of a device's memory in use above which a plan is called limited by memory."""


def tokens_per_second(plan: Plan, step_seconds: float) -> float:
    """Returns tokens of the global batch per second."""
    return plan.job.global_batch * plan.job.sequence / step_seconds


def parts_sentence(parts: Mapping[str, float]) -> str:
    """Says what the critical path spends its time on, and what would shorten the largest loss."""
    step = sum(parts.values())
    lost = {part: seconds for part, seconds in parts.items() if part != "compute" and seconds > 0}
    computing = (
        f"{parts.get('compute', 0.0) / step:.0%} of the step is what the busiest device computes"
    )
    if not lost:
        return f"{computing}; nothing else takes time."
    worst = max(lost, key=lambda part: lost[part])
    sentence = f"{computing}; the largest loss besides it is {_LIMITS[worst]} ({worst}): "
    sentence += f"{format_seconds(lost[worst])}, {lost[worst] / step:.0%}."
    if lost[worst] >= 0.05 * step:
        sentence += f" {_REMEDIES[worst].capitalize()}."
    return sentence


def memory_sentence(memory: tuple[DeviceMemory, ...]) -> str:
    """Names the fullest device, and says if memory limits the plan."""
    worst = max(memory, key=lambda m: total_bytes(m) / m.capacity)
    used = total_bytes(worst) / worst.capacity
    room = "memory limits this plan" if used >= TIGHT else "memory leaves room"
    total, capacity = format_bytes(total_bytes(worst)), format_bytes(worst.capacity)
    return f"{worst.device} is the fullest device: {total} of {capacity} ({used:.0%}); {room}."


def busiest_sentence(timeline: Timeline, cluster: Cluster) -> str:
    """Names the device that computes longest, which bounds the step, and the idlest."""
    ranks = range(len(timeline.devices))
    busy = {rank: busy_seconds(timeline, rank) for rank in ranks}
    most, least = max(busy, key=lambda r: busy[r]), min(busy, key=lambda r: busy[r])
    types = {device.name: device.type for device in devices_of(cluster)}
    device = timeline.devices[most]
    text = f"{device} ({types[device]}) is the busiest device: it computes for "
    text += f"{format_seconds(busy[most])}, {busy[most] / timeline.step_seconds:.0%} of the step"
    if busy[least] < busy[most]:
        other = timeline.devices[least]
        text += f"; {other} ({types[other]}) is the idlest with {format_seconds(busy[least])}"
    return text + "."


def limits(plan: Plan) -> tuple[str, ...]:
    """Returns the sentences on what limits the predicted step: time, memory, virtual stages and
    techniques."""
    sentences = []
    prediction = plan.prediction
    if prediction and sum(prediction.parts.values()) > 0:
        sentences.append(parts_sentence(prediction.parts))
    if prediction and prediction.memory:
        sentences.append(memory_sentence(prediction.memory))
        sentences += _frozen(prediction.memory)
    sentences += _virtual_stages(plan)
    for room in rooms_with("report"):
        sentences += room.sentences(plan)
    return tuple(sentences)


def _frozen(memory: tuple[DeviceMemory, ...]) -> Iterator[str]:
    """Says how much of the weights is frozen, if any: the difference of weights and gradients,
    which are equally large for trained weights."""
    held, trained = sum(m.parameters for m in memory), sum(m.gradients for m in memory)
    if held - trained > 0.005 * held:
        text = f"Of {format_bytes(held)} of weights on all devices {format_bytes(held - trained)} "
        yield text + "are frozen: they have no gradients, no sums and no optimizer states."


def _virtual_stages(plan: Plan) -> Iterator[str]:
    """Says why devices hold several stages, if any does."""
    layouts = [stage_layout(pipeline) for pipeline in plan.pipelines]
    most = max((len(held) for layout in layouts for held in layout), default=1)
    if most > 1:
        text = f"Devices hold up to {most} stages of a pipeline: it fills and drains in the time "
        text += "of shorter stages, for more transfers."
        if any(
            len(layout) > 1 and layout[0][-1] == sum(map(len, layout)) - 1 for layout in layouts
        ):
            text += " The first devices hold its last layers too."
        yield text


def error_sentence(predicted: float, measured: float) -> str:
    """Says how far a prediction was off: (predicted - measured) / measured."""
    error = (predicted - measured) / measured
    if abs(error) < 0.0005:
        return "as predicted"
    side = "below" if error < 0 else "above"
    return f"the prediction of {format_seconds(predicted)} is {abs(error):.1%} {side} that"


def verdict(plan: Plan, predicted: float, measured: float | None) -> str:
    """Summarises the whole page in one sentence; both arguments are seconds of a step."""
    where = f"{plan.model.name} on {plan.cluster.name}"
    seconds = measured or predicted
    rate = f"{tokens_per_second(plan, seconds):,.0f} tokens/s"
    if measured is None:
        return f"{where}: a step is predicted to take {format_seconds(seconds)}, or {rate}."
    error = error_sentence(predicted, measured)
    return f"{where}: a step takes {format_seconds(seconds)}, or {rate}; {error}."


def title(plan: Plan) -> str:
    """Describes the plan in one line, with its job."""
    job = plan.job
    return f"{describe_plan(plan)}, {job.global_batch} rows of {job.sequence}, {job.precision}"
