"""The table of contracts names every file here, and no other."""

from __future__ import annotations

import re
from pathlib import Path

HERE = Path(__file__).parent


def test_the_table_is_complete() -> None:
    page = HERE.parents[1] / "docs" / "training_loops.md"
    table = page.read_text("utf-8").partition("## Contracts")[2]
    named = re.findall(r"\| `(test_\w+\.py)` \|", table)
    assert len(named) == len(set(named))
    assert set(named) == {path.name for path in HERE.glob("test_*.py")} - {Path(__file__).name}
