"""Large blocks are reused once the program has asked for it."""

from __future__ import annotations

import subprocess
import sys

import pytest

PROGRAM = """
import resource, torch
from hfopt.experiment.memory import keep_freed_memory

def faults(rounds):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(rounds):
        torch.ones(16 * 2**20)
    return (resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) / rounds

plain = faults(4)
assert keep_freed_memory()
faults(30)  # until a block of the heap is found that nothing small has been put into meanwhile
print(plain, faults(4))
"""


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's allocator only")
def test_large_blocks_stay_mapped() -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True)
    plain, kept = map(float, done.stdout.split())
    assert plain > 20  # 64 MiB, in huge pages at best
    assert kept < plain / 10
