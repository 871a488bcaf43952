"""Text to token ids and back, over `tokenizers`, `sentencepiece` and `tiktoken`."""

from megatree.io.tokenizers.beside import (
    identity_beside,
    path_beside,
    read_beside,
    require_tokenizer,
    tokenizer_facts,
    write_beside,
)
from megatree.io.tokenizers.fast import FastTokenizer
from megatree.io.tokenizers.identity import require_same_identity
from megatree.io.tokenizers.plain import ByteTokenizer, NullTokenizer
from megatree.io.tokenizers.protocol import Tokenizer
from megatree.io.tokenizers.spec import TokenizerSpec, load_tokenizer
from megatree.io.tokenizers.special import Special
from megatree.io.tokenizers.train import train_tokenizer

__all__ = [
    "ByteTokenizer",
    "FastTokenizer",
    "NullTokenizer",
    "Special",
    "Tokenizer",
    "TokenizerSpec",
    "identity_beside",
    "load_tokenizer",
    "path_beside",
    "read_beside",
    "require_same_identity",
    "require_tokenizer",
    "tokenizer_facts",
    "train_tokenizer",
    "write_beside",
]
