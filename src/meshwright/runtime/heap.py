"""Memory that stays with the process."""

from __future__ import annotations

import ctypes
from functools import cache

KEPT_BYTES = 128 * 2**20
TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3
"""Of mallopt(3)."""


@cache
def keep_memory() -> None:
    """From here on freed memory is not given back to the system, and the first of it is there.

    A page that the system hands out takes up to ten microseconds, which is none of an emulated
    device's time; stretched by 1 / share it is a multiple of what the layer takes that asked.
    Does nothing where the C library has no such settings.
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
