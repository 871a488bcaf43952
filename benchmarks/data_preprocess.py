"""Preprocessing against the `tokenizers` library in a bare loop, and its scaling in processes.

    python benchmarks/data_preprocess.py [--input FILE.jsonl] [--workers 1 2 4] [--rounds 3]

The bare loop encodes texts that are in memory already, one after the other, on one core. Ours reads
the file, parses and checks each line, encodes, and writes the pair. Rates are MB of text (UTF-8).
Per core: MB per second of processor time of all processes, their start included, which other
programs on the machine disturb little; where it does not fall with the number of workers, free
cores give linear scaling.

Without --input the corpus of ../shared/data/corpus/bench_corpus_from_debian.py is built (75 MB; it
needs apt-get and dpkg); where that fails, the shipped novels are repeated.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # read by the library at its import

from megatree.io.data.demo import load_demo
from megatree.io.preprocess import Recipe, preprocess
from megatree.io.tokenizers import TokenizerSpec, load_tokenizer
from megatree.io.tokenizers.fast import FastTokenizer

SHARED = Path(os.environ.get("MEGATREE_SHARED", Path(__file__).parents[2] / "shared"))
PACKAGES = ("dict-gcide", "linux-doc-6.1", "wordnet-base")


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--input", type=Path)
    parser.add_argument("--megabytes", type=float, default=20.0, help="of text to encode")
    parser.add_argument("--workers", type=int, nargs="+", default=[2])
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        source, what = options.input, str(options.input)
        if source is None:
            source, what = corpus(Path(folder))
        path = Path(folder) / "in.jsonl"
        texts = take(source, path, options.megabytes * 1e6)
        size = sum(len(text.encode()) for text in texts) / 1e6
        print(f"{what}: {len(texts):,} documents, {size:.1f} MB of text, {os.cpu_count()} cores")
        measure(path, texts, size, Path(folder), options.workers, options.rounds)


def measure(
    path: Path, texts: list[str], size: float, folder: Path, workers: list[int], rounds: int
) -> None:
    """Print rates, each the median of `rounds` rounds that take turns."""
    spec = tokenizer_spec(folder)
    tokenizer = load_tokenizer(spec)
    assert isinstance(tokenizer, FastTokenizer), "of the tokenizers library"
    backend = tokenizer.backend
    recipe = Recipe(tokenizer=spec, append_eod=True)

    def ours(number: int) -> Callable[[], object]:
        out = str(folder / "out")
        return lambda: preprocess([path], out, recipe, workers=number, overwrite=True)

    programs: dict[str, Callable[[], object]] = {
        "bare loop, encode(text).ids": lambda: [backend.encode(text).ids for text in texts],
        **{f"preprocess, {number} worker(s)": ours(number) for number in [1, *workers]},
    }
    walls: dict[str, list[float]] = {name: [] for name in programs}
    cores: dict[str, list[float]] = {name: [] for name in programs}
    for _ in range(rounds):
        for name, program in programs.items():
            for one in folder.glob("out_*"):
                one.unlink()
            wall, cpu = time.perf_counter(), processor_seconds()
            program()
            walls[name].append(time.perf_counter() - wall)
            cores[name].append(processor_seconds() - cpu)
    bare = median(cores["bare loop, encode(text).ids"])
    alone = median(walls["preprocess, 1 worker(s)"])
    print(f"{'':32}{'MB/s':>8}{'MB/s per core':>15}{'of bare loop':>14}{'times 1 worker':>16}")
    for name in programs:
        wall, cpu = median(walls[name]), median(cores[name])
        print(
            f"{name:32}{size / wall:>8.2f}{size / cpu:>15.2f}{bare / cpu:>14.0%}"
            f"{alone / wall:>16.2f}"
        )


def processor_seconds() -> float:
    """Return the processor time of this process and of those it has waited for."""
    use = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(one.ru_utime + one.ru_stime for one in use)


def tokenizer_spec(folder: Path) -> TokenizerSpec:
    """Return GPT-2's tokenizer, or the one in the package."""
    gpt2 = SHARED / "data" / "tokenizers" / "gpt2"
    if gpt2.is_dir():
        return TokenizerSpec(kind="gpt2", path=gpt2)
    path = folder / "tokenizer.json"
    path.write_text(load_demo().tokenizer.backend.to_str(), encoding="utf-8")
    return TokenizerSpec(kind="hf", path=path, eod="<|endoftext|>")


def take(source: Path, path: Path, num_bytes: float) -> list[str]:
    """Copy lines, every so many, until they hold so much text; return the texts."""
    with open(source, encoding="utf-8") as file:
        lines = file.readlines()
    every = max(1, int(sum(map(len, lines)) / num_bytes))
    chosen = lines[::every]
    path.write_text("".join(chosen), encoding="utf-8")
    return [json.loads(line)["text"] for line in chosen]


def corpus(folder: Path) -> tuple[Path, str]:
    """Return a file of loose JSON, and what it holds."""
    out = folder / "corpus.jsonl"
    script = SHARED / "data" / "corpus" / "bench_corpus_from_debian.py"
    try:
        (folder / "x").mkdir()
        subprocess.run(
            ["apt-get", "download", *PACKAGES], cwd=folder, check=True, capture_output=True
        )
        for name in PACKAGES:
            (package,) = folder.glob(f"{name}_*.deb")
            subprocess.run(["dpkg", "-x", package, folder / "x" / name], check=True)
        subprocess.run([sys.executable, script, folder / "x", out], check=True, capture_output=True)
    except (OSError, ValueError, subprocess.CalledProcessError) as error:
        print(f"no Debian corpus ({error})")
        lines = [
            json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in load_demo().texts
        ]
        out.write_text("".join(lines * 5), encoding="utf-8")
        return out, "novels of Jane Austen, five times"
    return out, "dictionary, kernel documentation and WordNet of Debian"


if __name__ == "__main__":
    main()
