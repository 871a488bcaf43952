"""Checkpoints behind fsspec URLs: the same bytes, and the manifest makes the checkpoint."""

import importlib
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch

from megatree.io.checkpoint import (
    Piece,
    Retention,
    Saver,
    latest,
    load,
    load_extra,
    save,
    step_name,
    steps_in,
)
from megatree.io.checkpoint.place import Remote, place_of
from megatree.io.world import World

ONE = World.single()


@pytest.fixture
def memory() -> Iterator[str]:
    """A fresh folder in this process's memory."""
    fs = fsspec.filesystem("memory")
    yield "memory://runs/a"
    fs.store.clear()
    fs.pseudo_dirs[:] = [""]


@pytest.fixture(scope="module")
def s3() -> Iterator[str]:
    """A bucket of a local server that speaks S3."""
    for package in ("moto", "flask", "s3fs"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"the package {package!r} is not installed; it is in the extra 'test'")
    server_of = importlib.import_module("moto.server").ThreadedMotoServer
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    server = server_of(ip_address="127.0.0.1", port=port, verbose=False)
    server.start()
    options = {
        "key": "test",
        "secret": "test",
        "client_kwargs": {"endpoint_url": f"http://127.0.0.1:{port}", "region_name": "eu-west-1"},
    }
    fsspec.config.conf["s3"] = options
    fsspec.filesystem("s3").mkdir("bucket")
    yield "s3://bucket/runs/a"
    del fsspec.config.conf["s3"]
    server.stop()


def pieces(value: float, *, size: int = 3000) -> list[Piece]:
    return [
        Piece.whole("w", torch.arange(size * 4.0).reshape(size, 4) + value, "ffn embed"),
        Piece.whole("v", (torch.arange(12.0).reshape(3, 4) + value).t(), "embed ffn"),
        Piece.whole("step", torch.tensor(int(value)), ""),
    ]


def check(path: Any, value: float) -> None:
    wanted = pieces(value)
    targets = [Piece.whole(p.path, torch.zeros_like(p.tensor), p.axes) for p in wanted]
    loaded = load(path, targets, world=ONE)
    for target, expected in zip(loaded.pieces, wanted, strict=True):
        assert torch.equal(target.tensor, expected.tensor)


@pytest.fixture(params=["memory", "s3"])
def url(request: pytest.FixtureRequest) -> str:
    return request.getfixturevalue(request.param)


def test_a_run_behind_a_url_is_kept_like_one_in_a_folder(url: str, tmp_path: Path) -> None:
    """Saves in the background, retention, latest, loading, on the memory of fsspec and on S3."""
    assert latest(url) is None
    with Saver(ONE, host_bytes=1 << 23, retention=Retention(last=2)) as saver:
        for step in (1, 2, 3):
            saver.save(f"{url}/{step_name(step)}", pieces(step), step=step, extra={"step": step})
    assert list(steps_in(url)) == [2, 3]
    last = latest(url)
    assert last is not None
    assert str(last) == f"{url}/step_00000003"
    assert load_extra(last) == {"step": 3}
    check(last, 3.0)
    check(f"{url}/step_00000002", 2.0)
    save(tmp_path / "c", pieces(3.0), world=ONE, extra={"step": 3})
    remote = place_of(str(last))
    for file in ("manifest.msgpack", "rank_00000.bin"):
        assert remote.get(file) == (tmp_path / "c" / file).read_bytes()


def test_a_part_is_read_by_ranges(memory: str, monkeypatch: pytest.MonkeyPatch) -> None:
    save(f"{memory}/c", pieces(0.0), world=ONE, block_bytes=64)
    fs = fsspec.filesystem("memory")
    asked: list[int] = []
    cat_file = fs.cat_file

    def counted(path: str, start: int | None = None, end: int | None = None) -> bytes:
        if start is not None and end is not None:
            asked.append(end - start)
        return cat_file(path, start=start, end=end)

    monkeypatch.setattr(fs, "cat_file", counted)
    part = Piece(
        path="w", shape=(3000, 4), dtype=torch.float32, axes="ffn embed", box=((8, 16), (0, 4))
    )
    loaded = load(f"{memory}/c", [part], world=ONE, allow_extra=("*",))
    assert torch.equal(loaded.pieces[0].tensor, pieces(0.0)[0].tensor[8:16])
    assert asked == [64, 64]


def test_without_a_manifest_there_is_no_checkpoint(memory: str) -> None:
    """What a killed save left is not loaded, is not `latest`, and is replaced by the next save."""
    fs = fsspec.filesystem("memory")
    fs.pipe_file("/runs/a/step_00000005/rank_00000.bin", b"half")
    fs.pipe_file("/runs/a/step_00000005/rank_00001.bin", b"half")
    save(f"{memory}/{step_name(4)}", pieces(4.0), world=ONE)
    assert str(latest(memory)) == f"{memory}/step_00000004"
    with pytest.raises(ValueError, match="there is no checkpoint here"):
        load_extra(f"{memory}/{step_name(5)}")
    save(f"{memory}/{step_name(5)}", pieces(5.0), world=ONE)
    check(latest(memory), 5.0)
    assert sorted(fs.ls("/runs/a/step_00000005", detail=False)) == [
        "/runs/a/step_00000005/manifest.msgpack",
        "/runs/a/step_00000005/rank_00000.bin",
    ]


def test_an_existing_checkpoint_is_never_replaced(memory: str) -> None:
    save(f"{memory}/c", pieces(1.0), world=ONE)
    with pytest.raises(ValueError, match=r"^memory://runs/a/c: this checkpoint exists already"):
        save(f"{memory}/c", pieces(2.0), world=ONE)
    check(f"{memory}/c", 1.0)


def test_a_failed_save_leaves_nothing(memory: str, monkeypatch: pytest.MonkeyPatch) -> None:
    fs = fsspec.filesystem("memory")

    def refuse(*_: Any, **__: Any) -> None:
        raise PermissionError(13, "Forbidden")

    with monkeypatch.context() as patch:
        patch.setattr(fs, "open", refuse)
        with pytest.raises(OSError, match=r"c/rank_00000\.bin: cannot write its .*\(Forbidden\)"):
            save(f"{memory}/c", pieces(1.0), world=ONE)
    assert not fs.exists("/runs/a/c/rank_00000.bin")
    assert latest(memory) is None


@pytest.mark.parametrize("damage", ["flip", "cut", "missing"])
def test_damage_names_leaf_and_file(memory: str, damage: str) -> None:
    save(f"{memory}/c", pieces(1.0), world=ONE)
    fs, path = fsspec.filesystem("memory"), "/runs/a/c/rank_00000.bin"
    raw = bytearray(fs.cat_file(path))
    if damage == "flip":
        raw[-1000] ^= 1
        expected = r"w: rank_00000\.bin bytes \d+ to \d+ have checksum"
    elif damage == "cut":
        del raw[-1000:]
        expected = rf"w: rank_00000\.bin has {len(raw)} bytes, the manifest says {len(raw) + 1000}"
    else:
        expected = r"w: rank_00000\.bin is missing"
    fs.rm(path)
    if damage != "missing":
        fs.pipe_file(path, bytes(raw))
    with pytest.raises(ValueError, match=expected):
        check(f"{memory}/c", 1.0)


def test_a_url_that_nothing_reaches_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^nowhere://a: fsspec cannot open it \("):
        load_extra("nowhere://a")


def test_a_place_behind_a_url_is_a_value() -> None:
    place = place_of("memory://runs/a/")
    assert isinstance(place, Remote)
    assert (place / "b", str(place / "b")) == (place_of("memory://runs/a/b"), "memory://runs/a/b")
    assert (place / "b").name == "b"
    assert len({place, place_of("memory://runs/a")}) == 1
