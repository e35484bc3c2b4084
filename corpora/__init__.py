"""Data sets as data objects.

>>> import corpora
>>> images = corpora.curves(train=200, test=100, batch_size=50)
>>> tuple(images(0).inputs.shape), images.size(images(0)), images.shape
((50, 784), 50, (28, 28))
"""

from corpora.curves import curves
from corpora.digits import digits
from corpora.images import Images
from corpora.mnist import mnist

__all__ = ["Images", "curves", "digits", "mnist"]
