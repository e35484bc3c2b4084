"""The HTML document: markup, style, scripts and data in one file, which asks for nothing else."""

from __future__ import annotations

import base64
import hashlib
import html
import json
import os
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from hfopt.experiment.pages.contents import contents
from hfopt.experiment.store.reader import SavedRun
from hfopt.experiment.store.sealed import cannot_write

_SCRIPTS = ("data.js", "charts.js", "curves.js", "frames.js", "step.js", "page.js")


def write_report(runs: Sequence[SavedRun], path: Path) -> None:
    """Write a page with these runs inside into one HTML file.

    Raises:
        RunError: a run's file lacks what it should have.
        WriteError: there is no room or no permission; an earlier file stays.
    """
    names = _names(runs)
    title = runs[0].name if len(runs) == 1 else f"{len(runs)} runs"
    data = {"live": False, "runs": [contents(run, name) for run, name in zip(runs, names, strict=True)]}
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text(document(title, data), encoding="utf-8")
        temporary.replace(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise cannot_write(path, error) from error


def document(title: str, data: dict[str, Any]) -> str:
    """The page; `data` is `{"live": ..., "runs": [...]}`."""
    style = _text("vendored/uPlot.min.css") + _text("page.css")
    licence = "uPlot, embedded below:\n" + _text("vendored/LICENSE-uPlot").replace("--", "- -")
    scripts = [_text("vendored/uPlot.iife.min.js"), *(_text(name) for name in _SCRIPTS)]
    policy = "; ".join(
        [
            "default-src 'none'",
            f"script-src {' '.join(map(_hash, scripts))}",
            f"style-src {_hash(style)}",
            "img-src data:",
            "base-uri 'none'",
            "form-action 'none'",
            *(["connect-src 'self'"] if data["live"] else []),
        ]
    )
    head = "\n".join(
        [
            '<meta charset="utf-8">',
            f'<meta http-equiv="Content-Security-Policy" content="{html.escape(policy)}">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            '<meta name="referrer" content="no-referrer">',
            f"<title>{html.escape(title)}</title>",
            '<link rel="icon" href="data:,">',
            f"<style>{style}</style>",
        ]
    )
    body = _text("page.html").replace("{{title}}", html.escape(title))
    code = "\n".join(f"<script>{script}</script>" for script in scripts)
    return (
        f'<!doctype html>\n<html lang="en">\n<head>\n{head}\n</head>\n<body>\n{body}\n<!-- {licence} -->\n'
        f'<script type="application/json" id="data">{_embedded(data)}</script>\n{code}\n</body>\n</html>\n'
    )


def _embedded(data: Any) -> str:
    """JSON in which nothing ends the element that holds it."""
    words = json.dumps(data, allow_nan=False, separators=(",", ":"))
    return words.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")


def _text(name: str) -> str:
    return (files("hfopt.experiment.pages") / name).read_text(encoding="utf-8")


def _hash(text: str) -> str:
    """What a content security policy names inline text by."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def _names(runs: Sequence[SavedRun]) -> list[str]:
    """Names that tell the runs apart: those of their folders, with the folders above where two are the same."""
    names = [run.path.name or run.name for run in runs]
    return [name if names.count(name) == 1 else str(run.path) for name, run in zip(names, runs, strict=True)]
