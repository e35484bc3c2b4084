"""Text as data objects: characters and words, in windows of long streams.

>>> from corpora import text
>>> topics = text.characters(batch_size=10, window=50, warm_up=13)
>>> tuple(topics(0).inputs.shape), topics.size(topics(0))
((50, 10), 370)
"""

from corpora.text.alphabet import SYMBOLS_2011, Alphabet
from corpora.text.characters import CORPORA, characters
from corpora.text.stream import Text, Window
from corpora.text.words import WORDS, words

__all__ = ["CORPORA", "SYMBOLS_2011", "WORDS", "Alphabet", "Text", "Window", "characters", "words"]
