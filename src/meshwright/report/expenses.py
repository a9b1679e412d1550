"""Shows what plans cost in money: in sentences, as a table, and as a picture of speed and cost."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise

from rich.console import Console
from rich.table import Table

from meshwright.cluster.spec import Cluster, devices_of
from meshwright.money.choose import RentalChoice, RentedPlan
from meshwright.money.outcomes import ClusterPrices, format_amount, idle_devices, misses
from meshwright.money.spec import HourlyPrices, MoneyTerms, Outcome
from meshwright.plan.spec import Plan
from meshwright.records import record
from meshwright.report.charts import Tick, ticks
from meshwright.report.template import render
from meshwright.report.terminal import plain_text
from meshwright.text import name_ranges
from meshwright.units import format_seconds

WIDTH, HEIGHT = 720.0, 380.0
_LEFT, _TOP, _BOTTOM = 64.0, 26.0, 44.0
_LETTER, _MOST_LETTERS = 6.6, 44
"""Width of a letter of the names in the picture, in pixels, and the most letters of a name."""
_LINE = 13.0
"""Least distance between two lines of text in the picture, in pixels."""


def prices_text(prices: HourlyPrices) -> str:
    """Names the source of the hourly prices, with its date and its file."""
    return f"hourly prices: {prices.source}, {prices.date} ({prices.file})"


def amounts_text(outcome: Outcome) -> str:
    """Formats what a plan costs an hour, a step, and for a million tokens."""
    expense, currency = outcome.expense, outcome.expense.currency
    return (
        f"{format_amount(expense.per_hour)} {currency} an hour, "
        f"{format_amount(expense.per_step)} {currency} a step, "
        f"{format_amount(1e6 * expense.per_token)} {currency} per million tokens"
    )


def expense_sentence(plan: Plan, here: ClusterPrices, outcome: Outcome) -> str:
    """Says what a plan costs, by which prices, and that devices in no use cost nothing."""
    free, paid = idle_devices(here, plan.devices)
    number = len(plan.devices)
    told = "Its one device costs" if number == 1 else f"Its {number:,} devices cost"
    told += f" {amounts_text(outcome)}"
    if paid:
        told += f" ({paid:,} idle ones are paid for with their nodes)"
    if free:
        told += f"; {free:,} others are idle: they need not be rented, and cost nothing here"
    return f"{told} ({prices_text(here.prices)})."


def rented_text(plan: Plan, cluster: Cluster) -> str:
    """Lists the devices that a plan uses by type: `4 x A100-40, 8 x V100-32`."""
    types = {device.name: device.type for device in devices_of(cluster)}
    counts = Counter(types[device] for device in plan.devices)
    return ", ".join(f"{count} x {kind}" for kind, count in counts.items())


def choice_sentences(choice: RentalChoice, terms: MoneyTerms) -> tuple[str, ...]:
    """Says how the best plan compares with the fastest one, and how many choices were looked at."""
    best, fastest = choice.best.outcome, choice.found[0].outcome
    sentences = []
    if best != fastest and fastest.expense.per_token > 0:
        times = best.step_seconds / fastest.step_seconds
        share = best.expense.per_token / fastest.expense.per_token
        sentences.append(
            f"Against the fastest plan found, a step is {times:.3g} times as long, and a token "
            f"costs {share:.3g} times as much."
        )
    sentences += [f"The best {text}." for text in misses(best, terms)]
    looked = f"Of {choice.choices:,} ways to choose nodes (interchangeable ones count as one) and "
    looked += f"parts of single nodes, {choice.considered:,} were considered and "
    looked += f"{choice.searched:,} planned for"
    skipped = "; ".join(f"{count:,} not: {reason}" for reason, count in choice.skipped.items())
    return (*sentences, f"{looked}{'; ' if skipped else ''}{skipped}.")


def print_choice(
    choice: RentalChoice, cluster: Cluster, terms: MoneyTerms, console: Console | None = None
) -> None:
    """Prints the front, and how the plan that was chosen compares with it."""
    console = console or Console()
    console.print(plain_text(prices_text(terms.prices)))
    unused = "devices that a plan leaves idle are not rented, and cost nothing"
    if terms.prices.node:
        unused += "; a node with a price of its own is paid for as a whole"
    console.print(plain_text(f"{unused}\n"))
    console.print(front_table(choice, cluster, terms))
    console.print()
    for sentence in choice_sentences(choice, terms):
        console.print(plain_text(f"• {sentence}"))
    console.print()


def front_table(choice: RentalChoice, cluster: Cluster, terms: MoneyTerms) -> Table:
    """Returns a table of the plans that no other beats in both speed and cost per token, fastest
    first, followed by the best one if it is none of them."""
    currency = terms.prices.currency
    table = Table(box=None, pad_edge=False)
    table.add_column("rented", overflow="fold")
    for name in ("step", "tokens/s", f"{currency}/h", f"{currency}/Mtoken"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("")
    shown = [choice.found[index] for index in choice.front]
    for each in shown if choice.best in shown else [*shown, choice.best]:
        table.add_row(
            plain_text(f"{rented_text(each.plan, cluster)} ({name_ranges(each.plan.devices)})"),
            format_seconds(each.outcome.step_seconds),
            f"{each.outcome.tokens_per_second:,.0f}",
            format_amount(each.outcome.expense.per_hour),
            format_amount(1e6 * each.outcome.expense.per_token),
            _mark(each, choice, terms),
        )
    return table


def _mark(each: RentedPlan, choice: RentalChoice, terms: MoneyTerms) -> str:
    if each == choice.best:
        return "<- best"
    return "misses a limit" if misses(each.outcome, terms) else ""


@record
class FrontPoint:
    """Places one plan, in pixels, in the picture of costs and speeds."""

    x: float
    y: float
    text: str
    """What is rented, written beside the point; empty for a plan that another one beats."""
    text_y: float
    hint: str
    best: bool


def front_svg(choice: RentalChoice, cluster: Cluster, terms: MoneyTerms) -> str:
    """Draws all plans found, tokens/s across and cost of a million tokens upwards, and the front as
    a line, as a file of its own."""
    rates = [each.outcome.tokens_per_second for each in choice.found]
    costs = [1e6 * each.outcome.expense.per_token for each in choice.found]
    names = {index: _name(choice.found[index], cluster) for index in choice.front}
    right = WIDTH - 24 - _LETTER * max(map(len, names.values()))
    most_rate, most_cost = max(rates) * 1.02, max(costs) * 1.06 or 1.0

    def across(rate: float) -> float:
        return round(_LEFT + (right - _LEFT) * rate / most_rate, 1)

    def down(cost: float) -> float:
        return round(HEIGHT - _BOTTOM - (HEIGHT - _TOP - _BOTTOM) * cost / most_cost, 1)

    places = [(across(rate), down(cost)) for rate, cost in zip(rates, costs, strict=True)]
    labels = _label_heights([places[index][1] for index in choice.front])
    heights = dict(zip(choice.front, labels, strict=True))
    points = [
        FrontPoint(
            x=places[index][0],
            y=places[index][1],
            text=names.get(index, ""),
            text_y=heights.get(index, 0.0),
            hint=_hint(each),
            best=each == choice.best,
        )
        for index, each in enumerate(choice.found)
    ]
    return render(
        "front.svg",
        width=WIDTH,
        height=HEIGHT,
        left=_LEFT,
        right=right,
        bottom=HEIGHT - _BOTTOM,
        points=points,
        line=_steps([places[index] for index in choice.front]),
        across=[Tick(place=across(r), text=f"{r:,.0f}") for r in ticks(0, max(rates), 6)],
        down=[Tick(place=down(c), text=f"{c:.4g}") for c in ticks(0, max(costs), 5)],
        unit=f"{terms.prices.currency} per million tokens",
        source=prices_text(terms.prices),
    )


def _name(each: RentedPlan, cluster: Cluster) -> str:
    name = rented_text(each.plan, cluster)
    return name if len(name) <= _MOST_LETTERS else f"{name[: _MOST_LETTERS - 1]}…"


def _hint(each: RentedPlan) -> str:
    devices, step = name_ranges(each.plan.devices), format_seconds(each.outcome.step_seconds)
    return f"{devices}: {step} a step, {amounts_text(each.outcome)}"


def _steps(places: list[tuple[float, float]]) -> str:
    """Returns the points of a line that only turns at right angles, through these places: between
    two of them, whoever needs more than the slower one pays for the faster."""
    turns = [places[0]]
    for (_, height), (x, y) in pairwise(places):
        turns += [(x, height), (x, y)]
    return " ".join(f"{x},{y}" for x, y in turns)


def _label_heights(wanted: list[float]) -> list[float]:
    """Returns heights near those wanted for texts that must not overlap, given from the top of the
    picture to its bottom."""
    heights: list[float] = []
    for height in wanted:
        heights.append(max(height + 4, heights[-1] + _LINE) if heights else height + 4)
    return heights
