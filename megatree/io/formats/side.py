"""What formats of named arrays do not say: axes and training state, in one file beside them."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgpack

from megatree.io.checkpoint.extra import check_extra, packed
from megatree.io.checkpoint.place import Folder
from megatree.io.formats.names import checked_file

FILE = "megatree.msgpack"
_MOST_BYTES = 256 << 20


def write_side(folder: Path, axes: Mapping[str, str], extra: Mapping[str, Any]) -> None:
    """Write the file into a folder of another format."""
    value = {"axes": dict(axes), "extra": dict(extra)}
    check_extra(value, FILE)
    Folder(folder).put(FILE, packed(value))


def read_side(folder: Path) -> tuple[dict[str, str], dict[str, Any]] | None:
    """Return axes and training state, or None if the folder has no such file.

    Raises:
        ValueError: the file is not what it should be.
    """
    if not (folder / FILE).exists():
        return None
    file = checked_file(folder, FILE, place=str(folder))
    fix = "Take another copy, or remove it and give --like."
    if file.stat().st_size > _MOST_BYTES:
        raise ValueError(f"{file}: {file.stat().st_size} bytes, too many. {fix}")
    try:
        value = msgpack.unpackb(file.read_bytes())
        check_extra(value, str(file))
        axes, extra = dict(value["axes"]), dict(value["extra"])
    except (ValueError, TypeError, KeyError, RecursionError, msgpack.UnpackException) as error:
        raise ValueError(f"{file}: damaged ({type(error).__name__}). {fix}") from None
    return {str(path): str(text) for path, text in axes.items()}, extra
