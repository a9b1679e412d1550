"""Reads files of hourly prices (TOML), and limits as they are written on the command line."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import suppress
from datetime import date
from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, BeforeValidator, Field

from meshwright.errors import MoneyError, OptionError, Problem
from meshwright.money.spec import HourlyPrices, Limit, Measure
from meshwright.records import Format, Line, Name, check_format, parse, read, record
from meshwright.units import parse_quantity, parse_seconds

_CURRENCY = re.compile("[A-Z]{3}")
_MONEY = re.compile(r"([A-Z]{3})/(h|step|token|Mtoken)")
_MEASURES: dict[str, tuple[Measure, float]] = {
    "h": ("hour", 1.0),
    "step": ("step", 1.0),
    "token": ("token", 1.0),
    "Mtoken": ("token", 1e6),
}
_PRICE = "3.20 USD/h"
_LIMITS = "'30 USD/h', '0.05 USD/step', '0.40 USD/Mtoken', '2 s' or '5000 tokens/s'"
MOST = 1e30
"""Largest amount that is taken for a price or a limit."""


def _currency(text: str) -> str:
    if not _CURRENCY.fullmatch(text):
        raise ValueError("a currency by its three letters, like 'USD'")
    return text


def _day(text: str) -> str:
    with suppress(ValueError):
        if date.fromisoformat(text).isoformat() == text:
            return text
    raise ValueError("a day like '2026-11-28'")


def _named(text: str) -> str:
    if not text.strip():
        raise ValueError("where the prices are from, like 'list prices of our provider'")
    return text


def _price(value: object) -> tuple[float, str]:
    """Returns the amount and the currency of a price."""
    if not isinstance(value, str):
        raise ValueError(f"an hourly price with its unit, in quotes, like {_PRICE!r}")
    if value.lstrip().startswith("-"):
        raise ValueError(f"an hourly price of at least 0, like {_PRICE!r}")
    amount, unit = parse_quantity(value, _PRICE)
    match = _MONEY.fullmatch(unit)
    if match is None or match[2] != "h":
        raise ValueError(f"an hourly price like {_PRICE!r}: {unit!r} in {value!r} is no such unit")
    if amount > MOST:
        raise ValueError(f"an hourly price of at most {MOST:g}")
    return amount, match[1]


PriceText = Annotated[tuple[float, str], BeforeValidator(_price)]


@record
class PriceEntries:
    """Holds a file of hourly prices as it is written."""

    format: Format
    currency: Annotated[Name, AfterValidator(_currency)]
    """Currency of all prices of the file, by its three letters."""
    date: Annotated[Name, AfterValidator(_day)]
    """Day for which the prices hold."""
    source: Annotated[Line, AfterValidator(_named), Field(min_length=1)]
    """Source of the prices: a contract, or the list of a provider and a region."""
    device: dict[Name, PriceText] | None = None
    """Price of one device for an hour, by device type. A device that a plan leaves idle is not
    paid for."""
    node: dict[Name, PriceText] | None = None
    """Price of a whole node for an hour, by its name, or by that of all nodes of a `count`. It is
    paid in full as soon as the plan uses one device of the node, and its devices cost nothing
    besides."""


def load_prices(path: Path) -> HourlyPrices:
    """Reads the hourly prices of a file. Raises MoneyError with one Problem for each mistake."""
    data = read(path, error=MoneyError)
    check_format(data, source=str(path), error=MoneyError)
    entries = parse(data, PriceEntries, source=str(path), error=MoneyError)
    MoneyError.check(_currency_problems(entries, str(path)))
    return HourlyPrices(
        currency=entries.currency,
        date=entries.date,
        source=entries.source,
        file=str(path),
        device={name: amount for name, (amount, _) in (entries.device or {}).items()},
        node={name: amount for name, (amount, _) in (entries.node or {}).items()},
    )


def _currency_problems(entries: PriceEntries, source: str) -> Iterator[Problem]:
    for table, prices in (("device", entries.device), ("node", entries.node)):
        for name, (amount, currency) in (prices or {}).items():
            if currency != entries.currency:
                mend = "convert it, and say in `source` at which rate"
                found, wanted = f"{amount:g} {currency}/h", f"{entries.currency}, as for the file"
                yield Problem(source, f"{table}.{name}", found, wanted, mend)


def parse_limit(text: str, currency: str) -> Limit:
    """Parses a limit: at most `"30 USD/h"`, `"0.05 USD/step"`, `"0.40 USD/Mtoken"` or `"2 s"` a
    step, or at least `"5000 tokens/s"`. Raises OptionError, also for another currency than that of
    the prices."""
    try:
        measure, bound = _limit(text, currency)
    except ValueError as failure:
        raise OptionError(Problem("--limit", "", repr(text), str(failure))) from None
    return Limit(text=text.strip(), measure=measure, bound=bound)


def _limit(text: str, currency: str) -> tuple[Measure, float]:
    if text.lstrip().startswith("-"):
        raise ValueError("a limit above 0")
    amount, unit = parse_quantity(text, "30 USD/h")
    measure: Measure = "rate"
    if match := _MONEY.fullmatch(unit):
        if match[1] != currency:
            raise ValueError(f"an amount in {currency}, the currency of the prices")
        measure, parts = _MEASURES[match[2]]
        amount /= parts
    elif unit != "tokens/s":
        try:
            measure, amount = "seconds", parse_seconds(text)
        except ValueError:
            raise ValueError(f"a limit with its unit, like {_LIMITS}") from None
    if not 0 < amount <= MOST:
        raise ValueError("a limit above 0")
    return measure, amount
