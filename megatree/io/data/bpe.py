"""Train a byte-level BPE: a vocabulary that covers any text, as a function of the texts alone."""

from collections.abc import Iterable

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

EOD = "<|endoftext|>"


def train_byte_bpe(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Return a byte-level BPE of exactly `vocab_size` entries: `EOD` (id 0), 256 bytes, merges.

    The same texts give the same vocabulary, whatever the number of threads: merges are ordered by
    count, then by the ids of the pair. Decoding an encoded text returns it unchanged.

    Args:
        texts: the documents to count pairs in.
        vocab_size: entries in all, at least 257.

    Raises:
        ValueError: if `vocab_size` leaves no room for the bytes, or the texts hold too few pairs.
    """
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    smallest = len(alphabet) + 1
    if vocab_size < smallest:
        raise ValueError(
            f"train_byte_bpe: vocab_size {vocab_size} does not hold {len(alphabet)} bytes and "
            f"{EOD}. Use at least {smallest}."
        )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[AddedToken(EOD, special=True)],
        initial_alphabet=sorted(alphabet),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    found = tokenizer.get_vocab_size()
    if found != vocab_size:
        raise ValueError(
            f"train_byte_bpe: the texts give {found} of {vocab_size} entries. "
            f"Add text, or lower vocab_size to {found}."
        )
    return tokenizer
