"""`hfopt report` and `hfopt serve`: runs as a page for the browser."""

from __future__ import annotations

import argparse
from pathlib import Path

from hfopt.cli import choose
from hfopt.experiment import report


def add(commands: choose.Commands) -> None:
    """Add the commands."""
    page = choose.command(commands, "report", "write runs into one HTML file that needs nothing else")
    page.add_argument("path", nargs="+", help=choose.NAMES)
    page.add_argument("-o", "--output", type=Path, help="the file (default: report.html in the first run's folder)")
    page.set_defaults(run=write)
    live = choose.command(commands, "serve", "serve the page of all runs below the root on this machine, live")
    live.add_argument("-p", "--port", type=int, default=8200, help="port on 127.0.0.1 (default 8200; 0: any free one)")
    live.set_defaults(run=serve)


def write(chosen: argparse.Namespace) -> None:
    """Write a report."""
    from hfopt.experiment.pages.document import write_report

    runs = choose.runs(chosen.path, chosen.root)
    output = runs[0].path / "report.html" if chosen.output is None else chosen.output
    write_report(runs, output)
    print(report.short(output))


def serve(chosen: argparse.Namespace) -> None:
    """Serve until Ctrl-C."""
    from hfopt.experiment.pages.server import Server

    if not 0 <= chosen.port <= 65535:
        raise ValueError(f"--port {chosen.port}: must be between 0 and 65535")
    with Server(choose.existing(chosen.root), chosen.port) as server:
        print(f"runs below {report.short(chosen.root)}: {server.address}   (Ctrl-C ends it)", flush=True)
        server.serve_forever()
