"""Which tokenizer made the ids of a run: named in the config, or noted beside the files."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from megatree.io.data.demo import load_demo_tokenizer
from megatree.io.tokenizers.beside import read_beside, require_tokenizer
from megatree.io.tokenizers.protocol import Tokenizer
from megatree.io.tokenizers.spec import Kind, TokenizerSpec
from megatree.io.tokenizers.spec import load_tokenizer as load_spec
from megatree.recipes.data_config import DataConfig

END_OF_TEXT = "<|endoftext|>"
_KIND_OF_FILE: Mapping[str, Kind] = {
    "tokenizer.json": "hf",
    "vocab.json": "gpt2",
    "vocab.txt": "bert",
    "tokenizer.model": "sentencepiece",
    "spiece.model": "sentencepiece",
}
_KIND_OF_SUFFIX: Mapping[str, Kind] = {".json": "hf", ".txt": "bert", ".model": "sentencepiece"}


@dataclass(frozen=True, kw_only=True)
class Vocabulary:
    """What a run must know of the tokenizer behind its ids; None where nobody says.

    Args:
        identity: of the tokenizer.
        size: one more than its largest id.
        eod: id that ends a document.
        marks: ids of the marks of fill-in-the-middle, if they are used.
    """

    identity: str | None
    size: int | None
    eod: int | None
    marks: tuple[int, ...] = ()


def find_vocabulary(cfg: DataConfig, pairs: tuple[str, ...]) -> Vocabulary:
    """Return what is known of the vocabulary behind some pairs of files.

    Args:
        cfg: names the tokenizer, or leaves that to the files.
        pairs: prefixes of all pairs that are read.

    Raises:
        ValueError: two tokenizers made the ids, or a file is not what it should be.
    """
    facts = {prefix: (read_beside(prefix) or {}).get("tokenizer") or {} for prefix in pairs}
    known = [(prefix, told) for prefix, told in facts.items() if told.get("identity")]
    loaded = load_tokenizer(cfg) if cfg.tokenizer or cfg.text or cfg.fim_rate else None
    if loaded is None and not known:
        return Vocabulary(identity=None, size=None, eod=None)
    if loaded is not None:
        identity, whose = loaded.identity, f"data.tokenizer ({cfg.tokenizer or 'that of the text'})"
    else:
        identity, whose = known[0][1]["identity"], known[0][0]
    for prefix, _ in known:
        require_tokenizer(prefix, identity, of=whose)
    if loaded is None:
        told = known[0][1]
        return Vocabulary(
            identity=identity, size=told.get("vocab_size"), eod=told.get("special", {}).get("eod")
        )
    marks = tuple(_id_of(loaded, mark) for mark in cfg.fim_marks) if cfg.fim_rate else ()
    return Vocabulary(
        identity=identity, size=loaded.vocab_size, eod=loaded.special.eod, marks=marks
    )


def load_tokenizer(cfg: DataConfig) -> Tokenizer:
    """Read the tokenizer that a config names, or that is noted beside its files.

    Raises:
        ValueError: none is named, or a file is not what it should be.
    """
    if cfg.tokenizer == "demo" or (not cfg.tokenizer and cfg.text == "demo"):
        return load_demo_tokenizer()
    return load_spec(_with_eod(tokenizer_spec(cfg)))


def tokenizer_spec(cfg: DataConfig) -> TokenizerSpec:
    """Return which tokenizer a config names.

    Raises:
        ValueError: none is named, or there is no such file.
    """
    stored: Mapping[str, Any] = {}
    for prefix in cfg.prefix:
        pair = f"{prefix}_tokens" if cfg.kind == "chat" else prefix
        stored = stored or ((read_beside(pair) or {}).get("tokenizer") or {}).get("spec") or {}
    named: dict[str, Any] = {"eod": cfg.eod} if cfg.eod else {}
    if not cfg.tokenizer:
        if not stored:
            raise ValueError(
                "data.tokenizer: none is named, and none is noted beside the files. "
                "Give a tokenizer.json, a folder with a vocabulary, or KIND:PATH."
            )
        return TokenizerSpec.from_json({**stored, **named})
    kind, colon, path = cfg.tokenizer.partition(":")
    if colon and kind in get_args(Kind):
        settings = stored if stored.get("kind") == kind else {}
        place = {"path": path} if path else {}
        return TokenizerSpec.from_json({**settings, "kind": kind, **place, **named})
    found = Path(cfg.tokenizer)
    return TokenizerSpec.from_json({"kind": _guess(found), "path": str(found), **named})


def _guess(path: Path) -> Kind:
    """Return the kind of a tokenizer by the names of its files."""
    if path.is_dir():
        kinds = [kind for name, kind in _KIND_OF_FILE.items() if (path / name).is_file()]
        if kinds:
            return kinds[0]
    elif path.is_file():
        kind = _KIND_OF_FILE.get(path.name) or _KIND_OF_SUFFIX.get(path.suffix)
        if kind is not None:
            return kind
    raise ValueError(
        f"data.tokenizer: {str(path)!r} is no vocabulary. Give a tokenizer.json, a folder with "
        f"{', '.join(_KIND_OF_FILE)}, KIND:PATH ({', '.join(get_args(Kind))}), or demo."
    )


def _with_eod(spec: TokenizerSpec) -> TokenizerSpec:
    """Name the usual end of a document where a tokenizer.json has it and nothing else does."""
    if spec.kind != "hf" or spec.eod is not None:
        return spec
    if load_spec(spec).special.eod is not None:
        return spec
    named = TokenizerSpec.from_json({**spec.to_json(), "eod": END_OF_TEXT})
    try:
        load_spec(named)
    except ValueError:
        return spec
    return named


def _id_of(tokenizer: Tokenizer, mark: str) -> int:
    ids = tokenizer.encode_marked(mark)
    if len(ids) != 1:
        raise ValueError(
            f"data.fim_marks: {mark!r} is {len(ids)} tokens of this tokenizer. "
            "Name three entries of it, for prefix, middle and suffix."
        )
    return ids[0]
