"""The code blocks of the pages run, page by page, each page in one namespace."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from markdown_it import MarkdownIt

DOCS = Path(__file__).resolve().parents[2] / "docs"

# Pages of fragments, which speak of a model, closure or device that the reader has.
FRAGMENTS = {"gpu.md", "linearisation.md", "run_format.md", "training_loops.md"}

# Stands in a line of its own before a block that cannot run by itself, and says why.
NOT_RUN = "<!-- not run:"


def blocks(page: Path) -> list[tuple[int, str, bool]]:
    """(first line, code, whether it runs) of every Python block of a page."""
    found, marked = [], False
    for token in MarkdownIt().parse(page.read_text(encoding="utf-8")):
        if token.type == "fence" and token.info.split()[:1] == ["python"] and token.map is not None:
            found.append((token.map[0] + 1, token.content, not marked))
        marked = token.type == "html_block" and token.content.startswith(NOT_RUN)
    return found


PAGES = {path.name: blocks(path) for path in sorted(DOCS.glob("*.md"))}


@pytest.fixture
def log() -> Iterator[None]:
    """A page may turn the log on."""
    logger = logging.getLogger("hfopt")
    before = logger.level
    yield
    logger.setLevel(before)


@pytest.mark.usefixtures("log")
@pytest.mark.parametrize("name", sorted(n for n, found in PAGES.items() if found and n not in FRAGMENTS))
def test_blocks_run(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    namespace: dict[str, Any] = {"__name__": name}
    for line, code, runs in PAGES[name]:
        if runs:
            # Empty lines before it give tracebacks the page's own numbers.
            exec(compile("\n" * line + code, str(DOCS / name), "exec"), namespace)


def test_what_does_not_run_is_little() -> None:
    assert {name for name, found in PAGES.items() if found} >= FRAGMENTS
    left_out = {name: [line for line, _, runs in found if not runs] for name, found in PAGES.items()}
    assert sum(map(len, left_out.values())) <= 6, left_out
