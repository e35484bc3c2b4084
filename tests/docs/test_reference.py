"""Every public name stands in the reference, and every page is reached from the first one."""

from __future__ import annotations

import re
from fnmatch import fnmatch
from pathlib import Path
from types import ModuleType

import pytest

import hfopt
import hfopt.preconditioners
import hfopt.recurrences
import models
import pathological

DOCS = Path(__file__).resolve().parents[2] / "docs"
REFERENCE = "\n".join(path.read_text(encoding="utf-8") for path in sorted((DOCS / "api").glob("*.md")))


@pytest.mark.parametrize("package", [hfopt, hfopt.preconditioners, hfopt.recurrences, models, pathological])
def test_public_names_have_their_place(package: ModuleType) -> None:
    documented = {name.rpartition(".")[2] for name in re.findall(r"^\.\. auto\w+:: ([\w.]+)$", REFERENCE, re.MULTILINE)}
    public = {name: getattr(package, name) for name in package.__all__}
    # Names of types are shown in signatures; those of problems stand beside their classes.
    missing = {n for n, value in public.items() if {n, getattr(value, "__name__", n)}.isdisjoint(documented)}
    assert missing <= {"State", "NONLINEARITIES", "MULTIPLICATIVE"}


def test_pages_are_listed() -> None:
    """By name or, for those that measurements write, by a pattern."""
    first = (DOCS / "index.md").read_text(encoding="utf-8")
    pages = {path.stem for path in DOCS.glob("*.md")} - {"index"}
    listed = re.findall(r"^([\w\[\]*]+)$", first, re.MULTILINE)
    assert [page for page in sorted(pages) if not any(fnmatch(page, entry) for entry in listed)] == []
    linked = set(re.findall(r"\]\((\w+)\.md\)", first))
    assert pages & set(listed) <= linked <= pages
