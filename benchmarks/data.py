"""All benchmarks of data: preprocessing, then indices and the loader.

python -m benchmarks.data                      # both, at their defaults
python -m benchmarks.data preprocess --help    # text to token files, against `tokenizers`
python -m benchmarks.data index --help         # indices of 10^9 tokens, and the loader
"""

import sys

from benchmarks import data_index, data_preprocess

PARTS = {"preprocess": data_preprocess.main, "index": data_index.main}


def main() -> None:
    """Run the part that the first word names, or all."""
    name, *options = sys.argv[1:] or [""]
    if name and name not in PARTS:
        print(__doc__)
        raise SystemExit(0 if name in ("-h", "--help") else 2)
    for part in [name] if name else PARTS:
        sys.argv = [f"benchmarks.data {part}", *options]
        PARTS[part]()


if __name__ == "__main__":
    main()
