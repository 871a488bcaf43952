"""A dump of Wikipedia to loose JSON: articles as running text."""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from urllib.parse import quote, urljoin

from megatree.io.corpus.dump import Page, read_pages
from megatree.io.corpus.stream import Tally, json_line, open_output
from megatree.io.corpus.wikitext import plain_text
from megatree.io.preprocess.parallel import ordered_map

_CHARACTERS_AT_ONCE = 1 << 19


@dataclass(frozen=True, kw_only=True)
class Articles:
    """Which pages of a dump become documents.

    Attributes:
        namespaces: numbers; 0 holds the articles.
        min_characters: the shortest text.
        max_page_characters: a page with more markup is dropped, and not held in memory.
    """

    namespaces: tuple[str, ...] = ("0",)
    min_characters: int = 1
    max_page_characters: int = 1 << 23


def extract_wikipedia(
    dumps: Sequence[Path],
    output: Path,
    *,
    articles: Articles | None = None,
    workers: int = 1,
    overwrite: bool = False,
    report: Callable[[Tally], None] = lambda tally: None,
) -> Tally:
    """Write the articles of dumps as loose JSON with `id`, `url`, `title`, `text`, in order.

    Args:
        dumps: pages-articles.xml, compressed or not.
        output: appears when it is whole.
        articles: which pages.
        workers: processes that strip the markup.
        overwrite: replace a file of that name.
        report: called after each batch of pages with the counts so far.

    Raises:
        ValueError: if a dump is damaged or declares entities, a package is missing, or the output
            exists.
    """
    if output.exists() and not overwrite:
        raise ValueError(f"{output}: already there. Name another output, or pass --overwrite.")
    rules = articles or Articles()
    plain_text("")  # a missing package is told before any work
    tally = Tally()
    with open_output(output, overwrite=overwrite) as stream:
        batches = _batches(dumps, rules)
        for data, some in ordered_map(partial(_documents, rules), batches, workers=workers):
            stream.write(data)
            tally = tally.plus(some)
            report(tally)
    return tally


def _batches(dumps: Sequence[Path], rules: Articles) -> Iterator[list[Page]]:
    batch: list[Page] = []
    size = 0
    for path in dumps:
        for page in read_pages(path, max_page_characters=rules.max_page_characters):
            batch.append(page)
            size += len(page.text or "") + 1024
            if size >= _CHARACTERS_AT_ONCE:
                yield batch
                batch, size = [], 0
    if batch:
        yield batch


def _documents(rules: Articles, pages: list[Page]) -> tuple[bytes, Tally]:
    dropped: Counter[str] = Counter()
    lines = []
    for page in pages:
        reason = _reason(rules, page)
        text = "" if reason else plain_text(page.text or "")
        if reason is None and len(text) < max(rules.min_characters, 1):
            reason = "too few characters" if text else "no text"
        if reason is not None:
            dropped[reason] += 1
            continue
        url = urljoin(page.site, quote(page.title.replace(" ", "_"), safe="/:(),'!*"))
        lines.append(json_line({"id": page.id, "url": url, "title": page.title, "text": text}))
    data = b"".join(lines)
    return data, Tally(
        documents=len(lines),
        written=len(lines),
        dropped=dict(dropped),
        bytes_read=sum(len(page.text or "") for page in pages),
        bytes_written=len(data),
    )


def _reason(rules: Articles, page: Page) -> str | None:
    if page.namespace not in rules.namespaces:
        return f"namespace {page.namespace}"
    if page.redirect:
        return "redirect"
    if page.text is None:
        return "too many characters"
    return None
