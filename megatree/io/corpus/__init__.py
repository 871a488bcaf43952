"""Make a corpus of loose JSON cleaner: every step streams, and counts what it drops and why."""

from megatree.io.corpus.cleanup import Cleanup, clean
from megatree.io.corpus.decontaminate import Decontamination, decontaminate
from megatree.io.corpus.exact import drop_exact_duplicates
from megatree.io.corpus.groups import drop_groups, group_pairs
from megatree.io.corpus.near import NearDuplicates, find_pairs
from megatree.io.corpus.stream import Tally
from megatree.io.corpus.urls import BlockList, filter_urls
from megatree.io.corpus.wikipedia import Articles, extract_wikipedia

__all__ = [
    "Articles",
    "BlockList",
    "Cleanup",
    "Decontamination",
    "NearDuplicates",
    "Tally",
    "clean",
    "decontaminate",
    "drop_exact_duplicates",
    "drop_groups",
    "extract_wikipedia",
    "filter_urls",
    "find_pairs",
    "group_pairs",
]
