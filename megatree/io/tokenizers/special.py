"""The ids that mean something besides text, by name."""

from dataclasses import dataclass, fields


@dataclass(frozen=True, kw_only=True)
class Special:
    """Ids of the special tokens of a vocabulary; None where it has none of that name.

    Attributes:
        eod: ends a document.
        bos: starts a sequence.
        eos: ends a sequence; often the same id as `eod`.
        pad: fills a row; counts nowhere.
        unk: stands for text outside the vocabulary.
        mask: hides a token (BERT).
        cls: starts a pair of segments (BERT).
        sep: ends a segment (BERT).
        sentinels: stand for a removed span, in the order of use (T5).

    >>> Special(eod=3).need("eod")
    3
    """

    eod: int | None = None
    bos: int | None = None
    eos: int | None = None
    pad: int | None = None
    unk: int | None = None
    mask: int | None = None
    cls: int | None = None
    sep: int | None = None
    sentinels: tuple[int, ...] = ()

    def need(self, name: str) -> int:
        """Return the id called `name`.

        Raises:
            ValueError: if the vocabulary has none.
        """
        found = getattr(self, name)
        if found is None:
            has = ", ".join(self.named()) or "none"
            raise ValueError(
                f"tokenizer: it has no '{name}' token (it has: {has}). "
                f"Name one where the tokenizer is loaded, or use a vocabulary that has it."
            )
        return found

    def named(self) -> dict[str, int]:
        """Return the single ids that exist, by name."""
        found = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: value for name, value in found.items() if isinstance(value, int)}
