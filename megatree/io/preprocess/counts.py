"""What a job has done so far, and how much is left."""

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Counts:
    """What came out of some input.

    Attributes:
        documents: written, per key.
        num_bytes: read, uncompressed.
        bad: lines without a document, by reason.
    """

    documents: int = 0
    num_bytes: int = 0
    bad: Mapping[str, int]

    def plus(self, other: "Counts") -> "Counts":
        """Return the counts of both."""
        return Counts(
            documents=self.documents + other.documents,
            num_bytes=self.num_bytes + other.num_bytes,
            bad=dict(Counter(self.bad) + Counter(other.bad)),
        )


@dataclass(frozen=True, kw_only=True)
class Progress:
    """How far a job is.

    Attributes:
        counts: of all inputs so far.
        position: bytes of files on disk read so far.
        size: bytes of files on disk in all.
    """

    counts: Counts
    position: int
    size: int


class Tracker:
    """Adds up what is reported over the inputs.

    Args:
        report: called with each state.
        size: bytes on disk of all inputs.
    """

    def __init__(self, report: Callable[[Progress], None], size: int) -> None:
        self._report = report
        self._before = Counts(bad={})
        self._position = 0
        self._shown = 0
        self._size = size

    def show(self, counts: Counts, position: int) -> None:
        """Report the counts of the present input, and how far it is read."""
        self._shown = max(self._shown, self._position + position)
        counts = self._before.plus(counts)
        self._report(Progress(counts=counts, position=self._shown, size=self._size))

    def next_input(self, counts: Counts, size: int) -> None:
        """Go on to the next input after one with these counts and this size."""
        self._before = self._before.plus(counts)
        self._position += size
        self.show(Counts(bad={}), 0)
