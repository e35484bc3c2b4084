"""Recurrent models whose hidden states an optimizer can see, and deep feed-forward nets."""

from __future__ import annotations

from models.fnn import FNN
from models.gru import GRU
from models.lstm import LSTM
from models.mrnn import MRNN
from models.rnn import RNN

__all__ = ["FNN", "GRU", "LSTM", "MRNN", "RNN"]
