"""The command `hfopt`: look at runs from the terminal."""

from hfopt.cli.main import main

__all__ = ["main"]
