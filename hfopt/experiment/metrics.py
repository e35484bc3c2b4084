"""How a problem's error is called and written: the share of wrong cases, or a measured error per case."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Measure:
    """The error measure of a run: `name` is what is measured, None for the share of wrong cases."""

    name: str | None = None

    @classmethod
    def of(cls, configuration: Mapping[str, Any]) -> Measure:
        """That of a run with this configuration: of its problem's `error_name`."""
        return cls(configuration["problem"].get("error_name"))

    @property
    def title(self) -> str:
        """For columns and axes."""
        return "wrong %" if self.name is None else self.name

    @property
    def factor(self) -> float:
        """What a value is multiplied by where `title` stands over it."""
        return 100.0 if self.name is None else 1.0

    def number(self, value: float) -> str:
        """A value below `title`; empty if it is absent."""
        if math.isnan(value):
            return ""
        return f"{100 * value:.2f}" if self.name is None else f"{value:.4g}"

    def quantity(self, value: float, digits: int = 2) -> str:
        """A value by itself: with its unit, if it has one."""
        return f"{100 * value:.{digits}f}%" if self.name is None else f"{value:.{digits + 2}g}"

    def sentence(self, value: float) -> str:
        """What the last test said."""
        if self.name is None:
            return f"{self.quantity(value)} of the test cases are wrong"
        return f"{self.name} {self.quantity(value)} per test case"

    def bound(self, threshold: float) -> str:
        """What a run has to get below."""
        return f"{100 * threshold:g}% wrong" if self.name is None else f"{self.name} {threshold:g}"
