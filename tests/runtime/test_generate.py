"""Generated text is the model's own, the same on any mesh, and a function of the seed."""

from pathlib import Path

import pytest
import torch

from megatree.functional.param import init
from megatree.functional.tree import flatten_with_names
from megatree.io import checkpoint
from megatree.io.checkpoint import Piece
from megatree.io.world import World
from megatree.models.gpt import GPTConfig, gpt
from megatree.parallel.comm import OneDevice
from megatree.parallel.layout import Layout, Rules
from megatree.parallel.mesh import Mesh
from megatree.parallel.schedule import one_f_one_b
from megatree.runtime.collectives import ProcessComm
from megatree.runtime.generate import (
    Generator,
    greedy,
    load_generator,
    padded_length,
    sampling,
)
from megatree.runtime.processes import world_of_group
from tests.ranks import ranks

CFG = GPTConfig(
    vocab_size=30,
    vocab_pad=8,
    seq_length=24,
    num_layers=2,
    embed=16,
    kv_heads=2,
    group=2,
    head_dim=4,
    ffn=24,
    tied=True,
    positions="learned",
    init_std=0.5,
)
PROMPTS = [[1, 2, 3], [4, 5, 6, 7, 8]]


def write_weights(path: Path) -> dict:
    """Save whole random weights as a run does, with moments beside them; return them."""
    model = gpt(CFG, batch_size=1)
    tree = init(model.params, model.sizes, 5)
    names, leaves, _ = flatten_with_names(tree)
    axes = [leaf.axes for leaf in flatten_with_names(model.params)[1]]
    whole = dict(zip(names, leaves, strict=True))
    whole["embed.table"] = whole["embed.table"][:30]  # without its padding
    pieces = [
        Piece.whole(f"{kind}.{name}", leaf, axis)
        for kind in ("params", "opt.m")
        for (name, leaf), axis in zip(whole.items(), axes, strict=True)
    ]
    if not path.exists():
        checkpoint.save(path, pieces, world=World.single())
    return tree


def generator(path: Path, layout: Layout, *, rows: int = 2, seq: int = 16) -> Generator:
    one = layout.mesh.num_ranks == 1
    model = gpt(CFG, batch_size=rows).up_to("head").with_sizes(seq=seq, seq_res=seq)
    comm = OneDevice() if one else ProcessComm(layout.mesh)
    world = World.single() if one else world_of_group()
    return load_generator(str(path), model, layout, comm=comm, world=world)


def by_hand(tree: dict, prompt: list[int], num_tokens: int) -> list[int]:
    """Continue greedily with the plain model, without padding, one row at a time."""
    model = gpt(CFG, batch_size=1).up_to("head")
    tokens = list(prompt)
    for _ in range(num_tokens):
        row = torch.tensor([tokens])
        batch = {"tokens": row, "labels": row, "weights": torch.ones(row.shape)}
        logits, _ = model.apply(tree, batch)
        tokens.append(int(logits[0, -1, : CFG.vocab_size].argmax()))
    return tokens[len(prompt) :]


def test_greedy_text_is_the_plain_models(tmp_path: Path) -> None:
    """Rows of other lengths and the padding to their right must not show."""
    tree = write_weights(tmp_path / "weights")
    expected = [by_hand(tree, prompt, 8) for prompt in PROMPTS]
    assert len({tuple(row) for row in expected}) == 2
    assert generator(tmp_path / "weights", Layout())(PROMPTS, 8, greedy) == expected


def test_padding_of_the_vocabulary_is_never_chosen(tmp_path: Path) -> None:
    """Its logits are zero, which is likelier than a real token that is unlikely."""
    write_weights(tmp_path / "weights")
    rows, at = torch.zeros(2, 16, dtype=torch.int64), torch.tensor([3, 5])
    assert generator(tmp_path / "weights", Layout()).logits(rows, at).shape == (2, CFG.vocab_size)


@ranks(2)
def test_text_does_not_depend_on_the_mesh(tmp_path: Path) -> None:
    world = world_of_group()
    tree = world.broadcast(world.on_first(lambda: write_weights(tmp_path / "weights")))
    expected = [by_hand(tree, prompt, 6) for prompt in PROMPTS]
    tensor = Rules(kv_heads="tp", ffn="tp", vocab="tp", seq_res="tp")
    stages = Layout(Mesh(pp=2), schedule=one_f_one_b)
    for layout in (Layout(Mesh(tp=2), tensor), Layout(Mesh(dp=2), Rules(batch="dp")), stages):
        model = generator(tmp_path / "weights", layout)
        assert model(PROMPTS, 6, greedy) == expected
        drawn = model(PROMPTS, 6, sampling(temperature=1.0, seed=7))
        assert world.gather(drawn) == [drawn, drawn]


def test_a_row_stops_before_the_end_token(tmp_path: Path) -> None:
    tree = write_weights(tmp_path / "weights")
    first, second = (by_hand(tree, prompt, 8) for prompt in PROMPTS)
    end = next(token for token in first if token not in second)
    found = generator(tmp_path / "weights", Layout())(PROMPTS, 8, greedy, end=end)
    assert found == [first[: first.index(end)], second]


def test_draws_follow_the_seed_and_the_probabilities() -> None:
    logits = torch.log(torch.tensor([[0.5, 0.3, 0.2]])).expand(6000, 3)
    drawn = sampling(temperature=1.0, seed=1)(logits, 0)
    share = torch.bincount(drawn, minlength=3) / 6000
    torch.testing.assert_close(share, torch.tensor([0.5, 0.3, 0.2]), rtol=0, atol=0.025)
    assert torch.equal(sampling(temperature=1.0, seed=1)(logits, 0), drawn)
    assert not torch.equal(sampling(temperature=1.0, seed=2)(logits, 0), drawn)
    assert not torch.equal(sampling(temperature=1.0, seed=1)(logits, 1), drawn)
    cold = sampling(temperature=0.01, seed=1)(logits[:50], 0)
    assert torch.equal(cold, greedy(logits[:50], 0))


@pytest.mark.parametrize(
    ("prompts", "num_tokens", "message"),
    [
        ([[1]], 1, r"1 prompts, the model was lowered for 2 rows"),
        ([[1], []], 1, r"prompt 1 has no token\. Give it at least one"),
        (
            [[1], [2, 3, 4]],
            14,
            r"a prompt of 3 tokens and 14 new ones make 17, the model's sequence has 16\. "
            r"Ask for at most 13 new tokens",
        ),
    ],
)
def test_what_does_not_fit_is_refused(
    tmp_path: Path, prompts: list[list[int]], num_tokens: int, message: str
) -> None:
    write_weights(tmp_path / "weights")
    with pytest.raises(ValueError, match=message):
        generator(tmp_path / "weights", Layout())(prompts, num_tokens, greedy)


def test_a_checkpoint_without_the_weights_is_refused(tmp_path: Path) -> None:
    checkpoint.save(
        tmp_path / "other", [Piece.whole("params.x", torch.ones(2), "x")], world=World.single()
    )
    with pytest.raises(ValueError, match=r"other: 13 leaves do not match the target"):
        generator(tmp_path / "other", Layout())


def test_a_temperature_must_be_positive() -> None:
    with pytest.raises(ValueError, match=r"temperature: 0.0\. Give a positive one"):
        sampling(temperature=0.0, seed=0)


def test_lengths_divide_over_what_cuts_the_sequence() -> None:
    layout = Layout(Mesh(tp=4), Rules(seq_res="tp", ffn="tp"))
    assert [padded_length(n, layout, 128) for n in (1, 4, 5, 127)] == [4, 4, 8, 128]
    assert padded_length(5, Layout(), 128) == 5
