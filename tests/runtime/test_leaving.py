"""A process that has left its run has no thread of it any more: one that is still there when the
interpreter ends can abort the process."""

from __future__ import annotations

import subprocess
import sys

SCRIPT = """\
import os
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from meshwright.runtime.rendezvous import join_run

os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="0", WORLD_SIZE="1", LOCAL_WORLD_SIZE="1")
join_run(0, 1, torch.device("cpu"), timedelta(seconds=60))
weight = torch.nn.Parameter(torch.ones(1))
optimizer = torch.optim.AdamW([weight])
weight.sum().backward()
dist.all_reduce(weight.grad)
optimizer.step()



def group_threads():
    threads = Path("/proc/self/task").iterdir()
    return sum("gloo" in (each / "comm").read_text() for each in threads)


print(group_threads())
dist.destroy_process_group()
print(group_threads())
"""


def test_no_thread_of_a_group_outlives_it() -> None:
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    before, after = map(int, done.stdout.split())
    assert before > 0
    assert after == 0
