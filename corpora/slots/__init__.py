"""Slot filling: utterances whose words are tagged, scored by spans."""

from corpora.slots.data import Slots, atis
from corpora.slots.spans import compare, spans

__all__ = ["Slots", "atis", "compare", "spans"]
