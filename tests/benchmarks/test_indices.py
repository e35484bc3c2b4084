"""The benchmark of indices: both forms compute the same, and the table has every row."""

from __future__ import annotations

import pytest
import torch

from benchmarks import indices


def test_both_forms_give_the_same_numbers() -> None:
    torch.manual_seed(0)
    for works in (indices.rows(5, 8, 6, 3), indices.network(5, 8, 6, 3)):
        for index, vector in works.values():
            for x, y in zip(index(), vector(), strict=True):
                torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-6)


def test_the_table(capsys: pytest.CaptureFixture[str]) -> None:
    table = indices.main(["--symbols", "5", "--hidden", "4", "--steps", "3", "--batch", "2", "--rounds", "3"])
    names = ["rows, forward", "rows, gradient", "rows, product", "network, gradient", "network, product"]
    assert [row[0] for row in table] == names
    assert all(time > 0 for row in table for time in row[1:])
    assert capsys.readouterr().out.count("\n") == 7
