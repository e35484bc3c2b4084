"""Errors that hfopt raises besides ValueError and TypeError for bad arguments."""

from __future__ import annotations


class HfoptError(Exception):
    """Base class of the package's own errors."""


class ClosureError(HfoptError):
    """The closure could not be understood; the message says what was found and which keyword solves it."""


class NotDifferentiable(HfoptError):
    """No way of linearising the model worked; the message lists what was tried and what each attempt said."""


class CheckFailed(HfoptError):
    """A self-check (``check=True``) failed; the message says what was found and what to do about it."""
