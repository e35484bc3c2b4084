"""Recurrent models whose hidden states an optimizer can see."""

from __future__ import annotations

from models.rnn import RNN

__all__ = ["RNN"]
