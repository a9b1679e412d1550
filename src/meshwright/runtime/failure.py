"""A process that fails says why, in a file of the run folder, before it ends."""

from __future__ import annotations

import json
import os
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from meshwright.errors import MeshwrightError
from meshwright.records import plain
from meshwright.runtime.run import Failure, failure_file
from meshwright.runtime.world import PeerLost


@contextmanager
def report_failure(folder: Path) -> Iterator[None]:
    """Whatever goes wrong inside is written down, and ends the process with status 1."""
    try:
        yield
    except Exception as error:
        rank = int(os.environ.get("RANK", "0"))
        text = str(error) if isinstance(error, MeshwrightError) else traceback.format_exc()
        failure = Failure(
            rank=rank, seconds=time.time(), message=text, secondary=isinstance(error, PeerLost)
        )
        failure_file(folder, rank).write_text(json.dumps(plain(failure)))
        sys.stderr.write(f"rank {rank}: {text}\n")
        sys.exit(1)
