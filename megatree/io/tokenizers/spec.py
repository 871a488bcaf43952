"""Which tokenizer, as a value: what a command line, a config file or a worker process passes on."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal

from megatree.io.tokenizers.bert import load_bert
from megatree.io.tokenizers.gpt2 import END_OF_TEXT, load_gpt2
from megatree.io.tokenizers.hf import load_tokenizer_json
from megatree.io.tokenizers.plain import ByteTokenizer, NullTokenizer
from megatree.io.tokenizers.protocol import Tokenizer
from megatree.io.tokenizers.sentence_piece import load_sentencepiece
from megatree.io.tokenizers.tik_token import load_tiktoken

Kind = Literal["gpt2", "bert", "sentencepiece", "hf", "tiktoken", "bytes", "null"]

_ROLES = ("eod", "bos", "eos", "pad", "mask")
# Fields that mean something to a kind; any other one must keep its default.
_USES: dict[str, tuple[str, ...]] = {
    "gpt2": ("path", "merges", "eod"),
    "bert": ("path", "lowercase", "extra_ids"),
    "sentencepiece": ("path", "append", "extra_ids", "extra_ids_order"),
    "hf": ("path", *_ROLES),
    "tiktoken": ("path", "pattern", "special", "num_special"),
    "bytes": (),
    "null": ("vocab_size", "eod_id"),
}


@dataclass(frozen=True, kw_only=True)
class TokenizerSpec:
    """Names a tokenizer by kind and files.

    Attributes:
        kind: gpt2 (vocab.json and merges.txt), bert (vocab.txt), sentencepiece (Llama, T5), hf (a
            tokenizer.json), tiktoken, bytes (no file), null (text that is ids already).
        path: the vocabulary's file, or the folder that holds it under its usual name.
        merges: gpt2: merges.txt, by default beside the vocabulary.
        lowercase: bert: fold case and strip accents.
        extra_ids: bert, sentencepiece: number of sentinels <extra_id_N> to append (T5).
        extra_ids_order: sentencepiece: ascending as Megatron, or descending as Hugging Face's T5.
        append: sentencepiece: special tokens after the model's pieces, before the sentinels
            (Megatron's T5: <CLS> <SEP> <EOD> <MASK>).
        pattern: tiktoken: v1, v2, cl100k, or a regular expression.
        special: tiktoken: spellings of the special tokens, in order.
        num_special: tiktoken: ids in front of the ranks of a JSON file.
        vocab_size: null: ids in all, the end of document included.
        eod_id: null: id that ends a document.
        eod: gpt2, hf: spelling of the token that ends a document.
        bos: hf: spelling of the token that starts a sequence.
        eos: hf: spelling of the token that ends a sequence.
        pad: hf: spelling of the token that fills a row.
        mask: hf: spelling of the token that hides another.
    """

    kind: Kind
    path: Path | None = None
    merges: Path | None = None
    lowercase: bool = True
    extra_ids: int = 0
    extra_ids_order: Literal["ascending", "descending"] = "ascending"
    append: tuple[str, ...] = ()
    pattern: str = "v2"
    special: tuple[str, ...] = ("<unk>", "<s>", "</s>")
    num_special: int = 1000
    vocab_size: int | None = None
    eod_id: int | None = None
    eod: str | None = None
    bos: str | None = None
    eos: str | None = None
    pad: str | None = None
    mask: str | None = None

    def __post_init__(self) -> None:
        uses = _USES[self.kind]
        for field in fields(self):
            idle = field.name not in ("kind", *uses)
            if idle and getattr(self, field.name) != field.default:
                users = " or ".join(kind for kind, names in _USES.items() if field.name in names)
                raise ValueError(
                    f"tokenizer.{field.name}: a tokenizer of kind '{self.kind}' does not use it. "
                    f"Remove it, or set kind to {users}."
                )
        if "path" in uses and self.path is None:
            raise ValueError(
                f"tokenizer.path: a tokenizer of kind '{self.kind}' needs it. "
                "Name its file, or the folder that holds it."
            )
        if self.kind == "null" and (self.vocab_size is None or self.eod_id is None):
            raise ValueError(
                "tokenizer: kind 'null' needs vocab_size and eod_id. To match older files: "
                "Megatron 0.12 run with vocabulary V wrote eod_id V (vocab_size V + 1), later "
                "versions V - 1 (vocab_size V)."
            )
        if self.extra_ids < 0:
            raise ValueError(f"tokenizer.extra_ids: {self.extra_ids} is negative. Use 0 or more.")

    def to_json(self) -> dict[str, Any]:
        """Return what is stored beside data; fields at their default are left out."""
        told = {
            name: str(value) if isinstance(value, Path) else value
            for name, value in asdict(self).items()
        }
        default = {field.name: field.default for field in fields(self)}
        return {name: value for name, value in told.items() if value != default[name]}

    @staticmethod
    def from_json(told: Mapping[str, Any]) -> "TokenizerSpec":
        """Return the spec that `to_json` wrote."""
        values: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value for name, value in told.items()
        }
        for name in ("path", "merges"):
            if values.get(name) is not None:
                values[name] = Path(values[name])
        return TokenizerSpec(**values)


def load_tokenizer(spec: TokenizerSpec) -> Tokenizer:
    """Return the tokenizer that a spec names.

    Raises:
        ValueError: if a file is missing, damaged, of another kind, or needs an extra package.
    """
    match spec.kind:
        case "gpt2":
            vocab = _file(spec, "vocab.json")
            merges = spec.merges or vocab.with_name("merges.txt")
            return load_gpt2(vocab, _existing(merges), eod=spec.eod or END_OF_TEXT)
        case "bert":
            return load_bert(
                _file(spec, "vocab.txt"), lowercase=spec.lowercase, extra_ids=spec.extra_ids
            )
        case "sentencepiece":
            return load_sentencepiece(
                _file(spec, "tokenizer.model", "spiece.model"),
                append=spec.append,
                extra_ids=spec.extra_ids,
                extra_ids_order=spec.extra_ids_order,
            )
        case "hf":
            named = {role: getattr(spec, role) for role in _ROLES}
            roles = {role: spelling for role, spelling in named.items() if spelling is not None}
            return load_tokenizer_json(_file(spec, "tokenizer.json"), roles=roles)
        case "tiktoken":
            return load_tiktoken(
                _file(spec, "tekken.json", "tokenizer.tiktoken"),
                pattern=spec.pattern,
                special=spec.special,
                num_special=spec.num_special,
            )
        case "bytes":
            return ByteTokenizer()
        case "null":
            assert spec.vocab_size is not None, "checked by the spec"
            assert spec.eod_id is not None, "checked by the spec"
            return NullTokenizer(vocab_size=spec.vocab_size, eod=spec.eod_id)


def _file(spec: TokenizerSpec, *names: str) -> Path:
    """Return the file of `spec.path`: itself, or the first of `names` in that folder."""
    path = spec.path
    assert path is not None, "checked by the spec"
    if not path.is_dir():
        return _existing(path)
    for name in names:
        if (path / name).is_file():
            return path / name
    raise ValueError(
        f"{path}: the folder has no {' or '.join(names)}, which kind '{spec.kind}' reads. "
        "Name the file itself, or set another kind."
    )


def _existing(path: Path) -> Path:
    if not path.is_file():
        raise ValueError(f"{path}: there is no such file. Check tokenizer.path.")
    return path
