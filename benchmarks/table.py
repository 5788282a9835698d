"""Tables and numbers as Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


def markdown_table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a table whose first column is text and whose others are numbers, unless a title ends with `:`.

    A column titled `reason:` is text; its title loses the colon.
    """
    marks = ["---" if place == 0 or title.endswith(":") else "---:" for place, title in enumerate(columns)]
    titles = [title.removesuffix(":") for title in columns]
    lines = [_line(titles), f"|{'|'.join(marks)}|", *(_line(row) for row in rows)]
    return "\n".join(lines)


def megabytes(count: int | None) -> str:
    """Return a number of bytes in MB, a dash where it is not told."""
    return "-" if count is None else f"{count / 1e6:.0f}"


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"
