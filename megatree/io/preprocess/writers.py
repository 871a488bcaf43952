"""The pairs of all keys of one run, written together."""

import json
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

from megatree.io.data.atomic import StagedFile
from megatree.io.data.indexed import IndexedWriter
from megatree.io.preprocess.encode import Encoded


class PairWriters:
    """The pairs of all keys, and the list of bad lines; all appear when the block ends."""

    def __init__(
        self, prefixes: Mapping[str, str], dtype: Any, bad: Path, *, overwrite: bool
    ) -> None:
        self._bad_path = bad
        self._bad: StagedFile | None = None
        with ExitStack() as stack:
            self.by_key = {
                key: stack.enter_context(IndexedWriter(prefix, dtype, overwrite=overwrite))
                for key, prefix in prefixes.items()
            }
            stack.push(self._close_bad)
            self._stack = stack.pop_all()

    def __enter__(self) -> "PairWriters":
        return self

    def __exit__(self, *raised: Any) -> None:
        self._stack.__exit__(*raised)

    def _close_bad(self, kind: type[BaseException] | None, *_: Any) -> None:
        """Runs before the pairs are closed: what it raises leaves no pair."""
        if self._bad is not None:
            (self._bad.discard if kind else self._bad.commit)()
        elif kind is None:
            self._bad_path.unlink(missing_ok=True)

    def add(self, encoded: Encoded) -> None:
        """Append the documents of a block, and list its bad lines."""
        for key, column in encoded.columns.items():
            self.by_key[key].add_documents(column.tokens, column.lengths, column.sequences)
        for one in encoded.bad:
            self.add_bad(json.dumps(asdict(one), ensure_ascii=True).encode() + b"\n")

    def add_bad(self, lines: bytes) -> None:
        """List bad lines that are JSON already."""
        if self._bad is None:
            self._bad = StagedFile(self._bad_path)
        self._bad.write(lines)
