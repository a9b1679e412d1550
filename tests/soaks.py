"""How many cases a long test tries: a tenth, always the same, and all of them under `make soak`."""

import os


def tenth(whole: int) -> int:
    """Returns a tenth of a number of cases, or all of it if the environment has WHOLE=1."""
    return whole if os.environ.get("WHOLE") == "1" else whole // 10
