"""Pairs: byte for byte Megatron's, whole or absent, and never believed on their word."""

import filecmp
import json
import os
import signal
import struct
import subprocess
import sys
import tempfile
import textwrap
import tracemalloc
from pathlib import Path

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest

from megatree.io.data import IndexedFile, IndexedWriter, merge_pairs, token_dtype
from megatree.io.data.index_format import DTYPES, read_index

DTYPE_NAMES = sorted(dtype.name for dtype in DTYPES.values())
ARRAYS = st.lists(
    st.lists(st.lists(st.integers(0, 100), max_size=4), max_size=3), min_size=0, max_size=6
)


def write(prefix: Path, documents: list, dtype="int32", **options) -> Path:
    with IndexedWriter(prefix, dtype, **options) as writer:
        for document in documents:
            writer.add_document(document)
    return prefix


def read(prefix: Path) -> list:
    file = IndexedFile(prefix)
    return [[s.tolist() for s in file.document(d)] for d in range(file.num_documents)]


def same_bytes(a: Path, b: Path) -> bool:
    return all(filecmp.cmp(f"{a}.{end}", f"{b}.{end}", shallow=False) for end in ("bin", "idx"))


@pytest.mark.parametrize("name", [*DTYPE_NAMES, "modes"])
def test_hand_made_documents_give_the_bytes_of_megatron(goldens, tmp_path, name: str) -> None:
    edge = json.loads((goldens.folder / "data" / "edge.json").read_text(encoding="utf-8"))
    modes = name == "modes"
    small = name in ("uint8", "int8", "int16")
    documents = [
        [[min(token, 100) if small else token for token in s] for s in document]
        for document in edge["documents"]
    ]
    with IndexedWriter(tmp_path / "x", "int32" if modes else name, modes=modes) as writer:
        for document, mode in zip(documents, edge["modes"], strict=True):
            writer.add_document(document, modes=mode if modes else None)
    assert same_bytes(tmp_path / "x", goldens.pair(f"edge_{name}"))
    assert read(tmp_path / "x") == documents
    told = IndexedFile(tmp_path / "x").modes
    assert (told is not None) == modes
    if told is not None:
        assert told.tolist() == [m for document in edge["modes"] for m in document]


@pytest.mark.parametrize(
    "name",
    ["austen_c_text_document", "austen30_text_sentence"],
)
def test_a_pair_of_megatron_copied_through_the_reader_keeps_its_bytes(
    goldens, tmp_path, name: str
) -> None:
    source = IndexedFile(goldens.pair(name))
    told = goldens.parameters["data"][name]
    assert len(source) == told["sequences"]
    assert source.num_documents == told["documents"]
    assert source.tokens.size == told["tokens"]
    write(tmp_path / "x", [source.document(d) for d in range(source.num_documents)], told["dtype"])
    assert same_bytes(tmp_path / "x", goldens.pair(name))


def test_merging_equals_writing_all_at_once(goldens, tmp_path) -> None:
    names = ["austen40_text_document", "austen_b_text_document", "austen_c_text_document"]
    parts = [IndexedFile(goldens.pair(name)) for name in names]
    documents = [part.document(d) for part in parts for d in range(part.num_documents)]
    write(tmp_path / "whole", documents, "uint16")
    merge_pairs([goldens.pair(name) for name in names], tmp_path / "merged")
    assert same_bytes(tmp_path / "merged", tmp_path / "whole")


@hypothesis.settings(max_examples=25)
@hypothesis.given(documents=ARRAYS, name=st.sampled_from(DTYPE_NAMES), cut=st.integers(0, 6))
def test_what_is_written_is_read(documents: list, name: str, cut: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        whole = write(Path(folder) / "whole", documents, name)
        assert read(whole) == documents
        assert sorted(os.listdir(folder)) == ["whole.bin", "whole.idx"]
        write(Path(folder) / "a", documents[:cut], name)
        write(Path(folder) / "b", documents[cut:], name)
        merge_pairs([f"{folder}/a", f"{folder}/b"], f"{folder}/merged")
        assert same_bytes(Path(folder) / "merged", whole)


@pytest.mark.parametrize(
    ("vocab_size", "name", "itemsize"),
    [(65499, "uint16", 2), (65500, "int32", 4), (65536, "int32", 4), (65537, "int32", 4)],
)
def test_vocabularies_around_65536_are_read_as_they_were_written(
    tmp_path, vocab_size: int, name: str, itemsize: int
) -> None:
    """Megatron's fast path takes 65500..65536 for uint16 and reads every token as two."""
    ids = [[vocab_size - 1, 0, 1]]
    write(tmp_path / "x", [ids], token_dtype(vocab_size))
    assert token_dtype(vocab_size).name == name
    assert (tmp_path / "x.bin").stat().st_size == 3 * itemsize
    assert read(tmp_path / "x") == [ids]


@pytest.mark.parametrize(
    ("dtype", "token", "text"),
    [
        ("uint16", 65536, r"65536 in sequence 2 is no uint16 \(0 to 65535\)"),
        ("uint16", -1, "-1 in sequence 2 is no uint16"),
        ("int32", 1 << 31, "2147483648 in sequence 2 is no int32"),
        ("int32", 0.5, "0.5 in sequence 2 is no int32"),
    ],
)
def test_an_id_that_does_not_fit_leaves_no_pair(tmp_path, dtype, token, text: str) -> None:
    """A cast wraps without a word: token 65536 becomes token 0."""
    with pytest.raises(ValueError, match=text):
        write(tmp_path / "x", [[[1], [2]], [np.array([3, token])]], dtype)
    assert os.listdir(tmp_path) == []


def test_a_killed_writer_leaves_no_pair_and_the_next_one_sweeps_up(tmp_path) -> None:
    program = f"""
    import os, signal
    from megatree.io.data.indexed import IndexedWriter
    writer = IndexedWriter({str(tmp_path / "x")!r}, "int32")
    writer.add_document([[1, 2, 3]])
    os.kill(os.getpid(), signal.SIGKILL)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(program)], check=False)
    assert done.returncode == -signal.SIGKILL
    left = os.listdir(tmp_path)
    assert len(left) == 2
    assert all(name.endswith(".megatree-tmp") for name in left)
    living = IndexedWriter(tmp_path / "x", "int32")  # its files are locked and stay
    write(tmp_path / "x", [[[4]]])
    assert sorted(os.listdir(tmp_path))[2:] == ["x.bin", "x.idx"]
    living.__exit__(KeyboardInterrupt, KeyboardInterrupt(), None)
    assert sorted(os.listdir(tmp_path)) == ["x.bin", "x.idx"]


def test_dying_between_the_two_renames_leaves_no_pair(tmp_path, monkeypatch) -> None:
    """Also when an older pair is replaced: its index must not stand beside the new tokens."""
    prefix = write(tmp_path / "x", [[[1, 2]]])
    real = os.replace

    def replace(source, target):
        if str(target).endswith(".idx"):
            raise OSError("power cut")
        real(source, target)

    monkeypatch.setattr(os, "replace", replace)
    with pytest.raises(OSError, match="power cut"):
        write(prefix, [[[3, 4]]], overwrite=True)
    assert os.listdir(tmp_path) == ["x.bin"]
    with pytest.raises(FileNotFoundError, match=r"x\.idx: is not there"):
        IndexedFile(prefix)


def test_an_existing_pair_is_refused_before_any_work(tmp_path) -> None:
    prefix = write(tmp_path / "x", [[[1]]])
    with pytest.raises(ValueError, match="already there"):
        IndexedWriter(prefix, "int32")
    write(prefix, [[[2]]], overwrite=True)
    assert read(prefix) == [[[2]]]


HEADER = struct.Struct("<9sQBQQ")


def damaged(raw: bytes, **change: int | bytes) -> bytes:
    names = ("magic", "version", "code", "sequences", "bounds")
    fields = dict(zip(names, HEADER.unpack_from(raw), strict=True)) | change
    return HEADER.pack(*fields.values()) + raw[HEADER.size :]


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"magic": b"TNTIDX\x00\x00\x00"}, "starts with b'TNTIDX"),
        ({"version": 2}, "version 2 is not 1"),
        ({"code": 0}, "dtype code 0 is not one of 1 to 8"),
        ({"code": 9}, "dtype code 9"),
        ({"sequences": 1 << 40}, r"1099511627776 sequences .* the file has 114"),
        ({"sequences": (1 << 64) - 1}, "18446744073709551615 sequences"),
        ({"bounds": 1 << 61}, "2305843009213693951 documents"),
        ({"bounds": 0}, "-1 documents"),
        ({"code": 8}, r"sequence 1 starts at byte 12, and the one before it ends at 6"),
    ],
)
def test_a_lying_header_is_refused_without_allocating(tmp_path, change, text: str) -> None:
    prefix = write(tmp_path / "x", [[[1, 2, 3]], [[4], [5, 6]], [[7]]])
    path = tmp_path / "x.idx"
    path.write_bytes(damaged(path.read_bytes(), **change))
    tracemalloc.start()
    with pytest.raises(ValueError, match=text) as caught:
        IndexedFile(prefix)
    assert str(path) in str(caught.value)
    assert tracemalloc.get_traced_memory()[1] < 1 << 24  # and the header told of terabytes
    tracemalloc.stop()


@pytest.mark.parametrize(
    ("at", "value", "text"),
    [
        (HEADER.size + 4, struct.pack("<i", -5), "sequence 1 has -5 tokens"),
        (HEADER.size + 4, struct.pack("<i", 9), r"sequence 2 starts at byte 16, .* ends at 48"),
        (HEADER.size + 16, struct.pack("<q", 4), "sequence 0 starts at byte 4"),
        (HEADER.size + 48, struct.pack("<q", 1), "run from sequence 1 to 4, not from 0 to 4"),
        (HEADER.size + 72, struct.pack("<q", 3), "run from sequence 0 to 3, not from 0 to 4"),
        (HEADER.size + 56, struct.pack("<q", 4), "document 1 runs from sequence 4 back to 3"),
    ],
)
def test_an_index_that_contradicts_itself_is_refused(tmp_path, at, value, text: str) -> None:
    prefix = write(tmp_path / "x", [[[1, 2, 3]], [[4], [5, 6]], [[7]]])
    path = tmp_path / "x.idx"
    raw = path.read_bytes()
    path.write_bytes(raw[:at] + value + raw[at + len(value) :])
    with pytest.raises(ValueError, match=text):
        IndexedFile(prefix)


def test_every_truncation_is_refused(tmp_path) -> None:
    prefix = write(tmp_path / "x", [[[1, 2, 3]], [[4], [5, 6]], [[7]]])
    for path in (tmp_path / "x.idx", tmp_path / "x.bin"):
        raw = path.read_bytes()
        for size in range(len(raw)):
            path.write_bytes(raw[:size])
            with pytest.raises(ValueError, match=rf"{path}: "):
                IndexedFile(prefix)
        path.write_bytes(raw)
    assert len(IndexedFile(prefix)) == 4


def test_a_bin_of_another_size_is_named_with_both_sizes(tmp_path) -> None:
    prefix = write(tmp_path / "x", [[[1, 2, 3]]])
    with open(tmp_path / "x.bin", "ab") as file:
        file.write(b"\0")
    with pytest.raises(ValueError, match=r"x\.bin: has 13 bytes, and x\.idx tells of 12"):
        IndexedFile(prefix)


@hypothesis.settings(max_examples=50)
@hypothesis.given(data=st.data())
def test_a_damaged_index_is_refused_or_consistent(data: st.DataObject) -> None:
    """Whatever the bytes: a ValueError, or numbers that agree with each other and the file."""
    with tempfile.TemporaryDirectory() as folder:
        write(Path(folder) / "x", [[[1, 2, 3]], [], [[4], [5, 6]], [[7]]])
        path = Path(folder) / "x.idx"
        raw = bytearray(path.read_bytes())
        for _ in range(data.draw(st.integers(1, 4))):
            raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
        path.write_bytes(raw[: data.draw(st.integers(len(raw) - 9, len(raw)))])
        try:
            index = read_index(path)
        except ValueError:
            return
        assert index.lengths.sum() * index.dtype.itemsize == index.num_bytes
        assert index.documents[-1] == len(index.lengths)


@pytest.mark.parametrize("end", ["bin", "idx"])
@pytest.mark.parametrize("how", ["append", "replace", "touch", "remove"])
def test_a_change_of_an_open_file_is_detected(tmp_path, end: str, how: str) -> None:
    file = IndexedFile(write(tmp_path / "x", [[[1, 2, 3]]]))
    file.verify()
    path = tmp_path / f"x.{end}"
    raw = path.read_bytes()
    if how == "append":
        with open(path, "ab") as stream:
            stream.write(b"1234")
    elif how == "touch":  # other bytes of the same length
        os.utime(path, ns=(1, 1))
    else:
        path.unlink()
        if how == "replace":
            path.write_bytes(raw)
            os.utime(path, ns=(1, 1))  # an inode may be used again
    with pytest.raises(ValueError, match=rf"x\.{end}: (changed|was removed) while it was in use"):
        file.verify()


def test_identity_is_that_of_the_content(tmp_path) -> None:
    a = IndexedFile(write(tmp_path / "a", [[[1, 2, 3]], [[4]]]))
    same = IndexedFile(write(tmp_path / "b", [[[1, 2, 3]], [[4]]]))
    others = [
        write(tmp_path / "c", [[[1, 2, 3]], [[5]]]),
        write(tmp_path / "d", [[[1, 2], [3]], [[4]]]),
        write(tmp_path / "e", [[[1, 2, 3], [4]]]),
    ]
    assert a.identity == same.identity
    assert len({IndexedFile(p).identity for p in others} | {a.identity}) == 4


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda f: merge_pairs([], f / "y"), "0 sources give no pair"),
        (lambda f: merge_pairs([f / "x", f / "z"], f / "y"), "uint8 cannot be appended to int32"),
        (lambda f: merge_pairs([f / "x", f / "m"], f / "y"), "has modes, unlike"),
        (lambda f: IndexedWriter(f / "y", "complex64"), "complex64 has no code. Use one of uint8"),
        (lambda f: IndexedFile(f / "x")[3], "sequence 3 is not one of 1"),
        (lambda f: IndexedFile(f / "x").document(-1), "document -1 is not one of 1"),
        (lambda f: IndexedFile(f / "x.idx"), r"x\.idx\.idx: is not there"),
    ],
)
def test_what_cannot_be_is_refused(tmp_path, call, text: str) -> None:
    write(tmp_path / "x", [[[1]]])
    write(tmp_path / "z", [[[1]]], "uint8")
    with IndexedWriter(tmp_path / "m", "int32", modes=True) as writer:
        writer.add_document([[1]], modes=[0])
    with pytest.raises((ValueError, IndexError, FileNotFoundError), match=text):
        call(tmp_path)
    assert not (tmp_path / "y.idx").exists()


def test_counts_that_do_not_add_up_are_refused(tmp_path) -> None:
    with IndexedWriter(tmp_path / "x", "int32") as writer:
        for lengths, sequences in [([2], [1]), ([3], [2]), ([4, -1], [2])]:
            with pytest.raises(ValueError, match=r"3 tokens, .* do not agree"):
                writer.add_documents(np.arange(3), np.array(lengths), np.array(sequences))
        with pytest.raises(ValueError, match="1 modes for 1 sequences"):
            writer.add_document([[1]], modes=[1])
    assert len(IndexedFile(tmp_path / "x")) == 0
