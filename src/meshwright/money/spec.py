"""Defines hourly prices, what a plan costs by them, and what a user wants of both.

Amounts are in the currency of the prices. To tell them from the seconds that other rooms call
prices, a price of this room is always an hourly price.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from meshwright.records import Line, Name, PositiveSeconds, Ratio, record

Amount = Ratio
"""An amount of money, in the currency of the prices that it comes from."""

Objective = Literal["time", "cost"]
"""What is to be least: the seconds of a step, or the cost of a token."""

Measure = Literal["hour", "step", "token", "seconds", "rate"]
"""What a limit limits: the cost of an hour, of a step or of a token, the seconds of a step, or the
tokens per second, which must be at least the bound."""


@record
class HourlyPrices:
    """Says what an hour of each device type, or of a whole node, costs."""

    currency: Name
    date: Name
    """Day for which the prices hold, `YYYY-MM-DD`."""
    source: Line
    """Source of the prices, as the user names it."""
    file: Line = ""
    device: dict[Name, Amount]
    """Amount per hour of one device, by device type."""
    node: dict[Name, Amount]
    """Amount per hour of a whole node, by its name or by the name of all nodes of a `count`."""


@record
class Expense:
    """Says what a plan costs, in `currency`, for the devices that it uses."""

    currency: Name
    per_hour: Amount
    per_step: Amount
    per_token: Amount


@record
class Outcome:
    """Says what a plan achieves, and what it costs."""

    step_seconds: PositiveSeconds
    tokens_per_second: Ratio
    expense: Expense


@record
class Limit:
    """States a bound that an outcome must keep."""

    text: Line
    """The limit as the user wrote it."""
    measure: Measure
    bound: Annotated[float, Field(gt=0, le=1e30)]
    """An amount of money, seconds, or tokens per second."""


@record
class MoneyTerms:
    """Says what a user wants: which hourly prices hold, what shall be least, and which limits must
    be kept."""

    prices: HourlyPrices
    objective: Objective = "time"
    limits: tuple[Limit, ...] = ()

    @property
    def choose(self) -> bool:
        """True if another plan than the fastest one may be wanted."""
        return self.objective != "time" or bool(self.limits)
