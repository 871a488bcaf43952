"""Dumps of Wikipedia: articles as text, attacks refused, memory bounded."""

import bz2
import json
import tracemalloc
from pathlib import Path
from xml.sax.saxutils import escape

import pytest

from megatree.io.corpus import Articles, extract_wikipedia
from megatree.io.corpus.dump import read_pages
from megatree.io.corpus.wikitext import plain_text

ADA = """{{Infobox person|name=A {{nested|x}}}}
'''Ada Lovelace''' (10&nbsp;December 1815) was an [[English people|English]] [[mathematician]].<ref
name="a">A note {{cite|x}}</ref> [[File:Ada.jpg|thumb|A caption with a [[link]]]]
== Life ==
* Born in [[London]]<br/>in winter
{| class="wikitable"
! a !! b
|-
| 1 || 2
|}
__NOTOC__
See [[Star Trek: Voyager]] &amp; [[Mission: Impossible|MI]], [https://x.org a site] <math>x^2</math>
[[Category:People]] [[de:Ada Lovelace]]"""
TEXT = """Ada Lovelace (10\u00a0December 1815) was an English mathematician.
Life
Born in London
in winter
See Star Trek: Voyager & MI, a site"""


def page(
    title: str, text: str, *, namespace: int = 0, redirect: bool = False, number: int = 1
) -> str:
    target = '<redirect title="Elsewhere" />' if redirect else ""
    return (
        f"<page><title>{escape(title)}</title><ns>{namespace}</ns><id>{number}</id>{target}"
        f"<revision><id>99</id><contributor><id>5</id></contributor>"
        f'<text xml:space="preserve">{escape(text)}</text></revision></page>'
    )


def dump(*pages: str, head: str = "") -> str:
    site = "<siteinfo><base>https://en.wikipedia.org/wiki/Main_Page</base></siteinfo>"
    return (
        f'{head}<mediawiki xmlns="http://www.mediawiki.org/xml/export-0.11/">{site}'
        f"{''.join(pages)}</mediawiki>"
    )


def test_markup_becomes_the_text_a_reader_sees() -> None:
    assert plain_text(ADA) == TEXT


def test_articles_are_written_and_the_rest_is_counted(tmp_path: Path) -> None:
    path = tmp_path / "dump.xml.bz2"
    pages = [
        page("Ada Lovelace & co", ADA, number=7),
        page("Talk", "hello", namespace=1),
        page("Old name", "#REDIRECT [[x]]", redirect=True),
        page("Empty", "{{stub}}"),
        page("Huge", "x" * 5000),
        page("Caf\u00e9", "Coffee is drunk here."),
    ]
    path.write_bytes(bz2.compress(dump(*pages).encode()))
    tally = extract_wikipedia(
        [path], tmp_path / "out.jsonl", articles=Articles(max_page_characters=4000)
    )
    first, second = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert first == {
        "id": "7",
        "url": "https://en.wikipedia.org/wiki/Ada_Lovelace_%26_co",
        "title": "Ada Lovelace & co",
        "text": TEXT,
    }
    assert second["url"].endswith("/Caf%C3%A9")
    assert tally.documents == 2
    assert tally.dropped == {
        "namespace 1": 1,
        "redirect": 1,
        "no text": 1,
        "too many characters": 1,
    }


LAUGHS = (
    "<!DOCTYPE m ["
    + '<!ENTITY a "ha">'
    + "".join(f'<!ENTITY {chr(98 + n)} "{f"&{chr(97 + n)};" * 10}">' for n in range(9))
    + "]>"
)
FILE = '<!DOCTYPE m [<!ENTITY x SYSTEM "file:///etc/passwd">]>'


@pytest.mark.parametrize("head", [LAUGHS, FILE, '<!DOCTYPE m SYSTEM "https://x.org/a.dtd">'])
def test_entities_and_document_types_are_refused(tmp_path: Path, head: str) -> None:
    path = tmp_path / "dump.xml"
    path.write_text(dump("<page><title>&j;&x;</title></page>", head=head), encoding="utf-8")
    with pytest.raises(ValueError, match=r"dump.xml: line 1: it declares a document type or ent"):
        extract_wikipedia([path], tmp_path / "out.jsonl")
    assert not (tmp_path / "out.jsonl").exists()


def test_a_cut_dump_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "dump.xml"
    path.write_text(dump(page("A", "text"))[:-20], encoding="utf-8")
    with pytest.raises(ValueError, match=r"dump.xml: line 1: .*cut or damaged"):
        extract_wikipedia([path], tmp_path / "out.jsonl")


def test_a_page_of_any_size_takes_bounded_memory(tmp_path: Path) -> None:
    path = tmp_path / "dump.xml.bz2"
    with bz2.open(path, "wb", compresslevel=1) as file:
        before, _, after = dump(page("A", "@"), page("B", "b")).partition("@")
        file.write(before.encode())
        for _ in range(40):
            file.write(b"a" * (1 << 20))
        file.write(after.encode())
    tracemalloc.start()
    try:
        pages = list(read_pages(path, max_page_characters=100_000))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert [one.text for one in pages] == [None, "b"]
    assert peak < 8 << 20
