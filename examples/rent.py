"""Which devices to rent for a job, by your own prices: python examples/rent.py"""

from pathlib import Path

import meshwright as mw
from meshwright.money.choose import choose_rental
from meshwright.money.files import load_prices, parse_limit
from meshwright.money.outcomes import cluster_prices
from meshwright.money.spec import MoneyTerms
from meshwright.report.expenses import print_choice

HERE = Path(__file__).parent
JOB = mw.Job(global_batch=32, sequence=1024, precision="fp16")

cluster = mw.load_cluster(HERE / "clusters" / "a100-v100-t4.toml")
model = mw.load_model("gpt2-medium", JOB.sequence, JOB.precision)
prices = load_prices(HERE / "prices.toml")
here = cluster_prices(prices, cluster)  # refuses a device type without a price

for title, objective, limits in (
    ("the least cost of a token", "cost", ()),
    ("the least time for at most 8 USD an hour", "time", ("8 USD/h",)),
    ("the least cost with at least 50,000 tokens a second", "cost", ("50000 tokens/s",)),
):
    wanted = tuple(parse_limit(text, prices.currency) for text in limits)
    terms = MoneyTerms(prices=prices, objective=objective, limits=wanted)
    print(f"== {title}")
    print_choice(choose_rental(model, cluster, JOB, None, here, terms), cluster, terms)
