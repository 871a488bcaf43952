"""What `explain` prints: golden plans of a block, and the lines a reader looks for."""

import re

import pytest
import torch

from megatree.functional.annotate import shard
from megatree.functional.local_map import Out, local_map
from megatree.functional.param import Array, Param
from megatree.models.gpt import GPTConfig, gpt
from megatree.parallel.layout import Layout, Rules
from megatree.parallel.lower import lower
from megatree.parallel.mesh import Mesh
from megatree.parallel.model import lower_model
from tests.golden_files import assert_golden

TP = Rules(batch="dp", kv_heads="tp", ffn="tp", vocab="tp")
SMALL = GPTConfig(
    vocab_size=512,
    seq_length=256,
    num_layers=4,
    embed=128,
    kv_heads=2,
    group=2,
    head_dim=32,
    ffn=384,
)


def without_lines(text: str) -> str:
    """Drop the line numbers of the model's source: they move with every edit of it."""
    return re.sub(r"^  (\S+\.py):\d+ *", lambda m: f"  {m[1]:<19}", text, flags=re.MULTILINE)


@pytest.mark.parametrize(
    ("name", "layout", "units"),
    [
        ("block_tp2_sp", Layout(Mesh(tp=2), TP.updated(seq_res="tp")), ["blocks.dense"]),
        ("block_dp2_tp2", Layout(Mesh(dp=2, tp=2), TP), ["blocks.dense"]),
        (
            "ends_dp2_tp2_sp",
            Layout(Mesh(dp=2, tp=2), TP.updated(seq_res="tp")),
            ["embed", "head", "loss"],
        ),
    ],
)
def test_golden_plans(name: str, layout: Layout, units: list[str]) -> None:
    program = lower_model(gpt(SMALL, batch_size=8), layout)
    text = "\n\n".join(program.explain(unit) for unit in units)
    assert_golden(f"{name}.txt", without_lines(text))


def mlp(x, up, down):
    h = torch.tanh(torch.einsum("bd,fd->bf", x, up))
    return shard(torch.einsum("bf,fd->bd", h, down), "batch embed")


PROGRAM = lower(
    mlp,
    Layout(Mesh(dp=2, tp=4), Rules(batch="dp", ffn="tp")),
    Array("batch embed", grad=True),
    Param("ffn embed"),
    Param("ffn embed"),
    sizes={"batch": 8, "embed": 16, "ffn": 32},
)


def test_collectives_have_a_line_a_phase_and_bytes() -> None:
    """Bytes are those of one rank's larger side, in the program's dtype."""
    first = mlp.__code__.co_firstlineno
    rows = [(c.kind, c.axes, c.bytes, c.phase) for c in PROGRAM.collectives]
    x, w = 4 * 16 * 4, 8 * 16 * 4
    assert rows == [
        ("psum", ("tp",), x, "forward"),
        ("psum", ("tp",), x, "backward"),
        ("psum", ("dp",), w, "sync"),
        ("psum", ("dp",), w, "sync"),
    ]
    sources = [c.source for c in PROGRAM.collectives]
    lines = [first + 2, first + 1]
    assert sources == [f"parallel/test_explain.py:{n}" for n in lines] + ["up", "down"]
    assert PROGRAM.cost == {"psum": 2 * x}


def test_explain_shows_both_directions_of_a_transition() -> None:
    text = PROGRAM.explain()
    assert re.search(
        r"test_explain\.py:\d+ +> psum\(tp\) \| - +\[256 B\] +float32\[8/dp, 16\]$", text, re.M
    )
    assert re.search(
        r"test_explain\.py:\d+ +> - \| psum\(tp\) +\[256 B\] +float32\[8/dp, 16\] R\(tp\)$",
        text,
        re.M,
    )
    assert "gradient sync over dp: up, down" in text
    assert text.startswith("mlp on dp=2 tp=4\n")
    assert text.endswith("returns float32[8/dp, 16]")


def test_explain_shows_what_bodies_and_ops_do_by_themselves() -> None:
    def body(comm, x):
        return comm.all_gather(x, "seq", 0).square().sum(0), comm.psum(x.detach().sum(), "seq")

    call = local_map(
        body,
        in_axes=("seq embed",),
        out_axes=(Out("embed", replicated=("seq",)), Out("", replicated=("seq",), grad=False)),
    )
    program = lower(
        lambda x: call(x)[0],
        Layout(Mesh(cp=2), Rules(seq="cp")),
        Array("seq embed", grad=True),
        sizes={"seq": 8, "embed": 4},
    )
    text = program.explain()
    assert "local_map body > all_gather(cp) + psum(cp) | psum_scatter(cp)" in text
    assert [(c.kind, c.phase) for c in program.collectives] == [
        ("all_gather", "forward"),
        ("psum", "forward"),
        ("psum_scatter", "backward"),
    ]
