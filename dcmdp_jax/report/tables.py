"""Tables: as aligned text for a terminal, and as HTML for a page."""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence
from typing import NamedTuple

MISSING = "–"
CONTROLS = {code: 0x2400 + code for code in range(32) if chr(code) not in "\n\t"} | {127: 0x2421}


class Cell(NamedTuple):
    """An HTML cell that is more than plain text."""

    html: str  # markup, in which all text is escaped already
    style: str = ""  # class of the cell in the page's style sheet


def with_note(text: str, note: str, *, below: bool = False) -> Cell:
    """A text with a note in small print beside it, or below it."""
    separator = "<br>" if below else " "
    return Cell(f"{html.escape(text)}{separator}<small>{html.escape(note)}</small>")


def with_dot(color: str, text: str) -> Cell:
    """A text behind a dot in the colour of its curve."""
    return Cell(f'<i class="dot" style="background:{color}"></i>{html.escape(text)}')


def text(content: str) -> Cell:
    """A text of several words, whose lines are kept."""
    return Cell(html.escape(visible(content)), "text")


def visible(content: str) -> str:
    """Returns a text with a sign for each control character that a page would not show."""
    return content.translate(CONTROLS)


def bar(share: float, color: str) -> Cell:
    """A bar over this share, in [0, 1], of the cell's width."""
    return Cell(f'<i style="width:{100 * share:.1f}%;background:{color}"></i>', "bar")


def html_table(header: Sequence[str | Cell], rows: Iterable[Sequence[str | Cell]]) -> str:
    """Returns a table that scrolls sideways where the page is narrow; a `str` is escaped.

    The first column is aligned left, the others right (`html_page.STYLE`).
    """
    head = "".join(_element("th", cell) for cell in header)
    body = "".join(f"<tr>{''.join(_element('td', cell) for cell in row)}</tr>" for row in rows)
    return (
        f'<div class="scroll" tabindex="0"><table><thead><tr>{head}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )


def _element(tag: str, cell: str | Cell) -> str:
    if isinstance(cell, str):
        cell = Cell(html.escape(cell))
    attribute = f' class="{cell.style}"' if cell.style else ""
    return f"<{tag}{attribute}>{cell.html}</{tag}>"


def aligned_text(rows: Sequence[Sequence[str]], left: int = 1) -> str:
    """Returns rows of cells as lines with aligned columns: the first `left` columns are aligned
    left, the others right.
    """
    widths = [max(len(cell) for cell in column) for column in zip(*rows)]
    lines = []
    for row in rows:
        cells = [
            cell.ljust(width) if i < left else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths))
        ]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)
