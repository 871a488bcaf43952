"""From text to batches: documents, a split, an order, samples."""

from megatree.io.data.bpe import train_byte_bpe
from megatree.io.data.demo import Demo, load_demo
from megatree.io.data.documents import Documents, encode_documents
from megatree.io.data.entropy import unigram_entropy
from megatree.io.data.order import sample_ids
from megatree.io.data.split import split_documents
from megatree.io.data.tokens import TokenDataset

__all__ = [
    "Demo",
    "Documents",
    "TokenDataset",
    "encode_documents",
    "load_demo",
    "sample_ids",
    "split_documents",
    "train_byte_bpe",
    "unigram_entropy",
]
