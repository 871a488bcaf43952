"""`megatree data`: text to token files and back, and what is built from them before a run."""

import json
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, get_args

import tyro
from rich import box
from rich.console import Console
from rich.table import Table

from megatree.cli.choose import choose
from megatree.cli.data_options import (
    Chat,
    Export,
    Index,
    Inspect,
    Merge,
    Preprocess,
    TrainTokenizer,
)
from megatree.io.tokenizers.spec import Kind, TokenizerSpec

if TYPE_CHECKING:
    from megatree.io.data.cache import IndexCache
    from megatree.io.preprocess.pairs import Inspection, Lengths

_CONFIG = (tyro.conf.FlagCreatePairsOff,)


def preprocess(options: Preprocess) -> None:
    """Encode text into pairs."""
    from megatree.io.preprocess import Progress, Recipe, SentenceSplitter
    from megatree.io.preprocess import preprocess as run
    from megatree.io.preprocess.meter import Meter

    splitter = SentenceSplitter(data=options.punkt, keep_newlines=options.keep_newlines)
    recipe = Recipe(
        tokenizer=options.tokenizer,
        keys=options.json_keys,
        splitter=splitter if options.split_sentences else None,
        append_eod=options.append_eod,
        text_unit=options.text_unit,
        max_line_bytes=options.max_line_bytes,
    )
    with Meter("preprocess") as meter:

        def report(progress: Progress) -> None:
            counts = progress.counts
            meter.show(
                counts.documents, counts.num_bytes, done=progress.position, total=progress.size
            )

        summary = run(
            options.inputs,
            options.output_prefix,
            recipe,
            form=options.format,
            workers=options.workers,
            on_bad_line=options.on_bad_line,
            overwrite=options.overwrite,
            report=report,
        )
        counts = summary.counts
        if summary.reused < len(options.inputs):
            print(meter.rates(counts.documents, counts.num_bytes))
    if summary.reused:
        print(f"{summary.reused} of {len(options.inputs)} inputs: done by an earlier run")
    for prefix in summary.prefixes.values():
        print(f"{prefix}.bin and .idx: {counts.documents:,} documents")
    if summary.bad_lines is not None:
        told = ", ".join(f"{number} {kind}" for kind, number in sorted(counts.bad.items()))
        print(f"left out: {told}; listed in {summary.bad_lines}")


def chat(options: Chat) -> None:
    """Encode conversations into pairs."""
    from megatree.io.data.chat import encode_chats, read_conversations
    from megatree.io.data.chat_template import ChatTemplate, find_template
    from megatree.io.data.index_format import token_dtype
    from megatree.io.preprocess.meter import Meter
    from megatree.io.tokenizers import load_tokenizer, tokenizer_facts, write_beside

    tokenizer = load_tokenizer(options.tokenizer)
    special = {name: tokenizer.piece(token) for name, token in tokenizer.special.named().items()}
    variables = {f"{name}_token": spelled for name, spelled in special.items()}
    source = find_template(options.template or options.tokenizer.path)
    total = sum(path.stat().st_size for path in options.inputs)
    done = {"conversations": 0, "bytes": 0}

    def read(num_bytes: int) -> None:
        done["bytes"] += num_bytes

    def conversations() -> Iterator[tuple[str, Any]]:
        for path in options.inputs:
            for conversation in read_conversations(path, report=read):
                done["conversations"] += 1
                meter.show(*done.values(), done=done["bytes"], total=total)
                yield conversation

    with (
        Meter("chat") as meter,
        ChatTemplate(source, variables=variables, learn=options.learn) as template,
    ):
        told = encode_chats(
            conversations(),
            options.output_prefix,
            template,
            tokenizer.encode_marked,
            dtype=token_dtype(tokenizer.vocab_size),
            reserved=options.reserved or tuple(dict.fromkeys(special.values())),
            bad=options.on_bad_chat,
            overwrite=options.overwrite,
        )
        write_beside(
            f"{options.output_prefix}_tokens",
            {"tokenizer": tokenizer_facts(tokenizer, options.tokenizer)},
        )
        print(meter.rates(*done.values()))
    print(
        f"{options.output_prefix}_tokens and _learned: {told.written:,} conversations, "
        f"{told.tokens:,} tokens, {told.learned:,} of them learned"
    )
    for reason, number in sorted(told.skipped.items()):
        print(f"left out {number}: {reason}")
    print(f"train on it with: --data.prefix {options.output_prefix} --data.kind chat")


def merge(options: Merge) -> None:
    """Write one pair out of several."""
    from megatree.io.data.indexed import IndexedFile
    from megatree.io.preprocess import merge as run

    run(options.prefixes, options.output_prefix, overwrite=options.overwrite)
    merged = IndexedFile(options.output_prefix)
    print(
        f"{options.output_prefix}.bin and .idx: {merged.num_documents:,} documents of "
        f"{len(options.prefixes)} pairs"
    )


def inspect(options: Inspect) -> None:
    """Print counts of a pair, and some documents."""
    from megatree.io.data.indexed import IndexedFile
    from megatree.io.preprocess.pairs import decode_document, inspect_pair, tokenizer_of

    told = _tokenizer_of_pair(options.prefix, options.tokenizer)
    tokenizer = None
    if told and not options.ids and (options.documents or options.tokenizer):
        tokenizer = tokenizer_of(options.prefix, told)[1]
    found = inspect_pair(
        options.prefix, vocab_size=None if tokenizer is None else tokenizer.vocab_size
    )
    if options.json:
        print(json.dumps(found.to_json(), indent=1))
        return
    console = Console(highlight=False, soft_wrap=True)
    console.print(_table_of_counts(found))
    file = IndexedFile(options.prefix)
    last = min(options.first + options.documents, file.num_documents)
    for document in range(options.first, last):
        sequences = file.document(document)
        head = f"document {document} ({sum(map(len, sequences)):,} tokens)"
        if tokenizer is None or options.ids:
            shown = " | ".join(" ".join(map(str, one.tolist())) for one in sequences)
        else:
            shown = "\n".join(decode_document(file, document, tokenizer))
        cut = options.characters and len(shown) > options.characters
        shown = f"{shown[: options.characters]} ..." if cut else shown
        console.print(f"\n{head}", style="bold", markup=False)
        console.print(shown, markup=False)
    if tokenizer is None and not options.ids and options.documents:
        console.print("\n(ids: nothing beside the pair says which tokenizer made it)")


def export(options: Export) -> None:
    """Write a pair back as loose JSON."""
    from megatree.io.preprocess import export as run
    from megatree.io.preprocess.meter import Meter

    with Meter("export") as meter:
        documents = run(
            options.prefix,
            options.output,
            tokenizer=_tokenizer_of_pair(options.prefix, options.tokenizer),
            key=options.json_key,
            as_ids=options.ids,
            workers=options.workers,
            overwrite=options.overwrite,
            report=lambda done, total: meter.show(done, 0, done=done, total=total),
        )
    print(f"{options.output}: {documents:,} documents")


def index(options: Index) -> None:
    """Build all indices of a run before it starts."""
    from megatree.io.data.cache import IndexCache

    cache = IndexCache(folder=options.cache)
    built = _gpt_index(options, cache) if options.objective == "gpt" else _masked(options, cache)
    for name, samples in built:
        print(f"{name}: {'no share' if samples is None else f'{samples:,} samples'}")
    print(f"in {options.cache}")


def train_tokenizer(options: TrainTokenizer) -> None:
    """Train a vocabulary."""
    from megatree.io.tokenizers import train_tokenizer as run

    spec, tokenizer = run(
        lambda: _texts(options),
        options.output,
        algorithm=options.algorithm,
        vocab_size=options.vocab_size,
        lowercase=not options.keep_case,
    )
    case = "" if spec.lowercase else " --tokenizer.no-lowercase"
    print(f"{options.output}: {tokenizer.vocab_size:,} ids, {tokenizer.identity[:19]}")
    print(f"use it with: --tokenizer.kind {spec.kind} --tokenizer.path {spec.path}{case}")


def named_tokenizer(told: str | None, stored: Mapping[str, Any]) -> TokenizerSpec | None:
    """Return the tokenizer that KIND:PATH names, else the one whose settings are stored."""
    if told is not None:
        kind, _, path = told.partition(":")
        if kind not in get_args(Kind):
            raise ValueError(
                f"--tokenizer: {told!r} is not KIND:PATH. KIND is one of "
                f"{', '.join(get_args(Kind))}; PATH its file or folder."
            )
        settings = stored if stored.get("kind") == kind else {}
        stored = {**settings, "kind": kind, **({"path": path} if path else {})}
    return TokenizerSpec.from_json(stored) if stored else None


def _tokenizer_of_pair(prefix: str, told: str | None) -> TokenizerSpec | None:
    from megatree.io.tokenizers import read_beside

    stored = ((read_beside(prefix) or {}).get("tokenizer") or {}).get("spec") or {}
    return named_tokenizer(told, stored)


def _table_of_counts(found: "Inspection") -> Table:
    def lengths(some: "Lengths | None") -> str:
        if some is None:
            return "none"
        return (
            f"{some.smallest:,} to {some.largest:,}, median {some.median:,.0f}, "
            f"mean {some.mean:,.1f}, 99% below {some.percentile_99:,.0f}"
        )

    table = Table(title=found.prefix, title_justify="left", box=box.SIMPLE, show_header=False)
    rows = {
        "documents": f"{found.documents:,} ({found.empty_documents:,} empty)",
        "sequences": f"{found.sequences:,}",
        "tokens": f"{found.tokens:,} as {found.dtype}",
        "tokens per document": lengths(found.tokens_per_document),
        "tokens per sequence": lengths(found.tokens_per_sequence),
        "ids": "none" if found.largest_id is None else f"{found.smallest_id} to {found.largest_id}",
        "tokenizer": (found.tokenizer or {}).get("identity", "not told"),
    }
    for name, value in rows.items():
        table.add_row(name, value)
    return table


def _gpt_index(options: Index, cache: "IndexCache") -> list[tuple[str, int | None]]:
    from megatree.io.data.corpus import gpt_datasets, parse_blend
    from megatree.io.data.gpt import GPTOptions
    from megatree.io.data.splits import SPLITS

    datasets = gpt_datasets(
        parse_blend(options.data_path, split=options.split),
        GPTOptions(seq=options.seq, seed=options.seed),
        num_samples=options.samples or (None, None, None),
        cache=cache,
    )
    return [
        (name, None if dataset is None else len(dataset))
        for name, dataset in zip(SPLITS, datasets, strict=True)
    ]


def _masked(options: Index, cache: "IndexCache") -> list[tuple[str, int | None]]:
    from megatree.io.data.indexed import IndexedFile
    from megatree.io.data.masked_index import masked_index
    from megatree.io.data.splits import SPLITS, split_bounds

    pair = options.objective == "bert"
    built: list[tuple[str, int | None]] = []
    for prefix in options.data_path:
        source = IndexedFile(prefix)
        wanted = options.samples or (None, None, None)
        bounds = split_bounds(options.split, source.num_documents)
        for name, some, num_samples in zip(SPLITS, bounds, wanted, strict=True):
            if some is None or num_samples == 0:
                built.append((f"{prefix} {name}", None))
                continue
            found = masked_index(
                source,
                some,
                longest=options.seq - (3 if pair else 2),
                min_sentences=2 if pair else 1,
                short_probability=options.short_probability,
                num_samples=num_samples,
                seed=options.seed,
                cache=cache,
            )
            built.append((f"{prefix} {name}", len(found)))
    return built


def _texts(options: TrainTokenizer) -> Iterator[str]:
    from megatree.io.preprocess.blocks import BadLine
    from megatree.io.preprocess.encode import Recipe, records_of
    from megatree.io.preprocess.inputs import format_of, input_blocks

    recipe = Recipe(tokenizer=TokenizerSpec(kind="bytes"), keys=(options.json_key,))
    for path in options.inputs:
        form = format_of(path, options.format)
        for block in input_blocks(path, form, recipe):
            for record in records_of(recipe, form, block):
                if isinstance(record, BadLine):
                    if options.on_bad_line == "stop":
                        raise ValueError(f"{record}. Mend the line, or pass --on-bad-line skip.")
                    continue
                yield from record[1][options.json_key]


ABOUT = "Text to token files that Megatron reads too, and back."
COMMANDS: Mapping[str, tuple[str, type, Callable]] = {
    "preprocess": ("Encode text files into .bin/.idx pairs.", Preprocess, preprocess),
    "chat": ("Encode conversations into pairs of tokens and of what is learned.", Chat, chat),
    "merge": ("Write one pair with the documents of several.", Merge, merge),
    "inspect": ("Print the counts of a pair, and some documents decoded.", Inspect, inspect),
    "export": ("Write a pair back as loose JSON.", Export, export),
    "index": ("Build the sample indices of a run before it starts.", Index, index),
    "train-tokenizer": ("Train a vocabulary on text files.", TrainTokenizer, train_tokenizer),
}


def main(args: list[str]) -> int:
    """Run the command; return the exit code."""
    described = {name: text for name, (text, _, _) in COMMANDS.items()}
    name = choose("megatree data", args, described, kind="command", about=ABOUT)
    text, options, command = COMMANDS[name]
    prog = f"megatree data {name}"
    command(tyro.cli(options, prog=prog, description=text, args=args[1:], config=_CONFIG))
    return 0
