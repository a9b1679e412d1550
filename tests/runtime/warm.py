"""Traces two models, so that the processes forked from the one that imports this start fast.

The first trace in a process takes PyTorch over a second: it looks up how each operation runs on
fake tensors, and keeps what it found. A forked process has all of that at once.
"""

import gc
import os

import torch
from cases import batch, gpt, uneven

from meshwright.model.trace import trace

# Beside a GPU a backward starts threads, and a forked process would be without them.
if not torch.cuda.device_count():
    torch.set_num_threads(1)
    for _model in (gpt, uneven):
        trace(_model().double(), batch(0), "fp64")
    _threads = len(os.listdir("/proc/self/task"))
    assert _threads == 1, f"{_threads} threads, of which a forked process has one"

# What is here stays: no collection in a forked process need go through it.
gc.collect()
gc.freeze()
