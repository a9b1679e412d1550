"""Measures how fast a core is at the moment, so that emulated devices keep their speed.

Other programs, and other guests of the same host, slow a core by tens of percent for seconds or
minutes.
"""

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
from meshwright.emulation.compute_lock import turns_folder

WIDTH, LENGTH = 32, 8
"""Tensor sizes of the calibration kernel."""
ROWS, INPUTS, OUTPUTS = 128, 256, 512
"""Sizes of the matrix product in a sample: [ROWS, INPUTS] by [INPUTS, OUTPUTS]."""
PRODUCT_WEIGHT = 8.0
"""Weight of the matrix product's seconds relative to the calibration kernel's. Layers slow down
like such a weighted sum, which the product dominates; fitted to layers of 1 to 16 rows while the
machine's speed changed."""
RECENT_SAMPLES = 9
"""Number of latest samples, whose median is the present speed."""
REFERENCE_SECONDS = 5.2e-3
"""CPU seconds of a sample on the reference core; the share of an emulated device is a share of this
core. A machine on which samples usually take longer uses its own usual time instead. (Its fastest
time would not do: a machine that runs faster for some minutes becomes slower again, and its
emulated devices could not keep up.)"""
USUAL_SECONDS_FILE = f"usual-{__version__}"
"""Name of the file with this machine's usual seconds."""
FIRST_CALLS = 3
"""Samples at the start of a process that do not count: caches are cold and nothing has been set
up."""
FIRST_SAMPLES = 40
"""Samples from which the usual seconds are found."""
FIRST_NAP_SECONDS = 0.01
"""Sleep before each of those samples."""


@cache
def _kernel_tensors() -> tuple[Tensor, ...]:
    """Returns the calibration kernel's tensors: input, norm scale, and three weights."""
    shapes = ((1, LENGTH, WIDTH), (WIDTH,), (WIDTH, WIDTH), (2 * WIDTH, WIDTH), (WIDTH, 2 * WIDTH))
    return tuple(torch.ones(shape, requires_grad=True) for shape in shapes)


@cache
def _factors() -> tuple[Tensor, Tensor, Tensor]:
    """Returns the two matrices of a sample's product, and room for the result."""
    return torch.ones(ROWS, INPUTS), torch.ones(INPUTS, OUTPUTS), torch.empty(ROWS, OUTPUTS)


def run_calibration_kernel(mode: AbstractContextManager[object]) -> None:
    """Runs the calibration kernel: a millisecond of everything that layers consist of (products,
    norms, attention, activations and their gradients) on tiny tensors, which brings its code back
    into the caches."""
    x, scale, square, up, down = _kernel_tensors()
    with mode:
        normed = F.layer_norm(x, (WIDTH,), scale) + x * torch.rsqrt(x.square().mean(-1, True) + 1)
        heads = F.linear(normed, square).view(1, LENGTH, 2, -1).transpose(1, 2)
        mixed = F.scaled_dot_product_attention(heads, heads, heads, is_causal=True)
        y = F.linear(mixed.transpose(1, 2).flatten(-2), up)
        loss = F.linear(F.gelu(y) * F.silu(y), down).log_softmax(-1).mean()
        if loss.requires_grad:
            torch.autograd.grad(loss, (scale, square, up, down))


def sample_seconds() -> float:
    """Returns the CPU seconds of a fixed amount of work: a matrix product and the calibration
    kernel, weighted as layers feel them. It runs no backward, since it may be called within one."""
    left, right, out = _factors()
    began = time.thread_time()
    torch.mm(left, right, out=out)
    multiplied = time.thread_time()
    run_calibration_kernel(torch.no_grad())
    return PRODUCT_WEIGHT * (multiplied - began) + time.thread_time() - multiplied


class CoreSpeed:
    """Tracks how much slower than usual this rank's core is, from its latest samples."""

    def __init__(self, usual_seconds: float) -> None:
        self._usual = usual_seconds
        self._recent: deque[float] = deque(maxlen=RECENT_SAMPLES)
        for _ in range(FIRST_CALLS):
            sample_seconds()

    def sample(self) -> None:
        """Takes one more sample, which also warms the caches."""
        self._recent.append(sample_seconds())

    @property
    def slowness(self) -> float:
        """Returns the CPU seconds that work takes at present if it usually takes one second."""
        return median(self._recent) / self._usual if self._recent else 1.0


def usual_seconds(folder: Path | None = None) -> float:
    """Returns the usual CPU seconds of a `sample_seconds` on this machine: measured by the first
    process that asks, kept in a file, and the same for all later ones, so that an emulated device
    is as fast in a run as it was in its profile. The first decile of the samples is taken, since
    other ranks are starting at the same time."""
    file = os.open((folder or turns_folder()) / USUAL_SECONDS_FILE, os.O_CREAT | os.O_RDWR, 0o600)
    try:
        fcntl.lockf(file, fcntl.LOCK_EX)
        known = os.read(file, 64)
        with suppress(ValueError):  # empty, or cut short by a full disk
            return float(known)
        taken = max(REFERENCE_SECONDS, quantiles(_after_naps(), n=10)[0])
        os.ftruncate(file, 0)
        os.pwrite(file, repr(taken).encode(), 0)
        return taken
    finally:
        os.close(file)


def _after_naps() -> list[float]:
    """Takes samples as ranks do, each after a sleep and with one thread, and leaves out the first
    ones."""
    samples = []
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for _ in range(FIRST_CALLS + FIRST_SAMPLES):
            time.sleep(FIRST_NAP_SECONDS)
            samples.append(sample_seconds())
    finally:
        torch.set_num_threads(threads)
    return samples[FIRST_CALLS:]
