"""From text to batches: documents, a split, an order, samples."""

from megatree.io.data.bert import BertDataset, BertOptions, bert_dataset
from megatree.io.data.blend_order import blend_order, exhaustive_order
from megatree.io.data.blended import (
    BlendedDataset,
    blend_by_epochs,
    blend_by_weights,
    blend_sizes,
)
from megatree.io.data.bpe import train_byte_bpe
from megatree.io.data.cache import IndexCache
from megatree.io.data.chat import ChatReport, chat_dataset, encode_chats, read_conversations
from megatree.io.data.chat_template import ChatTemplate
from megatree.io.data.corpus import (
    bert_datasets,
    gpt_datasets,
    packed_datasets,
    parse_blend,
    t5_datasets,
)
from megatree.io.data.dataset import Batch, Dataset
from megatree.io.data.demo import Demo, load_demo, load_demo_tokenizer
from megatree.io.data.documents import Documents, encode_documents
from megatree.io.data.entropy import unigram_entropy
from megatree.io.data.fim import Codec, FillInMiddle
from megatree.io.data.gpt import GPTDataset, GPTOptions, gpt_dataset
from megatree.io.data.gpt_index import GPTIndex, build_gpt_index
from megatree.io.data.index_format import token_dtype
from megatree.io.data.indexed import IndexedFile, IndexedWriter, merge_pairs
from megatree.io.data.loader import Loader, Share, StepBatch
from megatree.io.data.masked_index import build_masked_index
from megatree.io.data.masking import Masking
from megatree.io.data.mixture import Blend, Corpus
from megatree.io.data.mock import MockSequences
from megatree.io.data.order import sample_ids
from megatree.io.data.packed import PackedDataset, packed_dataset
from megatree.io.data.packing import pack
from megatree.io.data.sequences import Sequences
from megatree.io.data.shuffled import Shuffled
from megatree.io.data.splits import split_bounds, split_shares
from megatree.io.data.stream import Stream
from megatree.io.data.t5 import T5Dataset, T5Options, t5_dataset

__all__ = [
    "Batch",
    "BertDataset",
    "BertOptions",
    "Blend",
    "BlendedDataset",
    "ChatReport",
    "ChatTemplate",
    "Codec",
    "Corpus",
    "Dataset",
    "Demo",
    "Documents",
    "FillInMiddle",
    "GPTDataset",
    "GPTIndex",
    "GPTOptions",
    "IndexCache",
    "IndexedFile",
    "IndexedWriter",
    "Loader",
    "Masking",
    "MockSequences",
    "PackedDataset",
    "Sequences",
    "Share",
    "Shuffled",
    "StepBatch",
    "Stream",
    "T5Dataset",
    "T5Options",
    "bert_dataset",
    "bert_datasets",
    "blend_by_epochs",
    "blend_by_weights",
    "blend_order",
    "blend_sizes",
    "build_gpt_index",
    "build_masked_index",
    "chat_dataset",
    "encode_chats",
    "encode_documents",
    "exhaustive_order",
    "gpt_dataset",
    "gpt_datasets",
    "load_demo",
    "load_demo_tokenizer",
    "merge_pairs",
    "pack",
    "packed_dataset",
    "packed_datasets",
    "parse_blend",
    "read_conversations",
    "sample_ids",
    "split_bounds",
    "split_shares",
    "t5_dataset",
    "t5_datasets",
    "token_dtype",
    "train_byte_bpe",
    "unigram_entropy",
]
