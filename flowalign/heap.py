"""Memory that is freed and asked for again in every batch: kept by the process, not handed back to the system in between."""

from __future__ import annotations

import ctypes
import os

TRIM, MMAP = -1, -3
"""Names of glibc's M_TRIM_THRESHOLD and M_MMAP_THRESHOLD, see mallopt(3)."""
KEPT, LARGEST = 512 * 2**20, 32 * 2**20
"""Bytes that are free and kept at most, and of a block that is kept; 32 MiB is the most that glibc allows."""


def keep_freed_memory() -> bool:
    """Let glibc's allocator keep what is freed; whether it does now.

    By default every activation of some megabytes is mapped anew and its pages are zeroed one fault at a time, which takes a
    tenth of the time of a small tower on a CPU. Up to `KEPT` bytes that are free then stay with the process. It concerns all of
    the process, so commands call it and the library does not. Nothing is done where the user's environment sets limits of its
    own, and on systems with another C library.
    """
    if {"MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "GLIBC_TUNABLES"} & set(os.environ):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError, TypeError):
        return False
    return bool(mallopt(MMAP, LARGEST) and mallopt(TRIM, KEPT))
