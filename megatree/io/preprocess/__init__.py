"""Raw text to `.bin/.idx` pairs of token ids and back."""

from megatree.io.preprocess.blocks import BadLine
from megatree.io.preprocess.counts import Counts, Progress
from megatree.io.preprocess.encode import Recipe
from megatree.io.preprocess.pairs import Inspection, export, inspect_pair, merge
from megatree.io.preprocess.run import Summary, preprocess
from megatree.io.preprocess.sentences import SentenceSplitter

__all__ = [
    "BadLine",
    "Counts",
    "Inspection",
    "Progress",
    "Recipe",
    "SentenceSplitter",
    "Summary",
    "export",
    "inspect_pair",
    "merge",
    "preprocess",
]
