"""Errors that list every bad leaf, at most eight of them."""

from collections.abc import Sequence

MOST_LISTED = 8


def listing(place: str, what: str, problems: Sequence[str], fix: str) -> str:
    """Return `<place>: <what>.`, one indented line per problem, then the fix.

    >>> print(listing("run", "1 leaf does not fit", ["blocks.k: missing"], "Rename it."))
    run: 1 leaf does not fit.
      blocks.k: missing
    Rename it.
    """
    lines = [f"{place}: {what}.", *(f"  {problem}" for problem in problems[:MOST_LISTED])]
    if len(problems) > MOST_LISTED:
        lines.append(f"  and {len(problems) - MOST_LISTED} more")
    return "\n".join([*lines, fix])


def leaves(count: int, one: str, many: str) -> str:
    """Count leaves with their verb.

    >>> leaves(2, "does not fit", "do not fit")
    '2 leaves do not fit'
    """
    return f"1 leaf {one}" if count == 1 else f"{count} leaves {many}"
