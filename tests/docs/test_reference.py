"""Every public name is in the reference, every page is linked from the first one, and README lists the package."""

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

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
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


def test_readme_lists_the_package() -> None:
    """Its table has a row for every file and folder of hfopt."""
    table = re.search(r"\| in `hfopt/` .*?\n\n", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    assert table
    listed = {name.rstrip("/") for name in re.findall(r"^\| `([^`]+)`", table[0], re.MULTILINE)}
    there = {p.name for p in (ROOT / "hfopt").iterdir() if p.suffix == ".py" or (p / "__init__.py").exists()}
    assert {name for name in listed if "/" not in name} == there
    assert all((ROOT / "hfopt" / name).is_dir() for name in listed if "/" in name)
