"""Look into a checkpoint of any format: its tree, the difference of two, whether it is whole."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from math import nan

import torch
from torch import Tensor

from megatree.io.checkpoint.box import spelled
from megatree.io.checkpoint.dtypes import dtype_name
from megatree.io.formats.arrays import BOX_BYTES, Reader, grid
from megatree.io.formats.native import NativeReader
from megatree.recipes.formats import Opened


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
    if not isinstance(reader, NativeReader):
        return {}
    out = {}
    for stored in reader.manifest.leaves:
        shown = stored.chunks if every_box else stored.chunks[:2]
        texts = [f"{spelled(chunk.box)} {chunk.file}" for chunk in shown]
        if len(shown) < len(stored.chunks):
            texts.append(f"and {len(stored.chunks) - len(shown)} more")
        out[stored.leaf.path] = ", ".join(texts)
    return out


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
            most, count = _compare(first, second, path, most_bytes)
            if count:
                what = f"{count} of {one.nbytes // one.dtype.itemsize} elements differ"
                yield Difference(path=path, what=f"{what}, by {most:.3g} at most", most=most)


def _compare(first: Opened, second: Opened, path: str, most_bytes: int) -> tuple[float, int]:
    most, count = 0.0, 0
    for box in grid(first.reader.arrays[path], most_bytes):
        one, two = first.reader.read(path, box), second.reader.read(path, box)
        if torch.equal(_bytes(one), _bytes(two)):
            continue
        odd = (_bytes(one) != _bytes(two)).reshape(one.numel(), -1).any(dim=1)
        count += int(odd.sum())
        gap = (one.to(torch.float64) - two.to(torch.float64)).abs().nan_to_num(nan=torch.inf)
        most = max(most, float(gap.max()))
    return most, count


def _bytes(data: Tensor) -> Tensor:
    return data.contiguous().reshape(-1).view(torch.uint8)


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
            for box in grid(array, most_bytes):
                data = opened.reader.read(path, box)
                told(path, data.numel() * data.element_size())
        except (ValueError, OSError) as error:
            problems.append(f"{path}: {error}")
    return problems
