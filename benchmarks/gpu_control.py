"""The control: the strongest single-GPU training step written by hand in plain PyTorch.

Plain functions over tensors: one compiled block that all layers share, one product for queries,
keys and values and one for gates and ups, fused attention called directly, linear and
cross-entropy in chunks, AdamW in one pass. bfloat16 weights and gradients, float32 masters and
moments; several microbatches add up in float32.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from megatree.models.gpt_config import GPTConfig

CHUNK = 8192
"""Positions whose logits exist at a time."""


@triton.jit
def _cross_entropy(z, labels, loss, scale, WIDTH: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """Per row: the loss; logits become (softmax - one-hot) * scale."""
    row = tl.program_id(0).to(tl.int64)
    z += row * WIDTH
    label = tl.load(labels + row)
    top = tl.full((), float("-inf"), tl.float32)
    total = tl.full((), 0.0, tl.float32)
    for first in range(0, WIDTH, BLOCK):
        at = first + tl.arange(0, BLOCK)
        x = tl.load(z + at, at < WIDTH, other=float("-inf")).to(tl.float32)
        higher = tl.maximum(top, tl.max(x, 0))
        total = total * tl.exp(top - higher) + tl.sum(tl.exp(x - higher), 0)
        top = higher
    own = tl.load(z + label).to(tl.float32)
    tl.store(loss + row, tl.log(total) + top - own)
    tl.debug_barrier()
    for first in range(0, WIDTH, BLOCK):
        at = first + tl.arange(0, BLOCK)
        x = tl.load(z + at, at < WIDTH, other=float("-inf")).to(tl.float32)
        grad = tl.exp(x - top) * (scale / total) - tl.where(at == label, scale, 0.0)
        tl.store(z + at, grad.to(z.dtype.element_ty), at < WIDTH)


@triton.jit
def _adamw(p, g, w, m, v, n, lr, b1, b2, eps, kept, fix1, fix2, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < n
    grad = tl.load(g + at, inside, other=0.0).to(tl.float32)
    master = tl.load(w + at, inside, other=0.0)
    first = b1 * tl.load(m + at, inside, other=0.0) + (1 - b1) * grad
    second = b2 * tl.load(v + at, inside, other=0.0) + (1 - b2) * grad * grad
    master = master * kept - lr * (first * fix1) / (tl.sqrt(second * fix2) + eps)
    tl.store(w + at, master, inside)
    tl.store(m + at, first, inside)
    tl.store(v + at, second, inside)
    tl.store(p + at, master.to(p.dtype.element_ty), inside)


class _LinearLoss(torch.autograd.Function):
    """Scaled sum of cross-entropies; the forward forms the gradients, a chunk at a time."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, table: Tensor, labels: Tensor, scale: float) -> Tensor:
        loss = torch.empty(len(x), dtype=torch.float32, device=x.device)
        grad_x, grad_table = torch.empty_like(x), None
        for start in range(0, len(x), CHUNK):
            part = slice(start, start + CHUNK)
            z = x[part] @ table.t()
            _cross_entropy[(len(z),)](
                z, labels[part], loss[part], scale, WIDTH=z.shape[1], BLOCK=4096, num_warps=8
            )
            torch.mm(z, table, out=grad_x[part])
            if grad_table is None:
                grad_table = torch.mm(z.t(), x[part], out_dtype=torch.float32)
            else:
                grad_table = torch.addmm(grad_table, z.t(), x[part], out_dtype=torch.float32)
        assert grad_table is not None
        ctx.save_for_backward(grad_x, grad_table.to(table.dtype))
        return loss.sum() * scale

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:  # type: ignore[override]
        return *ctx.saved_tensors, None, None  # the loss is not scaled further


def _attend(q: Tensor, k: Tensor, v: Tensor, kernel: str) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    if kernel == "fa4":
        out = torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, 0.0, True)[0]
    else:
        out = torch.ops.aten._scaled_dot_product_cudnn_attention(q, k, v, None, True, 0.0, True)[0]
    return out.transpose(1, 2).flatten(2)


def _rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    wide = x.float()
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-5)).to(x.dtype) * weight


def _turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b = x.float().chunk(2, -1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1).to(x.dtype)


def _llama_block(
    x: Tensor, w: list[Tensor], cos: Tensor, sin: Tensor, cfg: GPTConfig, kernel: str
) -> Tensor:
    norm1, wqkv, wo, norm2, w_in, w_down = w
    qkv = F.linear(_rms_norm(x, norm1), wqkv).unflatten(-1, (-1, cfg.head_dim))
    q, k, v = qkv.split([cfg.num_heads, cfg.kv_heads, cfg.kv_heads], 2)
    x = x + F.linear(_attend(_turn(q, cos, sin), _turn(k, cos, sin), v, kernel), wo)
    gate, up = F.linear(_rms_norm(x, norm2), w_in).chunk(2, -1)
    return x + F.linear(F.silu(gate) * up, w_down)


def _gpt_block(x: Tensor, w: list[Tensor], cfg: GPTConfig, kernel: str) -> Tensor:
    g1, b1, wqkv, bqkv, wo, bo, g2, b2, w_up, b_up, w_down, b_down = w
    qkv = F.linear(F.layer_norm(x, (cfg.embed,), g1, b1), wqkv, bqkv)
    q, k, v = qkv.unflatten(-1, (3, cfg.num_heads, cfg.head_dim)).unbind(2)
    x = x + F.linear(_attend(q, k, v, kernel), wo, bo)
    y = F.linear(F.layer_norm(x, (cfg.embed,), g2, b2), w_up, b_up)
    return x + F.linear(F.gelu(y, approximate="tanh"), w_down, b_down)


def _parameters(cfg: GPTConfig, device: torch.device) -> dict[str, list[Tensor]]:
    """Return bfloat16 leaves: the ends, and those of every block."""
    generator = torch.Generator(device).manual_seed(0)

    def normal(*shape: int, std: float = 0.02) -> Tensor:
        return torch.empty(*shape, device=device).normal_(0, std, generator=generator)

    d, ffn, std = cfg.embed, cfg.ffn, 0.02 / math.sqrt(2 * cfg.num_layers)
    q, kv = cfg.num_heads * cfg.head_dim, cfg.kv_heads * cfg.head_dim
    one, zero = torch.ones(d, device=device), torch.zeros(d, device=device)
    out: dict[str, list[Tensor]] = {}
    llama = cfg.positions == "rotary"
    if llama:
        out["ends"] = [normal(cfg.vocab_size, d), normal(cfg.vocab_size, d), one]
    else:
        out["ends"] = [normal(cfg.vocab_size, d), normal(cfg.seq_length, d), one, zero]
    for i in range(cfg.num_layers):
        qkv, wo = normal(q + 2 * kv, d), normal(d, q, std=std)
        w_in, w_down = normal((1 + llama) * ffn, d), normal(d, ffn, std=std)
        if llama:
            out[f"block {i}"] = [one, qkv, wo, one, w_in, w_down]
        else:
            wide, up = torch.zeros(len(qkv), device=device), torch.zeros(ffn, device=device)
            out[f"block {i}"] = [
                one, zero, qkv, wide, wo, zero, one, zero, w_in, up, w_down, zero
            ]  # fmt: skip
    return {n: [t.bfloat16().clone().requires_grad_() for t in ts] for n, ts in out.items()}


def control_step(
    cfg: GPTConfig, device: torch.device, *, kernel: str = "cudnn"
) -> Callable[[list[Tensor]], Tensor]:
    """Return a function that makes one update and returns the loss.

    Args:
        cfg: a Llama (RMSNorm, rotary, SwiGLU, untied) or a GPT-2 (biases, tied).
        device: a GPU.
        kernel: of attention, "cudnn" or "fa4".

    Returns:
        A function of microbatches of tokens, [batch, seq + 1].
    """
    named = _parameters(cfg, device)
    leaves = [t for ts in named.values() for t in ts]
    masters = [t.detach().float() for t in leaves]
    m, v = ([torch.zeros_like(w) for w in masters] for _ in range(2))
    compiled: Callable[[Callable[..., Tensor]], Callable[..., Tensor]] = lambda fn: torch.compile(  # noqa: E731
        fn, fullgraph=True, dynamic=False
    )
    ends = named["ends"]
    if cfg.positions == "rotary":
        frequencies = 1e4 ** (-torch.arange(0, cfg.head_dim, 2, device=device) / cfg.head_dim)
        angles = torch.outer(torch.arange(cfg.seq_length, device=device), frequencies)
        cos, sin = angles.cos()[:, None], angles.sin()[:, None]
        block = compiled(lambda x, w: _llama_block(x, w, cos, sin, cfg, kernel))
        first = lambda x: F.embedding(x, ends[0])  # noqa: E731
        last, table = compiled(lambda x: _rms_norm(x, ends[2])), ends[1]
    else:
        block = compiled(lambda x, w: _gpt_block(x, w, cfg, kernel))
        first = compiled(lambda x: F.embedding(x, ends[0]) + ends[1])
        last, table = compiled(lambda x: F.layer_norm(x, (cfg.embed,), ends[2], ends[3])), ends[0]
    count = 0

    def step(microbatches: list[Tensor]) -> Tensor:
        nonlocal count
        total, sums = torch.zeros((), device=device), None
        scale = 1.0 / sum(t[:, 1:].numel() for t in microbatches)
        for tokens in microbatches:
            x = first(tokens[:, :-1])
            for i in range(cfg.num_layers):
                x = block(x, named[f"block {i}"])
            loss = _LinearLoss.apply(last(x).flatten(0, 1), table, tokens[:, 1:].flatten(), scale)
            loss.backward()
            total += loss.detach()
            if len(microbatches) > 1:
                grads = [t.grad for t in leaves if t.grad is not None]
                if sums is None:
                    sums = [g.float() for g in grads]
                else:
                    torch._foreach_add_(sums, grads)
                for t in leaves:
                    t.grad = None
        count += 1
        for i, t in enumerate(leaves):
            grad = t.grad if sums is None else sums[i]
            decay = 0.1 if t.dim() > 1 else 0.0
            _adamw[(triton.cdiv(t.numel(), 1024),)](
                t, grad, masters[i], m[i], v[i], t.numel(), 1e-4, 0.9, 0.95, 1e-8, 1 - 1e-4 * decay,
                1 / (1 - 0.9**count), 1 / (1 - 0.95**count), BLOCK=1024, num_warps=4,
            )  # fmt: skip
            t.grad = None
        return total

    return step
