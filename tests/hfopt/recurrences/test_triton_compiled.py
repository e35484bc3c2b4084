"""The Triton kernels compile for CUDA: the compiler takes less of Python than the interpreter does."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

ROOT = Path(__file__).resolve().parents[3]


@pytest.mark.slow
@pytest.mark.skipif(platform.system() != "Linux", reason="Triton's compiler is there for Linux alone")
def test_every_kernel_compiles(tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "tests.hfopt.recurrences.compile_kernels"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    lines = [line.split() for line in done.stdout.splitlines()]
    assert sum(words[1] == "section_kernel" for words in lines) > 6
    assert len({words[0] for words in lines}) == 6
    assert sum(words[1] != "section_kernel" for words in lines) == 4 * 3 * 3
    # What every chip since 2018 lets a program have.
    assert all(int(shared) <= 64 * 1024 for *_, shared in lines)
