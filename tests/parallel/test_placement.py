"""Which layer runs where; what cannot be placed is refused with the stages and the marked cell."""

from functools import partial
from typing import Any

import pytest
import torch

import megatree.functional as F
from megatree.functional.chain import Chain, Segment, Stack
from megatree.functional.param import Array, Param
from megatree.models.gpt import GPTConfig, gpt
from megatree.parallel.errors import ShardingError
from megatree.parallel.layout import Layout
from megatree.parallel.mesh import Mesh
from megatree.parallel.model import lower_model
from megatree.parallel.placement import Placement
from megatree.parallel.schedule import from_csv, gpipe, interleaved, one_f_one_b

CHAIN = [False, *[True] * 7, False, False]  # embed, seven layers, norm, head


def refusal(build: Any) -> str:
    with pytest.raises(ValueError) as error:  # noqa: PT011 the text is compared whole
        build()
    return str(error.value)


@pytest.mark.parametrize(
    ("placement", "num_stages", "stages"),
    [
        (Placement(), 3, (0, 0, 0, 0, 1, 1, 2, 2, 2, 2)),
        (Placement(num_stages=7), 7, (0, 0, 1, 2, 3, 4, 5, 6, 6, 6)),
        # 7 layers and two that count for the embedding and the head: 3 each
        (
            Placement(num_stages=3, embed_layers=1, head_layers=1),
            3,
            (0, 0, 0, 1, 1, 1, 2, 2, 2, 2),
        ),
        (
            Placement(num_stages=4, embed_layers=2, head_layers=3),
            4,
            (0, 0, 1, 1, 1, 2, 2, 2, 3, 3),
        ),
        (Placement(layers_per_stage=(1, 0, 6)), 3, (0, 0, 2, 2, 2, 2, 2, 2, 2, 2)),
        (Placement(layers_per_stage=(0, 7, 0)), 3, (0, 1, 1, 1, 1, 1, 1, 1, 2, 2)),
        (Placement(stage_of_layer=(0, 0, 0, 0, 0, 1, 2)), 3, (0, 0, 0, 0, 0, 0, 1, 2, 2, 2)),
    ],
)
def test_layers_lie_where_the_placement_says(
    placement: Placement, num_stages: int, stages: tuple[int, ...]
) -> None:
    assert placement.stages(CHAIN, num_stages) == stages


def test_virtual_stages_go_round_the_ranks() -> None:
    layout = Layout(Mesh(pp=2), schedule=partial(interleaved, num_virtual=2))
    cfg = GPTConfig(
        vocab_size=8, seq_length=4, num_layers=4, embed=4, kv_heads=1, head_dim=4, ffn=4
    )
    program = lower_model(gpt(cfg, batch_size=1), layout)
    assert [program.stage_rank[stage] for stage in program.stages] == [0, 0, 1, 0, 1, 1, 1]


def test_more_stages_than_layers_are_refused_with_the_empty_stages_marked() -> None:
    text = refusal(lambda: Placement().stages([False, True, True, False], 4))
    assert text == (
        "placement: 2 layers over 4 stages leaves a stage without layers ([1, 1, 0, 0]). "
        "Use at most 2 stages, or give layers_per_stage.\n"
        "  stage 0 |  layer 0\n"
        "  stage 1 |  layer 1\n"
        "  stage 2 | [?]\n"
        "  stage 3 | [?]"
    )


def test_counts_that_do_not_fit_are_marked() -> None:
    assert refusal(lambda: Placement(layers_per_stage=(3, 3)).stages([True] * 4, 2)) == (
        "placement: (3, 3) places 6 layers, the model has 4. Make the counts add up.\n"
        "  stage 0 |  layer 0   layer 1   layer 2\n"
        "  stage 1 |  layer 3  [layer 4] [layer 5]"
    )
    assert refusal(lambda: Placement(layers_per_stage=(1, 1)).stages([True] * 3, 2)) == (
        "placement: (1, 1) places 2 layers, the model has 3. Make the counts add up.\n"
        "  stage 0 |  layer 0\n"
        "  stage 1 |  layer 1  [?]"
    )
    assert refusal(lambda: Placement(layers_per_stage=(1, 1, 1)).stages([True] * 3, 2)) == (
        "placement: has 3 stages, the schedule 2. Give both the same number.\n"
        "  stage 0 |  layer 0\n"
        "  stage 1 |  layer 1\n"
        "  stage 2 | [layer 2]"
    )
    assert refusal(lambda: Placement(layers_per_stage=(3,)).stages([True] * 3, 2)) == (
        "placement: has 1 stages, the schedule 2. Give both the same number.\n"
        "  stage 0 |  layer 0   layer 1   layer 2\n"
        "  stage 1 | [?]"
    )


def test_a_placement_is_said_in_one_way() -> None:
    assert refusal(lambda: Placement(num_stages=2, layers_per_stage=(1, 1))) == (
        "Placement: num_stages and layers_per_stage are given. Give one of them."
    )
    assert refusal(lambda: Placement(stage_of_layer=(0, 2))).startswith(
        "Placement: stage_of_layer (0, 2) must start at 0 and never decrease or skip."
    )


def test_a_schedule_that_deadlocks_makes_no_layout() -> None:
    wrong = from_csv("F0.0, B0.0, F0.1, B0.1\nF1.0, F1.1, B1.0, B1.1")
    assert refusal(lambda: Layout(Mesh(pp=2), schedule=wrong)) == (
        "schedule: deadlock, ranks wait in a circle: rank 0 at B0.0 for B1.0, rank 1 at F1.1 for "
        "F0.1. Move F0.1 before B0.0 on rank 0.\n"
        "  rank 0 |  F0.0  [B0.0]  F0.1   B0.1\n"
        "  rank 1 |  F1.0  [F1.1]  B1.0   B1.1"
    )


def test_a_microbatch_count_that_a_schedule_cannot_take_is_marked() -> None:
    layout = Layout(Mesh(pp=2), schedule=one_f_one_b(2, 2))
    assert refusal(lambda: layout.schedule_for(3)) == (
        "schedule: is for 2 ranks and 2 microbatches, the mesh has pp=2 and the step 3. "
        "Give a schedule of that size.\n"
        "  rank 0 |  F0.0   F0.1   B0.0   B0.1  [?]\n"
        "  rank 1 |  F1.0   B1.0   F1.1   B1.1  [?]"
    )
    assert refusal(lambda: layout.schedule_for(1)).endswith(
        "  rank 0 |  F0.0  [F0.1]  B0.0   B0.1\n  rank 1 |  F1.0   B1.0  [F1.1]  B1.1"
    )
    assert refusal(lambda: Layout(Mesh(pp=3), schedule=gpipe(2, 1))) == (
        "schedule: is for 2 ranks and 1 microbatches, the mesh has pp=3 and the step 1. "
        "Give a schedule of that size.\n"
        "  rank 0 |  F0.0   B0.0\n"
        "  rank 1 |  F1.0   B1.0\n"
        "  rank 2 | [?]"
    )


def leaky(kept: dict[str, Any], *, hand_out: bool = False) -> Chain:
    """A chain whose head uses what a block has put aside."""

    def embed(w: Any, carry: Any, consts: Any, cfg: Any, *, state: Any = None) -> Any:
        return F.embedding(consts["tokens"], w["table"]), {}

    def block(w: Any, carry: Any, consts: Any, cfg: Any, *, state: Any = None) -> Any:
        kept["x"] = F.linear(carry, w["mix"])
        return carry + kept["x"], {}

    def head(w: Any, carry: Any, consts: Any, cfg: Any, *, state: Any = None) -> Any:
        if hand_out:
            return None, {"kept": kept["x"]}
        total = (carry * kept["x"]).sum()
        return None, {"terms": {"loss": (total, torch.ones_like(consts["tokens"]).sum())}}

    return Chain(
        segments={
            "embed": Segment(apply=embed, params={"table": Param("vocab embed")}),
            "blocks": Stack(
                kinds={"mixer": Segment(apply=block, params={"mix": Param("embed_out embed")})},
                pattern=("mixer",) * 3,
            ),
            "head": Segment(apply=head),
        },
        cfg=None,
        sizes={"batch": 2, "seq": 4, "embed": 8, "embed_out": 8, "vocab": 16},
        batch={"tokens": Array("batch seq", torch.int64)},
    )


def test_a_value_alive_across_a_cut_outside_the_carry_is_marked() -> None:
    """In one process Python would hand it over; on two ranks there is nothing to hand over."""
    layout = Layout(Mesh(pp=2), schedule=one_f_one_b)
    here = r"parallel/test_placement\.py:\d+"
    text = refusal(lambda: lower_model(leaky({}), layout))
    assert text.split("\n")[1:] == [
        "  stage 0 |  embed           [blocks.mixer 0]  blocks.mixer 1",
        "  stage 1 |  blocks.mixer 2  [head]",
    ]
    with pytest.raises(ShardingError, match=(
        rf"^head: mul at {here} uses a value of blocks\.mixer \(made at {here}\) that is not in "
        r"the carry; only the carry crosses a cut\. Return it in the carry of every segment in "
        r"between, or compute it in the chain's consts\.\n"
    )):  # fmt: skip
        lower_model(leaky({}), layout)
    with pytest.raises(
        ShardingError, match=r"^head: return at .* a value of blocks\.mixer \(made "
    ):
        lower_model(leaky({}, hand_out=True), layout)
