"""Every message that the pages quote is in the sources, and what can stop or slow down a user is quoted."""

from __future__ import annotations

import ast
import functools
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from markdown_it import MarkdownIt

ROOT = Path(__file__).resolve().parents[2]
QUOTING = ("troubleshooting.md", "closure.md")

# Stands for whatever an f-string fills in.
FILLED = "…"


def text_of(node: ast.expr | None) -> str | None:
    """A string as the sources write it, filled-in parts as `FILLED`; None for anything else."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(str(v.value) if isinstance(v, ast.Constant) else FILLED for v in node.values)
    return None


@functools.cache
def trees() -> list[ast.Module]:
    return [ast.parse(path.read_text(encoding="utf-8")) for path in sorted((ROOT / "hfopt").rglob("*.py"))]


def filled(template: str) -> str:
    """A template of str.format with its fields as `FILLED`."""
    return re.sub(r"\{[^{}]*\}", FILLED, template)


@functools.cache
def strings() -> set[str]:
    """Every string, f-string and template of the package."""
    found = (text_of(node) for tree in trees() for node in ast.walk(tree) if isinstance(node, ast.expr))
    texts = {text for text in found if text}
    return texts | {filled(text) for text in texts}


def name_of(function: ast.expr) -> str:
    return function.id if isinstance(function, ast.Name) else ""


def told() -> Iterator[str]:
    """What `ClosureError` is raised with, and what the package warns of."""
    for tree in trees():
        constants = {
            target.id: text_of(node.value)
            for node in tree.body
            if isinstance(node, ast.Assign)
            for target in node.targets
            if isinstance(target, ast.Name)
        }
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and name_of(node.func) in {"ClosureError", "warn"} and node.args:
                argument = node.args[0]
                if isinstance(argument, ast.Call) and isinstance(argument.func, ast.Attribute):
                    argument = argument.func.value  # of TEMPLATE.format(...)
                named = constants.get(name_of(argument))
                text = text_of(argument) or named
                assert text, ast.unparse(node)
                yield filled(text)


def quotes(name: str) -> list[str]:
    """The paragraphs of code that a page sets as quotations, each on one line."""
    found, depth = [], 0
    for token in MarkdownIt().parse((ROOT / "docs" / name).read_text(encoding="utf-8")):
        depth += {"blockquote_open": 1, "blockquote_close": -1}.get(token.type, 0)
        if depth and token.type == "inline":
            found.append(" ".join(token.content.strip("`").split()))
    return found


@pytest.mark.parametrize("name", QUOTING)
def test_quoted_messages_are_those_of_the_sources(name: str) -> None:
    there = strings()
    assert quotes(name)
    assert [quote for quote in quotes(name) if not any(quote in text for text in there)] == []


def test_errors_of_closures_and_warnings_are_quoted() -> None:
    """A message that is not explained yet belongs into docs/troubleshooting.md, quoted in part or whole."""
    quoted = quotes("troubleshooting.md")
    messages = set(told())
    assert len(messages) > 25
    assert sorted(text for text in messages if not any(quote in text for quote in quoted)) == []
