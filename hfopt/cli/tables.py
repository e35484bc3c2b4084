"""Tables on the terminal: what files say is neither markup nor control characters, and columns find room."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Literal

from rich.console import Console
from rich.table import Table


def console() -> Console:
    """The terminal; nothing that a file says is taken for markup."""
    return Console(highlight=False, markup=False, emoji=False)


def clean(text: str) -> str:
    """Text without what would control a terminal."""
    return "".join(c if c.isprintable() else " " if c in "\n\t" else "\ufffd" for c in text)


def table(
    titles: Sequence[str],
    rows: Iterable[Sequence[str]],
    width: int,
    *,
    drop: Sequence[str] = (),
    words: int = 1,
) -> Table:
    """Aligned columns without lines; the first so many are `words`. Of too wide ones those to `drop` are left out."""
    rows = [[clean(cell) for cell in row] for row in rows]
    titles = [clean(title) for title in titles]
    widths = {
        title: 1 + max(len(title), *(len(row[i]) for row in rows)) if rows else len(title)
        for i, title in enumerate(titles)
    }
    left_out: set[str] = set()
    for title in drop:
        if sum(w for t, w in widths.items() if t not in left_out) > width:
            left_out.add(title)
    made = Table(box=None, padding=(0, 0, 0, 1), header_style="bold")
    for i, title in enumerate(titles):
        if title not in left_out:
            side: Literal["left", "right"] = "left" if i < words else "right"
            made.add_column(title, justify=side, no_wrap=words < len(titles), overflow="fold")
    for row in rows:
        made.add_row(*(cell for title, cell in zip(titles, row, strict=True) if title not in left_out))
    return made


def row_of(record: Any) -> dict[str, Any]:
    """A row of a structured array as Python scalars."""
    return {name: record[name].item() for name in record.dtype.names}
