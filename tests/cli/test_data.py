"""`megatree data` and `megatree corpus`: the guide's commands run, help is there, refusals help."""

import gzip
import json
import re
import shlex
from pathlib import Path

import pytest

from megatree.cli import corpus, data, data_options
from megatree.io.data.demo import load_demo
from megatree.io.data.indexed import IndexedFile

GUIDE = Path(__file__).parents[2] / "docs" / "data-preprocessing.md"
MAINS = {"data": data.main, "corpus": corpus.main}
CHAPTERS = [text[:3000] for text in load_demo().texts[:20]]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with what the guide's commands read; one process, to save their start."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(data_options.os, "sched_getaffinity", lambda pid: {0}, raising=False)
    texts = [*CHAPTERS, CHAPTERS[3], CHAPTERS[4].upper(), CHAPTERS[5] + " The end.", "Short."]
    Path("novels.jsonl").write_text("".join(json.dumps({"text": one}) + "\n" for one in texts))
    quiz = {"question": " ".join(CHAPTERS[9].split()[200:230]), "answer": "None."}
    Path("quiz.jsonl").write_text(json.dumps(quiz) + "\n")
    turns = [{"role": "user", "content": "Hello."}, {"role": "assistant", "content": "Yes?"}]
    Path("chats.jsonl").write_text(json.dumps({"messages": turns}) + "\n")
    Path("turns.jinja").write_text(
        "{% for m in messages %}{{ m.content }}{{ eod_token }}{% endfor %}"
    )
    return tmp_path


def run(command: str) -> int:
    megatree, group, *args = shlex.split(command)
    assert megatree == "megatree"
    return MAINS[group](args)


def test_the_commands_of_the_guide_run(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    blocks = re.findall(r"```bash\n(.*?)```", GUIDE.read_text(encoding="utf-8"), re.DOTALL)
    commands = [line for block in blocks for line in block.splitlines()]
    assert len(commands) == 12
    for command in commands:
        assert run(command) == 0, command
    printed = capsys.readouterr().out
    assert "24 documents" in printed
    assert CHAPTERS[0][:60] in printed.replace("\n", " ")
    assert IndexedFile("gpt_text_document").num_documents == 24
    assert len(IndexedFile("bert_text_sentence")) > 200
    assert IndexedFile("twice").num_documents == 48
    chat = IndexedFile("chats_tokens")
    assert chat.num_documents == 1
    assert "chats_tokens and _learned: 1 conversations" in printed
    learned = IndexedFile("chats_learned")[0]
    assert learned.tolist() == sorted(learned.tolist()), "the answer comes last"
    assert 0 < learned.sum() < len(chat[0])
    meta = [json.loads(Path(f"{name}.meta.json").read_text()) for name in ("chats_tokens", "twice")]
    assert len({one["tokenizer"]["identity"] for one in meta}) == 1
    with gzip.open("back.jsonl.gz", "rt", encoding="utf-8") as file:
        texts = [json.loads(line)["text"] for line in file]
    assert texts[:20] == CHAPTERS
    assert json.loads(Path("clean.json").read_text())["dropped"] == {"too few characters": 1}
    assert len(Path("near.jsonl").read_text().splitlines()) == 20
    train = [json.loads(line) for line in Path("train.jsonl").read_text().splitlines()]
    assert len(train) == 21
    assert [one["piece"] for one in train if "piece" in one] == [0, 1]


@pytest.mark.parametrize("group", MAINS)
def test_every_command_explains_itself(group: str, capsys: pytest.CaptureFixture[str]) -> None:
    commands = {"data": data.COMMANDS, "corpus": corpus.COMMANDS}[group]
    with pytest.raises(SystemExit) as stopped:
        MAINS[group](["--help"])
    assert stopped.value.code == 0
    overview = capsys.readouterr().out
    for name, (about, _, _) in commands.items():
        assert name in overview
        with pytest.raises(SystemExit) as stopped:
            MAINS[group]([name, "--help"])
        assert stopped.value.code == 0
        shown = " ".join(capsys.readouterr().out.replace("\u2502", " ").split())
        assert f"usage: megatree {group} {name}" in shown
        assert about in shown


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("megatree data frobnicate", r"no command is called so.*Use one of preprocess, chat"),
        ("megatree corpus cleanup", r"no command is called so.*Use one of wikipedia, urls, clean"),
        (
            "megatree data preprocess nothing.jsonl --output-prefix x --tokenizer.kind bytes",
            r"nothing.jsonl: No such file or directory. Name files that exist",
        ),
        (
            "megatree data preprocess novels.jsonl --output-prefix x --tokenizer.kind bert "
            "--tokenizer.path .",
            r"the folder has no vocab.txt, which kind 'bert' reads",
        ),
        (
            "megatree data chat chats.jsonl --output-prefix x --tokenizer.kind bytes",
            r"chat template: none is named\. Give a Jinja file as --template\.",
        ),
        (
            "megatree data chat chats.jsonl --output-prefix x --tokenizer.kind bytes "
            "--template novels.jsonl.json",
            r"novels.jsonl.json: holds no chat template",
        ),
        ("megatree data inspect nothing", r"nothing.(idx|bin)"),
        ("megatree data inspect x --tokenizer what", r"'what' is not KIND:PATH"),
        (
            "megatree data index 0.3 a 0.7 --cache c --seq 8",
            r"is not one prefix, a list of prefixes, or weights and prefixes",
        ),
        (
            "megatree corpus clean novels.jsonl --output novels.jsonl",
            r"novels.jsonl: already there. Name another output",
        ),
        (
            "megatree corpus near-duplicates novels.jsonl --output n --threshold 1.5",
            r"threshold: 1.5 is not between 0 and 1",
        ),
    ],
)
def test_what_cannot_be_done_is_refused_with_what_to_do(
    folder: Path, command: str, message: str
) -> None:
    before = sorted(one.name for one in folder.iterdir())
    with pytest.raises((ValueError, OSError), match=message):
        run(command)
    assert sorted(one.name for one in folder.iterdir()) == before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--tokenizer.kind null", "needs vocab_size and eod_id"),
        ("--tokenizer.kind bytes --keep-newlines", "Add --split-sentences, or remove it"),
        ("--tokenizer.kind bytes --tokenizer.extra-ids 3", "does not use it"),
        ("--tokenizer.kind byte", "byte"),
        ("--tokenizer.kind bytes --apend-eod", "--append-eod"),
    ],
)
def test_options_that_contradict_are_refused(
    options: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        run(f"megatree data preprocess a.jsonl --output-prefix x {options}")
    assert stopped.value.code == 2
    shown = capsys.readouterr().err.replace("\u2502", " ")
    assert message in " ".join(shown.split())


def test_a_pair_of_bytes_is_inspected_with_a_named_tokenizer(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run("megatree data preprocess novels.jsonl --output-prefix b --tokenizer.kind bytes")
    Path("b_text_document.meta.json").unlink()
    capsys.readouterr()
    run("megatree data inspect b_text_document --documents 1")
    assert "nothing beside the pair says which tokenizer made it" in capsys.readouterr().out
    run("megatree data inspect b_text_document --documents 1 --tokenizer bytes --characters 20")
    assert f"{CHAPTERS[0][:20]} ..." in capsys.readouterr().out
    run("megatree data inspect b_text_document --json")
    assert json.loads(capsys.readouterr().out)["documents"] == 24


def test_skipped_lines_are_told(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with open("novels.jsonl", "a", encoding="utf-8") as file:
        file.write("{\n[]\n")
    run(
        "megatree data preprocess novels.jsonl --output-prefix b --tokenizer.kind bytes "
        "--on-bad-line skip"
    )
    assert "left out: 1 no object, 1 not JSON; listed in b.bad.jsonl" in capsys.readouterr().out
    run("megatree data index b_text_document --cache c --seq 64 --split 8,1,1")
    shown = capsys.readouterr().out
    assert re.search(r"train: [\d,]+ samples\nvalid: [\d,]+ samples\ntest: ", shown)


def test_indices_of_sentences_are_built(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(
        "megatree data preprocess novels.jsonl --output-prefix s --tokenizer.kind bytes "
        "--split-sentences"
    )
    for objective in ("bert", "t5"):
        run(
            f"megatree data index s_text_sentence --cache c --seq 64 --objective {objective} "
            "--split 8,1,1 --samples 100 10 0"
        )
        found = re.search(r"s_text_sentence train: ([\d,]+) samples", capsys.readouterr().out)
        assert found is not None
        assert int(found[1].replace(",", "")) >= 100
