"""JAX forms of `megatree.functional`, written from the formulas and not from the torch code."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

import megatree.functional as F
from megatree.functional.loss import IGNORE
from megatree.runtime.jax.form import Form, wide
from megatree.runtime.jax.keys import keep_mask


def _swiglu(gate: Array, up: Array) -> Array:
    return gate * jax.nn.sigmoid(gate) * up


def _gelu(x: Array) -> Array:
    return x * (1 + jax.scipy.special.erf(x / 2**0.5)) / 2


def _gelu_tanh(x: Array) -> Array:
    return x * (1 + jnp.tanh((2 / jnp.pi) ** 0.5 * (x + 0.044715 * x**3))) / 2


def _squared_relu(x: Array) -> Array:
    return jnp.where(x > 0, x * x, 0)


def _rms_norm(x: Array, weight: Array | None = None, *, eps: float = 1e-5) -> Array:
    y = wide(x)
    y = y / jnp.sqrt(jnp.mean(y * y, axis=-1, keepdims=True) + eps)
    return y if weight is None else y * weight


def _layer_norm(
    x: Array, weight: Array | None = None, bias: Array | None = None, *, eps: float = 1e-5
) -> Array:
    y = wide(x)
    y = y - jnp.mean(y, axis=-1, keepdims=True)
    y = y / jnp.sqrt(jnp.mean(y * y, axis=-1, keepdims=True) + eps)
    y = y if weight is None else y * weight
    return y if bias is None else y + bias


def _embedding(ids: Array, table: Array) -> Array:
    return table[ids]


def _cross_entropy(logits: Array, labels: Array, *, num_classes: int | None = None) -> Array:
    # Masks where one would slice and gather, which a cut vocabulary would have to be whole for.
    logits = wide(logits)
    columns = jnp.arange(logits.shape[-1])
    if num_classes is not None:
        logits = jnp.where(columns < num_classes, logits, -jnp.inf)
    own = jnp.sum(jnp.where(columns == labels[..., None], logits, 0), axis=-1)
    return jnp.where(labels == IGNORE, 0, jax.nn.logsumexp(logits, axis=-1) - own)


def _linear_cross_entropy(
    x: Array,
    table: Array,
    labels: Array,
    weights: Array,
    *,
    num_classes: int | None = None,
    chunk: int | None = None,
) -> Array:
    logits = jnp.einsum("...d,vd->...v", x, table, precision=jax.lax.Precision.HIGHEST)
    return jnp.sum(_cross_entropy(logits, labels, num_classes=num_classes) * weights)


def _dropout(x: Array, key: int | Array, *, rate: float) -> Array:
    if rate == 0.0:
        return x
    return jnp.where(keep_mask(key, x.shape, rate), x / (1.0 - rate), 0)


def _rope(x: Array, table: Array, *, last: bool = False, neighbours: bool = False) -> Array:
    """Turn the pairs (i, i + c/2), or neighbours, as complex numbers are multiplied."""
    half = table.shape[-1] // 2
    ones = (1,) * (x.ndim - 3)
    table = table.reshape(*table.shape[:-1], *ones, 2 * half)
    cos, sin = table[..., :half], table[..., half:]
    rest = x.shape[-1] - 2 * half
    head, x = (x[..., :rest], x[..., rest:]) if last else (x[..., :0], x)
    x, tail = x[..., : 2 * half], x[..., 2 * half :]
    real, imaginary = (x[..., ::2], x[..., 1::2]) if neighbours else jnp.split(x, 2, axis=-1)
    turned = [real * cos - imaginary * sin, real * sin + imaginary * cos]
    if neighbours:
        turned = [jnp.stack(turned, axis=-1).reshape(x.shape)]
    head, tail = (y.astype(turned[0].dtype) for y in (head, tail))
    return jnp.concatenate([head, *turned, tail], axis=-1)


def _attention(
    q: Array,
    k: Array,
    v: Array,
    positions: Array | None = None,
    source_positions: Array | None = None,
    key: int | Array | None = None,
    segment_ids: Array | None = None,
    source_segment_ids: Array | None = None,
    sinks: Array | None = None,
    *,
    causal: bool = True,
    window: int | None = None,
    scale: float | None = None,
    dropout: float = 0.0,
    kernel: str = "auto",
) -> Array:
    """Write the definition out, one score per head, query and source; torch may fuse it."""
    q, k, v = wide(q), wide(k), wide(v)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    exact = jax.lax.Precision.HIGHEST
    scores = jnp.einsum("btgrk,bsgk->bgrts", q, k, precision=exact) * scale
    seen = _seen(q.shape[1], positions, source_positions, causal, window)
    if segment_ids is not None:
        of_sources = segment_ids if source_segment_ids is None else source_segment_ids
        same = segment_ids[..., :, None] == of_sources[..., None, :]
        seen = same if seen is None else seen & same
    if seen is not None:
        seen = seen if seen.ndim == 2 else seen[:, None, None]
        scores = jnp.where(seen, scores, -jnp.inf)
    top = jax.lax.stop_gradient(jnp.max(scores, axis=-1, keepdims=True))
    top = jnp.where(jnp.isfinite(top), top, 0)
    p = jnp.exp(scores - top)
    total = jnp.sum(p, axis=-1, keepdims=True)
    if sinks is not None:
        total = total + jnp.exp(wide(sinks)[:, :, None, None] - top)
    p = p / jnp.where(total == 0, 1, total)  # a query that sees nothing gets zeros
    if dropout > 0.0:
        assert key is not None
        p = jnp.where(keep_mask(key, p.shape, dropout), p / (1.0 - dropout), 0)
    return jnp.einsum("bgrts,bsgw->btgrw", p, v, precision=exact)


def _seen(
    num_queries: int,
    positions: Array | None,
    source_positions: Array | None,
    causal: bool,
    window: int | None,
) -> Array | None:
    """Return what every query sees, [t, s] or [b, t, s]; None for everything."""
    if not causal and window is None:
        return None
    if positions is None:
        positions = jnp.arange(num_queries)
    sources = positions if source_positions is None else source_positions
    distance = positions[..., :, None] - sources[..., None, :]
    seen = distance >= 0 if causal else jnp.abs(distance) < (window or 0)
    return seen if window is None else seen & (distance < window)


_FORMS: dict[Callable[..., Any], Form] = {
    F.silu: lambda x: x * jax.nn.sigmoid(x),
    F.swiglu: _swiglu,
    F.gelu: _gelu,
    F.gelu_tanh: _gelu_tanh,
    F.squared_relu: _squared_relu,
    F.rms_norm: _rms_norm,
    F.layer_norm: _layer_norm,
    F.embedding: _embedding,
    F.cross_entropy: _cross_entropy,
    F.linear_cross_entropy: _linear_cross_entropy,
    F.dropout: _dropout,
    F.rope: _rope,
    F.attention: _attention,
}

TABLE = {function.rule.fn: form for function, form in _FORMS.items()}  # type: ignore[attr-defined]
"""The function under an op -> its form; products need none, and the rest is torch functions."""
