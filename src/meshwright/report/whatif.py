"""Shows what another cluster would gain: the step before and after, in the terminal and as JSON."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from meshwright.money.outcomes import format_amount
from meshwright.money.spec import Expense
from meshwright.plan.ranks import describe_plan
from meshwright.plan.spec import Plan
from meshwright.records import dumps, record
from meshwright.report.resources import NamedLoad
from meshwright.report.sentences import limits, tokens_per_second
from meshwright.report.tables import plan_table
from meshwright.report.terminal import plain_text
from meshwright.units import format_seconds

BUSY = 0.5
"""Share of the step for which a link must be busy to be mentioned."""


@record
class WhatIfOption:
    """Says how fast a plan is on a cluster, and what it costs: one line of the answer."""

    name: str
    plan: str = ""
    """The plan in one line."""
    step_seconds: float | None = None
    """Seconds of a step; None if the plan cannot run there."""
    tokens_per_second: float | None = None
    reason: str = ""
    """Reason why the plan cannot run there."""
    expense: Expense | None = None
    """What the plan costs; None without prices."""
    misses: tuple[str, ...] | None = None
    """Sentences on the limits that the plan misses; None without prices."""


@record
class WhatIf:
    """Answers a what-if question: what would edits of a cluster gain?"""

    edits: tuple[str, ...]
    """Sentences on what was changed, and what was assumed for it."""
    options: tuple[WhatIfOption, ...]
    """Four lines: the plan as it is, the best plan for the cluster as it is, the plan kept on the
    edited cluster, and the best plan for the edited cluster."""
    seconds_before: float
    """Seconds of a step of the fastest plan for the cluster as it is."""
    seconds_after: float
    """Seconds of a step of the fastest plan for the edited cluster."""
    best: Plan
    """The fastest plan for the edited cluster, with its prediction."""
    busiest: NamedLoad | None
    """The link of the edited cluster that is busy longest under that plan."""
    prices: str | None = None
    """The source of the hourly prices; None without prices."""
    expense_before: Expense | None = None
    """What the best plan for the cluster as it is costs."""
    expense_after: Expense | None = None
    """What the best plan for the edited cluster costs."""

    @property
    def speed_up(self) -> float:
        """Returns the ratio of the step times, before / after."""
        return self.seconds_before / self.seconds_after


def what_if_option(name: str, plan: Plan, seconds: float) -> WhatIfOption:
    """Returns the line of a plan that runs."""
    rate = tokens_per_second(plan, seconds)
    return WhatIfOption(
        name=name, plan=describe_plan(plan), step_seconds=seconds, tokens_per_second=rate
    )


def whatif_json(found: WhatIf) -> str:
    """Formats the answer as JSON, in seconds and bytes."""
    return dumps(found)


def gain_sentence(found: WhatIf) -> str:
    """Says in a sentence what the edits would gain."""
    before, after = format_seconds(found.seconds_before), format_seconds(found.seconds_after)
    change = f"{before} before, {after} after"
    if abs(found.speed_up - 1) < 0.0005:
        return f"It would buy nothing: {change}."
    if found.speed_up < 1:
        return f"A step would be {1 / found.speed_up:.3g} times as long: {change}."
    return f"It would be {found.speed_up:.3g} times as fast: {change}."


def cost_sentence(found: WhatIf) -> str:
    """Says in a sentence what the edits would change in the cost of a token; empty without
    prices."""
    before, after = found.expense_before, found.expense_after
    if before is None or after is None:
        return ""
    first, last = (1e6 * each.per_token for each in (before, after))
    change = f"{format_amount(first)} {before.currency} per million tokens before, "
    change += f"{format_amount(last)} after"
    if first == last or abs(last / first - 1 if first else 1) < 0.0005:
        return f"A token would cost the same: {change}."
    times = f"{last / first:.3g} times as much" if first else "more"
    return f"A token would cost {times}: {change} ({found.prices})."


def print_whatif(found: WhatIf, console: Console | None = None) -> None:
    """Prints the assumptions, the gain, the best plan for the edited cluster, and what would limit
    it."""
    console = console or Console()
    for edit in found.edits:
        console.print(plain_text(f"• {edit}"))
    console.print()
    console.print(_options_table(found))
    console.print()
    console.print(plain_text(f"• {gain_sentence(found)}"))
    if cost := cost_sentence(found):
        console.print(plain_text(f"• {cost}"))
    console.print()
    console.print(plain_text(f"the best plan for it: {describe_plan(found.best)}", style="bold"))
    console.print(plan_table(found.best))
    console.print()
    for sentence in (*limits(found.best), *_busiest(found)):
        console.print(plain_text(f"• {sentence}"))


def _busiest(found: WhatIf) -> tuple[str, ...]:
    if found.busiest is None or found.busiest.seconds < BUSY * found.seconds_after:
        return ()
    share = found.busiest.seconds / found.seconds_after
    return (f"{found.busiest.name} is the busiest link: {share:.0%} of the step.",)


def _options_table(found: WhatIf) -> Table:
    table = Table(box=None, pad_edge=False)
    money = _money_columns(found)
    for name in ("", "step", "tokens/s", *money):
        table.add_column(name, justify="right" if name else "left", no_wrap=True)
    table.add_column("plan", overflow="fold")
    told: dict[str, str] = {}
    for each in found.options:
        if each.step_seconds is None or each.tokens_per_second is None:
            dashes = ("-",) * (2 + len(money))
            table.add_row(plain_text(each.name), *dashes, plain_text(each.reason))
            continue
        rate = f"{each.tokens_per_second:,.0f}"
        plan = told.get(each.plan, each.plan)
        told.setdefault(each.plan, "the same")
        table.add_row(
            plain_text(each.name),
            format_seconds(each.step_seconds),
            rate,
            *_amounts(each, money),
            plain_text("; ".join((plan, *(each.misses or ())))),
        )
    return table


def _money_columns(found: WhatIf) -> tuple[str, ...]:
    """Returns the titles of the columns for what plans cost; none without prices."""
    expense = found.expense_after
    return (f"{expense.currency}/h", f"{expense.currency}/Mtoken") if expense else ()


def _amounts(option: WhatIfOption, columns: tuple[str, ...]) -> tuple[str, ...]:
    if option.expense is None:
        return ("-",) * len(columns)
    return (
        format_amount(option.expense.per_hour),
        format_amount(1e6 * option.expense.per_token),
    )
