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
    """One encoded input of several; whole once its marker is there."""

    folder: Path
    stem: str
    keys: tuple[str, ...]

    @property
    def prefixes(self) -> dict[str, str]:
        return {key: str(self.folder / f"{self.stem}_{key}") for key in self.keys}

    @property
    def bad(self) -> Path:
        return self.folder / f"{self.stem}.bad.jsonl"

    @property
    def _marker(self) -> Path:
        return self.folder / f"{self.stem}.whole.json"

    def read_counts(self) -> Counts | None:
        if not self._marker.exists():
            return None
        return Counts(**json.loads(self._marker.read_text(encoding="utf-8")))

    def mark_whole(self, counts: Counts) -> None:
        with atomic_write(self._marker) as file:
            file.write(json.dumps(asdict(counts)).encode())

    def unmark(self) -> None:
        """Make it not whole: before its files go, one by one."""
        self._marker.unlink(missing_ok=True)

    def append_to(self, writers: PairWriters) -> Counts:
        for key, prefix in self.prefixes.items():
            writers.by_key[key].add_file(IndexedFile(prefix))
        if self.bad.exists():
            with open(self.bad, "rb") as file:
                while lines := file.read(1 << 20):
                    writers.add_bad(lines)
        counts = self.read_counts()
        assert counts is not None, "a part is appended when it is whole"
        return counts
