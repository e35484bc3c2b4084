"""`hfopt completion`: a script that makes the shell complete commands, options, and names of runs."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import shtab

from hfopt.experiment.store.catalogue import LOGS

_NAMES = {
    "bash": f'_hfopt_names() {{ compgen -f -- "$1"; (cd {LOGS} 2>/dev/null && compgen -d -- "$1"); }}',
    "zsh": f"_hfopt_names() {{ _files; _path_files -/ -W {LOGS}; }}",
}


def add(commands: Any, whole: Callable[[], argparse.ArgumentParser]) -> None:
    """Add the command; `whole` makes the parser that is completed."""
    made = commands.add_parser("completion", help="print a script that has the shell complete hfopt's command line")
    made.add_argument("shell", choices=list(_NAMES), help="such as: hfopt completion bash >> ~/.bash_completion")
    made.set_defaults(run=lambda chosen: script(chosen.shell, whole()))


def script(shell: str, whole: argparse.ArgumentParser) -> None:
    """Print the script."""
    commands = next(a for a in whole._actions if isinstance(a, argparse._SubParsersAction))
    for command in commands.choices.values():
        for action in command._actions:
            if action.dest == "path":
                action.complete = dict.fromkeys(_NAMES, "_hfopt_names")
            elif action.dest in ("root", "output"):
                action.complete = shtab.FILE
    print(shtab.complete(whole, shell=shell, preamble=_NAMES[shell]))
