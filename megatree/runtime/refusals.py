"""Which errors are the user's to fix: they are told in a sentence, all others with a traceback."""

import traceback
from pathlib import Path

_PACKAGE = str(Path(__file__).resolve().parent.parent)


def refusal(error: BaseException) -> str | None:
    """Return the message of an error that a user can cause and mend, None for a bug.

    These are errors of the operating system, and a ValueError that the package itself raised;
    one that came out of a library below it may well be ours.
    """
    if isinstance(error, OSError):
        return str(error)
    if not isinstance(error, ValueError):
        return None
    frames = traceback.extract_tb(error.__traceback__)
    ours = bool(frames) and frames[-1].filename.startswith(_PACKAGE)
    return str(error) if ours else None
