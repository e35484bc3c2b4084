"""Recurrent models whose hidden states an optimizer can see, and deep feed-forward nets."""

from __future__ import annotations

from models.cells import GRU2014, RHN, UGRNN, IntersectionRNN
from models.fnn import FNN
from models.gru import GRU
from models.language import LanguageModel
from models.long_memory import constrain, long_memory, units_of_equal_size
from models.lstm import LSTM
from models.mrnn import MRNN
from models.piano_roll import PianoRoll
from models.rnn import RNN
from models.rnn_nade import RNNNADE
from models.sizes import parameter_count, units_for
from models.stacked import Stack
from models.tagger import Tagger

__all__ = [
    "FNN",
    "GRU",
    "GRU2014",
    "LSTM",
    "MRNN",
    "RHN",
    "RNN",
    "RNNNADE",
    "UGRNN",
    "IntersectionRNN",
    "LanguageModel",
    "PianoRoll",
    "Stack",
    "Tagger",
    "constrain",
    "long_memory",
    "parameter_count",
    "units_for",
    "units_of_equal_size",
]
