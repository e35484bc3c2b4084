"""Data sets as data objects.

>>> import corpora
>>> images = corpora.curves(train=200, test=100, batch_size=50)
>>> tuple(images(0).inputs.shape), images.size(images(0)), images.shape
((50, 784), 50, (28, 28))
"""

from corpora.images import Images, Pixels, curves, digits, mnist, pixels
from corpora.music import Music
from corpora.slots import Slots, atis

__all__ = ["Images", "Music", "Pixels", "Slots", "atis", "curves", "digits", "mnist", "pixels"]
