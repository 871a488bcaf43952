"""From MediaWiki markup to running text."""

import re
from typing import Any

from megatree.io.optional import optional

# Elements whose content is no running text.
_DROPPED_TAGS = frozenset(
    ["ref", "references", "table", "gallery", "math", "timeline", "score", "syntaxhighlight",
     "source", "imagemap", "style", "script"]
)  # fmt: skip
_MAGIC = re.compile(r"__[A-Z]+__")
_TAG = re.compile(r"<[a-zA-Z]+\s[^<>]*>")
_LINE_BREAK = re.compile(r"<br\s*/?>", re.IGNORECASE)
_OTHER_LANGUAGE = re.compile(r"[a-z]{2,3}(?:-[a-z]+)*:\S")


def plain_text(markup: str) -> str:
    """Return the text a reader sees, without templates, tables, notes, files and categories.

    Headings stay as lines of their own; links become their labels.

    Raises:
        ValueError: if `mwparserfromhell` is not installed.
    """
    parser = optional("mwparserfromhell", extra="data", purpose="wikipedia")
    # The parser takes a tag with a line end in it for text.
    markup = _TAG.sub(lambda tag: " ".join(tag.group().split()), _MAGIC.sub("", markup))
    code = parser.parse(_LINE_BREAK.sub("\n", markup))
    for node in code.filter_tags(recursive=True, matches=_is_dropped):
        _remove(code, node)
    for node in code.filter_wikilinks(recursive=True, matches=_is_no_text):
        _remove(code, node)
    for node in code.filter_templates(recursive=False):
        _remove(code, node)
    text = code.strip_code(normalize=True, collapse=True, keep_template_params=False)
    lines = [line.strip() for line in text.split("\n")]
    kept = [line for line in lines if line not in ("", "*", "#", ":", "()")]
    return "\n".join(kept)


def _remove(code: Any, node: Any) -> None:
    try:
        code.remove(node)
    except ValueError:
        return  # it lay in one that is removed already


def _is_dropped(node: Any) -> bool:
    return str(node.tag).strip().lower() in _DROPPED_TAGS


def _is_no_text(node: Any) -> bool:
    """Whether a link is a file, a category, or the same page in another language."""
    target = str(node.title).strip()
    if node.text is None and _OTHER_LANGUAGE.match(target):
        return True
    return target.partition(":")[0].strip().lower() in _FILES


# The canonical names, which every wiki understands, and those of the largest wikis.
_FILES = frozenset(
    ["file", "image", "category", "datei", "bild", "kategorie", "fichier", "catégorie",
     "archivo", "imagen", "categoría", "immagine", "categoria", "bestand", "categorie", "plik",
     "kategoria", "ficheiro", "imagem", "файл", "изображение", "категория", "ファイル", "画像"]
)  # fmt: skip
