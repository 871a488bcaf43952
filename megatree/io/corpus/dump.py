"""Read the pages of a MediaWiki XML dump as a stream; entities and document types are refused."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from xml.parsers import expat

from megatree.io.preprocess.compressed import open_source

_CHUNK = 1 << 16
_KEPT = ("title", "ns", "id", "text")


@dataclass(frozen=True, kw_only=True)
class Page:
    """One page of a dump.

    Attributes:
        title: its name.
        namespace: 0 for articles.
        id: number of the page.
        redirect: whether it only points to another page.
        text: its markup; None if it is longer than is allowed.
        site: address of the wiki's main page; "" if the dump tells none.
        position: bytes of the file on disk read so far.
    """

    title: str
    namespace: str
    id: str
    redirect: bool
    text: str | None
    site: str
    position: int


def read_pages(path: Path, *, max_page_characters: int) -> Iterator[Page]:
    """Yield the pages of a dump (.xml, or compressed) in order; memory is bounded by one page.

    Raises:
        ValueError: if the file is no XML, is cut, or declares a document type or entities, as no
            dump does and an attack would.
    """
    reader = _Reader(path, max_page_characters)
    with open_source(path) as source:
        while True:
            chunk = source.read(_CHUNK)
            try:
                reader.parser.Parse(chunk, not chunk)
            except expat.ExpatError as error:
                raise ValueError(
                    f"{path}: line {error.lineno}: {expat.errors.messages[error.code]}. "
                    "The dump is cut or damaged: fetch it again."
                ) from error
            for page in reader.pages:
                yield Page(**page, position=source.position)
            reader.pages.clear()
            if not chunk:
                return


class _Reader:
    """Collects pages from parser events."""

    def __init__(self, path: Path, max_page_characters: int) -> None:
        self.path = path
        self.pages: list[dict] = []
        self.parser = expat.ParserCreate()
        self.parser.buffer_text = True
        self.parser.StartElementHandler = self._start
        self.parser.EndElementHandler = self._end
        self.parser.CharacterDataHandler = self._characters
        self.parser.StartDoctypeDeclHandler = self._refuse
        self.parser.EntityDeclHandler = self._refuse
        self._max = max_page_characters
        self._open: list[str] = []
        self._fields: dict[str, str] = {}
        self._redirect = False
        self._parts: list[str] = []
        self._size = 0
        self._site = ""

    def _refuse(self, *_: object) -> None:
        raise ValueError(
            f"{self.path}: line {self.parser.CurrentLineNumber}: it declares a document type or "
            "entities, which no dump of MediaWiki does. Fetch the dump from where it is published."
        )

    def _start(self, name: str, _: object) -> None:
        name = name.rpartition(":")[2]
        self._open.append(name)
        if name == "page":
            self._fields, self._redirect = {}, False
        elif name == "redirect":
            self._redirect = True
        self._parts, self._size = [], 0

    def _characters(self, data: str) -> None:
        self._size += len(data)
        if self._size <= self._max:
            self._parts.append(data)

    def _end(self, name: str) -> None:
        name = self._open.pop()
        if name == "base":
            self._site = "".join(self._parts)
        elif name in _KEPT and name not in self._fields:  # the page's id comes before others
            if self._size <= self._max:
                self._fields[name] = "".join(self._parts)
        elif name == "page":
            self.pages.append(
                {
                    "title": self._fields.get("title", ""),
                    "namespace": self._fields.get("ns", "0"),
                    "id": self._fields.get("id", ""),
                    "redirect": self._redirect,
                    "text": self._fields.get("text"),
                    "site": self._site,
                }
            )
        self._parts, self._size = [], 0
