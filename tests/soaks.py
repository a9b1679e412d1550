"""How many cases a test tries: fewer in a first check, and a tenth of a long test but for
`make soak`."""

import os

from hypothesis import settings


def portion(whole: int) -> int:
    """Returns the number of cases, or three tenths of it under `make check`."""
    return -(-whole * settings.default.max_examples // 100)


def tenth(whole: int) -> int:
    """Returns a tenth of a number of cases, or all of it if the environment has WHOLE=1."""
    return whole if os.environ.get("WHOLE") == "1" else whole // 10
