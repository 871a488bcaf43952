"""Context parallelism from a config: layouts, what is refused, and a run whose losses stay."""

from dataclasses import replace
from typing import Any

import pytest

from megatree.cli.plan import advice
from megatree.parallel.context import Ring
from megatree.parallel.order import Zigzag
from megatree.recipes.build import layout_of, layout_of_run
from megatree.recipes.config import ContextConfig, MeshConfig, megatron_rules
from megatree.recipes.presets import RECIPES


def demo(**changes: Any) -> Any:
    return replace(RECIPES["demo"](), **changes)


def test_cp_cuts_the_sequence_and_takes_the_lowering_that_is_named() -> None:
    cfg = demo(mesh=MeshConfig(cp=2, tp=2), context=ContextConfig(attention="ring"))
    layout = layout_of_run(cfg)
    assert layout.axes("seq") == ("cp",)
    assert layout.axes("seq_res") == ("cp", "tp")
    assert dict(layout.rules.lower) == {"attention": Ring()}
    assert layout.order == Zigzag()
    natural = layout_of(cfg.mesh, cfg.rules, context=ContextConfig(zigzag=False))
    assert natural.order is None
    alone = layout_of_run(demo(mesh=MeshConfig(tp=2)))
    assert (alone.rules.lower, alone.order, alone.axes("seq")) == ((), None, ())
    assert str(MeshConfig(tp=2)) == "dp=1 tp=2"


def test_sequences_that_do_not_divide_are_refused_with_a_length() -> None:
    model = replace(RECIPES["demo"]().model, seq_length=126)
    rules = megatron_rules()
    with pytest.raises(
        ValueError,
        match=r"model\.seq_length: 126 tokens do not divide into 4 chunks of mesh\.cp 2\. Set "
        r"model\.seq_length to 128, or leave out context\.zigzag\.",
    ):
        demo(mesh=MeshConfig(cp=2, tp=1), rules=rules, model=model)
    natural = ContextConfig(zigzag=False)
    demo(mesh=MeshConfig(cp=2, tp=1), rules=rules, model=model, context=natural)
    with pytest.raises(ValueError, match=r"mesh\.cp: 2 ranks, and no rule names 'cp'"):
        demo(mesh=MeshConfig(cp=2, tp=1), rules={"batch": ("dp",)})


def test_the_advice_is_for_the_heads_and_rows_of_one_rank() -> None:
    """A faster link favours what is waited for; the numbers are those of the run's own sizes."""
    cfg = demo(mesh=MeshConfig(dp=2, cp=2, tp=2))
    slow, fast = (advice(cfg, link) for link in (0.001, 1e6))
    assert slow.bandwidth == 1e6
    work, rows = cfg.model, cfg.train.microbatch // 2
    local = rows * work.seq_length // 2 * 2 * (work.kv_heads // 2) * work.head_dim * 4
    ring = next(c for c in slow.choices if isinstance(c.how, Ring))
    assert ring.bytes == (local, 2 * local)
    assert fast.choices[0].exposed_s < slow.choices[0].exposed_s
