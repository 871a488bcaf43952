"""Decoders with experts, layouts for them, and their terms and gradients against one device's."""

from collections.abc import Mapping
from dataclasses import replace
from functools import cache
from typing import Any

import optree
import torch
from torch import Tensor

from megatree.functional.chain import Chain
from megatree.functional.param import padded_shape
from megatree.functional.tree import flatten_with_names, map_with_names
from megatree.models.moe import moe
from megatree.models.moe_config import MoEConfig
from megatree.parallel.assemble import assemble
from megatree.parallel.context import Ring
from megatree.parallel.layout import Layout, Rules
from megatree.parallel.mesh import Mesh
from megatree.parallel.model import lower_model
from megatree.parallel.order import Zigzag
from megatree.parallel.threads import ThreadComm, Threads
from megatree.parallel.types import make_type
from tests.runtime.one_device import Reference, gradients_on, rank_inputs
from tests.tolerances import RELATIVE, assert_leaves_close

BATCH, SEQ, EXPERTS = 8, 8, 8
SIZES: dict[str, Any] = {
    "vocab_size": 50, "vocab_pad": 8, "seq_length": SEQ, "embed": 16, "kv_heads": 2, "group": 1,
    "head_dim": 4, "ffn": 16, "experts": EXPERTS, "expert_ffn": 4, "num_layers": 2,
}  # fmt: skip
LOSSES: dict[str, Any] = {"balance": 0.3, "z_loss": 0.2}
CAPPED = MoEConfig(**SIZES, **LOSSES, top_k=2, pre_softmax=True, capacity_factor=0.75)
MODELS: dict[str, MoEConfig] = {
    # as Mixtral: all layers are mixtures
    "dropless": MoEConfig(**SIZES, **LOSSES, top_k=2),
    # as DeepSeek: a dense layer first, a shared expert, groups, balance of every sequence
    "shared": MoEConfig(
        **SIZES, **LOSSES, top_k=4, score="sigmoid", groups=4, group_top_k=2, route_scale=2.5,
        shared_ffn=8, dense_first=1, balance_over="sequence",
    ),
    "capped": CAPPED,
    "padded": replace(CAPPED, pad_to_capacity=True),
    # as DeepSeek-V3: chosen by score and bias; the shared expert while rows travel
    "biased": MoEConfig(
        **SIZES, **LOSSES, top_k=4, score="sigmoid", groups=4, group_top_k=2, shared_ffn=8,
        bias_rate=1e-2, balance_over="global", overlap_shared=True,
    ),
    "jittered": MoEConfig(
        **SIZES, **LOSSES, top_k=2, jitter=0.3, shared_ffn=8, overlap_shared=True,
        capacity_factor=0.75, pad_to_capacity=True,
    ),
    "sinkhorn": MoEConfig(**SIZES, z_loss=0.2, top_k=1, score="sigmoid", router="sinkhorn"),
}  # fmt: skip
TP: dict[str, Any] = {"kv_heads": "tp", "ffn": "tp", "shared_ffn": "tp", "vocab": "tp"}
_FOLDED = Mesh(dp=4, tp=2).refine(ep=4)
LAYOUTS: dict[str, Layout] = {
    "one rank": Layout(),
    "dp2": Layout(Mesh(dp=2), Rules(batch="dp")),
    "ep2": Layout(Mesh(ep=2), Rules(batch="ep", experts="ep")),
    "ep8": Layout(Mesh(ep=8), Rules(batch="ep", experts="ep")),
    "dp2 ep2": Layout(Mesh(dp=2, ep=2), Rules(batch=("dp", "ep"), experts="ep")),
    "dp2 ep4": Layout(Mesh(dp=2, ep=4), Rules(batch=("dp", "ep"), experts="ep")),
    # experts within dp: no axis of their own
    "ep is dp": Layout(Mesh(dp=4), Rules(batch="dp", experts="dp")),
    "ep2 tp2": Layout(Mesh(ep=2, tp=2), Rules(batch="ep", experts="ep", **TP)),
    # experts are cut within, by the axis that cuts heads
    "ep2 etp2": Layout(
        Mesh(ep=2, tp=2), Rules(batch="ep", experts="ep", expert_ffn="tp", seq_res="tp", **TP)
    ),
    "dp2 ep2 etp2": Layout(
        Mesh(dp=2, ep=2, tp=2),
        Rules(batch=("dp", "ep"), experts="ep", expert_ffn="tp", seq_res="tp", **TP),
    ),
    # experts over all of tp and the inner half of dp
    "folded": Layout(
        _FOLDED, Rules(batch="dp", experts="ep", seq_res="tp", seq_moe="tp", **TP)
    ),
    "ep against mesh order": Layout(
        Mesh(dp=2, tp=2), Rules(batch="dp", experts=("tp", "dp"), seq_moe="tp", **TP)
    ),
    "over cp": Layout(
        Mesh(dp=2, cp=2),
        Rules(batch="dp", seq="cp", seq_res="cp", seq_moe="cp", experts=("dp", "cp")),
    ),
    "ep2 cp2 tp2": Layout(
        Mesh(ep=2, cp=2, tp=2),
        Rules(
            batch="ep", seq="cp", seq_res=("cp", "tp"), seq_moe=("cp", "tp"), experts="ep", **TP
        ),
    ),
    # experts over all 8 ranks
    "dp2 cp2 tp2 folded": Layout(
        Mesh(dp=2, cp=2, tp=2),
        Rules(
            batch="dp", seq="cp", seq_res=("cp", "tp"), seq_moe=("cp", "tp"),
            experts=("dp", "cp", "tp"), **TP,
        ),
    ),
    "ep4 etp2": Layout(
        Mesh(ep=4, tp=2), Rules(batch="ep", experts="ep", expert_ffn="tp", seq_res="tp", **TP)
    ),
    "zigzag ring": Layout(
        Mesh(cp=2, tp=2),
        Rules(
            seq="cp", seq_res=("cp", "tp"), seq_moe=("cp", "tp"), experts=("cp", "tp"), **TP,
            lower={"attention": Ring()},
        ),
        order=Zigzag(),
    ),
}  # fmt: skip


def layout_of(layout: Layout, cfg: MoEConfig) -> Layout:
    """Return a layout without the rules for axes that the model does not have."""
    lacks = {"ffn"} - ({"ffn"} if "dense" in cfg.pattern else set())
    lacks |= {"shared_ffn"} if cfg.shared_ffn is None else set()
    rules = {k: v for k, v in layout.rules.table if k not in lacks}
    if cfg.overlap_shared:  # computed on the tokens as they are sent: cut within, or of a rank
        rules["shared_ffn"] = rules.get("expert_ffn", ())
    return replace(layout, rules=Rules(**rules, lower=dict(layout.rules.lower)))


def objective(model: Chain, params: Any, batches: Any) -> dict[str, Tensor]:
    """Return every term, averaged as the step does, on plain tensors: term -> value."""
    sums: dict[str, list[Any]] = {}
    for batch in batches:
        _, outs = model.apply(params, batch)
        found = {**outs["loss"]["terms"], **outs["blocks"]["moe"].get("terms", {})}
        for name, (total, weight) in found.items():
            sums.setdefault(name, []).append((total, weight))
    return {
        name: torch.sum(
            torch.stack([s for s, _ in pairs]).sum(0) / torch.stack([w for _, w in pairs]).sum(0)
        )
        for name, pairs in sums.items()
    }


def draw_weights(model: Chain, draw: torch.Generator) -> Any:
    """Draw weights large enough that every part of a model shows in its loss."""

    def weights(name: str, leaf: Any) -> Tensor:
        shape = padded_shape(leaf, model.sizes, name)
        centre = 1.0 if "norm" in name.split(".")[-1] else 0.0
        value = centre + 0.3 * torch.randn(shape, dtype=torch.float64, generator=draw)
        return value.to(leaf.dtype or torch.float64)

    return map_with_names(weights, model.params)


@cache
def reference(cfg: MoEConfig) -> tuple[Reference, Mapping[str, Tensor]]:
    """Draw weights and two microbatches; return them with the gradients, and the terms' values."""
    model = moe(cfg, batch_size=BATCH, dtype=torch.float64)
    draw = torch.Generator().manual_seed(0)

    params = draw_weights(model, draw)
    batches = []
    for number in range(2):
        tokens, labels = torch.randint(50, (2, BATCH, SEQ), generator=draw)
        kept = (torch.rand((BATCH, SEQ), generator=draw) < 1 / (2 + number)).float()
        batch = {"tokens": tokens, "labels": labels, "weights": kept}
        batches.append({**batch, "key": torch.tensor(17 + number)} if cfg.random else batch)
    leaves = optree.tree_map(lambda w: w.clone().requires_grad_(), params)
    if cfg.balance_over == "global":  # one device takes the whole step at once
        whole = {name: torch.cat([b[name] for b in batches]) for name in batches[0]}
        terms = objective(model.with_sizes(batch=2 * BATCH), leaves, [whole])
    else:
        terms = objective(model, leaves, batches)
    total = torch.stack(list(terms.values())).sum()
    total.backward()
    names, flat, _ = flatten_with_names(leaves)
    grads = {
        name: torch.zeros_like(leaf) if leaf.grad is None else leaf.grad
        for name, leaf in zip(names, flat, strict=True)
    }
    values = {name: value.detach() for name, value in terms.items()}
    return Reference(model, params, tuple(batches), total.detach(), grads), values


def assert_exact(ref: Reference, terms: Mapping[str, Tensor], layout: Layout) -> None:
    """Compare all terms and gradients of simulated ranks with one device's."""
    program = lower_model(ref.model, layout)

    def rank_main(comm: ThreadComm) -> tuple[dict[str, Tensor], list[Tensor]]:
        values, grads = gradients_on(program, comm, *rank_inputs(ref, program, comm))
        return values, optree.tree_leaves(grads)

    results = Threads(layout.sizes).run(rank_main)
    got = {name: torch.stack([values[name] for values, _ in results]) for name in terms}
    expected = {name: value.expand(len(results)) for name, value in terms.items()}
    names, declared, _ = flatten_with_names(ref.model.params)
    for at, (name, leaf) in enumerate(zip(names, declared, strict=True)):
        shape = tuple(ref.grads[name].shape)
        ty = make_type(shape, torch.float64, layout.spec(leaf.names, shape, name), layout.sizes)
        pieces = [grads[at].double() for _, grads in results]
        got[name] = assemble(pieces, ty, layout.sizes, name, rtol=RELATIVE[torch.float64])
        expected[name] = ref.grads[name].double()
    assert_leaves_close(got, expected)
