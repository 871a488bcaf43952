"""What the commands of `megatree data` take."""

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import tyro

from megatree.io.preprocess.blocks import MAX_LINE_BYTES
from megatree.io.tokenizers.spec import TokenizerSpec

Positional = tyro.conf.Positional


def cores() -> int:
    """Return the number of cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@dataclass(frozen=True, kw_only=True)
class Preprocess:
    """What `megatree data preprocess` takes.

    Args:
        inputs: files, in the order in which their documents are written.
        output_prefix: start of the names: PREFIX_KEY_document.bin and .idx, or ..._sentence...
        tokenizer: which one.
        json_keys: keys of the JSON objects (or columns of the table); each gives a pair of files.
        format: of the inputs; by default their suffixes tell.
        split_sentences: make each sentence a sequence of its own (BERT, T5).
        punkt: folder of punkt data for another language than English.
        keep_newlines: leave the white space after a sentence in it.
        append_eod: end each document with the end-of-document token.
        text_unit: what a document of plain text is; blank lines part paragraphs.
        workers: processes that encode; the result does not depend on it.
        on_bad_line: stop at a line that gives no document, or list it in PREFIX.bad.jsonl.
        max_line_bytes: a longer line is bad; memory stays bounded.
        overwrite: replace files made from other inputs or settings.
    """

    inputs: Positional[tuple[Path, ...]]
    output_prefix: str
    tokenizer: TokenizerSpec
    json_keys: tuple[str, ...] = ("text",)
    format: Literal["jsonl", "parquet", "text"] | None = None
    split_sentences: bool = False
    punkt: Path | None = None
    keep_newlines: bool = False
    append_eod: bool = False
    text_unit: Literal["paragraph", "line", "file"] = "paragraph"
    workers: int = field(default_factory=cores)
    on_bad_line: Literal["stop", "skip"] = "stop"
    max_line_bytes: int = MAX_LINE_BYTES
    overwrite: bool = False

    def __post_init__(self) -> None:
        if (self.keep_newlines or self.punkt) and not self.split_sentences:
            name = "keep-newlines" if self.keep_newlines else "punkt"
            raise ValueError(f"{name}: nothing is split. Add --split-sentences, or remove it.")


@dataclass(frozen=True, kw_only=True)
class Chat:
    """What `megatree data chat` takes.

    Args:
        inputs: JSONL with "messages" on every line: lists of objects with "role" and "content".
        output_prefix: start of the names: PREFIX_tokens.bin and .idx, PREFIX_learned.bin and .idx.
        tokenizer: which one.
        template: a Jinja file, or a JSON file with "chat_template"; by default the one in the
            tokenizer's folder.
        learn: learn every message of the assistant, or the last of each conversation.
        reserved: texts that no message may hold; by default the tokenizer's special tokens.
        on_bad_chat: stop at a conversation that cannot be used, or leave it out and count it.
        overwrite: replace pairs of that name.
    """

    inputs: Positional[tuple[Path, ...]]
    output_prefix: str
    tokenizer: TokenizerSpec
    template: Path | None = None
    learn: Literal["all", "last"] = "all"
    reserved: tuple[str, ...] = ()
    on_bad_chat: Literal["stop", "skip"] = "stop"
    overwrite: bool = False


@dataclass(frozen=True, kw_only=True)
class Merge:
    """What `megatree data merge` takes.

    Args:
        prefixes: of the pairs, in order; without .bin and .idx.
        output_prefix: of the pair to write.
        overwrite: replace a pair of that name.
    """

    prefixes: Positional[tuple[str, ...]]
    output_prefix: str
    overwrite: bool = False


@dataclass(frozen=True, kw_only=True)
class Inspect:
    """What `megatree data inspect` takes.

    Args:
        prefix: of the pair; without .bin and .idx.
        documents: show so many documents.
        first: the first one to show.
        characters: cut shown texts here; 0 shows all.
        ids: show ids and no text.
        json: print the counts as JSON.
        tokenizer: KIND:PATH to decode with; by default the one stored beside the pair.
    """

    prefix: Positional[str]
    documents: int = 3
    first: int = 0
    characters: int = 300
    ids: bool = False
    json: bool = False
    tokenizer: str | None = None


@dataclass(frozen=True, kw_only=True)
class Export:
    """What `megatree data export` takes.

    Args:
        prefix: of the pair; without .bin and .idx.
        output: loose JSON to write, compressed if it ends in .gz or .zst.
        json_key: key of the text.
        ids: write lists of ids and no text.
        tokenizer: KIND:PATH to decode with; by default the one stored beside the pair.
        workers: processes that decode.
        overwrite: replace a file of that name.
    """

    prefix: Positional[str]
    output: Path
    json_key: str = "text"
    ids: bool = False
    tokenizer: str | None = None
    workers: int = 1
    overwrite: bool = False


@dataclass(frozen=True, kw_only=True)
class Index:
    """What `megatree data index` takes.

    Args:
        data_path: a prefix, several, or weights and prefixes in turn.
        cache: folder for the indices; the run must be given the same one.
        seq: tokens of a row.
        samples: of train, valid and test; without it each split is passed over once.
        split: shares of train, valid and test.
        seed: of the order.
        objective: what is trained: gpt, bert (pairs of sentence runs) or t5.
        short_probability: bert, t5: share of samples that aim at fewer tokens than fit.
    """

    data_path: Positional[tuple[str, ...]]
    cache: Path
    seq: int
    samples: tuple[int, int, int] | None = None
    split: str = "969,30,1"
    seed: int = 1234
    objective: Literal["gpt", "bert", "t5"] = "gpt"
    short_probability: float = 0.1


@dataclass(frozen=True, kw_only=True)
class TrainTokenizer:
    """What `megatree data train-tokenizer` takes.

    Args:
        inputs: loose JSON, parquet or plain text.
        output: folder for the vocabulary.
        algorithm: byte-bpe covers any text (GPT-2's kind); wordpiece is BERT's.
        vocab_size: entries of the vocabulary.
        json_key: key of the text.
        format: of the inputs; by default their suffixes tell.
        keep_case: wordpiece: do not fold case.
        on_bad_line: stop at a line that gives no document, or pass over it.
    """

    inputs: Positional[tuple[Path, ...]]
    output: Path
    vocab_size: int
    algorithm: Literal["byte-bpe", "wordpiece", "sentencepiece-bpe", "sentencepiece-unigram"] = (
        "byte-bpe"
    )
    json_key: str = "text"
    format: Literal["jsonl", "parquet", "text"] | None = None
    keep_case: bool = False
    on_bad_line: Literal["stop", "skip"] = "stop"
