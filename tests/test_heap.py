"""Freed memory stays with the process."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest

from flowalign.heap import keep_freed_memory

FAULTS = """
import resource, sys
import numpy as np
from flowalign.heap import keep_freed_memory
print(keep_freed_memory())
for _ in range(3):
    np.ones(2**21)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(50):
    np.ones(2**21)  # 16 MiB
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(**more: str) -> tuple[str, int]:
    """(whether memory is kept, pages that were mapped anew)"""
    mine = {name: value for name, value in os.environ.items() if "MALLOC" not in name}
    done = subprocess.run([sys.executable, "-c", FAULTS], capture_output=True, text=True, check=True, env=mine | more)
    kept, count = done.stdout.split()
    return kept, int(count)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library")
def test_blocks_of_a_batch_are_mapped_once() -> None:
    kept, count = faults()
    assert kept == "True"
    assert count < 500
    kept, count = faults(MALLOC_MMAP_THRESHOLD_="65536", NUMPY_MADVISE_HUGEPAGE="0")  # a user's own limit stays
    assert kept == "False"
    assert count > 50_000


def test_systems_with_another_allocator_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MALLOC_TRIM_THRESHOLD_", raising=False)
    monkeypatch.delenv("MALLOC_MMAP_THRESHOLD_", raising=False)
    monkeypatch.setattr("ctypes.CDLL", lambda name: object())
    assert not keep_freed_memory()
