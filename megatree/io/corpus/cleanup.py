"""Mend and sift documents of the web: address, broken characters, language, length."""

from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

from megatree.io.corpus.language import language_of, require_languages
from megatree.io.corpus.stream import Dropped, Job, Kept, Record, Tally, Verdict, filter_documents
from megatree.io.corpus.urls import BlockList
from megatree.io.optional import optional
from megatree.io.tokenizers import Tokenizer, TokenizerSpec, load_tokenizer

# A text of this many characters per token asked for is not counted: it has them.
_CHARACTERS_PER_TOKEN = 8


@dataclass(frozen=True, kw_only=True)
class Cleanup:
    """What stays, and how it is mended. Filters run in this order.

    Attributes:
        blocked: web addresses to leave out; None looks at none.
        url_key: of the address; documents without one stay.
        fix_text: mend characters that were decoded wrongly (ftfy).
        languages: that stay; none asked for keeps all.
        min_characters: the shortest text.
        max_characters: the longest text; None for any.
        min_tokens: fewest tokens, counted with `tokenizer` in texts of less than 8 characters per
            token asked for.
        tokenizer: to count tokens with.
    """

    blocked: BlockList | None = None
    url_key: str = "url"
    fix_text: bool = True
    languages: tuple[str, ...] = ("en",)
    min_characters: int = 1
    max_characters: int | None = None
    min_tokens: int = 0
    tokenizer: TokenizerSpec | None = None

    def __post_init__(self) -> None:
        if (self.min_tokens > 0) != (self.tokenizer is not None):
            raise ValueError(
                f"min-tokens: {self.min_tokens} with {'a' if self.tokenizer else 'no'} tokenizer. "
                "Give both, or neither."
            )


def clean(job: Job, rules: Cleanup) -> Tally:
    """Write the documents of a job that the rules keep, mended.

    Raises:
        ValueError: if an input cannot be read, a language is unknown, or a package is missing.
    """
    if rules.languages:
        require_languages(rules.languages)
    if rules.fix_text:
        _ftfy()
    if rules.tokenizer is not None:
        _tokenizer(rules.tokenizer)
    return filter_documents(job, partial(_judge, rules, job.key))


def _judge(rules: Cleanup, key: str, record: Record, text: str, line: int) -> Verdict:
    if rules.blocked is not None and isinstance(url := record.get(rules.url_key), str):
        reason = rules.blocked.reason(url)
        if reason is not None:
            return Dropped(reason=reason)
    fixed = _ftfy().fix_text(text) if rules.fix_text else text
    if not fixed.strip():
        return Dropped(reason="empty")
    if len(fixed) < rules.min_characters:
        return Dropped(reason="too few characters")
    if rules.max_characters is not None and len(fixed) > rules.max_characters:
        return Dropped(reason="too many characters")
    if rules.languages and (found := language_of(fixed)) not in rules.languages:
        return Dropped(reason=f"language {found}")
    if _too_few_tokens(rules, fixed):
        return Dropped(reason="too few tokens")
    if fixed == text:
        return Kept()
    return Kept(records=({**record, key: fixed},), notes=("text mended",))


def _too_few_tokens(rules: Cleanup, text: str) -> bool:
    if rules.tokenizer is None or len(text) >= _CHARACTERS_PER_TOKEN * rules.min_tokens:
        return False
    return len(_tokenizer(rules.tokenizer).encode(text)) < rules.min_tokens


def _ftfy() -> Any:
    return optional("ftfy", extra="data", purpose="fix-text")


@lru_cache(maxsize=1)
def _tokenizer(spec: TokenizerSpec) -> Tokenizer:
    return load_tokenizer(spec)
