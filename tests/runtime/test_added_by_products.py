"""Gradients of narrow weights that their products add to wide sums: unrounded, and each once."""

import math
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import replace
from functools import lru_cache, partial
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

import megatree.functional as F
from megatree.functional.chain import Chain, Segment, Stack
from megatree.functional.param import Array, Param
from megatree.functional.tree import flatten_with_names
from megatree.models.gpt import GPTConfig, gpt
from megatree.parallel.comm import OneDevice
from megatree.parallel.layout import Layout, Rules
from megatree.parallel.mesh import Mesh
from megatree.parallel.model import lower_model
from megatree.parallel.packing import Group, Leaf, pack, views
from megatree.parallel.precision import Precision
from megatree.parallel.remat import Remat
from megatree.parallel.schedule import one_f_one_b, zero_bubble_h1
from megatree.parallel.split import weight_gradient
from megatree.parallel.storage import Storage
from megatree.parallel.threads import Threads
from megatree.runtime import gradients as gradients_module
from megatree.runtime.gradients import Gradients, make_gradients, whole_gradients
from megatree.runtime.leaves import Leaves
from megatree.runtime.optimizers import LeafRule, by_path
from megatree.runtime.sums import GradientSums
from tests.functional.check import rand
from tests.runtime.one_device import assert_like_one_device, reference
from tests.tolerances import distance

LLAMA = GPTConfig(
    vocab_size=32, seq_length=8, num_layers=2, embed=16, kv_heads=2, group=2, head_dim=4, ffn=24
)
GPT2 = replace(
    LLAMA, norm="layer", positions="learned", activation="gelu_tanh", bias=True, tied=True
)
MODELS = {"llama": LLAMA, "gpt2": GPT2}
PRODUCTS = {
    "llama": {"wq", "wk", "wv", "wo", "w_gate", "w_up", "w_down", "table"},
    "gpt2": {"wq", "wk", "wv", "wo", "w_up", "w_down"},  # the head's table is looked up too
}
APART = by_path({f"*.{name}": LeafRule(lr=0.5) for name in ("w_up", "wk")})
Grads = dict[str, Tensor]


@contextmanager
def rounded() -> Generator[None]:
    """Have autograd make every gradient, in the dtype of its leaf."""
    with mock.patch.object(gradients_module, "added_by_products", return_value=frozenset()):
        yield


@contextmanager
def exact_sums() -> Generator[dict[tuple[str, int | None], Tensor]]:
    """Note the sum of what products add, in float64 from their own factors."""
    found: dict[tuple[str, int | None], Tensor] = {}
    add = Leaves.add_product

    def noted(self: Leaves, keys: Any, product: Any, x: Tensor, g: Tensor, **options: Any) -> None:
        shapes = [self._places[key].leaf.shape for key in keys]
        whole = weight_gradient(product, x.double(), g.double()).flatten()
        parts = whole.split([math.prod(shape) for shape in shapes])
        for key, part, shape in zip(keys, parts, shapes, strict=True):
            found[key] = found.get(key, 0) + part.view(shape)
        add(self, keys, product, x, g, **options)

    with mock.patch.object(Leaves, "add_product", noted):
        yield found


def batches(cfg: GPTConfig, count: int) -> list[dict[str, Tensor]]:
    draw = torch.Generator().manual_seed(1)
    shape = (count, 2, 4, cfg.seq_length)
    tokens = torch.randint(0, cfg.vocab_size, shape, generator=draw)
    weights = torch.ones(4, cfg.seq_length)
    return [{"tokens": x, "labels": y, "weights": weights} for x, y in tokens]


def fill(run: Gradients) -> None:
    """Draw weights: the same for every model of one shape, whatever its dtype and order."""
    for group in run.groups:
        for leaf, layer, view in group.rows(run.weights.stored[group.name]):
            seed = sum(map(ord, f"{leaf.path} {layer}"))
            view.copy_(0.2 * rand(*leaf.shape, seed=seed) + ("norm" in leaf.path))


def gradients(
    cfg: GPTConfig,
    dtype: torch.dtype,
    *,
    joined: bool = True,
    transform: Any = lambda fn: fn,
    device: str = "cpu",
    num_microbatches: int = 4,
) -> Grads:
    """Return what a step on one device adds up."""
    model = gpt(cfg, batch_size=4, dtype=dtype)
    program = lower_model(model, Layout())
    groups = pack(program) if joined else pack(program, rule=APART)
    run = make_gradients(program, OneDevice(device), groups=groups, transform=transform)
    fill(run)
    run([{n: x.to(device) for n, x in b.items()} for b in batches(cfg, num_microbatches)])
    tree = views(run.groups, whole_gradients(run), model.params)
    names, flat, _ = flatten_with_names(tree)
    return {name: x.clone() for name, x in zip(names, flat, strict=True)}


def is_added(model: str, name: str) -> bool:
    return name != "embed.table" and name.rpartition(".")[2] in PRODUCTS[model]


@pytest.mark.parametrize("joined", [True, False])
@pytest.mark.parametrize("model", MODELS)
def test_they_are_not_rounded_and_all_others_are_as_before(model: str, joined: bool) -> None:
    """The sum of four bfloat16 gradients is off by 2^-9 each; float32 sums of products by 2^-24."""
    cfg = MODELS[model]
    with rounded():
        before = gradients(cfg, torch.bfloat16, joined=joined)
    with exact_sums() as exact:
        after = gradients(cfg, torch.bfloat16, joined=joined)
    assert {path for path, _ in exact} == {name for name in before if is_added(model, name)}
    for name, grad in after.items():
        assert grad.dtype == torch.float32
        if not is_added(model, name):
            assert torch.equal(grad, before[name]), name
            continue
        layers = sorted(index for path, index in exact if path == name and index is not None)
        best = torch.stack([exact[name, i] for i in layers]) if layers else exact[name, None]
        assert distance(grad, best) < 1e-6, name
        assert distance(before[name], best) > 500 * distance(grad, best), name


def one_product(dtype: torch.dtype) -> Chain:
    """A chain of one product whose factors and cotangents are numbers of 8 bits."""

    def apply(w: Any, carry: Any, consts: Any, cfg: Any, *, state: Any = None) -> Any:
        y = F.linear(consts["x"], w["mix"]) * consts["t"]
        return None, {"terms": {"loss": (y.sum(), consts["weights"].sum())}}

    layer = Segment(apply=apply, params={"mix": Param("embed_out embed")})
    return Chain(
        segments={"only": Stack(kinds={"layer": layer}, pattern=("layer",))},
        cfg=None,
        sizes={"batch": 16, "seq": 16, "embed": 8, "embed_out": 12},
        batch={
            "x": Array("batch seq embed", dtype),
            "t": Array("batch seq embed_out", dtype),
            "weights": Array("batch seq", torch.float32),
        },
        dtype=dtype,
    )


def one_product_sums(
    dtype: torch.dtype,
    device: str = "cpu",
    transform: Any = lambda fn: fn,
    *,
    num_microbatches: int = 4,
) -> Tensor:
    """Return what a step of that chain adds up."""
    draw = torch.Generator().manual_seed(2)
    model = lower_model(one_product(dtype), Layout())
    run = make_gradients(model, OneDevice(device), transform=transform)
    fill(run)
    made = []
    for _ in range(num_microbatches):
        x, t = (torch.randn(16, 16, n, generator=draw).bfloat16() for n in (8, 12))
        made.append({"x": x.to(dtype), "t": t.to(dtype), "weights": torch.ones(16, 16)})
    run([{name: value.to(device) for name, value in each.items()} for each in made])
    (grad,) = run.sums.shards().values()
    return grad


def test_sums_of_exact_factors_are_those_of_float64() -> None:
    """Nothing else is rounded here: before, each of four gradients was."""
    expected, after = one_product_sums(torch.float64), one_product_sums(torch.bfloat16)
    with rounded():
        before = one_product_sums(torch.bfloat16)
    assert distance(after, expected) < 1e-6
    assert distance(before, expected) > 1000 * distance(after, expected)


COMPILER_WARNS = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")


@COMPILER_WARNS
def test_compiled_bodies_hand_them_out_too() -> None:
    cfg = replace(GPT2, num_layers=1)
    compile_ = partial(torch.compile, backend="aot_eager", fullgraph=True, dynamic=False)

    def compiled(fn: Any) -> Any:  # the block alone: it takes the most
        return compile_(fn) if fn.__code__.co_argcount > 20 else fn

    eager = gradients(cfg, torch.bfloat16)
    with exact_sums() as exact:
        ours = gradients(cfg, torch.bfloat16, transform=compiled)
    assert {path.rpartition(".")[2] for path, _ in exact} == PRODUCTS["gpt2"]
    for name, grad in ours.items():
        if not name.endswith(".bk"):  # softmax does not see it
            assert distance(grad, eager[name]) < 1e-6, name


# -- every way of storing and running -------------------------------------------------------------

SP = Rules(kv_heads="tp", ffn="tp", vocab="tp", seq_res="tp")
DP = Layout(Mesh(dp=2), Rules(batch="dp"))
PP = Layout(Mesh(pp=2), schedule=one_f_one_b)
ZERO_3 = Storage(params="dp", grads="dp", opt="dp")
LAYOUTS = {
    "one device": Layout(),
    "tp2 sp": Layout(Mesh(tp=2), SP),
    "dp2": DP,
    "zero-1": replace(DP, storage=Storage(opt="dp")),
    "zero-2": replace(DP, storage=Storage(grads="dp", opt="dp")),
    "zero-3": replace(DP, storage=ZERO_3),
    "zero-3 full": replace(DP, storage=ZERO_3, remat=Remat(policy="full")),
    "full": Layout(remat=Remat(policy="full", layers=2)),
    "selective, offload": Layout(remat=Remat(policy="selective", offload=True)),
    "pp2": PP,
    "pp2 zb-h1": replace(PP, schedule=zero_bubble_h1),
    "pp2 zb-h1 selective": replace(PP, schedule=zero_bubble_h1, remat=Remat(policy="selective")),
}


def sums_on(layout: Layout) -> list[tuple[Grads, int]]:
    """Return every rank's sums of two microbatches, and how many products added to them.

    Weights are float32 and sums float64: as narrow ones are, but what is lost or comes twice shows.
    """
    program = lower_model(gpt(GPT2, batch_size=4, dtype=torch.float32), layout)

    def main(comm: Any) -> tuple[Grads, int]:
        run = make_gradients(program, comm, precision=Precision(grads=torch.float64))
        state = run.weights.shards()
        for group in run.groups:
            seed = sum(map(ord, group.leaves[0].path))
            state[group.name].copy_(0.1 * rand(*state[group.name].shape, seed=seed) + 0.1)
        run.weights.publish(state)
        count, add = 0, run.sums.add_product

        def counted(*args: Any, **options: Any) -> None:
            nonlocal count
            count += 1
            add(*args, **options)

        run.sums.add_product = counted  # type: ignore[method-assign]
        parts = layout.mesh.sizes.get("dp", 1)
        at = comm.coords.get("dp", 0)
        run([{name: x.chunk(parts)[at] for name, x in b.items()} for b in batches(GPT2, 2)])
        return {name: x.clone() for name, x in run.sums.shards().items()}, count

    return Threads(layout.mesh.sizes).run(main) if layout.mesh.sizes else [main(OneDevice())]


@lru_cache
def without(layout: Layout) -> list[tuple[Grads, int]]:
    with rounded():
        return sums_on(layout)


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_product_is_added_once_wherever_it_is_stored(name: str) -> None:
    layout = LAYOUTS[name]
    plain = replace(layout, remat=Remat(), schedule=PP.schedule if "pp" in name else None)
    ranks = sums_on(layout)
    for rank, ((got, count), (expected, none)) in enumerate(
        zip(ranks, without(plain), strict=True)
    ):
        assert none == 0
        # Two microbatches of: heads, their output, up, down. A split backward leaves the head's
        # table too, as its stage does not look it up.
        layers = 1 if "pp" in name else 2
        assert count == 2 * (4 * layers + ("zb" in name and rank == 1))
        for group, grads in expected.items():
            assert distance(got[group], grads) < 1e-6, group


def test_a_table_that_a_stage_multiplies_and_looks_up_has_both_gradients() -> None:
    """A split backward of one stage: the head's product must not take the embedding's place."""
    layout = Layout(Mesh(dp=2), Rules(batch="dp"), schedule=zero_bubble_h1)
    assert_like_one_device(reference(replace(GPT2, num_layers=1)), layout)


# -- into a row -----------------------------------------------------------------------------------

SHAPES = {  # the leaf's shape, the dim that storage cuts, the number of rows as a matrix
    "rows": ((8, 6), 0, 8),
    "columns": ((3, 8), 1, 3),
    "inner rows": ((3, 4, 2, 5), 1, 24),
    "inner columns": ((5, 3, 4, 2), 2, 5),
}


def one_row(shape: tuple[int, ...], dim: int, parts: tuple[int, int, int]) -> Group:
    """Return a group of three leaves of which the last two lie side by side."""
    size = math.prod(shape)
    leaves = [Leaf(path="first", start=0, shape=(4,))]
    leaves += [
        Leaf(path=p, start=4 + i * size, shape=shape, dim=dim) for i, p in enumerate(("a", "b"))
    ]
    cut = Storage(*(("dp",) if n > 1 else () for n in parts))
    return Group(
        name="g", unit="u", layers=None, leaves=tuple(leaves), sync=(), stored=cut, parts=parts,
        copies=1, holders=(), rule=None, dtype=torch.bfloat16,
    )  # fmt: skip


@pytest.mark.parametrize("parts", [(1, 1, 1), (1, 1, 4), (1, 4, 4)])
@pytest.mark.parametrize("kind", SHAPES)
def test_a_product_goes_where_its_gradient_would(kind: str, parts: tuple[int, int, int]) -> None:
    """Of two leaves side by side; the first replaces what was there, the second is added."""
    shape, dim, rows = SHAPES[kind]
    group = one_row(shape, dim, parts)
    bucket, (_, *leaves) = ("g", 0), group.leaves
    sums, other = (GradientSums(OneDevice(), (group,), {bucket: 5}, Precision()) for _ in range(2))
    factors = [
        (rand(7, 2 * rows, seed=i).bfloat16(), rand(7, math.prod(shape) // rows, seed=i).bfloat16())
        for i in range(2)
    ]
    for each in (sums, other):
        each.begin(1)
        each.stored["g"].fill_(torch.nan if parts[1] == 1 else 0.0)
    for number, (left, right) in enumerate(factors, 1):
        sums.add_product(bucket, leaves, left, right)
        exact = (left.float().T @ right.float()).view(2, *shape)
        for leaf, grad in zip(leaves, exact, strict=True):
            other.add(bucket, leaf, grad)
        assert sums._left == other._left == {bucket: 5 - 2 * number}
        other._write(bucket)  # small gradients wait for the rest of their row
        for leaf in leaves:
            got, expected = sums.target(bucket, leaf), other.target(bucket, leaf)
            assert distance(got, expected) < 1e-6
            assert got.dtype == torch.float32


def test_a_part_of_a_sum_is_not_the_last_gradient_of_a_row() -> None:
    """What makes up no arrival starts no reduction, at the beginning of a microbatch either."""
    group = one_row((8, 6), 0, (1, 4, 4))
    sums = GradientSums(OneDevice(), (group,), {("g", 0): 3}, Precision())
    sums.begin(2)
    with mock.patch.object(sums, "_scatter") as scatter:
        for arrivals in (0, 3, 0):
            leaf = group.leaves[1]
            sums.add_product(("g", 0), [leaf], rand(2, 8), rand(2, 6), arrivals=arrivals)
            assert scatter.call_count == (arrivals > 0 or scatter.call_count)
    assert scatter.call_count == 1


def test_narrow_sums_stay_what_they_were() -> None:
    """Sums no wider than the weights: autograd's gradient is what is added, bit for bit."""
    assert Precision().widens(torch.bfloat16)
    assert not Precision().widens(torch.float32)
    assert not Precision(grads=torch.bfloat16).widens(torch.bfloat16)
    assert not Precision(grads=torch.bfloat16).widens(torch.float32)
