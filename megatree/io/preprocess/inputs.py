"""Read an input of any format as blocks, each small enough to hold."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from megatree.io.optional import optional
from megatree.io.preprocess.blocks import BLOCK_BYTES, Rows, read_blocks
from megatree.io.preprocess.compressed import SUFFIXES, plain_suffix
from megatree.io.preprocess.encode import Format, Piece, Recipe

_BY_SUFFIX: dict[str, Format] = {
    ".jsonl": "jsonl",
    ".json": "jsonl",
    ".ndjson": "jsonl",
    ".parquet": "parquet",
    ".txt": "text",
    ".text": "text",
}
_ROWS_AT_ONCE = 256


def format_of(path: Path, told: Format | None) -> Format:
    """Return the format of an input: as told, else by its suffix.

    Raises:
        ValueError: if the suffix tells nothing.
    """
    found = told or _BY_SUFFIX.get(plain_suffix(path))
    if found is None:
        known = ", ".join(_BY_SUFFIX)
        raise ValueError(
            f"{path}: the suffix {plain_suffix(path)!r} tells no format (known: {known}; each "
            f"but .parquet may be followed by {', '.join(SUFFIXES)}). "
            "Give --format jsonl, parquet or text."
        )
    return found


def input_blocks(path: Path, form: Format, recipe: Recipe) -> Iterator[Piece]:
    """Yield the blocks of an input in order.

    Raises:
        ValueError: if it cannot be read to its end.
    """
    if form == "parquet":
        return _row_blocks(path, recipe.keys)
    return read_blocks(
        path,
        unit="line" if form == "jsonl" else recipe.text_unit,
        max_line_bytes=recipe.max_line_bytes,
    )


def _row_blocks(path: Path, keys: Sequence[str]) -> Iterator[Rows]:
    parquet = optional("pyarrow.parquet", extra="parquet", purpose=str(path))
    arrow = optional("pyarrow", extra="parquet", purpose=str(path))
    try:
        with parquet.ParquetFile(path) as file:
            present = [key for key in keys if key in file.schema_arrow.names]
            size = path.stat().st_size
            row = 1
            for batch in file.iter_batches(batch_size=_ROWS_AT_ONCE, columns=present):
                for rows in _of_bounded_size(batch.to_pylist()):
                    # Rows are read in groups: how far the file is read is known by their number.
                    position = size * (row + len(rows)) // max(file.metadata.num_rows, 1)
                    yield Rows(file=str(path), first_row=row, rows=rows, position=position)
                    row += len(rows)
    except FileNotFoundError as error:
        raise ValueError(f"{path}: {error.strerror}. Name files that exist.") from error
    except (arrow.ArrowException, OSError) as error:
        raise ValueError(
            f"{path}: it is no parquet file, or damaged: {error}. Fetch it again."
        ) from error


def _of_bounded_size(rows: list[dict[str, Any]]) -> Iterator[tuple[dict[str, Any], ...]]:
    some: list[dict[str, Any]] = []
    size = 0
    for row in rows:
        some.append(row)
        size += sum(len(value) for value in row.values() if isinstance(value, str))
        if size >= BLOCK_BYTES:
            yield tuple(some)
            some, size = [], 0
    if some:
        yield tuple(some)
