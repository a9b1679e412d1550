"""`python -m meshwright`, and the command `meshwright`."""

from __future__ import annotations

import signal


def main() -> None:
    """Run the command line. While it is being loaded, Ctrl-C ends the process without a word."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    from meshwright import cli

    signal.signal(signal.SIGINT, signal.default_int_handler)
    cli.main()


if __name__ == "__main__":
    main()
