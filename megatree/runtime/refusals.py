"""Which errors are the user's to fix: they are told in a sentence, all others with a traceback."""

import traceback
from pathlib import Path

_PACKAGE = str(Path(__file__).resolve().parent.parent)


def refusal(error: BaseException) -> str | None:
    """Return the message of an error that a user can cause and mend, None for a bug.

    These are errors of the operating system, and a ValueError that a `raise` in this package made;
    one from elsewhere (a library, an unpacking, a strict zip) is a bug until shown otherwise.
    """
    if isinstance(error, OSError):
        return str(error)
    frames = traceback.extract_tb(error.__traceback__)
    if not isinstance(error, ValueError) or not frames:
        return None
    last = frames[-1]
    ours = last.filename.startswith(_PACKAGE) and (last.line or "").startswith("raise ")
    return str(error) if ours else None
