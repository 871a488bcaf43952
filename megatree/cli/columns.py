"""Rows of text in columns as wide as they need: lines are never folded, so they can be searched."""

from collections.abc import Sequence


def columns(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table as text, a line for each row.

    >>> print(columns(("leaf", "MB"), [("embed.table", "12"), ("head", "3")]))
    leaf         MB
    embed.table  12
    head         3
    """
    table = [tuple(headings), *map(tuple, rows)]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    return "\n".join(
        "  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip()
        for row in table
    )
