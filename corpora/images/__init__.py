"""Images: to be reconstructed, and to be read pixel by pixel or row by row."""

from corpora.images.curves import curves
from corpora.images.digits import digits
from corpora.images.images import Images
from corpora.images.mnist import mnist
from corpora.images.pixels import Pixels, pixels

__all__ = ["Images", "Pixels", "curves", "digits", "mnist", "pixels"]
