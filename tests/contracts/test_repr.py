"""What an optimizer prints."""

from __future__ import annotations

import hfopt
from tests.hfopt.tools import mlp


def test_repr_tells_the_groups() -> None:
    text = repr(hfopt.HessianFree(mlp(3, 2).parameters(), lr=0.5, weight_decay=0.1))
    assert "HessianFree" in text
    assert "lr: 0.5" in text
    assert "weight_decay: 0.1" in text
