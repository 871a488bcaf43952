"""A config's files, text and tokenizer become samples, or it is told what is wrong with them."""

import json
import lzma
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatree.cli.data import main as data_command
from megatree.io.data import (
    Blend,
    BlendedDataset,
    Corpus,
    GPTDataset,
    GPTOptions,
    IndexedFile,
    IndexedWriter,
    gpt_datasets,
)
from megatree.io.world import World
from megatree.parallel.model import lower_model
from megatree.recipes.build import layout_of_run, model_of
from megatree.recipes.config import MeshConfig, RunConfig
from megatree.recipes.data import RunData, open_data
from megatree.recipes.data_config import DataConfig
from megatree.recipes.text import read_texts
from megatree.recipes.vocabulary import load_tokenizer
from megatree.runtime.processes import world_of_group
from tests.ranks import ranks
from tests.recipes.tiny_run import SEQ, tiny_run, with_group

TEXTS = [f"Document {n}: " + "the cat sat on the mat. " * (5 + n) for n in range(40)]


def opened(cfg: RunConfig, samples: int = 16) -> RunData:
    return open_data(cfg, World.single(), samples=samples)


@pytest.fixture(scope="session")
def pair(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Return the prefix of a pair that the command made with the tokenizer of the package."""
    folder = tmp_path_factory.mktemp("pair")
    return preprocess(folder, "a", TEXTS)


def preprocess(folder: Path, name: str, texts: list[str], *tokenizer: str) -> str:
    source = folder / f"{name}.jsonl"
    source.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    demo = Path(__file__).parents[2] / "megatree" / "demo_data" / "tokenizer.json"
    named = ["hf", "--tokenizer.path", str(demo), "--tokenizer.eod", "<|endoftext|>"]
    told = ["preprocess", str(source), "--output-prefix", str(folder / name), "--workers", "1"]
    data_command([*told, "--append-eod", "--tokenizer.kind", *(tokenizer or named)])
    return str(folder / f"{name}_text_document")


def of_files(tmp_path: Path, *prefix: str, **changes: Any) -> RunConfig:
    """Return the tiny run on pairs."""
    cfg = tiny_run(tmp_path)
    return replace(cfg, data=replace(DataConfig(prefix=prefix, split="8,2"), **changes))


def test_samples_are_megatrons_for_the_same_settings(goldens_gpt: Any, tmp_path: Path) -> None:
    """From the fields of a config to the golden samples: nothing on the way changes one."""
    prefix, told, arrays = goldens_gpt
    reset, train_samples = told["reset"], told["samples"]
    cfg = of_files(tmp_path, prefix, split=told["split"], seed=told["seed"], **reset)
    model = replace(cfg.model, vocab_size=50257, seq_length=told["seq"])
    cfg = replace(cfg, model=model, train=replace(cfg.train, eval_every=0, eval_samples=0))
    cfg = replace(cfg, data=replace(cfg.data, tokenizer=f"gpt2:{told['tokenizer']}"))
    data = opened(cfg, samples=train_samples)
    for name, of in (("tokens", "tokens"), ("labels", "labels"), ("weights", "loss_mask")):
        for row, sample in enumerate(arrays["train.sample_ids"][:20].tolist()):
            found = data.train.batch(sample, 1)[name][0]
            np.testing.assert_array_equal(found, arrays[f"train.{of}"][row])
    assert len(data.train.dataset) == len(arrays["train.shuffle_index"])
    if reset:
        rows = [data.train.batch(k, 1) for k in arrays["train.sample_ids"].tolist()]
        positions = np.concatenate([row["positions"] for row in rows])
        np.testing.assert_array_equal(positions, arrays["train.position_ids"])
        segments = np.concatenate([row["segments"] for row in rows])
        starts = np.array([[row.tolist().index(s) for s in row] for row in segments])
        np.testing.assert_array_equal(starts, arrays["train.attention_start"])


@pytest.fixture(params=["g01", "g08"])
def goldens_gpt(request: pytest.FixtureRequest, shared: Path) -> Any:
    folder = shared / "goldens"
    if not folder.is_dir():
        pytest.skip(f"missing data: {folder} is no folder. Copy the goldens there.")
    told = {
        "g01": {"seq": 64, "split": "969,30,1", "samples": 1291, "reset": {}},
        "g08": {
            "seq": 1024,
            "split": "949,50,1",
            "samples": 300,
            "reset": {
                "reset_positions": True,
                "reset_attention": True,
                "eod_mask_loss": True,
            },
        },
    }[request.param]
    told |= {"seed": 1234, "tokenizer": shared / "data" / "tokenizers" / "gpt2"}
    with np.load(folder / "gpt" / f"{request.param}.npz") as file:
        arrays = dict(file)
    return str(folder / "data" / "austen40_text_document"), told, arrays


def test_what_is_held_out_is_a_split_and_the_same_for_every_seed_of_the_weights(
    tmp_path: Path, pair: str
) -> None:
    cfg = of_files(tmp_path, pair)
    data, other = opened(cfg), opened(with_group(cfg, "train", seed=5))
    assert data.valid is not None
    assert other.valid is not None
    assert data.valid.identity == other.valid.identity
    assert data.train.identity == other.train.identity
    source = IndexedFile(pair)
    first_held_out = int(source.lengths[:32].sum())
    assert len(data.valid.dataset) == (int(source.lengths[32:].sum()) - 1) // SEQ
    assert isinstance(data.train.dataset, GPTDataset)
    assert data.train.dataset.index.documents.max() == 31
    assert first_held_out > 0
    moved = opened(with_group(cfg, "data", seed=5))
    assert moved.train.identity != data.train.identity


def test_nothing_is_held_out_where_nothing_is_asked(tmp_path: Path, pair: str) -> None:
    cfg = with_group(of_files(tmp_path, pair), "train", eval_every=0, eval_samples=0)
    assert opened(with_group(cfg, "data", split="100")).valid is None


def test_prefixes_are_blended_by_weights_or_epochs_and_lists_per_split_are_whole(
    tmp_path: Path, pair: str
) -> None:
    second = preprocess(tmp_path, "b", TEXTS[:10])
    weighted = opened(of_files(tmp_path, "0.7", pair, "0.3", second), samples=20)
    assert isinstance(weighted.train.dataset, BlendedDataset)
    counts = np.bincount(weighted.train.dataset.dataset_index).tolist()
    assert counts == [14, 6]
    expected = gpt_datasets(
        Blend(
            parts=(Corpus(prefix=pair, split="8,2"), Corpus(prefix=second, split="8,2")),
            weights=(0.7, 0.3),
        ),
        GPTOptions(seq=SEQ, seed=1234),
        num_samples=(20, 4, 0),
    )
    for mine, theirs in ((weighted.train, expected[0]), (weighted.valid, expected[1])):
        assert mine is not None
        assert theirs is not None
        np.testing.assert_array_equal(
            mine.batch(0, len(theirs))["tokens"], theirs.rows(np.arange(len(theirs)))["tokens"]
        )
    twice = opened(of_files(tmp_path, pair, second, epochs=(1.0, 2.0)))
    assert isinstance(twice.train.dataset, BlendedDataset)
    parts = [len(part) for part in twice.train.dataset.datasets]
    assert np.bincount(twice.train.dataset.dataset_index).tolist() == [parts[0], 2 * parts[1]]
    whole = opened(of_files(tmp_path, pair, valid_prefix=(second,)))
    assert whole.valid is not None
    assert len(whole.valid.dataset) == (int(IndexedFile(second).lengths.sum()) - 1) // SEQ


@ranks(2)
def test_one_rank_encodes_a_text_for_all(tmp_path: Path) -> None:
    """Each rank once encoded the whole text for itself."""
    world = world_of_group()
    cfg = world.broadcast(world.on_first(lambda: tiny_run(tmp_path)))
    names: list[str] = []

    def noted(name: str) -> tuple[str, ...]:
        names.append(name)
        return read_texts(name)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("megatree.recipes.data.read_texts", noted)
        data = open_data(cfg, world, samples=16)
    assert world.gather(names) == [[cfg.data.text], []]
    assert len(set(world.gather(data.train.identity))) == 1
    absent = with_group(cfg, "data", text="absent.txt")
    with pytest.raises(OSError, match=r"absent\.txt"):
        open_data(absent, world, samples=16)


def test_the_index_is_kept_beside_the_checkpoints(tmp_path: Path, pair: str) -> None:
    cfg = of_files(tmp_path, pair)
    opened(cfg)
    kept = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "run" / "index").iterdir()}
    assert any(name.endswith(".npy") for name in kept)
    opened(cfg, samples=15)  # the same epochs
    again = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "run" / "index").iterdir()}
    assert again == kept
    opened(with_group(cfg, "data", cache=str(tmp_path / "elsewhere")))
    assert (tmp_path / "elsewhere").is_dir()


def test_an_index_built_before_the_job_is_the_one_that_it_takes(tmp_path: Path, pair: str) -> None:
    cache = tmp_path / "cache"
    told = ["index", pair, "--cache", str(cache), "--seq", str(SEQ), "--samples", "16", "4", "0"]
    data_command([*told, "--split", "8,2", "--seed", "7"])
    built = sorted(cache.iterdir())
    opened(of_files(tmp_path, pair, cache=str(cache), seed=7))
    assert built == sorted(cache.iterdir())
    opened(of_files(tmp_path, pair, cache=str(cache), seed=8))
    assert len(built) < len(sorted(cache.iterdir()))


def test_rows_of_whole_documents_say_what_they_need(tmp_path: Path, pair: str) -> None:
    cfg = of_files(tmp_path, pair, kind="packed", too_long="cut")
    row = opened(cfg).train.batch(0, 2)
    assert row.keys() - {"tokens", "labels", "weights"} == set(cfg.data.entries)
    assert set(cfg.data.entries) == {"positions", "segments"}
    single = with_group(cfg, "data", packing="single")
    assert opened(single).train.batch(0, 2).keys() == {"tokens", "labels", "weights"}
    assert DataConfig(reset_positions=True).entries == ("positions",)


def test_marks_of_fill_in_the_middle_are_entries_of_the_tokenizer(
    tmp_path: Path, pair: str
) -> None:
    marks = ("!", "$", "%")
    cfg = of_files(tmp_path, pair, fim_rate=1.0, fim_marks=marks, tokenizer="demo")
    ids = [load_tokenizer(cfg.data).encode(mark)[0] for mark in marks]
    tokens = opened(cfg).train.batch(0, 8)["tokens"]
    plain = opened(of_files(tmp_path, pair)).train.batch(0, 8)["tokens"]
    assert np.isin(tokens, ids).any()
    assert not np.isin(plain, ids).any()
    with pytest.raises(ValueError, match=r"data.fim_marks: '<fim_prefix>' is \d+ tokens of this"):
        opened(with_group(cfg, "data", fim_marks=DataConfig().fim_marks))


def test_mock_data_need_no_file(tmp_path: Path) -> None:
    cfg = replace(tiny_run(tmp_path), data=DataConfig(text="mock"))
    cfg = with_group(cfg, "model", seq_length=1024)
    row = opened(cfg).train.batch(0, 2)
    inside = row["tokens"][:, 1:] == row["tokens"][:, :-1] + 1
    assert inside.mean() > 0.9


def test_ids_of_two_tokenizers_are_refused(tmp_path: Path, pair: str) -> None:
    other = preprocess(tmp_path, "other", TEXTS[:5], "bytes")
    with pytest.raises(ValueError, match=r"other_text_document: its ids come from tokenizer sha"):
        opened(of_files(tmp_path, "0.5", pair, "0.5", other))
    with pytest.raises(ValueError, match=r"other_text_document: .*but data.tokenizer \(demo\) was"):
        opened(of_files(tmp_path, other, tokenizer="demo"))
    assert opened(of_files(tmp_path, pair, tokenizer="demo")).vocabulary.size == 512


def test_what_the_files_do_not_tell_is_asked_for(tmp_path: Path) -> None:
    """A pair that Megatron wrote has no notes beside it."""
    prefix = str(tmp_path / "bare")
    with IndexedWriter(prefix, np.uint16) as writer:
        for _ in range(20):
            writer.add_document([list(range(50))])
    data = opened(of_files(tmp_path, prefix))
    assert data.vocabulary.identity is None
    with pytest.raises(ValueError, match=r"data.reset_attention: looks for the end of a document"):
        opened(of_files(tmp_path, prefix, reset_attention=True))
    low = with_group(of_files(tmp_path, prefix), "model", vocab_size=49)
    with pytest.raises(ValueError, match=r"bare: sequence \d+ holds token 49, and the vocab.* 49"):
        opened(low).train.batch(0, 16)


def test_the_padded_vocabulary_does_not_depend_on_the_mesh(tmp_path: Path) -> None:
    """In Megatron it is padded to a multiple of 128 times tp, so files of one tp fit no other."""
    shapes = set()
    for tp in (1, 4):
        cfg = tiny_run(tmp_path)
        model = replace(cfg.model, vocab_size=501, vocab_pad=8, kv_heads=4)
        cfg = replace(cfg, model=model, mesh=MeshConfig(tp=tp))
        table = lower_model(model_of(cfg), layout_of_run(cfg)).types["embed.table"]
        shapes.add(tuple(table.shape))
    assert shapes == {(504, 16)}


@pytest.mark.parametrize("name", ["a.txt", "a.txt.xz", "a.jsonl", "a.jsonl.xz"])
def test_a_text_is_read_in_each_form(tmp_path: Path, name: str) -> None:
    words = "Caf\u00e9 \u2028 and tea.\n"
    raw = (words if ".txt" in name else json.dumps({"text": words}) + "\n").encode()
    (tmp_path / name).write_bytes(lzma.compress(raw) if name.endswith(".xz") else raw)
    assert read_texts(str(tmp_path / name)) == (words,)


def test_a_raw_line_separator_inside_json_ends_no_line(tmp_path: Path) -> None:
    """JSON allows U+2028 and U+0085 unescaped; `str.splitlines` cuts there."""
    (tmp_path / "a.jsonl").write_text('{"text": "one\u2028two\u0085three"}\n', encoding="utf-8")
    assert read_texts(str(tmp_path / "a.jsonl")) == ("one\u2028two\u0085three",)


@pytest.mark.parametrize(
    ("files", "size", "text"),
    [
        (("tokenizers", "gpt2"), 50257, "Hello world, it's 2 a.m."),
        (("tokenizers", "bert-base-uncased"), 30524, "hello world"),
        (("tokenizers", "mistral-v1"), 32000, "Hello world"),
        (("weights", "stories260K", "hf"), 512, "Once upon a time"),
    ],
)
def test_a_folder_of_a_vocabulary_is_a_tokenizer(
    shared: Path, files: tuple[str, ...], size: int, text: str
) -> None:
    tokenizer = load_tokenizer(DataConfig(tokenizer=str(shared.joinpath("data", *files))))
    assert tokenizer.vocab_size == size
    assert tokenizer.decode(tokenizer.encode(text)).strip() == text


@pytest.mark.parametrize(
    ("group", "changes", "message"),
    [
        ("data", {"text": ""}, r"^data: this recipe brings no data\. Set data.prefix to what"),
        ("data", {"text": "absent.txt"}, r"No such file or directory: 'absent.txt'"),
        ("data", {"tokenizer": ""}, r"^data.tokenizer: none is named, and none is noted"),
        ("data", {"tokenizer": "absent"}, r"^data.tokenizer: 'absent' is no vocabulary\. Give"),
        ("data", {"tokenizer": __file__}, r"^data.tokenizer: .*test_data.py' is no vocabulary"),
        ("data", {"text": "", "prefix": ("absent",)}, r"absent.(idx|bin): is not there\. Name the"),
        ("data", {"split": "1,2,3,4"}, r"^split '1,2,3,4': 4 numbers"),
        (
            "model",
            {"vocab_size": 500},
            r"^model.vocab_size: 500, but the tokenizer has 512 entries\. Set model.vocab_size",
        ),
        (
            "train",
            {"eval_samples": 1000},
            r"^train.eval_samples: 1000, but \d+ samples are held out\. "
            r"Set train.eval_samples to at most \d*[02468],",
        ),
    ],
)
def test_what_does_not_fit_is_refused(
    tmp_path: Path, group: str, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises((ValueError, OSError), match=message):
        opened(with_group(tiny_run(tmp_path), group, **changes))


def test_a_split_that_rounds_to_nothing_is_refused_at_once(tmp_path: Path) -> None:
    """Megatron counts epochs for ever here."""
    few = preprocess(tmp_path, "few", TEXTS[:4])
    with pytest.raises(ValueError, match=r"eval_samples: 4, but 0 samples are held out"):
        opened(of_files(tmp_path, few, split="999,1"))
    with pytest.raises(ValueError, match=r"split '1,999' of 4 sequences leaves none for train"):
        opened(of_files(tmp_path, few, split="1,999"))


def test_a_bad_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "bad.jsonl").write_text('{"text": "a"}\n{"txt": "b"}\n', encoding="utf-8")
    with pytest.raises(ValueError, match=r'bad.jsonl:2: no JSON object with a "text"'):
        read_texts(str(tmp_path / "bad.jsonl"))
    (tmp_path / "latin.txt").write_bytes("caf\u00e9".encode("latin-1"))
    with pytest.raises(ValueError, match=r"latin.txt is no UTF-8 text \(.*\)\. Convert it"):
        read_texts(str(tmp_path / "latin.txt"))
    (tmp_path / "a.csv").write_text("x", encoding="utf-8")
    with pytest.raises(ValueError, match=r"a.csv is neither .jsonl nor .txt"):
        read_texts(str(tmp_path / "a.csv"))
