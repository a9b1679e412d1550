"""Hourly prices of the small clusters of these tests."""

from __future__ import annotations

from dataclasses import replace

from meshwright.money.spec import HourlyPrices


def priced(node: dict[str, float] | None = None, **device: float) -> HourlyPrices:
    """Prices in USD by device type, and by node."""
    return HourlyPrices(
        currency="USD",
        date="2026-11-28",
        source="a test",
        file="prices.toml",
        device=device,
        node=node or {},
    )


def scaled(prices: HourlyPrices, factor: float) -> HourlyPrices:
    """The prices times a factor."""
    return replace(
        prices,
        device={name: amount * factor for name, amount in prices.device.items()},
        node={name: amount * factor for name, amount in prices.node.items()},
    )
