"""Files that lie: each is refused with place and reason, before anything is read or made of it."""

import json
import os
import pickle
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from megatree.io.formats import archive, dcp, hf, safetensors, side
from megatree.io.formats.arrays import Array
from megatree.io.formats.meta import meta_reader
from megatree.io.formats.orbax import OrbaxReader
from megatree.io.formats.tiles import Tile, Tiles
from tests.io.formats.in_memory import samples
from tests.io.formats.test_round_trip import written


def tensors_file(file: Path, header: Any, data: bytes = b"", *, length: int | None = None) -> Path:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    size = len(raw) if length is None else length
    file.write_bytes(struct.pack("<Q", size) + raw + data)
    return file


def tensor(start: int, stop: int, shape: Any = (2,), dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [start, stop]}


HEADERS: dict[str, tuple[Any, bytes, int | None, str]] = {
    "longer than the file": ({}, b"", 1 << 40, r"header says it has 1099511627776 bytes"),
    "longer than any": ({}, b"", (1 << 64) - 1, r"header says it has"),
    "no JSON": (b"{", b"", None, r"no JSON"),
    "deep JSON": (b"[" * 100_000, b"", None, r"no JSON"),
    "no object": ([1], b"", None, r"no JSON object"),
    "a key twice": (b'{"a":{},"a":{}}', b"", None, r"a key is there twice"),
    "beyond the end": ({"a": tensor(0, 8)}, b"\0" * 4, None, r"a: ends at byte .* the file at"),
    "a size that lies": ({"a": tensor(0, 4)}, b"\0" * 4, None, r"takes 8 bytes, data_offsets are"),
    "a huge shape": ({"a": tensor(0, 8, (1 << 62,))}, b"\0" * 8, None, r"data_offsets are"),
    "a negative size": ({"a": tensor(0, 8, (-2,))}, b"\0" * 8, None, r"no list of sizes"),
    "a bool as size": ({"a": tensor(0, 4, (True,))}, b"\0" * 4, None, r"no list of sizes"),
    "backwards": ({"a": tensor(8, 0)}, b"\0" * 8, None, r"data_offsets are \[8, 0\]"),
    "overlapping": (
        {"a": tensor(0, 8), "b": tensor(4, 12)}, b"\0" * 12, None, r"b begins at byte",
    ),
    "a hole": ({"a": tensor(4, 12)}, b"\0" * 12, None, r"a begins at byte .* ends at"),
    "a tail": ({"a": tensor(0, 8)}, b"\0" * 12, None, r"tensors end at byte .*, the file at"),
    "an unknown dtype": ({"a": tensor(0, 8, dtype="Q9")}, b"\0" * 8, None, r"unknown dtype 'Q9'"),
}  # fmt: skip


@pytest.mark.parametrize("name", HEADERS)
def test_a_header_that_lies_is_refused(name: str, tmp_path: Path) -> None:
    header, data, length, message = HEADERS[name]
    file = tensors_file(tmp_path / "x.safetensors", header, data, length=length)
    with pytest.raises(ValueError, match=f"x.safetensors: .*{message}"):
        safetensors.read_header(file)


def folder_with(tmp_path: Path, files: dict[str, Any]) -> Path:
    tensors_file(tmp_path / "model-1.safetensors", {"a": tensor(0, 8)}, b"\0" * 8)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
    return tmp_path


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"a": "../model-1.safetensors"}, r"file name '../model-1.safetensors' leads out"),
        ({"a": "/etc/passwd"}, r"file name '/etc/passwd' leads out"),
        ({"a": ".."}, r"file name '..' leads out"),
        ({"a": "model-2.safetensors"}, r"model-2.safetensors is listed, and absent"),
        ({"a": "model-1.safetensors", "b": "model-1.safetensors"}, r"b is what the index says"),
        ({"a": 3}, r"weight_map is no table of file names"),
    ],
)
def test_an_index_that_lies_is_refused(files: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        hf.HfReader(folder_with(tmp_path, files))


def test_links_are_refused(tmp_path: Path) -> None:
    real = tensors_file(tmp_path / "elsewhere", {"a": tensor(0, 8)}, b"\0" * 8)
    folder = tmp_path / "model"
    folder.mkdir()
    os.symlink(real, folder / "model.safetensors")
    with pytest.raises(ValueError, match=r"model.safetensors: a symbolic link"):
        hf.HfReader(folder)


class Run:
    """Runs a command when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.path}",)


def test_a_pickle_that_runs_code_is_refused_and_does_not_run(tmp_path: Path) -> None:
    trap = tmp_path / "ran"
    file = tmp_path / "x.pt"
    torch.save({"model": Run(trap)}, file)
    with pytest.raises(ValueError, match=r"x.pt: its pickle asks for (posix|nt)\.system"):
        archive.load(file, str(file))
    (tmp_path / dcp.METADATA).write_bytes(pickle.dumps(Run(trap)))
    with pytest.raises(ValueError, match=r"\.metadata: asks for (posix|nt)\.system"):
        dcp.DcpReader(tmp_path)
    assert not trap.exists()


def test_classes_of_megatron_become_records_without_behaviour(tmp_path: Path) -> None:
    from argparse import Namespace

    file = tmp_path / "x.pt"
    torch.save({"args": Namespace(num_layers=2), "w": torch.ones(2)}, file)
    held = archive.load(file, str(file))
    assert type(held["args"]).__name__ == "Inert"
    assert archive.plain(held["args"]) == {"num_layers": 2}


def _packed(file: Path) -> None:
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as out:
        out.writestr("x/data.pkl", b"", compress_type=zipfile.ZIP_STORED)
        out.writestr("x/data/0", b"\0" * 10_000_000)


def _escaping(file: Path) -> None:
    with zipfile.ZipFile(file, "w") as out:
        out.writestr("x/../../data.pkl", b"")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (_packed, r"expands from \d+ to 10000000 bytes"),
        (_escaping, r"a way out"),
        (lambda file: file.write_bytes(b"no archive"), r"no archive of torch"),
        (lambda file: file.write_bytes(pickle.dumps({"a": 1})), r"no archive of torch"),
    ],
)
def test_archives_that_expand_or_are_none_are_refused(
    make: Callable[[Path], None], message: str, tmp_path: Path
) -> None:
    make(tmp_path / "x.pt")
    with pytest.raises(ValueError, match=f"x.pt: .*{message}"):
        archive.load(tmp_path / "x.pt", str(tmp_path / "x.pt"))


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    return written("dcp", tmp_path, samples())


def changed(folder: Path, change: Callable[[Any], None]) -> Path:
    told = pickle.loads((folder / dcp.METADATA).read_bytes())
    change(told)
    (folder / dcp.METADATA).write_bytes(pickle.dumps(told))
    return folder


def _first_place(told: Any, **fields: Any) -> None:
    info = next(iter(told.storage_data.values()))
    for name, value in fields.items():
        setattr(info, name, value)


def _chunks(told: Any) -> list[Any]:
    return told.state_dict_metadata["params.b.c"].chunks


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda told: _first_place(told, relative_path="../x"), r"file name '../x' leads out"),
        (lambda told: _first_place(told, relative_path="/x"), r"file name '/x' leads out"),
        (lambda told: _first_place(told, relative_path="gone"), r"gone is listed, and absent"),
        (lambda told: _first_place(told, length=1 << 50), r"which has \d+"),
        (lambda told: _first_place(told, offset=-1), r"is at bytes -1"),
        (lambda told: _chunks(told).pop(), r"none holds \[6:7, 0:6\]"),
        (lambda told: _chunks(told).append(_chunks(told)[0]), r"overlap"),
        (
            lambda told: setattr(
                told.state_dict_metadata["params.b.c"], "size", torch.Size([1 << 40, 1 << 20])
            ),
            r"hold \d+ of \d+ elements",
        ),
        (lambda told: told.storage_data.clear(), r"no file has params.a at"),
        (lambda told: setattr(told, "storage_data", None), r"has no tables"),
    ],
)
def test_metadata_that_lies_is_refused(
    change: Callable[[Any], None], message: str, saved: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        dcp.DcpReader(changed(saved, change))


def test_a_chunk_of_another_shape_than_it_says_is_refused(saved: Path) -> None:
    def swap(told: Any) -> None:
        keys = list(told.storage_data)
        told.storage_data[keys[0]], told.storage_data[keys[-1]] = (
            told.storage_data[keys[-1]],
            told.storage_data[keys[0]],
        )

    reader = dcp.DcpReader(changed(saved, swap))
    with pytest.raises(ValueError, match=r"is not bfloat16 .*, as the metadata says"):
        reader.read("params.a", ((0, 5), (0, 3), (0, 4)))


def test_tiles_that_contradict_each_other_are_refused() -> None:
    array = Array(shape=(4,), dtype=torch.float32)
    for boxes, message in (
        ([((0, 5),)], r"the part \[0:5\] is not inside \[4\]"),
        ([((0, 3),), ((2, 4),)], r"the parts \[0:3\] and \[2:4\] overlap"),
        ([((0, 3),)], r"hold 3 of 4 elements, none holds \[3:4\]"),
    ):
        tiles = [Tile(box=box, read=lambda box: torch.zeros(1)) for box in boxes]
        with pytest.raises(ValueError, match=f"here: x: .*{message}"):
            Tiles({"x": array}, {"x": tiles}, "here")


def test_orbax_keys_and_files_that_lead_out_are_refused(tmp_path: Path) -> None:
    tensors = {"params.b": torch.ones(3, 2)}
    for name, change, message in (
        ("key", lambda t: t.replace('"key": "b"', '"key": "../b"'), r"leads out of it"),
        ("gone", lambda t: t.replace('"key": "b"', '"key": "c"'), r"is listed, and cannot be"),
        ("json", lambda t: t[:-5], r"no JSON"),
    ):
        (tmp_path / name).mkdir()
        folder = written("orbax", tmp_path / name, tensors)
        file = folder / "_METADATA"
        file.write_text(change(file.read_text()))
        with pytest.raises(ValueError, match=message):
            OrbaxReader(folder)
    (tmp_path / "link").mkdir()
    folder = written("orbax", tmp_path / "link", tensors)
    os.symlink("/etc/passwd", folder / "d" / "x")
    with pytest.raises(ValueError, match=r"a symbolic link"):
        OrbaxReader(folder)


def test_a_rank_of_meta_that_is_absent_or_odd_is_refused(tmp_path: Path) -> None:
    torch.save({"a": torch.ones(2)}, tmp_path / "consolidated.01.pth")
    with pytest.raises(ValueError, match=r"has consolidated.01.pth, not consolidated.00.pth"):
        meta_reader(tmp_path, {})
    torch.save({"b": torch.ones(2)}, tmp_path / "consolidated.00.pth")
    with pytest.raises(ValueError, match=r"ranks 0 and 1 do not hold the same tensors \(a, b\)"):
        meta_reader(tmp_path, {})


@pytest.mark.parametrize(
    "raw", [b"", b"\xc1", b"\x80", b"\x91" * 2000, b"\x82\xa4axes\x01\xa5extra\x80"]
)
def test_a_side_file_that_is_none_is_refused(raw: bytes, tmp_path: Path) -> None:
    (tmp_path / side.FILE).write_bytes(raw)
    with pytest.raises(ValueError, match=r"megatree.msgpack: damaged"):
        side.read_side(tmp_path)


def test_a_chunk_of_orbax_that_is_absent_is_damage_not_zeros(tmp_path: Path) -> None:
    import tensorstore

    folder = written("orbax", tmp_path, {"params.b": torch.ones(3, 2), "zero": torch.zeros(2)})
    store = tensorstore.KvStore.open({"driver": "ocdbt", "base": f"file://{folder}/"}).result()
    assert b"zero/0" in store.list().result()
    store.delete_range(tensorstore.KvStore.KeyRange("params.b/0", "params.b/1")).result()
    with pytest.raises(ValueError, match=r"params.b cannot be read"):
        OrbaxReader(folder).read("params.b", ((0, 3), (0, 2)))


def test_arrays_of_orbax_that_expand_without_bound_are_refused(tmp_path: Path) -> None:
    import tensorstore

    folder = written("orbax", tmp_path, {"params.b": torch.ones(3, 2)})
    store = tensorstore.KvStore.open({"driver": "ocdbt", "base": f"file://{folder}/"}).result()
    raw = bytes(store["params.b/.zarray"])
    store["params.b/.zarray"] = raw.replace(b'"shape":[3,2]', b'"shape":[3000000000,200]')
    with pytest.raises(ValueError, match=r"say they are 2400000000000 bytes, its files have \d+"):
        OrbaxReader(folder)
