"""How fast a core is just now: neighbours that no one here sees slow it by tens of percent, for a
second or for minutes, which no emulated device should feel."""

from __future__ import annotations

import fcntl
import os
import time
from collections import deque
from contextlib import AbstractContextManager, suppress
from functools import cache
from pathlib import Path
from statistics import median, quantiles

import torch
import torch.nn.functional as F
from torch import Tensor

from meshwright import __version__
from meshwright.runtime.turns import turns_folder

WIDTH, LENGTH = 32, 8
ROWS, INPUTS, OUTPUTS = 128, 256, 512
PRODUCT_WEIGHT = 8.0
"""Of the product's seconds to the exercise's: layers slow down like such a sum, in which the
product is most. Chosen by layers of 1 to 16 rows, watched while the machine's speed changed."""
RECENT = 9
"""Samples of which the median tells the pace."""
REFERENCE_SECONDS = 5.2e-3
"""Of a sample on the core that shares are of, unless this machine's are slower. What a machine does
at its quickest would not do: it does it for minutes, and then for others, and the devices that play
on it could not keep up."""
USUAL = f"usual-{__version__}"
FIRST_CALLS = 3
"""In a process; they find nothing prepared."""
FIRST_SAMPLES = 40
FIRST_NAP_SECONDS = 0.01


@cache
def _gymnasium() -> tuple[Tensor, ...]:
    shapes = ((1, LENGTH, WIDTH), (WIDTH,), (WIDTH, WIDTH), (2 * WIDTH, WIDTH), (WIDTH, 2 * WIDTH))
    return tuple(torch.ones(shape, requires_grad=True) for shape in shapes)


@cache
def _factors() -> tuple[Tensor, Tensor, Tensor]:
    return torch.ones(ROWS, INPUTS), torch.ones(INPUTS, OUTPUTS), torch.empty(ROWS, OUTPUTS)


def exercise(mode: AbstractContextManager[object]) -> None:
    """What layers are made of, on next to nothing: a millisecond that brings the code of products,
    norms, attention and activations, and that of their gradients, back into the caches."""
    x, scale, square, up, down = _gymnasium()
    with mode:
        normed = F.layer_norm(x, (WIDTH,), scale) + x * torch.rsqrt(x.square().mean(-1, True) + 1)
        heads = F.linear(normed, square).view(1, LENGTH, 2, -1).transpose(1, 2)
        mixed = F.scaled_dot_product_attention(heads, heads, heads, is_causal=True)
        y = F.linear(mixed.transpose(1, 2).flatten(-2), up)
        loss = F.linear(F.gelu(y) * F.silu(y), down).log_softmax(-1).mean()
        if loss.requires_grad:
            torch.autograd.grad(loss, (scale, square, up, down))


def sample() -> float:
    """CPU seconds of a product and an exercise, always the same, weighted as layers feel them; no
    backward is part of it, for it may be within one."""
    left, right, out = _factors()
    began = time.thread_time()
    torch.mm(left, right, out=out)
    multiplied = time.thread_time()
    exercise(torch.no_grad())
    return PRODUCT_WEIGHT * (multiplied - began) + time.thread_time() - multiplied


class Pace:
    """How much longer than usual this rank's work takes, by the last samples."""

    def __init__(self, usual_seconds: float) -> None:
        self._usual = usual_seconds
        self._recent: deque[float] = deque(maxlen=RECENT)
        for _ in range(FIRST_CALLS):
            sample()

    def learn(self) -> None:
        """One more sample, which is an exercise too."""
        self._recent.append(sample())

    @property
    def slowness(self) -> float:
        """CPU seconds now for one that is usual."""
        return median(self._recent) / self._usual if self._recent else 1.0


def usual_seconds(folder: Path | None = None) -> float:
    """Of a `sample` on this machine, measured by the first who asks and the same for all after it,
    so that an emulated device is as fast in a run as it was in its profile. Only the quickest tenth
    counts: other ranks are starting beside it."""
    file = os.open((folder or turns_folder()) / USUAL, os.O_CREAT | os.O_RDWR, 0o600)
    try:
        fcntl.lockf(file, fcntl.LOCK_EX)
        known = os.read(file, 64)
        with suppress(ValueError):  # nothing yet, or cut short by a full disk
            return float(known)
        taken = max(REFERENCE_SECONDS, quantiles(_after_naps(), n=10)[0])
        os.ftruncate(file, 0)
        os.pwrite(file, repr(taken).encode(), 0)
        return taken
    finally:
        os.close(file)


def _after_naps() -> list[float]:
    """As ranks do it, that slept before and have one thread; after some that find nothing ready."""
    samples = []
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for _ in range(FIRST_CALLS + FIRST_SAMPLES):
            time.sleep(FIRST_NAP_SECONDS)
            samples.append(sample())
    finally:
        torch.set_num_threads(threads)
    return samples[FIRST_CALLS:]
