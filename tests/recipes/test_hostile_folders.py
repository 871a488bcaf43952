"""Folders that lie, of every format: an error that says where, and nothing made of the lie."""

import copy
import io
import json
import os
import random
import shutil
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from megatree.io.checkpoint import Piece, save
from megatree.io.formats import archive, dcp
from megatree.io.world import World
from megatree.models.gpt import gpt
from megatree.recipes import formats
from megatree.recipes.convert import Options, convert
from megatree.recipes.formats import Format, open_checkpoint
from tests.recipes.foreign import their_model

KINDS: tuple[Format, ...] = ("megatree", "dcp", "orbax", "megatron", "torch_dist")


@pytest.fixture(scope="module")
def honest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return folders of one model: hf, and one of every format that is written."""
    root = tmp_path_factory.mktemp("honest")
    their_model("llama2").save_pretrained(root / "hf")
    for kind in KINDS:
        options = Options(target=kind, tensor=2 if kind == "megatron" else 1, vocab_divisor=49)
        convert(str(root / "hf"), str(root / kind), options)
    meta = root / "meta"
    meta.mkdir()
    names = ("tok_embeddings.weight", "layers.0.feed_forward.w1.weight")
    torch.save({name: torch.ones(2, 2) for name in names}, meta / "consolidated.00.pth")
    (meta / "params.json").write_text('{"dim": 2, "n_layers": 1, "n_heads": 1}')
    return root


@pytest.fixture
def folder(honest: Path, tmp_path: Path) -> Callable[[str], Path]:
    """Return a function that copies one of them."""

    def copied(kind: str) -> Path:
        return Path(shutil.copytree(honest / kind, tmp_path / kind))

    return copied


LINKED = {
    "hf": ("config.json", "model.safetensors"),
    "meta": ("params.json", "consolidated.00.pth"),
    "megatron": (
        "iter_0000000/mp_rank_01",
        "iter_0000000/mp_rank_00/model_optim_rng.pt",
        "latest_checkpointed_iteration.txt",
        "iter_0000000",
    ),
    "torch_dist": ("iter_0000000/.metadata", "iter_0000000/common.pt",
                   "iter_0000000/metadata.json", "iter_0000000/__0_0.distcp"),
    "dcp": (".metadata", "__0_0.distcp", "megatree.msgpack"),
    "orbax": ("_METADATA", "megatree.msgpack", "manifest.ocdbt", "d"),
    "megatree": ("step_00000000/manifest.msgpack", "step_00000000/rank_00000.bin"),
}  # fmt: skip


@pytest.mark.parametrize(("kind", "name"), [(k, n) for k, names in LINKED.items() for n in names])
def test_a_symbolic_link_is_refused_in_every_format(
    kind: Format, name: str, folder: Callable[[str], Path], tmp_path: Path
) -> None:
    """It may lead anywhere: into another user's files, or to a device that never ends."""
    file = folder(kind) / name
    file.rename(tmp_path / "elsewhere")
    os.symlink(tmp_path / "elsewhere", file)
    with pytest.raises(ValueError, match=r"symbolic link|is not there|regular file"):
        read_all(open_checkpoint(tmp_path / kind, kind))


def read_all(opened: formats.Opened) -> None:
    for path, array in opened.reader.arrays.items():
        opened.reader.read(path, tuple((0, n) for n in array.shape))


ABSENT = {
    "meta": ("consolidated.00.pth", r"has no file, not consolidated.00.pth"),
    "megatron": ("iter_0000000/mp_rank_00/model_optim_rng.pt", r"is listed, and absent"),
    "torch_dist": ("iter_0000000/__0_0.distcp", r"__0_0.distcp is listed, and absent"),
    "dcp": ("__0_0.distcp", r"__0_0.distcp is listed, and absent"),
    "megatree": ("step_00000000/rank_00000.bin", r"rank_00000.bin"),
}


@pytest.mark.parametrize("kind", ABSENT)
def test_a_file_that_is_listed_and_absent_is_named(
    kind: Format, folder: Callable[[str], Path]
) -> None:
    name, message = ABSENT[kind]
    path = folder(kind)
    (path / name).unlink()
    with pytest.raises((ValueError, OSError), match=message):
        read_all(open_checkpoint(path, kind))


def test_a_rank_of_megatron_that_is_absent_is_named(folder: Callable[[str], Path]) -> None:
    path = folder("megatron")
    (path / "iter_0000000/mp_rank_00").rename(path / "iter_0000000/mp_rank_02")
    with pytest.raises(ValueError, match=r"lacks mp_rank_00_000. Copy all ranks"):
        open_checkpoint(path)


@pytest.mark.parametrize("text", ["../../etc", "/etc", "7x", "-1", "", "\u0661"])
def test_a_tracker_of_megatron_that_leads_out_is_refused(
    text: str, folder: Callable[[str], Path]
) -> None:
    path = folder("megatron")
    (path / "latest_checkpointed_iteration.txt").write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=r"iteration.txt: says .*, no iteration"):
        open_checkpoint(path)


COUNTS = {
    "hf": ("config.json", "num_hidden_layers"),
    "meta": ("params.json", "n_layers"),
}


@pytest.mark.parametrize("kind", COUNTS)
@pytest.mark.parametrize("count", [10**15, 0, -1])
def test_layers_that_no_tensor_holds_are_refused_before_any_is_made(
    kind: str, count: int, folder: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def made(*args: Any, **kwargs: Any) -> Any:
        assert not args, "a model of so many layers is being made"
        return gpt(*args, **kwargs)

    name, key = COUNTS[kind]
    file = folder(kind) / name
    file.write_text(json.dumps({**json.loads(file.read_text()), key: count}))
    monkeypatch.setattr(formats, "decoder", made)
    with pytest.raises(ValueError, match=rf"says {count} layers|num_layers|lack|is {count}"):
        open_checkpoint(file.parent)


def places_in(value: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    items = value.items() if isinstance(value, dict) else enumerate(value)
    for key, item in items:
        yield (*at, key)
        if isinstance(item, (dict, list)):
            yield from places_in(item, (*at, key))


ODD = [None, 0, -1, "x", "../x", 1e30, float("nan"), [], {}, 10**12, 10**30, [[[]]], True]


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("hf", "config.json"),
        ("meta", "params.json"),
        ("orbax", "_METADATA"),
        ("torch_dist", "iter_0000000/metadata.json"),
    ],
)
def test_whatever_a_file_of_json_says_the_error_names_the_folder(
    kind: Format, name: str, folder: Callable[[str], Path]
) -> None:
    """Sixty places with values of other types: opened, or refused; never another error."""
    path = folder(kind)
    file, draw = path / name, random.Random(7)
    plain = json.loads(file.read_text())
    refused = 0
    for _ in range(60):
        changed = copy.deepcopy(plain)
        *outer, last = draw.choice(list(places_in(changed)))
        inner = changed
        for key in outer:
            inner = inner[key]
        inner[last] = draw.choice(ODD)
        file.write_text(json.dumps(changed))
        try:
            open_checkpoint(path, kind)
        except ValueError as error:
            refused += 1
            assert str(path) in str(error) or "GPTConfig" in str(error)  # noqa: PT017
    assert refused > 10


NO_NUMBERS: tuple[tuple[Format, str, dict[str, Any], str], ...] = (
    ("hf", "config.json", {"rope_theta": "../x", "rope_parameters": None}, "rope_theta is '../x'"),
    ("hf", "config.json", {"rope_parameters": {"rope_theta": "1e4"}}, "rope_theta is '1e4'"),
    ("hf", "config.json", {"rope_parameters": {"rope_theta": None}}, "rope_theta is None"),
    ("hf", "config.json", {"hidden_size": "../x"}, "hidden_size is '../x'"),
    (
        "hf",
        "config.json",
        {"rope_parameters": {"rope_type": "llama3", "rope_theta": 1e4, "factor": "8"}},
        "factor is '8'",
    ),
    ("meta", "params.json", {"rope_theta": "../x"}, "rope_theta is '../x'"),
    ("meta", "params.json", {"dim": "../x"}, "dim is '../x'"),
)


@pytest.mark.parametrize(("kind", "name", "change", "message"), NO_NUMBERS)
def test_a_text_where_a_number_belongs_is_named_with_its_file(
    kind: Format, name: str, change: dict[str, Any], message: str, folder: Callable[[str], Path]
) -> None:
    """Of `float`, the error would name neither."""
    file = folder(kind) / name
    file.write_text(json.dumps({**json.loads(file.read_text()), **change}))
    with pytest.raises(ValueError, match="no number") as error:
        open_checkpoint(file.parent, kind)
    assert str(error.value) == f"{file}: {message}, no number. Copy it anew."


@pytest.mark.parametrize("told", [[1], "../x", 7])
def test_angles_that_are_no_object_are_named_with_their_file(
    told: Any, folder: Callable[[str], Path]
) -> None:
    file = folder("hf") / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "rope_parameters": told}))
    with pytest.raises(ValueError, match="no object") as error:
        open_checkpoint(file.parent)
    assert str(error.value) == f"{file}: rope_parameters is {told!r}, no object. Copy it anew."


def test_a_model_to_go_by_is_read_as_carefully(folder: Callable[[str], Path]) -> None:
    file = folder("hf") / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "vocab_size": "x"}))
    with pytest.raises(ValueError, match=r"config\.json: vocab_size is 'x', no number"):
        formats.model_like(str(file))


def test_an_error_of_a_library_is_told_with_the_folder(
    folder: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It says "invalid literal for int()", and not of what."""
    path = folder("hf")
    monkeypatch.setitem(formats._OPEN, "hf", lambda path, like, weights_only: int("../x"))
    with pytest.raises(ValueError, match="invalid literal") as error:
        open_checkpoint(path, "hf")
    assert str(error.value).startswith(f"{path}: its files do not say what a checkpoint of hf says")


def chunk_of(tensor: torch.Tensor, change: Callable[[zipfile.ZipFile, str, bytes], None]) -> bytes:
    """Return an archive of a tensor, its entries written anew by `change`."""
    stream, out = io.BytesIO(), io.BytesIO()
    torch.save(tensor, stream)
    with zipfile.ZipFile(stream) as old, zipfile.ZipFile(out, "w") as new:
        for entry in old.infolist():
            change(new, entry.filename, old.read(entry))
    return out.getvalue()


def _packed(new: zipfile.ZipFile, name: str, data: bytes) -> None:
    new.writestr(name, data, compress_type=zipfile.ZIP_DEFLATED)


def _short(new: zipfile.ZipFile, name: str, data: bytes) -> None:
    new.writestr(name, data[:8] if name.endswith("/data/0") else data)


def _huge(new: zipfile.ZipFile, name: str, data: bytes) -> None:
    # The pickle holds the size of the storage, 4096, as BININT2 (M) and little-endian bytes.
    new.writestr(name, data.replace(b"M\x00\x10", b"J\x00\x00\x00\x7f"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_packed, r"expands from \d+ to \d+ bytes, and torch packs nothing"),
        (_short, r"its storage has 16384 bytes and .* the entry has 8"),
        (_huge, r"its storage has 8522825728 bytes and .*, the entry has 16384"),
    ],
)
def test_chunks_whose_archive_lies_are_refused_and_nothing_is_allocated(
    change: Callable[[zipfile.ZipFile, str, bytes], None], message: str, tmp_path: Path
) -> None:
    raw = chunk_of(torch.arange(4096, dtype=torch.float32), change)
    (tmp_path / "x").write_bytes(b"before" + raw + b"after")
    with pytest.raises(ValueError, match=message):
        archive.locate(tmp_path / "x", 6, len(raw), "x at byte 6")


def test_a_chunk_is_read_where_it_lies(tmp_path: Path) -> None:
    """A slice of a storage, and a chunk that is no tensor."""
    stream = io.BytesIO()
    torch.save(torch.arange(10.0)[4:8], stream)
    (tmp_path / "x").write_bytes(b"ab" + stream.getvalue())
    region = archive.locate(tmp_path / "x", 2, len(stream.getvalue()), "x")
    assert region is not None
    assert dcp.read_region(region, ((1, 3),)).tolist() == [5.0, 6.0]
    other = io.BytesIO()
    torch.save({"a": 1}, other)
    (tmp_path / "y").write_bytes(other.getvalue())
    with pytest.raises(ValueError, match="y: holds no tensor"):
        archive.locate(tmp_path / "y", 0, len(other.getvalue()), "y")


def test_nothing_is_written_outside_the_target(tmp_path: Path) -> None:
    """Names of leaves that lead out, in a checkpoint of our own."""
    pieces = [Piece.whole("params.../../out", torch.ones(2), "embed")]
    save(tmp_path / "step_00000001", pieces, world=World.single())
    before = sorted(entry.name for entry in tmp_path.iterdir())
    with pytest.raises(ValueError, match=r"the key 'params.../../out' leads out"):
        convert(str(tmp_path / "step_00000001"), str(tmp_path / "x"), Options(target="orbax"))
    assert sorted(entry.name for entry in tmp_path.iterdir()) == before
    convert(str(tmp_path / "step_00000001"), str(tmp_path / "x"), Options(target="dcp"))
    assert sorted(entry.name for entry in tmp_path.iterdir()) == sorted([*before, "x"])
    assert sorted(entry.name for entry in (tmp_path / "x").iterdir()) == [
        ".metadata", "__0_0.distcp", "megatree.msgpack",
    ]  # fmt: skip
