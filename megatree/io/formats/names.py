"""File names that a foreign index gives: plain names of regular files in its own folder."""

import os
import stat
from pathlib import Path


def checked_file(folder: Path, name: str, *, place: str) -> Path:
    """Return the file of that name in the folder.

    Args:
        folder: where the index lies.
        name: what the index says.
        place: of the index, for errors.

    Raises:
        ValueError: the name leads elsewhere, or there is no regular file of it.
    """
    if not name or name in (".", "..") or "/" in name or "\\" in name or "\0" in name:
        raise ValueError(
            f"{place}: the file name {name!r} leads out of its folder. "
            "Use a checkpoint from who you trust."
        )
    file = folder / name
    try:
        status = os.lstat(file)
    except FileNotFoundError:
        raise ValueError(f"{place}: {name} is listed, and absent. Copy it beside.") from None
    if stat.S_ISLNK(status.st_mode):
        raise ValueError(
            f"{file}: a symbolic link, which may lead anywhere. Copy the folder with 'cp -rL'."
        )
    if not stat.S_ISREG(status.st_mode):
        raise ValueError(f"{file}: no regular file. Copy it anew.")
    return file
