"""What the commands of `megatree corpus` take."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import tyro

from megatree.cli.data_options import cores
from megatree.io.preprocess.blocks import MAX_LINE_BYTES

Positional = tyro.conf.Positional


@dataclass(frozen=True, kw_only=True)
class Files:
    """What the commands on loose JSON share.

    Args:
        inputs: loose JSON, compressed or not.
        output: file to write, compressed if it ends in .gz or .zst; it appears when it is whole.
        json_key: key of the text.
        workers: processes; the result does not depend on it.
        on_bad_line: stop at a line that gives no document, or count it and go on.
        max_line_bytes: a longer line is bad; memory stays bounded.
        overwrite: replace a file of the output's name.
        counts: file for the counts, as JSON.
    """

    inputs: Positional[tuple[Path, ...]]
    output: Path
    json_key: str = "text"
    workers: int = field(default_factory=cores)
    on_bad_line: Literal["stop", "skip"] = "stop"
    max_line_bytes: int = MAX_LINE_BYTES
    overwrite: bool = False
    counts: Path | None = None


@dataclass(frozen=True, kw_only=True)
class Wikipedia:
    """What `megatree corpus wikipedia` takes.

    Args:
        dumps: pages-articles.xml, compressed or not.
        output: loose JSON to write.
        namespaces: numbers of the namespaces to keep; 0 holds the articles.
        min_characters: the shortest text.
        workers: processes; the result does not depend on it.
        overwrite: replace a file of the output's name.
        counts: file for the counts, as JSON.
    """

    dumps: Positional[tuple[Path, ...]]
    output: Path
    namespaces: tuple[str, ...] = ("0",)
    min_characters: int = 1
    workers: int = field(default_factory=cores)
    overwrite: bool = False
    counts: Path | None = None


@dataclass(frozen=True, kw_only=True)
class Urls:
    """What `megatree corpus urls` takes.

    Args:
        inputs: lists of web addresses, one a line.
        output: file to write.
        block_list: files of domains to leave out, one a line.
        overwrite: replace a file of the output's name.
        counts: file for the counts, as JSON.
    """

    inputs: Positional[tuple[Path, ...]]
    output: Path
    block_list: tuple[Path, ...] = ()
    overwrite: bool = False
    counts: Path | None = None


@dataclass(frozen=True, kw_only=True)
class Clean(Files):
    """What `megatree corpus clean` takes.

    Args:
        block_list: files of domains to leave out, one a line.
        url_key: key of a document's web address; without a block list only bad ones are left out.
        languages: to keep, as ISO 639-1 codes; none keeps all.
        keep_broken_text: do not mend characters that were decoded wrongly.
        min_characters: the shortest text.
        max_characters: the longest text.
        min_tokens: fewest tokens, in texts of less than 8 characters per token.
        tokenizer: KIND:PATH to count tokens with.
    """

    block_list: tuple[Path, ...] = ()
    url_key: str = "url"
    languages: tuple[str, ...] = ("en",)
    keep_broken_text: bool = False
    min_characters: int = 1
    max_characters: int | None = None
    min_tokens: int = 0
    tokenizer: str | None = None


@dataclass(frozen=True, kw_only=True)
class Exact(Files):
    """What `megatree corpus exact-duplicates` takes.

    Args:
        normalize: compare texts as they are, or without regard to case and white space.
    """

    normalize: Literal["none", "case-and-space"] = "none"


@dataclass(frozen=True, kw_only=True)
class Near(Files):
    """What `megatree corpus near-duplicates` takes.

    Args:
        threshold: similarity from which two documents count as the same.
        measure: shared 5-character pieces over those of both (Jaccard), of the shorter text or of
            the longer.
        num_places: of a signature, a power of two; more find more of the pairs near the threshold.
        pairs: keep the pairs in this file.
        groups: keep the groups in this file.
    """

    threshold: float = 0.7
    measure: Literal["union", "min", "max"] = "union"
    num_places: int = 256
    pairs: Path | None = None
    groups: Path | None = None


@dataclass(frozen=True, kw_only=True)
class Pairs(Files):
    """What `megatree corpus find-pairs` takes; the output takes the pairs.

    Args:
        threshold: similarity from which a pair is written.
        measure: shared 5-character pieces over those of both (Jaccard), of the shorter text or of
            the longer.
        num_places: of a signature, a power of two; more find more of the pairs near the threshold.
    """

    threshold: float = 0.5
    measure: Literal["union", "min", "max"] = "union"
    num_places: int = 256


@dataclass(frozen=True, kw_only=True)
class Groups:
    """What `megatree corpus group-pairs` takes.

    Args:
        pairs: file of pairs.
        output: file to write.
        threshold: similarity that connects; at least the one of the pairs.
        overwrite: replace a file of the output's name.
    """

    pairs: Positional[Path]
    output: Path
    threshold: float = 0.7
    overwrite: bool = False


@dataclass(frozen=True, kw_only=True)
class DropGroups(Files):
    """What `megatree corpus drop-groups` takes.

    Args:
        groups: file of groups; of each, the first document stays.
    """

    groups: Path


@dataclass(frozen=True, kw_only=True)
class Decontaminate(Files):
    """What `megatree corpus decontaminate` takes.

    Args:
        against: evaluation sets: loose JSON, or plain text (.txt) with blank lines between.
        against_keys: keys of their texts.
        num_words: length of the word sequences to look for.
        min_words: a text with fewer words than that, but at least so many, is looked for whole.
        margin: characters cut out on either side of a match.
        min_piece: the shortest piece of a cut document that stays, in characters.
        max_cuts: a document with more cuts is dropped.
        max_occurrences: what is found more often is a common phrase and stays; negative cuts all.
    """

    against: tuple[Path, ...]
    against_keys: tuple[str, ...] = ("text",)
    num_words: int = 13
    min_words: int = 8
    margin: int = 200
    min_piece: int = 200
    max_cuts: int = 10
    max_occurrences: int = 10
