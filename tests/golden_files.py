"""Golden files: text that a refactor must not move, under tests/golden."""

import os
from pathlib import Path

FOLDER = Path(__file__).parent / "golden"
UPDATE = "MEGATREE_UPDATE_GOLDEN"


def assert_golden(name: str, text: str) -> None:
    """Fail unless tests/golden/`name` holds `text`; write it if MEGATREE_UPDATE_GOLDEN is set."""
    path = FOLDER / name
    text = text.rstrip("\n") + "\n"
    if os.environ.get(UPDATE):
        path.parent.mkdir(exist_ok=True)
        path.write_text(text, encoding="utf-8")
    assert path.exists(), f"{path} is missing. Set {UPDATE}=1 to write it."
    expected = path.read_text(encoding="utf-8")
    assert text.splitlines() == expected.splitlines(), (
        f"{path.name} moved. If that is meant, run the test with {UPDATE}=1 and commit the change."
    )
