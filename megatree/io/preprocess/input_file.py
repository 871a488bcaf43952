"""An input as it was when the job began: a file that changes meanwhile is refused."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatree.io.preprocess.encode import Format


@dataclass(frozen=True, kw_only=True)
class InputFile:
    """A file with its size and time.

    Attributes:
        path: of the file.
        form: of its content.
        size: bytes on disk.
        mtime_ns: when it was last written.
    """

    path: Path
    form: Format
    size: int
    mtime_ns: int

    @staticmethod
    def of(path: Path, form: Format) -> "InputFile":
        """Return a file as it is now.

        Raises:
            ValueError: if there is none.
        """
        try:
            info = path.stat()
        except OSError as error:
            raise ValueError(f"{path}: {error.strerror}. Name files that exist.") from error
        return InputFile(path=path, form=form, size=info.st_size, mtime_ns=info.st_mtime_ns)

    def facts(self) -> dict[str, Any]:
        """Return what is stored of it as JSON values."""
        told = {"path": str(self.path.resolve()), "form": self.form}
        return {**told, "size": self.size, "mtime_ns": self.mtime_ns}

    def require_unchanged(self) -> None:
        """Refuse to go on if the file was written since.

        Raises:
            ValueError: naming it.
        """
        if InputFile.of(self.path, self.form) != self:
            raise ValueError(
                f"{self.path}: it changed while it was read. Run again when nothing writes to it."
            )
