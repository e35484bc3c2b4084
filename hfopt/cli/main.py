"""The command line: which commands there are, and a sentence for whatever goes wrong."""

from __future__ import annotations

import argparse
import importlib.metadata
import sys
from collections.abc import Sequence

from hfopt.cli import change, completion, export, listing, pages, pictures, show, watch
from hfopt.cli.tables import clean
from hfopt.experiment import report
from hfopt.experiment.store.format import RunError

_NEEDED = {
    "matplotlib": "pictures need matplotlib",
    "tensorboard": "event files need tensorboard",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit status."""
    chosen = parser().parse_args(arguments)
    try:
        status: int | None = chosen.run(chosen)
        sys.stdout.flush()
    except BrokenPipeError:  # hfopt show run | head
        report.close_output()
        return 1
    except KeyboardInterrupt:
        print(f"\nhfopt {chosen.command}: stopped", file=sys.stderr)
        return 130
    except (RunError, OSError, ValueError, LookupError) as error:
        said = error.args[0] if isinstance(error, LookupError) and error.args else error
        print(f"hfopt {chosen.command}: {clean(str(said))}", file=sys.stderr)
        return 1
    except ModuleNotFoundError as error:
        needed = str(error.name).partition(".")[0]
        if needed not in _NEEDED:
            raise
        print(f"hfopt {chosen.command}: {_NEEDED[needed]}; pip install {needed}", file=sys.stderr)
        return 1
    return status or 0


def parser() -> argparse.ArgumentParser:
    """The parser of the whole command line; each command's module adds its own."""
    whole = argparse.ArgumentParser(prog="hfopt", description="Look at the runs of hfopt experiments.")
    whole.add_argument("--version", action="version", version=f"hfopt {_version()}")
    commands = whole.add_subparsers(dest="command", required=True, metavar="command")
    for module in (listing, show, watch, pictures, export, pages, change):
        module.add(commands)
    completion.add(commands, parser)
    return whole


def _version() -> str:
    try:
        return importlib.metadata.version("hfopt")
    except importlib.metadata.PackageNotFoundError:
        return "of a checkout"
