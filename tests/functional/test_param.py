"""First values: functions of seed, path and global index."""

import math

import pytest
import torch

from megatree.functional.param import Box, Param, init, initial_value, normal, ones, zeros

SIZES = {"vocab": 10, "embed": 6, "ffn": 8}
TREE = {
    "table": Param("vocab embed", init=normal(0.5), pad=4),
    "w": Param("layers ffn embed", stack=3),
    "norm": Param("embed", init=ones),
    "bias": Param("ffn", init=zeros, dtype=torch.float64),
}
PADDED = {"table": (12, 6), "w": (3, 8, 6), "norm": (6,), "bias": (8,)}


class Halves:
    """A layout that cuts one dim of every leaf in two."""

    def __init__(self, dim: int) -> None:
        self.dim = dim

    def box(self, leaf: Param, shape: tuple[int, ...], coords: dict[str, int], name: str) -> Box:
        dim = min(self.dim, len(shape) - 1)
        half = shape[dim] // 2
        cut = (coords["rank"] * half, (coords["rank"] + 1) * half)
        return tuple(cut if d == dim else (0, n) for d, n in enumerate(shape))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("dim", [0, 1])
def test_pieces_are_slices_of_the_whole_bit_for_bit(dim: int, dtype: torch.dtype) -> None:
    """Initial weights that depend on the cut make every comparison between meshes meaningless."""
    tree = {name: leaf for name, leaf in TREE.items() if dim or name != "w"}
    whole = init(tree, SIZES, seed=7, dtype=dtype)
    for rank in range(2):
        piece = init(tree, SIZES, 7, layout=Halves(dim), coords={"rank": rank}, dtype=dtype)
        for name in tree:
            at = min(dim, whole[name].dim() - 1)
            assert torch.equal(piece[name], whole[name].chunk(2, at)[rank]), name


def test_a_box_in_the_middle_is_a_slice() -> None:
    leaf = Param("vocab embed")
    whole = initial_value(leaf, "a", (1000, 70), ((0, 1000), (0, 70)), 3, torch.float32, None)
    box = initial_value(leaf, "a", (1000, 70), ((501, 777), (3, 64)), 3, torch.float32, None)
    assert torch.equal(box, whole[501:777, 3:64])


def test_shapes_dtypes_and_padding() -> None:
    params = init(TREE, SIZES, seed=7)
    assert {name: tuple(leaf.shape) for name, leaf in params.items()} == PADDED
    assert {name: leaf.dtype for name, leaf in params.items()} == {
        "table": torch.float32,
        "w": torch.float32,
        "norm": torch.float32,
        "bias": torch.float64,
    }
    assert params["table"][10:].count_nonzero() == 0
    assert params["table"][:10].count_nonzero() == 60
    assert torch.equal(params["norm"], torch.ones(6))


def test_padding_changes_no_value() -> None:
    other = {**TREE, "table": Param("vocab embed", init=normal(0.5), pad=16)}
    assert torch.equal(
        init(TREE, SIZES, seed=7)["table"][:10], init(other, SIZES, seed=7)["table"][:10]
    )


def test_seed_and_path_decide() -> None:
    params = init({"a": TREE["w"], "b": TREE["w"]}, SIZES, seed=7)
    assert torch.equal(params["a"], init({"a": TREE["w"]}, SIZES, seed=7)["a"])
    assert not torch.equal(params["a"], params["b"])
    assert not torch.equal(params["a"], init({"a": TREE["w"]}, SIZES, seed=8)["a"])
    assert not torch.equal(params["a"][0], params["a"][1])


def test_moments_of_the_normal() -> None:
    """10^6 draws: five standard errors of mean, variance, skewness and fourth moment."""
    leaf = Param("vocab embed", init=normal(2.0))
    box = ((0, 1000), (0, 1000))
    x = initial_value(leaf, "x", (1000, 1000), box, 0, torch.float64, None) / 2.0
    for power, moment, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
        error = (x**power).mean().item() - moment
        assert abs(error) < 5 * math.sqrt(variance / x.numel()) + (0.02 if power == 4 else 0.0), (
            power
        )
    rows = x[:-1] * x[1:]
    assert abs(rows.mean().item()) < 5 / math.sqrt(rows.numel())
