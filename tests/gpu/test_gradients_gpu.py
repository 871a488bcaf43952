"""On one GPU: bfloat16 gradients against float64 leaf by leaf, and every attention kernel against
the reference.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import lru_cache, partial
from typing import Any

import optree
import pytest
import torch
from torch import Tensor

import megatree.functional as F
from megatree.functional import flash_attn_package
from megatree.functional.attention import Kernel
from megatree.functional.attention_kernels import choose_tile_kernel
from megatree.functional.tree import flatten_with_names
from megatree.models.gpt import GPTConfig, gpt
from megatree.parallel.comm import OneDevice
from megatree.parallel.layout import Layout
from megatree.parallel.model import lower_model
from megatree.parallel.packing import views
from megatree.parallel.precision import Precision
from megatree.runtime.gradients import make_gradients, whole_gradients
from tests.tolerances import VANISHES, distance

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
    # Under torch 2.11 dynamo itself reads .grad of what it wraps.
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning"),
]

BATCH, SEQ = 4, 128
LLAMA = GPTConfig(
    vocab_size=512,
    seq_length=SEQ,
    num_layers=2,
    embed=256,
    kv_heads=2,
    group=2,
    head_dim=64,
    ffn=512,
    fused_loss=True,
)
GPT2 = replace(
    LLAMA,
    kv_heads=4,
    group=1,
    norm="layer",
    positions="learned",
    activation="gelu_tanh",
    bias=True,
    tied=True,
)
MODELS: Mapping[str, GPTConfig] = {
    "llama": LLAMA,
    "llama, head and loss apart": replace(LLAMA, fused_loss=False),
    "gpt2": GPT2,
}

LEAF = 2e-2
"""Relative L2 distance of a leaf: activations and cotangents are rounded to 2^-9 = 2e-3 some dozens
of times on the way to a gradient, at random, so 2e-3 times a root of a hundred. Seen: 1.3e-2."""
VECTOR = 2e-2
"""Of a norm's weight or a bias, a sum over all tokens. Seen: 1.3e-2."""
ALL = 1.5e-2
"""Of all leaves together. Seen: 1.2e-2 of "llama", 8e-3 of "gpt2"."""
ATTENTION = 5e-3
"""Of one attention and its gradients: the weights, the result and their cotangents are rounded.
Seen: 3.5e-3."""


def whole_batch(cfg: GPTConfig) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(1)
    tokens, labels = torch.randint(0, cfg.vocab_size, (2, BATCH, SEQ), generator=draw)
    weights = (torch.rand(BATCH, SEQ, generator=draw) > 0.2).float()
    return {"tokens": tokens, "labels": labels, "weights": weights}


@lru_cache
def weights_of(cfg: GPTConfig) -> Any:
    """Return weights that are bfloat16 numbers: both sides begin with the same ones."""
    draw = torch.Generator().manual_seed(0)
    shapes = gpt(cfg, batch_size=BATCH, dtype=torch.float64)
    step = make_gradients(lower_model(shapes, Layout()), OneDevice("cpu"))
    tree = step.weights.tree(shapes.params)
    names, leaves, structure = flatten_with_names(tree)
    drawn = []
    for name, leaf in zip(names, leaves, strict=True):
        centre = 1.0 if name.rpartition(".")[2] in ("norm1", "norm2", "norm") else 0.0
        value = centre + 0.05 * torch.randn(leaf.shape, dtype=torch.float64, generator=draw)
        drawn.append(value.bfloat16())
    return optree.tree_unflatten(structure, drawn)


@lru_cache
def expected_of(cfg: GPTConfig) -> tuple[float, dict[str, Tensor]]:
    """Return loss and gradients of the model's own fold in float64 on the CPU."""
    cfg = replace(cfg, fused_loss=False, attention_kernel="reference")
    model = gpt(cfg, batch_size=BATCH, dtype=torch.float64)
    leaves = optree.tree_map(lambda w: w.double().requires_grad_(), weights_of(cfg))
    total, weight = model.apply(leaves, whole_batch(cfg))[1]["loss"]["terms"]["loss"]
    loss = total / weight
    loss.backward()
    names, flat, _ = flatten_with_names(leaves)
    return loss.item(), {name: leaf.grad for name, leaf in zip(names, flat, strict=True)}


def gradients_on(
    device: str,
    cfg: GPTConfig,
    *,
    transform: Callable[[Callable[..., Any]], Callable[..., Any]] = lambda fn: fn,
    grads: torch.dtype | None = None,
) -> tuple[float, dict[str, Tensor]]:
    """Return loss and gradients of the lowered model in bfloat16."""
    model = gpt(cfg, batch_size=BATCH, dtype=torch.bfloat16)
    run = make_gradients(
        lower_model(model, Layout()),
        OneDevice(device),
        precision=Precision(grads=grads),
        transform=transform,
    )
    run.weights.fill(optree.tree_map(lambda w: w.to(device), weights_of(cfg)))
    terms, _, _ = run([{name: x.to(device) for name, x in whole_batch(cfg).items()}])
    names, flat, _ = flatten_with_names(views(run.groups, whole_gradients(run), model.params))
    return terms["loss"].item(), {n: x.cpu() for n, x in zip(names, flat, strict=True)}


def check(title: str, got: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """Print the distance of every leaf, and fail if one is too far."""
    assert list(got) == list(expected)
    norms = {name: leaf.norm().item() for name, leaf in expected.items()}
    largest = max(norms.values())
    lines, far = [], []
    for name, leaf in expected.items():
        scale = largest if norms[name] < VANISHES * largest else None
        off = distance(got[name], leaf, scale=scale)
        lines.append(f"  {name:<28} {list(leaf.shape)!s:<20} norm {norms[name]:.3e}  off {off:.2e}")
        vector = name.rpartition(".")[2].startswith(("b", "norm"))
        most = VECTOR if vector else LEAF
        far += [f"{name}: off by {off:.3g}, at most {most}"] if not off <= most else []
    flat = [torch.cat([x.double().flatten() for x in side.values()]) for side in (got, expected)]
    together = distance(*flat)
    print("\n".join([title, *lines, f"  {'together':<49} off {together:.2e}"]))  # noqa: T201
    assert not far, f"{len(far)} leaves: {'; '.join(far[:8])}"
    assert together <= ALL


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("model", MODELS)
def test_bfloat16_gradients_are_as_near_to_float64_as_their_dtype(
    model: str, compiled: bool
) -> None:
    cfg = MODELS[model]
    loss, expected = expected_of(cfg)
    narrow = torch.bfloat16 if compiled else None  # once float32 sums, once none
    transform = partial(torch.compile, dynamic=False) if compiled else lambda fn: fn
    got_loss, got = gradients_on("cuda", cfg, transform=transform, grads=narrow)
    assert got_loss == pytest.approx(loss, rel=5e-3)
    check(f"{model}, {'compiled' if compiled else 'eager'}", got, expected)


KERNELS: tuple[Kernel, ...] = ("auto", "sdpa", "cudnn", "flash", "flash_attn", "efficient")


def fits(kernel: str) -> str:
    """Return why a kernel cannot run on this card, "" if it can."""
    if kernel == "flash_attn" and not flash_attn_package.installed():
        return "flash-attn is not installed"
    if kernel == "cudnn" and torch.cuda.get_device_capability() < (8, 0):
        return "cuDNN's attention needs Ampere or later"
    return ""


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("group", [1, 4])
@pytest.mark.parametrize("kernel", [*KERNELS, "reference"])
def test_every_attention_kernel_is_the_reference(kernel: Kernel, group: int, causal: bool) -> None:
    """Result and gradients of q, k and v against plain torch in float64, grouped heads too."""
    if why := fits(kernel):
        pytest.skip(why)
    draw = torch.Generator().manual_seed(2)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=torch.float64, generator=draw).bfloat16()

    q, g = normal(2, 256, 2, group, 64), normal(2, 256, 2, group, 64)
    k, v = normal(2, 256, 2, 64), normal(2, 256, 2, 64)

    def run(device: str, dtype: torch.dtype, kernel: Kernel) -> list[Tensor]:
        leaves = [x.to(device, dtype).requires_grad_() for x in (q, k, v)]
        out = F.attention(*leaves, causal=causal, kernel=kernel)
        grads = torch.autograd.grad(out, leaves, g.to(device, dtype))
        return [x.detach().cpu() for x in (out, *grads)]

    expected = run("cpu", torch.float64, "reference")
    got = run("cuda", torch.bfloat16, kernel)
    off = {
        name: distance(a, b)
        for name, a, b in zip(("out", "q", "k", "v"), got, expected, strict=True)
    }
    print(f"{kernel}: {', '.join(f'{name} {d:.1e}' for name, d in off.items())}")  # noqa: T201
    assert max(off.values()) <= ATTENTION, off


def test_the_kernel_that_is_chosen_is_among_those_that_are_tested() -> None:
    chosen = choose_tile_kernel("cuda", torch.bfloat16, 64, 64, masked=False)
    assert chosen.name in KERNELS
