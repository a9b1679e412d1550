"""Keeps freed memory in the process, so that emulated devices do not pay for page faults."""

from __future__ import annotations

import ctypes
from functools import cache

KEPT_BYTES = 128 * 2**20
"""Size of the memory that is touched in advance."""
TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3
"""Numbers of two options of mallopt(3)."""


@cache
def keep_freed_memory() -> None:
    """Makes malloc keep freed memory from now on, and touches KEPT_BYTES of it once.

    A page fault takes up to ten microseconds of CPU time that is no work of the emulated device.
    Stretched by 1 / share like compute, the page faults of a layer would take several times as long
    as the layer. Does nothing if the C library has no mallopt.
    """
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "mallopt"):
        return
    libc.mallopt(TRIM_THRESHOLD, 2**31 - 1)
    libc.mallopt(MMAP_THRESHOLD, 2**30)
    libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
    libc.free.restype, libc.free.argtypes = None, [ctypes.c_void_p]
    block = libc.malloc(KEPT_BYTES)
    if block:
        ctypes.memset(block, 0, KEPT_BYTES)
        libc.free(block)
