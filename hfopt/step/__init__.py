"""One step of the optimizer: its objective, its candidates, its record, and its self-checks."""

from hfopt.step.stats import StepStats

__all__ = ["StepStats"]
