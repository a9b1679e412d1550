"""Runs the command line as `python -m meshwright` or `meshwright`."""

from __future__ import annotations

import signal


def main() -> None:
    """Runs the command line. Ctrl-C during start-up ends the process silently."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    from meshwright import cli

    signal.signal(signal.SIGINT, signal.default_int_handler)
    cli.main()


if __name__ == "__main__":
    main()
