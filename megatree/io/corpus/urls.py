"""Which web addresses to leave out: malformed, short, blocked by domain or type, repeated."""

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import SplitResult, urlsplit

from megatree.io.corpus.stream import Tally, open_output
from megatree.io.preprocess.blocks import BadLine, read_blocks
from megatree.io.preprocess.records import numbered_lines

# Addresses that end so hold no running text.
BLOCKED_SUFFIXES = (
    ".3gp", ".7z", ".ai", ".aif", ".apk", ".app", ".avi", ".bin", ".bmp", ".bz2", ".css", ".csv",
    ".dat", ".deb", ".dmg", ".doc", ".docx", ".eps", ".exe", ".gif", ".gifv", ".gz", ".h264",
    ".ico", ".iso", ".jar", ".jpeg", ".jpg", ".js", ".json", ".log", ".mid", ".mkv", ".mov",
    ".mp3", ".mp4", ".mpeg", ".mpg", ".odp", ".ods", ".odt", ".ogg", ".otf", ".pdf", ".png",
    ".ppt", ".pptx", ".psd", ".rar", ".rpm", ".rss", ".rtf", ".svg", ".swf", ".tar", ".tif",
    ".tiff", ".ttf", ".txt", ".wav", ".webm", ".webp", ".wma", ".wmv", ".xls", ".xlsx", ".xml",
    ".xz", ".zip",
)  # fmt: skip
SHORTEST = 8


@dataclass(frozen=True, kw_only=True)
class BlockList:
    """Domains and file types that are left out.

    Attributes:
        domains: each blocks itself and its subdomains.
        suffixes: ends of the path of an address.

    >>> BlockList(domains=frozenset({"a.org"})).reason("https://www.a.org/x")
    'url: blocked domain'
    """

    domains: frozenset[str] = frozenset()
    suffixes: tuple[str, ...] = BLOCKED_SUFFIXES

    @staticmethod
    def read(paths: Iterable[Path]) -> "BlockList":
        """Return the list of domains in some files, one a line; `#` starts a comment.

        Raises:
            ValueError: if a file cannot be read, or a line is no domain.
        """
        domains = set()
        for path in paths:
            for line, text in _text_lines(path):
                domain = text.partition("#")[0].strip().lower().removeprefix("*.").strip(".")
                if not domain:
                    continue
                if "/" in domain or " " in domain or "." not in domain:
                    raise ValueError(
                        f"{path}:{line}: {text[:60]!r} is no domain. "
                        "Write one a line, like example.org."
                    )
                domains.add(domain)
        return BlockList(domains=frozenset(domains))

    def reason(self, url: str) -> str | None:
        """Return why an address is left out; None if it stays."""
        url = url.strip()
        if len(url) <= SHORTEST:
            return "url: too short"
        parts = _split(url)
        if parts is None:
            return "url: malformed"
        labels = (parts.hostname or "").rstrip(".").split(".")
        if any(".".join(labels[at:]) in self.domains for at in range(len(labels) - 1)):
            return "url: blocked domain"
        if parts.path.lower().endswith(self.suffixes):
            return "url: blocked file type"
        return None


def filter_urls(
    inputs: Iterable[Path],
    output: Path,
    blocked: BlockList,
    *,
    overwrite: bool = False,
    report: Callable[[Tally], None] = lambda tally: None,
) -> Tally:
    """Write the addresses of some lists, one a line, that stay; each once.

    Args:
        inputs: files with an address a line.
        output: appears when it is whole.
        blocked: what is left out.
        overwrite: replace a file of that name.
        report: called after each block.

    Raises:
        ValueError: if a file cannot be read, or the output exists.
    """
    if output.exists() and not overwrite:
        raise ValueError(f"{output}: already there. Name another output, or pass --overwrite.")
    seen: set[str] = set()
    dropped: Counter[str] = Counter()
    bytes_read = bytes_written = 0
    with open_output(output, overwrite=overwrite) as stream:
        for path in inputs:
            for _, text in _text_lines(path):
                bytes_read += len(text) + 1
                url = text.strip()
                reason = "url: repeated" if url in seen else blocked.reason(url)
                if reason is not None:
                    dropped[reason] += 1
                    continue
                seen.add(url)
                bytes_written += stream.write(url.encode() + b"\n")
            report(_tally(seen, dropped, bytes_read, bytes_written))
    return _tally(seen, dropped, bytes_read, bytes_written)


def _tally(seen: set[str], dropped: Counter[str], bytes_read: int, bytes_written: int) -> Tally:
    return Tally(
        documents=len(seen),
        written=len(seen),
        dropped=dict(dropped),
        bytes_read=bytes_read,
        bytes_written=bytes_written,
    )


def _text_lines(path: Path) -> Iterable[tuple[int, str]]:
    for block in read_blocks(path, max_line_bytes=1 << 16):
        if isinstance(block, BadLine):
            raise ValueError(f"{block}. Give a file of short lines.")
        for line, raw in numbered_lines(block):
            yield line, raw.decode(errors="replace").rstrip("\r")


def _split(url: str) -> SplitResult | None:
    try:
        parts = urlsplit(url)
        host = parts.hostname
    except ValueError:
        return None
    web = parts.scheme in ("http", "https")
    well_formed = web and host is not None and "." in host and not any(c.isspace() for c in url)
    return parts if well_formed and "\ufffd" not in url else None
