"""Look into a checkpoint of any format: its tree, the difference of two, whether it is whole."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from math import nan

from megatree.io.checkpoint.box import spelled
from megatree.io.checkpoint.dtypes import dtype_name
from megatree.io.formats.arrays import BOX_BYTES, Reader, grid, read_ahead
from megatree.io.formats.compare import gap
from megatree.io.formats.dcp import DcpReader
from megatree.io.formats.native import NativeReader
from megatree.recipes.formats import Opened, Picked


@dataclass(frozen=True, kw_only=True)
class Line:
    """A leaf, for people.

    Args:
        path: of the leaf.
        axes: of its dims.
        dtype: of its elements.
        shape: elements per dim.
        nbytes: bytes of it.
        boxes: the chunks that hold it; "" where the format has none.
    """

    path: str
    axes: str
    dtype: str
    shape: tuple[int, ...]
    nbytes: int
    boxes: str


def lines(opened: Opened, *, every_box: bool = False) -> Iterator[Line]:
    """Yield the leaves of a checkpoint in the order of their paths.

    Args:
        opened: the checkpoint.
        every_box: spell every box out; if not, at most two.
    """
    boxes = _boxes(opened.reader, every_box)
    for path, leaf in sorted(opened.leaves.items()):
        yield Line(
            path=path,
            axes=leaf.axes,
            dtype=dtype_name(leaf.dtype),
            shape=leaf.shape,
            nbytes=leaf.nbytes,
            boxes=boxes.get(path, ""),
        )


def _boxes(reader: Reader, every_box: bool) -> Mapping[str, str]:
    while not isinstance(reader, (NativeReader, DcpReader)):
        if not isinstance(reader, Picked):
            return {}
        reader = reader.source
    if isinstance(reader, DcpReader):
        held = {path: [spelled(box) for box in reader.boxes(path)] for path in reader.arrays}
    else:
        held = {
            stored.leaf.path: [f"{spelled(chunk.box)} {chunk.file}" for chunk in stored.chunks]
            for stored in reader.manifest.leaves
        }
    return {path: _shown(texts, every_box) for path, texts in held.items()}


def _shown(texts: list[str], every: bool) -> str:
    shown = texts if every else texts[:2]
    more = [f"and {len(texts) - len(shown)} more"] if len(shown) < len(texts) else []
    return ", ".join(shown + more)


@dataclass(frozen=True, kw_only=True)
class Difference:
    """How a leaf differs between two checkpoints.

    Args:
        path: of the leaf.
        what: for people.
        most: largest difference of an element; nan if they cannot be compared.
    """

    path: str
    what: str
    most: float = nan


def differences(
    first: Opened, second: Opened, *, values: bool = True, most_bytes: int = BOX_BYTES
) -> Iterator[Difference]:
    """Yield the leaves that are not the same, a box of each in memory at a time.

    Args:
        first, second: checkpoints of any formats.
        values: compare elements too; if not, declarations alone.
        most_bytes: bytes of a box.
    """
    for path in sorted({*first.leaves, *second.leaves}):
        one, two = first.leaves.get(path), second.leaves.get(path)
        if one is None or two is None:
            yield Difference(path=path, what=f"only in the {'first' if one else 'second'}")
        elif one != two:
            yield Difference(path=path, what=f"{one} in the first, {two} in the second")
        elif values:
            reads = [partial(opened.reader.read, path) for opened in (first, second)]
            apart = gap(first.reader.arrays[path], reads[0], reads[1], most_bytes)
            if apart.count:
                yield Difference(path=path, what=str(apart), most=apart.most)


def verify(
    opened: Opened,
    told: Callable[[str, int], None] = lambda path, nbytes: None,
    *,
    most_bytes: int = BOX_BYTES,
) -> list[str]:
    """Read every element; return what is wrong, a line for each leaf that is.

    Args:
        opened: the checkpoint. Of a native one every checksum is compared; of another, that the
            files hold what they say.
        told: called after each box, with the leaf and the bytes of the box.
        most_bytes: bytes of a box.
    """
    problems = [f"{name}: has no leaf" for name in opened.unmapped]
    for path, array in opened.reader.arrays.items():
        try:
            places = ((path, box) for box in grid(array, most_bytes))
            for _, _, data in read_ahead(opened.reader, places):
                told(path, data.numel() * data.element_size())
        except (ValueError, OSError) as error:
            problems.append(f"{path}: {error}")
    return problems
