"""Run every Python block of README and of the pages in docs/, page by page, each page in one namespace."""

from __future__ import annotations

import importlib.util
import logging
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from markdown_it import MarkdownIt

import hfopt
import models
import pathological

ROOT = Path(__file__).resolve().parents[2]
FILES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]

# Comments on a line of their own before a block: the block needs a package that is optional, or cannot run at all.
NEEDS = "<!-- needs "
NOT_RUN = "<!-- not run:"


class Block(NamedTuple):
    line: int
    code: str
    comment: str

    @property
    def runs(self) -> bool:
        if self.comment.startswith(NEEDS):
            return importlib.util.find_spec(self.comment.removeprefix(NEEDS).split()[0]) is not None
        return not self.comment.startswith(NOT_RUN)


def blocks(page: Path) -> list[Block]:
    """Every Python block of a page, with the comment that precedes it."""
    found, comment = [], ""
    for token in MarkdownIt().parse(page.read_text(encoding="utf-8")):
        if token.type == "fence" and token.info.split()[:1] == ["python"] and token.map is not None:
            found.append(Block(token.map[0] + 1, token.content, comment))
        comment = token.content if token.type == "html_block" else ""
    return found


PAGES = {path.relative_to(ROOT).as_posix(): blocks(path) for path in FILES}


@pytest.fixture
def restored(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Restore what a page may change for the whole process: the log's level, and the state of accelerate."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("ACCELERATE_USE_CPU", "1")
    logger = logging.getLogger("hfopt")
    before = logger.level
    yield
    logger.setLevel(before)
    if "accelerate" in sys.modules:
        from accelerate.state import AcceleratorState, PartialState

        AcceleratorState._reset_state()
        PartialState._reset_state()


def a_run() -> dict[str, Any]:
    """Make the run that docs/run_format.md reads, with a tiny model."""
    problem = pathological.multiplication(10, batch_size=10, train_batches=1, test_batches=1)
    model = models.RNN(problem.V, 5, problem.O)
    name, adam = "multiplication-T30-hf-seed0", torch.optim.Adam
    hfopt.HF(name, model, problem, optimizer=adam, average=0.9, max_steps=2, quiet=True).optimize()
    return {"model": model}


# Names that a page assumes.
GIVEN = {"docs/run_format.md": a_run}


@pytest.mark.usefixtures("restored")
@pytest.mark.parametrize("name", sorted(n for n, found in PAGES.items() if found))
def test_blocks_run(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    namespace: dict[str, Any] = {"__name__": name, **GIVEN.get(name, dict)()}
    for block in PAGES[name]:
        if block.runs:
            with warnings.catch_warnings():
                if block.comment:  # other packages warn of loaders and hardware
                    warnings.simplefilter("ignore")
                # Empty lines before it give tracebacks the page's own numbers.
                exec(compile("\n" * block.line + block.code, str(ROOT / name), "exec"), namespace)


def test_few_blocks_are_left_out() -> None:
    comments = [block.comment for found in PAGES.values() for block in found]
    assert sum(comment.startswith(NOT_RUN) for comment in comments) == 0
    assert {comment for comment in comments if comment.startswith(NEEDS)} <= {
        "<!-- needs transformers -->\n",
        "<!-- needs wandb -->\n",
    }
    assert len(comments) > 50
