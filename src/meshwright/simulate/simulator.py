"""Simulates a program at given prices, event by event, with contention for links.

The timing rules are those of program/instructions.py.
"""

from __future__ import annotations

from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from heapq import heappop, heappush
from typing import Any

from meshwright.cluster.spec import Cluster
from meshwright.cost.collective import Traffic
from meshwright.cost.priced_plan import PricedPlan
from meshwright.cost.pricing import Prices
from meshwright.cost.profile import Profile
from meshwright.errors import Problem, ProgramError
from meshwright.model.spec import LayerGraph
from meshwright.plan.spec import Plan
from meshwright.program.instructions import (
    GradientKey,
    Instruction,
    Program,
    collective_key,
    format_instruction,
)
from meshwright.program.messages import Chain, chain_of, stage_before
from meshwright.program.operations import MATCHING_RECEIVE, Op
from meshwright.program.timeline import Timeline
from meshwright.simulate.flows import (
    Flow,
    FlowNetwork,
    Streams,
    add_flow,
    remove_flow,
    reshare_bandwidth,
    streams_of,
)
from meshwright.simulate.simulated_step import SimulatedStep
from meshwright.stopping import raise_if_stopped

EVENTS_BETWEEN_CHECKS = 1_000
"""The number of intervals between two checks for an interrupt: a few hundredths of a second."""

At = tuple[int, int]
"""An instruction: its rank, and its index in that rank's list."""


@dataclass(slots=True)
class _Rank:
    """Keeps how far a rank has come, and what it waits for."""

    position: int = 0
    """The index of the next instruction."""
    busy: bool = False
    """True while it computes or a blocking collective holds it."""
    awaited: dict[tuple[Op, int, int | None], int] = field(default_factory=lambda: defaultdict(int))
    """The number of receives posted and not arrived, by RECV_F or RECV_B, stage and micro-batch."""
    posted: list[int] = field(default_factory=list)
    """The indices of the posted collectives, in order; those before `next_posted` have begun."""
    next_posted: int = 0
    open_reductions: Counter[GradientKey] = field(default_factory=Counter)
    """The number of sums of gradients posted and not finished, by what they sum."""
    memory: float = 0.0


@dataclass(slots=True)
class _Channel:
    """Holds the messages in one direction between two ranks, first in, first out."""

    sends: deque[At] = field(default_factory=deque)
    receives: deque[At] = field(default_factory=deque)
    busy: bool = False


@dataclass(slots=True, eq=False)
class _Collective:
    """Holds the instructions that take part in one collective, and those that are ready for it."""

    members: list[At] = field(default_factory=list)
    ready: set[At] = field(default_factory=set)


@dataclass(slots=True)
class _Queue:
    """Holds the broadcasts along one chain, which run one after another."""

    ranks: tuple[int, ...]
    posted: dict[tuple[object, ...], list[At]] = field(default_factory=lambda: defaultdict(list))
    """The sends and receives of broadcasts that have not begun, by cut, micro-batch and rows."""
    busy: bool = False


def _streams(traffic: Traffic) -> Streams | None:
    """Returns the streams of a message or collective; None if no byte moves."""
    sizes = {resource: size for resource, size in traffic.bytes_by_resource.items() if size > 0}
    return streams_of(sizes, traffic.stream) if sizes else None


def _waits(state: _Rank, i: Instruction) -> bool:
    """Returns whether a compute instruction or a collective must wait."""
    if i.op.reads is not None and state.awaited[i.op.reads, i.stage, i.micro_batch]:
        return True
    if i.op.awaits == "own":
        return state.open_reductions[i.layers, i.tied] > 0
    return i.op.awaits == "all" and state.open_reductions.total() > 0


class _Simulation:
    """Plays one step of a program."""

    def __init__(self, program: Program, prices: Prices) -> None:
        self.program, self.prices = program, prices
        self.now = 0.0
        self.events: list[tuple[float, int, Callable[..., None], tuple[Any, ...]]] = []
        self.sequence = 0
        self.network = FlowNetwork(bandwidth=prices.bandwidth)
        self.ranks = [_Rank(memory=size) for size in prices.static_bytes]
        self.channels: dict[tuple[int, int, Op], _Channel] = defaultdict(_Channel)
        self.chains: dict[Chain, _Queue] = {}
        self.collectives: dict[At, _Collective] = {}
        self.executed: list[tuple[int, int, float, float]] = []
        """Rank, index, begin and end of every instruction, in the order of their ends."""
        self.memory: list[tuple[int, float, float]] = []
        """Rank, moment and bytes of every change of the memory in use."""
        self.streams: dict[int, Streams | None] = {}
        """The streams of every traffic, by its identity."""
        self._meet()

    def _meet(self) -> None:
        """Finds the members of every collective: equal members, content and repetition."""
        groups: dict[Any, _Collective] = defaultdict(_Collective)
        for rank, instructions in enumerate(self.program.ranks):
            turn: dict[Any, int] = defaultdict(int)
            for index, i in enumerate(instructions):
                if i.op.kind == "collective":
                    key = collective_key(i)
                    turn[key] += 1
                    group = groups[(key, turn[key])]
                    group.members.append((rank, index))
                    self.collectives[rank, index] = group
                    if not i.op.blocks:
                        self.ranks[rank].posted.append(index)

    def run(self) -> None:
        """Runs all events in the order of time; after those of one moment, flows share bandwidth
        again."""
        for rank in range(len(self.ranks)):
            self.advance(rank)
        while self.events:
            self.now, _, react, arguments = heappop(self.events)
            react(*arguments)
            if self.network.touched and (not self.events or self.events[0][0] > self.now):
                for flow in reshare_bandwidth(self.network, self.now):
                    if flow.rate:
                        self.at(max(flow.ends, self.now), self.leave, flow, flow.version)

    def at(self, seconds: float, react: Callable[..., None], *arguments: Any) -> None:
        self.sequence += 1
        heappush(self.events, (seconds, self.sequence, react, arguments))

    def advance(self, rank: int) -> None:
        """Issues a rank's instructions up to the first one that keeps it busy or has to wait."""
        state, instructions = self.ranks[rank], self.program.ranks[rank]
        while not state.busy and state.position < len(instructions):
            at, i = (rank, state.position), instructions[state.position]
            if i.op.kind in ("send", "receive"):
                self.post(at, i)
            elif (i.op.reads is not None or i.op.awaits != "none") and _waits(state, i):
                return
            elif i.op.kind == "compute":
                self.compute(at, i)
            elif i.op.blocks:
                state.busy = True
                self.ready(at)
            else:
                state.open_reductions[i.layers, i.tied] += i.op.of_gradients
                if self.prices.ranks[rank][at[1]].completed_by is None:
                    self.ready(at)
            state.position += 1

    def compute(self, at: At, i: Instruction) -> None:
        rank, index = at
        self.ranks[rank].busy = True
        price = self.prices.ranks[rank][index]
        if i.op is Op.FORWARD:
            self.hold(rank, price.held_bytes)
        for reduction, offset in price.completes:
            self.at(self.now + offset, self.ready, (rank, reduction))
        self.at(self.now + price.seconds, self.computed, at, i, self.now)

    def computed(self, at: At, i: Instruction, began: float) -> None:
        if i.op is not Op.FORWARD and (held := self.prices.ranks[at[0]][at[1]].held_bytes):
            self.hold(at[0], held)
        self.record(at, began)
        self.ranks[at[0]].busy = False
        self.advance(at[0])

    def hold(self, rank: int, size: float) -> None:
        self.ranks[rank].memory += size
        self.memory.append((rank, self.now, self.ranks[rank].memory))

    def post(self, at: At, i: Instruction) -> None:
        assert i.peer is not None
        if i.ranks:
            if i.op.kind == "receive":
                self.ranks[at[0]].awaited[i.op, i.stage, i.micro_batch] += 1
            chain = self.chains.setdefault(chain_of(i), _Queue(i.ranks))
            chain.posted[stage_before(i), i.micro_batch, i.rows].append(at)
            self.pass_on(chain)
            return
        if i.op.kind == "send":
            channel = self.channels[at[0], i.peer, MATCHING_RECEIVE[i.op]]
            channel.sends.append(at)
        else:
            channel = self.channels[i.peer, at[0], i.op]
            channel.receives.append(at)
            self.ranks[at[0]].awaited[i.op, i.stage, i.micro_batch] += 1
        self.match(channel)

    def match(self, channel: _Channel) -> None:
        """Begins the next message of a channel if both its send and its receive are posted."""
        if channel.sends and channel.receives and not channel.busy:
            channel.busy = True
            send, receive = channel.sends.popleft(), channel.receives.popleft()
            self.move(send, self.moved, channel, send, receive, self.now)

    def moved(self, channel: _Channel, send: At, receive: At, began: float) -> None:
        self.record(send, began)
        self.record(receive, began)
        i = self.program.ranks[receive[0]][receive[1]]
        self.ranks[receive[0]].awaited[i.op, i.stage, i.micro_batch] -= 1
        channel.busy = False
        self.match(channel)
        self.advance(receive[0])

    def pass_on(self, chain: _Queue) -> None:
        """Begins the first broadcast whose sends and receives are all posted."""
        for key, ends in () if chain.busy else chain.posted.items():
            if len(ends) == 2 * (len(chain.ranks) - 1):
                chain.busy = True
                del chain.posted[key]
                first = next(at for at in ends if self.peer(at) == chain.ranks[1])
                self.move(first, self.passed_on, chain, ends, self.now)
                return

    def passed_on(self, chain: _Queue, ends: list[At], began: float) -> None:
        for at in ends:
            self.record(at, began)
            i = self.program.ranks[at[0]][at[1]]
            if i.op.kind == "receive":
                self.ranks[at[0]].awaited[i.op, i.stage, i.micro_batch] -= 1
        chain.busy = False
        self.pass_on(chain)
        for rank in chain.ranks[1:]:
            self.advance(rank)

    def peer(self, at: At) -> int | None:
        return self.program.ranks[at[0]][at[1]].peer

    def ready(self, at: At) -> None:
        collective = self.collectives[at]
        collective.ready.add(at)
        self.reduce(collective)

    def reduce(self, collective: _Collective) -> None:
        """Begins a collective if every member is ready and has begun its earlier reductions."""
        first = collective.members[0]
        i = self.program.ranks[first[0]][first[1]]
        if len(collective.ready) < len(i.ranks):
            return
        if i.op.blocks:
            self.move(first, self.met, collective, self.now)
            return
        states = [self.ranks[rank] for rank, _ in collective.members]
        turns = [state.posted[state.next_posted] for state in states]
        if turns == [index for _, index in collective.members]:
            self.move(first, self.reduced, collective, self.now)
            for state in states:
                state.next_posted += 1
            for (rank, _), state in zip(collective.members, states, strict=True):
                if state.next_posted < len(state.posted):
                    self.reduce(self.collectives[rank, state.posted[state.next_posted]])

    def reduced(self, collective: _Collective, began: float) -> None:
        for rank, index in collective.members:
            self.record((rank, index), began)
            i = self.program.ranks[rank][index]
            self.ranks[rank].open_reductions[i.layers, i.tied] -= i.op.of_gradients
        for rank, _ in collective.members:
            self.advance(rank)

    def met(self, collective: _Collective, began: float) -> None:
        for at in collective.members:
            self.record(at, began)
            self.ranks[at[0]].busy = False
        for rank, _ in collective.members:
            self.advance(rank)

    def move(self, at: At, then: Callable[..., None], *arguments: Any) -> None:
        """Sends an instruction's traffic: its latency, then its bytes."""
        traffic = self.prices.ranks[at[0]][at[1]].traffic
        arrival = self.now + traffic.latency
        if id(traffic) not in self.streams:
            self.streams[id(traffic)] = _streams(traffic)
        if (streams := self.streams[id(traffic)]) is None:
            self.at(arrival, then, *arguments)
            return
        flow = Flow(streams, partial(then, *arguments), traffic.sender)
        self.at(arrival, self.enter, flow)

    def enter(self, flow: Flow) -> None:
        add_flow(self.network, flow, self.now)

    def leave(self, flow: Flow, version: int) -> None:
        """Ends a flow, unless its rate has changed since the forecast."""
        if version == flow.version:
            remove_flow(self.network, flow)
            flow.on_end()

    def record(self, at: At, began: float) -> None:
        if len(self.executed) % EVENTS_BETWEEN_CHECKS == 0:
            raise_if_stopped()
        self.executed.append((*at, began, self.now))


def simulate(program: Program, prices: Prices) -> Timeline:
    """Simulates one step, as `simulated_step` does."""
    return simulated_step(program, prices).timeline()


def simulated_step(program: Program, prices: Prices) -> SimulatedStep:
    """Simulates one step; raises ProgramError with one Problem for every rank that gets stuck."""
    step = _Simulation(program, prices)
    step.run()
    ProgramError.check(
        Problem("program", f"rank {rank}[{index}]", found, wanted, each=("rank", f"rank {rank}"))
        for rank, index, found, wanted in _stuck(step)
    )
    # Not `step.now`: outdated forecasts of flows that have sped up stay queued after the end.
    end = max((ended for _, _, _, ended in step.executed), default=0.0)
    seconds = end + prices.overhead_seconds
    return SimulatedStep(program, prices, seconds, step.executed, step.memory)


def _stuck(step: _Simulation) -> Iterator[tuple[int, int, str, str]]:
    """Yields rank and index of every instruction that waits for ever, and what it lacks."""
    for rank, state in enumerate(step.ranks):
        instructions = step.program.ranks[rank]
        done = state.position == len(instructions)
        if not done or state.busy:
            index = min(state.position, len(instructions) - 1) - (state.busy and not done)
            found = f"{format_instruction(instructions[index])!r}, which waits for ever"
            yield rank, index, found, "a program that ends"
    for (source, target, _), channel in step.channels.items():
        for rank, index in (*channel.sends, *channel.receives):
            waiting = format_instruction(step.program.ranks[rank][index])
            found = f"{waiting!r} on rank {rank}, without a partner"
            yield rank, index, found, f"a send from rank {source} for each receive on rank {target}"
    for chain in step.chains.values():
        for rank, index in (at for ends in chain.posted.values() for at in ends):
            waiting = format_instruction(step.program.ranks[rank][index])
            found = f"{waiting!r} on rank {rank}, without the others"
            yield rank, index, found, "all sends and receives of its broadcast"


def simulate_plan(
    plan: Plan,
    model: LayerGraph,
    cluster: Cluster,
    profile: Profile | None = None,
    *,
    clipped: bool = True,
) -> Timeline:
    """Compiles, prices and simulates one step of a valid plan, with gradients `clipped` or not.

    Raises ClusterError if a device does not offer the model's precision.
    """
    priced = PricedPlan(plan, model, cluster, profile, clipped=clipped)
    return simulate(priced.program, priced.prices)
