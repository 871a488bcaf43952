"""One encoded input of several, kept until all are there."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from megatree.io.data.atomic import atomic_write
from megatree.io.data.indexed import IndexedFile
from megatree.io.preprocess.counts import Counts
from megatree.io.preprocess.writers import PairWriters


@dataclass(frozen=True, kw_only=True)
class Part:
    """Pairs in a folder; whole once their marker is there.

    Attributes:
        folder: of all parts of a job.
        stem: number of the input, and digest of all that decides its pairs.
        keys: one pair each.
    """

    folder: Path
    stem: str
    keys: tuple[str, ...]

    @property
    def prefixes(self) -> dict[str, str]:
        """Prefix of the pair of each key."""
        return {key: str(self.folder / f"{self.stem}_{key}") for key in self.keys}

    @property
    def bad(self) -> Path:
        """Where bad lines are listed."""
        return self.folder / f"{self.stem}.bad.jsonl"

    @property
    def _marker(self) -> Path:
        return self.folder / f"{self.stem}.whole.json"

    def read_counts(self) -> Counts | None:
        """Return the counts of a whole part; None if it is not."""
        if not self._marker.exists():
            return None
        return Counts(**json.loads(self._marker.read_text(encoding="utf-8")))

    def mark_whole(self, counts: Counts) -> None:
        """Say that all of it is on the disk."""
        with atomic_write(self._marker) as file:
            file.write(json.dumps(asdict(counts)).encode())

    def unmark(self) -> None:
        """Make it not whole: before its files go, one by one."""
        self._marker.unlink(missing_ok=True)

    def append_to(self, writers: PairWriters) -> Counts:
        """Append its documents and bad lines; return its counts."""
        for key, prefix in self.prefixes.items():
            writers.by_key[key].add_file(IndexedFile(prefix))
        if self.bad.exists():
            with open(self.bad, "rb") as file:
                while lines := file.read(1 << 20):
                    writers.add_bad(lines)
        counts = self.read_counts()
        assert counts is not None, "a part is appended when it is whole"
        return counts
