"""Settings of Sphinx: `make docs` builds these pages and the reference of the docstrings into docs/_build/html."""

from __future__ import annotations

import contextlib
import sys
from importlib.metadata import version as installed
from pathlib import Path
from pkgutil import resolve_name

from docutils import nodes
from sphinx.addnodes import pending_xref
from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment

# The models and problems are used from a checkout, and documented from it.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
sys.path.insert(1, str(Path(__file__).resolve().parent))

project = "hfopt"
author = "hfopt authors"
project_copyright = author
version = release = installed("hfopt")

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["_build"]

# Links between pages are those of the files, so that they work on a code host as well; headings have its anchors.
myst_heading_anchors = 3

# Docstrings: sections by napoleon, single backticks for code, arguments with the types of the signature.
default_role = "code"
smartquotes_action = "D"  # dashes alone: the transpose of J' is no quotation mark
napoleon_numpy_docstring = False
napoleon_use_ivar = True
autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
python_maximum_signature_line_length = 100

# Every name that a page or docstring refers to must exist: see `existing`.
nitpicky = True
# Modules name these for the type checker alone, or as short names of types.
nitpick_ignore_regex = [(r"py:.*", r"Tensor|Figure|nn\..*|Given|Against|Experiment|Layers|V")]

html_theme = "furo"
html_title = f"hfopt {version}"
html_copy_source = False


def existing(_app: Sphinx, _env: BuildEnvironment, node: pending_xref, text: nodes.TextElement) -> nodes.Element | None:
    """A name that has no place in the reference, as plain text if it can be imported; otherwise Sphinx complains."""
    target = node["reftarget"]
    for name in (target, f"{node.get('py:module')}.{target}"):
        with contextlib.suppress(ImportError, AttributeError, ValueError):
            resolve_name(name)
            return text
    return None


def formulas(_app: Sphinx, _what: str, _name: str, _value: object, _options: object, lines: list[str]) -> None:
    """Blocks that a docstring indents between two paragraphs are shown as they stand."""
    for i in reversed(range(2, len(lines))):
        before = next((line for line in reversed(lines[:i]) if line), "")
        opens = not lines[i - 1] and lines[i].startswith("    ") and not before.startswith(" ")
        if opens and not before.endswith("::"):
            lines[i:i] = ["::", ""]


def draw_pictures(_app: Sphinx) -> None:
    """Make the pictures of looking_inside.md, if the code that draws has changed since they were made."""
    import pictures

    if not pictures.is_current():
        pictures.make()


def setup(app: Sphinx) -> None:
    """Called by Sphinx."""
    app.connect("builder-inited", draw_pictures)
    app.connect("missing-reference", existing)
    app.connect("autodoc-process-docstring", formulas, priority=400)  # napoleon's is 500
