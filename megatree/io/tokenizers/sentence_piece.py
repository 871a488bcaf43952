"""A SentencePiece model (Llama, T5), with special tokens appended to its vocabulary."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any, Literal

from megatree.io.optional import optional
from megatree.io.tokenizers.identity import digest
from megatree.io.tokenizers.marked import encode_marked
from megatree.io.tokenizers.protocol import refuse_foreign_ids
from megatree.io.tokenizers.special import Special

# What Megatron's T5 puts between the model's own pieces and the sentinels, in this order.
MEGATRON_APPENDED = ("<CLS>", "<SEP>", "<EOD>", "<MASK>")


@dataclass(frozen=True, kw_only=True, eq=False)
class SentencePieceTokenizer:
    """Wraps a SentencePiece processor; see the protocol for the laws.

    Attributes:
        processor: the library's object.
        marks: spelling -> id of all ids that are no text: control pieces and appended ones.
        vocab_size: pieces of the model and appended ones.
        special: the special ids.
        identity: digest of the model file and the appended spellings.
    """

    processor: Any
    marks: dict[str, int]
    vocab_size: int
    special: Special
    identity: str

    def encode(self, text: str) -> list[int]:
        """Return the ids of a text."""
        return self.processor.encode(text)

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the ids of each text."""
        return self.processor.encode(list(texts), num_threads=1)

    def encode_marked(self, text: str) -> list[int]:
        """Return the ids of a text in which special tokens are spelled out."""
        return encode_marked(text, self.marks, self.encode)

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of ids; the library itself would drop control pieces."""
        refuse_foreign_ids(ids, self.vocab_size)
        spelled = {token: spelling for spelling, token in self.marks.items()}
        parts = []
        for is_mark, run in groupby(map(int, ids), key=spelled.__contains__):
            if is_mark:
                parts.extend(spelled[token] for token in run)
            else:
                parts.append(self.processor.decode(list(run)))
        return "".join(parts)

    def piece(self, token: int) -> str:
        """Return the vocabulary's own spelling of one id."""
        refuse_foreign_ids([token], self.vocab_size)
        if token < self.processor.get_piece_size():
            return self.processor.id_to_piece(token)
        return next(spelling for spelling, mark in self.marks.items() if mark == token)


def load_sentencepiece(
    model: Path,
    *,
    append: Sequence[str] = (),
    extra_ids: int = 0,
    extra_ids_order: Literal["ascending", "descending"] = "ascending",
) -> SentencePieceTokenizer:
    """Return the tokenizer of a SentencePiece model.

    Ids beyond the model's pieces: `append` in order, then the sentinels. Megatron's T5 appends
    `MEGATRON_APPENDED` and ascending sentinels; T5 of Hugging Face has nothing in between and
    descending ones (<extra_id_0> is the last id). A spelling that the model has is not appended.

    A document ends with <EOD> where the vocabulary has it, else with the model's </s>.

    Args:
        model: the file (tokenizer.model, spiece.model).
        append: spellings of special tokens.
        extra_ids: number of sentinels.
        extra_ids_order: which sentinel has the lowest id.

    Raises:
        ValueError: if `sentencepiece` is not installed or cannot read the file.
    """
    library = optional("sentencepiece", extra="data", purpose=str(model))
    content = model.read_bytes()
    processor = library.SentencePieceProcessor()
    try:
        processor.LoadFromSerializedProto(content)
    except RuntimeError as error:
        raise ValueError(
            f"{model}: it is no SentencePiece model ({len(content)} bytes). "
            "Give a tokenizer.model or spiece.model."
        ) from error
    size = processor.get_piece_size()
    marks = {processor.id_to_piece(i): i for i in range(size) if processor.is_control(i)}
    sentinels = [f"<extra_id_{number}>" for number in range(extra_ids)]
    ordered = sentinels if extra_ids_order == "ascending" else sentinels[::-1]
    vocab_size = size
    for spelling in (*append, *ordered):
        known = processor.piece_to_id(spelling)
        if processor.id_to_piece(known) == spelling:
            marks[spelling] = known
        elif spelling not in marks:
            marks[spelling] = vocab_size
            vocab_size += 1
    special = _special(processor, marks, sentinels)
    appended = {spelling: token for spelling, token in marks.items() if token >= size}
    return SentencePieceTokenizer(
        processor=processor,
        marks=marks,
        vocab_size=vocab_size,
        special=special,
        identity=digest("sentencepiece", {"model": content, "appended": appended}, special),
    )


def _special(processor: Any, marks: dict[str, int], sentinels: Sequence[str]) -> Special:
    def own(token: int) -> int | None:
        return token if token >= 0 else None

    eos = own(processor.eos_id())
    return Special(
        eod=marks.get("<EOD>", eos),
        bos=own(processor.bos_id()),
        eos=eos,
        pad=own(processor.pad_id()),
        unk=own(processor.unk_id()),
        mask=marks.get("<MASK>"),
        cls=marks.get("<CLS>"),
        sep=marks.get("<SEP>"),
        sentinels=tuple(marks[spelling] for spelling in sentinels),
    )
