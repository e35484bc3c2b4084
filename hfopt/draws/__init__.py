"""Random draws: generators of torch, Python and numpy, who draws from them, and draws that are repeated."""

from hfopt.draws.repeated import Draws

__all__ = ["Draws"]
