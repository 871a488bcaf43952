"""Reading planned chunks into the targets, every block verified against its checksum."""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import groupby
from typing import NamedTuple

from megatree.io.checkpoint.box import Box, runs, volume
from megatree.io.checkpoint.checksum import crc32
from megatree.io.checkpoint.manifest import Manifest
from megatree.io.checkpoint.memory import Scratch, memory, scatter_bytes
from megatree.io.checkpoint.piece import Piece
from megatree.io.checkpoint.place import Place, Unreadable
from megatree.io.checkpoint.place import Read as ReadAt
from megatree.io.checkpoint.reads import Read
from megatree.io.checkpoint.write import NUM_THREADS


class Fetched(NamedTuple):
    """How many bytes were read, and per damaged place one line that names leaf and file."""

    nbytes: int
    problems: list[str]


class Straight(NamedTuple):
    """Bytes of a chunk that lie in one run in the target too, so that no copy is needed.

    Bytes `start` to `stop` of the chunk go to `memory`, from its beginning.
    """

    start: int
    stop: int
    memory: memoryview


def fetch(
    directory: Place, manifest: Manifest, reads: Sequence[Read], targets: Sequence[Piece]
) -> Fetched:
    """Carry out the reads (sorted by file); damage is returned, not raised, to list all of it."""
    nbytes, problems = 0, []
    scratch = Scratch()
    with ThreadPoolExecutor(NUM_THREADS) as pool:
        for name, group in groupby(reads, key=lambda read: read.chunk.file):
            from_file = list(group)
            try:
                with directory.reader(name, manifest.files[name]) as source:
                    jobs = _jobs(source, from_file, targets, manifest.block_bytes, scratch)
                    results = list(pool.map(lambda job: job(), jobs))
            except Unreadable as error:
                problems += _hit(name, error, from_file)
                continue
            nbytes += sum(result.nbytes for result in results)
            problems += [problem for result in results for problem in result.problems]
    return Fetched(nbytes, problems)


def _hit(file: str, error: Unreadable, reads: Sequence[Read]) -> list[str]:
    """Return a line for each leaf that a file which is not what it was takes along."""
    hit = reads
    if error.end is not None:
        ends = [(read, read.chunk.offset + read.chunk.nbytes) for read in reads]
        hit = [read for read, end in ends if end > error.end] or reads
    return list(dict.fromkeys(f"{read.path}: {file} {error}" for read in hit))


def _jobs(
    source: ReadAt,
    reads: Sequence[Read],
    targets: Sequence[Piece],
    block_bytes: int,
    scratch: Scratch,
) -> list[Callable[[], Fetched]]:
    jobs: list[Callable[[], Fetched]] = []
    for read in reads:
        straight = _straight(read, targets)
        for start, stop in read.blocks(block_bytes):
            checksum = read.chunk.checksums[start // block_bytes]
            job = partial(_fetch_block, source, read, start, stop, checksum)
            jobs.append(partial(job, targets=targets, straight=straight, scratch=scratch))
    return jobs


def _straight(read: Read, targets: Sequence[Piece]) -> Straight | None:
    if len(read.wants) != 1:
        return None
    (want,) = read.wants
    target = targets[want.target]
    view, size = memory(target.tensor), read.itemsize
    source, destination = _run(want.box, read.chunk.box), _run(want.box, target.box)
    if view is None or source is None or destination is None:
        return None
    count = volume(want.box)
    into = view[destination * size : (destination + count) * size]
    return Straight(source * size, (source + count) * size, into)


def _run(box: Box, within: Box) -> int | None:
    """Return the element of `within` at which `box` starts, if it is one run of it."""
    start, stop = next(runs(box, within))
    return start if stop - start == volume(box) else None


def _fetch_block(
    source: ReadAt,
    read: Read,
    start: int,
    stop: int,
    checksum: int,
    *,
    targets: Sequence[Piece],
    straight: Straight | None,
    scratch: Scratch,
) -> Fetched:
    """Read bytes `start` to `stop` of a chunk, verify them, and put them where they are wanted."""
    if straight is not None and straight.start <= start and stop <= straight.stop:
        buffer, view = None, straight.memory[start - straight.start : stop - straight.start]
    else:
        buffer = scratch.take(stop - start)
        view = buffer.numpy().data
    where = f"{read.path}: {read.chunk.file} bytes {read.chunk.offset + start} to "
    where += f"{read.chunk.offset + stop}"
    try:
        nbytes = source(view, read.chunk.offset + start)
    except OSError as error:
        return Fetched(0, [f"{where} cannot be read ({error.strerror or error})"])
    found = crc32(view)
    if nbytes < stop - start or found != checksum:
        wrong = f"{where} have checksum {found:#010x}, the manifest says {checksum:#010x}"
        return Fetched(nbytes, [wrong])
    if buffer is not None:
        first, last = start // read.itemsize, stop // read.itemsize
        for want in read.wants:
            target = targets[want.target]
            scatter_bytes(buffer, read.chunk.box, first, last, target.tensor, target.box, want.box)
        scratch.give_back(buffer)
    return Fetched(nbytes, [])
