"""Files of hourly prices and limits: what they mean, and what is refused with file, field, mend."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prices import priced

from meshwright.cluster.edit import with_added, with_removed
from meshwright.errors import LimitError, MoneyError, OptionError
from meshwright.money.files import load_prices, parse_limit
from meshwright.money.outcomes import (
    check_limits,
    cluster_prices,
    dominates,
    excess,
    format_amount,
    front,
    hourly_price,
    idle_devices,
    merit,
    misses,
    outcome,
)
from meshwright.money.spec import Limit, MoneyTerms, Outcome
from meshwright.workflows.rent import open_terms
from worlds import cluster, job

HEAD = 'format = 1\ncurrency = "USD"\ndate = "2026-11-28"\nsource = "our contract"\n'
PAIR = cluster(("fast", "fast"), ("slow",), ("slow",), names=("p-0", "q-0", "q-1"))


def written(folder: Path, text: str, head: str = HEAD) -> Path:
    path = folder / "prices.toml"
    path.write_text(head + text)
    return path


def test_prices_are_read_with_their_currency_their_day_and_their_source(tmp_path):
    found = load_prices(
        written(tmp_path, '[device]\nT4 = "0.35 USD/h"\nown = "0 USD/h"\n[node]\nn = "4USD/h"\n')
    )
    assert (found.currency, found.date, found.source) == ("USD", "2026-11-28", "our contract")
    assert found.device == {"T4": 0.35, "own": 0.0}
    assert found.node == {"n": 4.0}


BAD = {
    "negative": ('T4 = "-1 USD/h"', "device.T4", "at least 0"),
    "empty": ('T4 = ""', "device.T4", "3.20 USD/h"),
    "not a number": ('T4 = "nan USD/h"', "device.T4", "3.20 USD/h"),
    "a bare nan": ("T4 = nan", "device.T4", "finite"),
    "infinite": ('T4 = "1e999 USD/h"', "device.T4", "at most"),
    "without a unit": ("T4 = 0.35", "device.T4", "with its unit, in quotes"),
    "without a unit, in quotes": ('T4 = "0.35"', "device.T4", "no such unit"),
    "per day": ('T4 = "8 USD/day"', "device.T4", "no such unit"),
    "per step": ('T4 = "8 USD/step"', "device.T4", "no such unit"),
    "by a sign": ('T4 = "$0.35/h"', "device.T4", "3.20 USD/h"),
    "in two currencies": ('T4 = "0.35 USD/h"\nV100 = "1 EUR/h"', "device.V100", "USD"),
    "a table": ("T4 = {}", "device.T4", "with its unit"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_price_at_fault_is_refused_with_its_field(tmp_path, name):
    line, *words = BAD[name]
    with pytest.raises(MoneyError) as caught:
        load_prices(written(tmp_path, f"[device]\n{line}\n"))
    for word in ("prices.toml", *words):
        assert word in str(caught.value)


@pytest.mark.parametrize(
    ("head", "words"),
    [
        (HEAD.replace('"USD"', '"dollars"'), ("currency", "three letters")),
        (HEAD.replace('currency = "USD"\n', ""), ("currency", "required")),
        (HEAD.replace("2026-11-28", "28.11.2026"), ("date", "2026-11-28")),
        (HEAD.replace("2026-11-28", ""), ("date", "2026-11-28")),
        (HEAD.replace("2026-11-28", "20261128"), ("date", "2026-11-28")),
        (HEAD.replace("2026-11-28", "2026-02-30"), ("date", "2026-11-28")),
        (HEAD.replace('"2026-11-28"', "2026-11-28"), ("date", "text in quotes")),
        (HEAD.replace("our contract", " "), ("source", "where the prices are from")),
        (HEAD.replace("format = 1", "format = 2"), ("format", "newer version")),
        (HEAD.replace("format = 1", ""), ("format",)),
        (HEAD + "price = 3\n", ("price", "unknown field")),
    ],
)
def test_a_file_says_currency_day_and_source(tmp_path, head, words):
    with pytest.raises(MoneyError) as caught:
        load_prices(written(tmp_path, "", head))
    for word in ("prices.toml", *words):
        assert word in str(caught.value)


def test_every_mistake_of_a_file_is_told_at_once(tmp_path):
    with pytest.raises(MoneyError) as caught:
        load_prices(written(tmp_path, '[device]\nT4 = "-1 USD/h"\nA = 3\n[node]\nb = "x"\n'))
    assert len(caught.value.problems) == 3


def test_a_device_costs_its_own_price_or_that_of_its_whole_node():
    here = cluster_prices(priced({"p-0": 5.0}, slow=0.5), PAIR)
    assert hourly_price(here, ["p-0:0"]) == 5.0
    assert hourly_price(here, ["p-0:0", "p-0:1", "q-0:0"]) == 5.5
    assert hourly_price(here, []) == 0.0


def test_the_price_of_one_node_stands_above_that_of_its_kind():
    for prices in (priced({"q": 2.0, "q-1": 1.0}, fast=1), priced({"q-1": 1.0, "q": 2.0}, fast=1)):
        here = cluster_prices(prices, PAIR)
        assert here.nodes == {"q-0": 2.0, "q-1": 1.0}


@pytest.mark.parametrize(
    ("prices", "words"),
    [
        (priced(fast=1.0), ("device.slow", "no price", "q-0", "3.20 USD/h")),
        (priced(fast=1.0, slow=1.0, T44=1.0), ("device.T44", "'T44'", "Did you mean 'T4'")),
        (priced({"q-3": 1.0}, fast=1.0, slow=1.0), ("node.q-3", "'q-3'", "Did you mean 'q-")),
    ],
)
def test_missing_prices_and_unknown_names_are_told(prices, words):
    with pytest.raises(MoneyError) as caught:
        cluster_prices(prices, PAIR)
    for word in ("prices.toml", *words):
        assert word in str(caught.value)


def test_a_price_list_may_serve_several_clusters_and_edits():
    cluster_prices(priced(fast=1.0, slow=1.0, H100=4.0), PAIR)
    fewer = with_removed(PAIR, ["q-1"]).cluster
    more = with_added(PAIR, "1 x p-0").cluster
    prices = priced({"q-1": 1.0}, fast=1.0, slow=1.0)
    assert cluster_prices(prices, fewer, PAIR).nodes == {}
    with pytest.raises(MoneyError):
        cluster_prices(prices, fewer)
    named = priced({"new-0": 7.0}, fast=1.0, slow=1.0)
    assert cluster_prices(named, more).nodes == {"new-0": 7.0}
    assert cluster_prices(named, PAIR, more).nodes == {}


@pytest.mark.parametrize(
    ("text", "measure", "bound"),
    [
        ("30 USD/h", "hour", 30.0),
        (" 0.05USD/step ", "step", 0.05),
        ("0.40 USD/Mtoken", "token", 0.4e-6),
        ("4e-7 USD/token", "token", 4e-7),
        ("2 s", "seconds", 2.0),
        ("500ms", "seconds", 0.5),
        ("5000 tokens/s", "rate", 5000.0),
    ],
)
def test_limits_are_read_by_their_units(text, measure, bound):
    found = parse_limit(text, "USD")
    assert found.measure == measure
    assert found.bound == pytest.approx(bound, rel=1e-12)


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("30 EUR/h", "USD, the currency of the prices"),
        ("0 USD/h", "above 0"),
        ("-3 USD/h", "above 0"),
        ("0 s", "above 0"),
        ("nan s", "a quantity like"),
        ("", "a quantity like"),
        ("30", "with its unit"),
        ("30 USD", "with its unit"),
        ("30 tokens", "with its unit"),
        ("1e999 USD/h", "above 0"),
    ],
)
def test_limits_at_fault_are_refused(text, word):
    with pytest.raises(OptionError, match="--limit") as caught:
        parse_limit(text, "USD")
    assert word in str(caught.value)


def test_objective_limits_and_front_need_prices():
    assert open_terms(None, "time", ()) is None
    with pytest.raises(OptionError) as caught:
        open_terms(None, "cost", ("2 s", "30 USD/h"), front=True)
    assert [each.source for each in caught.value.problems] == [
        "--objective",
        "--limit",
        "--limit",
        "--front",
    ]
    assert all("--prices" in each.mend for each in caught.value.problems)


def of(per_hour: float, seconds: float) -> Outcome:
    here = cluster_prices(priced(fast=1.0, slow=1.0), PAIR)
    return outcome(here, job(8), per_hour, seconds)


def test_a_step_costs_its_share_of_the_hour():
    found = of(36.0, 2.0)
    assert found.expense.per_step == pytest.approx(0.02)
    assert found.expense.per_token == pytest.approx(0.02 / (8 * 16))
    assert found.tokens_per_second == 64.0


def test_how_far_a_limit_is_missed():
    found = of(36.0, 2.0)
    for text, share in (
        ("36 USD/h", 0.0),
        ("18 USD/h", 1.0),
        ("0.04 USD/step", -0.5),
        ("1 s", 1.0),
        ("128 tokens/s", 1.0),
        ("32 tokens/s", -0.5),
    ):
        assert excess(found, parse_limit(text, "USD")) == pytest.approx(share)


def test_the_nearest_plan_is_named_with_what_it_misses():
    terms = MoneyTerms(
        prices=priced(),
        limits=tuple(parse_limit(text, "USD") for text in ("18 USD/h", "3 s", "128 tokens/s")),
    )
    with pytest.raises(LimitError) as caught:
        check_limits(of(36.0, 2.0), terms, "for 2 x fast")
    one, other = caught.value.problems
    assert one.wanted == "at most 18 USD/h"
    assert "36 USD/h, 100.0% too much" in one.found
    assert "the nearest, for 2 x fast" in one.found
    assert "64 tokens/s, 50.0% too few" in other.found
    check_limits(of(18.0, 1.0), terms, "")
    assert misses(of(18.0, 1.0), terms) == ()
    assert len(misses(of(36.0, 2.0), terms)) == 2


def test_without_limits_nothing_is_missed():
    assert merit(of(36.0, 2.0), MoneyTerms(prices=priced()))[:2] == (0.0, 2.0)


outcomes = st.builds(of, st.floats(0.1, 10), st.floats(0.1, 10))
limits = st.builds(
    Limit,
    text=st.just("a limit"),
    measure=st.sampled_from(["hour", "step", "token", "seconds", "rate"]),
    bound=st.floats(1e-6, 1e3),
)
wanted = st.builds(
    MoneyTerms,
    prices=st.just(priced()),
    objective=st.sampled_from(["time", "cost"]),
    limits=st.lists(limits, max_size=2).map(tuple),
)


@given(st.lists(outcomes, min_size=1, max_size=12))
def test_the_front_is_what_nothing_dominates_and_runs_one_way(found):
    kept = [found[index] for index in front(found)]
    for one in kept:
        assert not any(dominates(other, one) and other != one for other in found)
    for other in found:
        assert any(dominates(one, other) for one in kept)
    rates = [each.tokens_per_second for each in kept]
    costs = [each.expense.per_token for each in kept]
    assert rates == sorted(set(rates), reverse=True)
    assert costs == sorted(set(costs), reverse=True)


@given(outcomes, st.floats(1, 3), st.floats(1, 3), wanted)
def test_whatever_is_dearer_and_slower_serves_no_terms_better(found, dearer, slower, terms):
    worse = of(found.expense.per_hour * dearer, found.step_seconds * slower)
    assert merit(found, terms) <= merit(worse, terms)


@given(outcomes, outcomes, wanted)
def test_a_kept_limit_comes_before_the_objective(one, other, terms):
    missed = [max((excess(each, x) for x in terms.limits), default=0.0) for each in (one, other)]
    if missed[0] <= 0 < missed[1]:
        assert merit(one, terms) < merit(other, terms)


def test_amounts_are_told_with_four_digits():
    told = [format_amount(each) for each in (0.0, 1.23456e-5, 3.2, 999.96, 1000.0, 12345.6)]
    assert told == ["0", "1.235e-05", "3.2", "1000", "1,000", "12,346"]


def test_idle_devices_are_free_unless_their_node_is_paid_whole():
    here = cluster_prices(priced({"p-0": 5.0}, slow=0.5), PAIR)
    assert idle_devices(here, ["q-0:0"]) == (3, 0)
    assert idle_devices(here, ["p-0:0", "q-0:0"]) == (1, 1)
    assert idle_devices(here, ["p-0:0", "p-0:1", "q-0:0", "q-1:0"]) == (0, 0)
