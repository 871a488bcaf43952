"""Cut a text where special tokens are spelled out, for libraries that do not."""

import re
from collections.abc import Callable, Mapping


def encode_marked(
    text: str, spellings: Mapping[str, int], encode: Callable[[str], list[int]]
) -> list[int]:
    """Return the ids of a text in which each spelling stands for its id.

    The longest spelling wins where several start at one character.

    >>> encode_marked("a<s>b", {"<s>": 9}, lambda text: [ord(text)])
    [97, 9, 98]
    """
    if not spellings:
        return encode(text)
    longest_first = sorted(spellings, key=lambda spelling: (-len(spelling), spelling))
    parts = re.split(f"({'|'.join(map(re.escape, longest_first))})", text)
    ids: list[int] = []
    for number, part in enumerate(parts):
        if number % 2:
            ids.append(spellings[part])
        elif part:
            ids.extend(encode(part))
    return ids
