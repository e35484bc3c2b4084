"""Polyphonic music as piano rolls: the four collections of 2012, chorales in JSON, MIDI files, generated counterpoint.

>>> from corpora.music import Music, counterpoint
>>> music = Music(counterpoint(pieces=20, seed=0), batch_size=5)
>>> music(0).inputs.shape[1:], music.metrics[0].name
(torch.Size([5, 88]), 'nats/frame')
"""

from corpora.music.collections import NAMES, load
from corpora.music.counterpoint import counterpoint
from corpora.music.data import Music
from corpora.music.rolls import Pieces

__all__ = ["NAMES", "Music", "Pieces", "counterpoint", "load"]
