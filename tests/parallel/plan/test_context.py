"""Which lowering of attention a plan recommends; its numbers are those that are counted."""

import itertools
from dataclasses import replace

import pytest
import torch

from benchmarks.context import LOWERINGS, check_bytes, kept_bytes, time_ring
from megatree.models.gpt import gpt
from megatree.models.gpt_config import GPTConfig
from megatree.parallel.context import AllGather, Ring, Ulysses
from megatree.parallel.layout import Layout, Rules
from megatree.parallel.mesh import Mesh
from megatree.parallel.order import Zigzag
from megatree.parallel.plan import plan
from megatree.parallel.plan.context import Attention, moved_bytes, recommend

SMALL = Attention(batch=2, seq=32, kv_heads=4, group=2, head_dim=4, itemsize=4)
LONG = Attention(batch=1, seq=131072, kv_heads=8, group=4, head_dim=128)


@pytest.mark.parametrize("how", LOWERINGS, ids=str)
def test_every_rank_sends_the_bytes_of_the_formula(how: object) -> None:
    check_bytes(SMALL, 4, how, zigzag=True)
    check_bytes(replace(SMALL, kv_heads=1, group=8), 4, how, zigzag=False)
    for window, zigzag in ((5, False), (3, True)):
        check_bytes(replace(SMALL, window=window), 4, how, zigzag=zigzag)


@pytest.mark.parametrize("how", LOWERINGS, ids=str)
def test_what_a_rank_keeps_halves_as_ranks_double(how: object) -> None:
    kept = [kept_bytes(SMALL, cp, how) for cp in (1, 2, 4)]
    assert all(a == 2 * b for a, b in itertools.pairwise(kept))


def test_a_timed_ring_computes_what_one_kernel_does() -> None:
    found = time_ring(16, 4, 2, 8, torch.float32, "cpu", pairs=2)
    assert found["wall_median"] > 0.0


def test_a_ring_hides_its_messages_where_the_sequence_is_long() -> None:
    """Work falls with the length's square, bytes with the length: a short one waits."""
    found = recommend(LONG, 8, bandwidth=360e9)
    assert isinstance(found.best, Ring)
    assert found.zigzag
    assert found.choices[0].exposed_s == 0.0
    text = str(found)
    assert text.startswith("attention: take ring in zigzag order (")
    assert "all-to-all: sends 280.0 MiB forward and 280.0 MiB backward" in text
    short = recommend(replace(LONG, seq=4096), 8, bandwidth=5e9)
    assert isinstance(short.best, Ulysses)
    assert not short.zigzag


def test_heads_that_do_not_divide_are_said_and_come_last() -> None:
    found = recommend(replace(LONG, kv_heads=3, group=1), 8)
    assert isinstance(found.choices[-1].how, Ulysses)
    assert str(found.choices[-1]) == ("all-to-all: neither 3 kv_heads nor a group of 1 divide by 8")
    with pytest.raises(ValueError, match=r"100 tokens of axis 'seq' over cp=8\. Give 2 ranks"):
        recommend(replace(LONG, seq=100), 8)


def test_a_window_makes_the_bytes_constant_in_the_sequence() -> None:
    windowed = replace(LONG, window=1024)
    longer = replace(windowed, seq=2 * LONG.seq)
    assert moved_bytes(windowed, 8, Ring()) == moved_bytes(longer, 8, Ring())
    forward, _ = moved_bytes(windowed, 8, AllGather()) or (0, 0)
    assert forward == windowed.kv_bytes(1023)


def test_a_plan_knows_what_attention_sends() -> None:
    """Its context bytes are those of the formula, for every layer, microbatch and phase."""
    cfg = GPTConfig(
        vocab_size=64,
        seq_length=32,
        num_layers=3,
        embed=32,
        kv_heads=4,
        group=2,
        head_dim=4,
        ffn=32,
    )
    model = gpt(cfg, batch_size=2)
    for how in LOWERINGS:
        rules = Rules(seq="cp", seq_res="cp", lower={"attention": how})
        made = plan(model, Layout(Mesh(cp=4), rules, order=Zigzag()), num_microbatches=2)
        once = moved_bytes(SMALL, 4, how, zigzag=True)
        assert once is not None
        assert made.context_bytes == 3 * 2 * sum(once)
        assert "~" not in made.mesh
    assert plan(model, Layout()).context_bytes == 0
