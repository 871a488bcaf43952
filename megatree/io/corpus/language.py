"""Guess the language of a text with py3langid."""

from functools import cache
from typing import Any

from megatree.io.optional import optional

# Characters to look at: more change no verdict, and the time of a long document would be theirs.
_LOOKED_AT = 4096


def language_of(text: str) -> str:
    """Return the ISO 639-1 code of the likeliest language of a text.

    >>> language_of("It is a truth universally acknowledged, that a single man in possession")
    'en'
    """
    return _identifier().classify(text[:_LOOKED_AT])[0]


def require_languages(codes: tuple[str, ...]) -> None:
    """Refuse codes that no text can have.

    Raises:
        ValueError: naming them.
    """
    known = set(_identifier().labels)
    unknown = sorted(set(codes) - known)
    if unknown:
        raise ValueError(
            f"languages: {', '.join(unknown)} unknown. Use ISO 639-1 codes, like en, de, zh."
        )


@cache
def _identifier() -> Any:
    module = optional("py3langid.langid", extra="data", purpose="the language filter")
    # An own object: the module's shared one can be narrowed by whoever else uses it.
    return module.LanguageIdentifier.from_model_file(module.MODEL_FILE)
