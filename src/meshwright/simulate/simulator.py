"""Simulates a program at given prices, event by event, with contention for links.

The timing rules are those of program/instructions.py.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
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
from meshwright.simulate.rank_progress import (
    At,
    BroadcastQueue,
    CollectiveProgress,
    MessageChannel,
    RankProgress,
    must_wait,
)
from meshwright.simulate.simulated_step import Executed, SimulatedStep
from meshwright.stopping import raise_if_stopped

EVENTS_BETWEEN_CHECKS = 1_000
"""The number of events between two checks for an interrupt: a few hundredths of a second."""


def _streams(traffic: Traffic) -> Streams | None:
    """Returns the streams of a message or collective; None if no byte moves."""
    sizes = {resource: size for resource, size in traffic.bytes_by_resource.items() if size > 0}
    return streams_of(sizes, traffic.stream) if sizes else None


class _Simulation:
    """Plays one step of a program."""

    def __init__(self, program: Program, prices: Prices) -> None:
        self.now = 0.0
        self.events: list[tuple[float, int, Callable[..., None], tuple[Any, ...]]] = []
        self.sequence = 0
        self.network = FlowNetwork(bandwidth=prices.bandwidth)
        self.ranks = {
            rank: RankProgress(rank, instructions, prices.ranks[rank], prices.static_bytes[rank])
            for rank, instructions in enumerate(program.ranks)
            if instructions
        }
        """The ranks that have anything to do."""
        self.channels: dict[tuple[int, int, Op], MessageChannel] = {}
        """The channels, by source, target and the operation of its receives."""
        self.channel_of: dict[tuple[int, int | None, Op], MessageChannel] = {}
        """The same by rank, peer and operation of a send or receive."""
        self.chains: dict[Chain, BroadcastQueue] = {}
        self.collectives: dict[At, CollectiveProgress] = {}
        self.executed: list[Executed] = []
        """Rank, index, begin and end of every instruction, in the order of their ends."""
        self.memory: list[tuple[int, float, float]] = []
        """Rank, moment and bytes of every change of the memory in use."""
        self.streams: dict[int, Streams | None] = {}
        """The streams of every traffic, by its identity."""
        self._meet()

    def _meet(self) -> None:
        """Finds the members of every collective: equal members, content and repetition."""
        groups: dict[Any, CollectiveProgress] = defaultdict(CollectiveProgress)
        for rank, state in self.ranks.items():
            turn: dict[Any, int] = defaultdict(int)
            for index, i in enumerate(state.instructions):
                if i.op.kind == "collective":
                    key = collective_key(i)
                    turn[key] += 1
                    group = groups[(key, turn[key])]
                    group.members.append((rank, index))
                    self.collectives[rank, index] = group
                    if not i.op.blocks:
                        state.posted.append(index)

    def run(self) -> None:
        """Runs all events in the order of time; after those of one moment, flows share bandwidth
        again."""
        events, network = self.events, self.network
        for state in self.ranks.values():
            self.advance(state)
        turn = 0
        while events:
            turn += 1
            if turn % EVENTS_BETWEEN_CHECKS == 0:
                raise_if_stopped()
            self.now, _, react, arguments = heappop(events)
            react(*arguments)
            if network.touched and (not events or events[0][0] > self.now):
                for flow in reshare_bandwidth(network, self.now):
                    if flow.rate:
                        self.at(max(flow.ends, self.now), self.leave, flow, flow.version)

    def at(self, seconds: float, react: Callable[..., None], *arguments: Any) -> None:
        self.sequence += 1
        heappush(self.events, (seconds, self.sequence, react, arguments))

    def advance(self, state: RankProgress) -> None:
        """Issues a rank's instructions up to the first one that keeps it busy or has to wait."""
        instructions = state.instructions
        end = len(instructions)
        while not state.busy and state.position < end:
            index = state.position
            i = instructions[index]
            op = i.op
            if op.kind == "send" or op.kind == "receive":
                self.post(state, index, i)
                if waits := state.prices[index].seconds:
                    state.busy = True
                    self.at(self.now + waits, self.resume, state)
            elif (op.reads is not None or op.awaits != "none") and must_wait(state, i):
                return
            elif op.kind == "compute":
                self.compute(state, index, op)
            elif op.blocks:
                state.busy = True
                self.ready((state.number, index))
            else:
                state.open_reductions[i.layers, i.tied] += op.of_gradients
                if state.prices[index].completed_by is None:
                    self.ready((state.number, index))
            state.position = index + 1

    def compute(self, state: RankProgress, index: int, op: Op) -> None:
        state.busy = True
        price, now = state.prices[index], self.now
        if op is Op.FORWARD:
            self.hold(state, price.held_bytes)
        for reduction, offset in price.completes:
            self.at(now + offset, self.ready, (state.number, reduction))
        self.sequence += 1  # as `at` does, but at once
        done = (state, index, op, now)
        heappush(self.events, (now + price.seconds, self.sequence, self.computed, done))

    def computed(self, state: RankProgress, index: int, op: Op, began: float) -> None:
        if op is not Op.FORWARD and (held := state.prices[index].held_bytes):
            self.hold(state, held)
        self.executed.append((state.number, index, began, self.now))
        state.busy = False
        self.advance(state)

    def resume(self, state: RankProgress) -> None:
        state.busy = False
        self.advance(state)

    def hold(self, state: RankProgress, size: float) -> None:
        state.memory += size
        self.memory.append((state.number, self.now, state.memory))

    def post(self, state: RankProgress, index: int, i: Instruction) -> None:
        op = i.op
        receives = op.kind == "receive"
        if receives:
            state.awaited[op, i.stage, i.micro_batch] += 1
        if i.ranks:
            chain = self.chains.setdefault(chain_of(i), BroadcastQueue(i.ranks))
            chain.posted[stage_before(i), i.micro_batch, i.rows].append((state.number, index))
            self.pass_on(chain)
            return
        key = (state.number, i.peer, op)
        channel = self.channel_of.get(key)
        if channel is None:
            channel = self.channel_of[key] = self.channel(state.number, i)
        (channel.receives if receives else channel.sends).append(index)
        if not channel.busy:
            self.match(channel)

    def channel(self, rank: int, i: Instruction) -> MessageChannel:
        """Returns the channel of a send or receive of a rank."""
        assert i.peer is not None
        if i.op.kind == "receive":
            source, target, op = i.peer, rank, i.op
        else:
            source, target, op = rank, i.peer, MATCHING_RECEIVE[i.op]
        found = self.channels.get((source, target, op))
        if found is None:
            one, other = (
                self.ranks.get(end) or RankProgress(end, (), (), 0.0) for end in (source, target)
            )
            found = self.channels[source, target, op] = MessageChannel(one, other)
        return found

    def match(self, channel: MessageChannel) -> None:
        """Begins the next message of an idle channel if its send and its receive are posted."""
        if channel.sends and channel.receives:
            channel.busy = True
            send, receive = channel.sends.popleft(), channel.receives.popleft()
            traffic = channel.source.prices[send].traffic
            self.move(traffic, self.moved, channel, send, receive, self.now)

    def moved(self, channel: MessageChannel, send: int, receive: int, began: float) -> None:
        target, now = channel.target, self.now
        self.executed += (
            (channel.source.number, send, began, now),
            (target.number, receive, began, now),
        )
        i = target.instructions[receive]
        target.awaited[i.op, i.stage, i.micro_batch] -= 1
        channel.busy = False
        self.match(channel)
        if not target.busy:
            self.advance(target)

    def pass_on(self, chain: BroadcastQueue) -> None:
        """Begins the first broadcast whose sends and receives are all posted."""
        for key, ends in () if chain.busy else chain.posted.items():
            if len(ends) == 2 * (len(chain.ranks) - 1):
                chain.busy = True
                del chain.posted[key]
                first = next(at for at in ends if self.instruction(at).peer == chain.ranks[1])
                self.move(self.traffic(first), self.passed_on, chain, ends, self.now)
                return

    def passed_on(self, chain: BroadcastQueue, ends: list[At], began: float) -> None:
        for at in ends:
            self.executed.append((*at, began, self.now))
            i = self.instruction(at)
            if i.op.kind == "receive":
                self.ranks[at[0]].awaited[i.op, i.stage, i.micro_batch] -= 1
        chain.busy = False
        self.pass_on(chain)
        for rank in chain.ranks[1:]:
            self.advance(self.ranks[rank])

    def instruction(self, at: At) -> Instruction:
        return self.ranks[at[0]].instructions[at[1]]

    def traffic(self, at: At) -> Traffic:
        return self.ranks[at[0]].prices[at[1]].traffic

    def ready(self, at: At) -> None:
        collective = self.collectives[at]
        collective.ready.add(at)
        self.reduce(collective)

    def reduce(self, collective: CollectiveProgress) -> None:
        """Begins a collective if every member is ready and has begun its earlier reductions."""
        first = collective.members[0]
        i = self.instruction(first)
        if len(collective.ready) < len(i.ranks):
            return
        if i.op.blocks:
            self.move(self.traffic(first), self.met, collective, self.now)
            return
        states = [self.ranks[rank] for rank, _ in collective.members]
        turns = [state.posted[state.next_posted] for state in states]
        if turns == [index for _, index in collective.members]:
            self.move(self.traffic(first), self.reduced, collective, self.now)
            for state in states:
                state.next_posted += 1
            for state in states:
                if state.next_posted < len(state.posted):
                    self.reduce(self.collectives[state.number, state.posted[state.next_posted]])

    def reduced(self, collective: CollectiveProgress, began: float) -> None:
        for at in collective.members:
            self.executed.append((*at, began, self.now))
            i = self.instruction(at)
            self.ranks[at[0]].open_reductions[i.layers, i.tied] -= i.op.of_gradients
        for rank, _ in collective.members:
            self.advance(self.ranks[rank])

    def met(self, collective: CollectiveProgress, began: float) -> None:
        for at in collective.members:
            self.executed.append((*at, began, self.now))
            self.ranks[at[0]].busy = False
        for rank, _ in collective.members:
            self.advance(self.ranks[rank])

    def move(self, traffic: Traffic, then: Callable[..., None], *arguments: Any) -> None:
        """Sends traffic: its latency, then its bytes."""
        arrival, key = self.now + traffic.latency, id(traffic)
        if key not in self.streams:
            self.streams[key] = _streams(traffic)
        if (streams := self.streams[key]) is None:
            self.at(arrival, then, *arguments)
        else:
            flow = Flow(streams, partial(then, *arguments), traffic.sender)
            self.sequence += 1  # as `at` does, but at once
            arriving = (self.network, flow, arrival)
            heappush(self.events, (arrival, self.sequence, add_flow, arriving))

    def leave(self, flow: Flow, version: int) -> None:
        """Ends a flow, unless its rate has changed since the forecast."""
        if version == flow.version:
            remove_flow(self.network, flow)
            flow.on_end()


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
    for rank, state in step.ranks.items():
        instructions = state.instructions
        done = state.position == len(instructions)
        if not done or state.busy:
            index = min(state.position, len(instructions) - 1) - (state.busy and not done)
            found = f"{format_instruction(instructions[index])!r}, which waits for ever"
            yield rank, index, found, "a program that ends"
    for (source, target, _), channel in step.channels.items():
        wanted = f"a send from rank {source} for each receive on rank {target}"
        for rank, posted in ((source, channel.sends), (target, channel.receives)):
            for index in posted:
                waiting = format_instruction(step.instruction((rank, index)))
                yield rank, index, f"{waiting!r} on rank {rank}, without a partner", wanted
    for chain in step.chains.values():
        for rank, index in (at for ends in chain.posted.values() for at in ends):
            waiting = format_instruction(step.instruction((rank, index)))
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
