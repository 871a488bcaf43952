"""BERT's WordPiece from vocab.txt, with the entries that Megatron appends to it."""

from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers

from megatree.io.tokenizers.fast import FastTokenizer
from megatree.io.tokenizers.identity import digest
from megatree.io.tokenizers.special import Special

OWN = {"pad": "[PAD]", "unk": "[UNK]", "cls": "[CLS]", "sep": "[SEP]", "mask": "[MASK]"}


def load_bert(vocab: Path, *, lowercase: bool = True, extra_ids: int = 0) -> FastTokenizer:
    """Return a WordPiece tokenizer; [BOS], [EOS], then <extra_id_i> follow the file's entries.

    A document ends with [EOS].

    Args:
        vocab: one entry a line; its number is its id.
        lowercase: fold case and strip accents (an uncased vocabulary).
        extra_ids: number of sentinels (T5 on a BERT vocabulary).

    Raises:
        ValueError: if the file repeats an entry or lacks [PAD], [UNK], [CLS], [SEP] or [MASK].
    """
    entries = _read(vocab)
    appended = ["[BOS]", "[EOS]", *(f"<extra_id_{number}>" for number in range(extra_ids))]
    for spelling in appended:
        entries.setdefault(spelling, len(entries))
    backend = Tokenizer(
        models.WordPiece(entries, unk_token=OWN["unk"], max_input_chars_per_word=100)
    )
    backend.normalizer = normalizers.BertNormalizer(lowercase=lowercase)
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece()
    marked = [*OWN.values(), *appended]
    backend.add_special_tokens([AddedToken(one, special=True, normalized=False) for one in marked])
    special = Special(
        **{name: entries[spelling] for name, spelling in OWN.items()},
        bos=entries["[BOS]"],
        eos=entries["[EOS]"],
        eod=entries["[EOS]"],
        sentinels=tuple(entries[spelling] for spelling in appended[2:]),
    )
    identity = digest("bert", {"vocab": entries, "lowercase": lowercase}, special)
    return FastTokenizer(backend=backend, special=special, identity=identity)


def _read(path: Path) -> dict[str, int]:
    lines = path.read_text(encoding="utf-8").split("\n")
    if not lines[-1]:
        lines.pop()
    entries: dict[str, int] = {}
    for number, line in enumerate(lines):
        entry = line.rstrip("\r")
        if entry in entries:
            raise ValueError(
                f"{path}:{number + 1}: entry {entry!r} stands on line {entries[entry] + 1} too. "
                "Remove one and keep the ids of the others, or use an intact vocab.txt."
            )
        entries[entry] = number
    missing = [spelling for spelling in OWN.values() if spelling not in entries]
    if missing:
        raise ValueError(
            f"{path}: {len(entries)} entries, without {', '.join(missing)}. Give a BERT vocab.txt."
        )
    return entries
