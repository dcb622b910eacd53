"""Scaled dot-product attention; where there are many queries, one head and one block of them at a time."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from jax import lax

# Of one head and one block of queries: 8 MB in float32, which stay in a CPU's last-level cache.
SCORES = 2**21
# Fewer queries than this are cheaper at once.
QUERIES = 1024


def attention(
    q: jax.Array, k: jax.Array, v: jax.Array, key_mask: jax.Array | None = None, causal: bool = False
) -> jax.Array:
    """softmax(q k^T / sqrt(D)) v for each head (Vaswani et al. 2017, eq. 1); softmax in float32.

    Args:
      q: (B, T, N, D) queries of N heads.
      k, v: (B, S, N, D) keys and values.
      key_mask: (B, S) bool, False where a key is to be ignored; None for all.
      causal: query t sees keys 0 ... t only.

    Returns:
      (B, T, N, D), of q's dtype.
    """
    length, keys = q.shape[1], k.shape[1]
    if causal or length < QUERIES:
        mask = None if key_mask is None else key_mask[:, None, None, :]
        if causal:
            below = jnp.tril(jnp.ones((length, keys), bool))[None, None]
            mask = below if mask is None else mask & below
        return _attend(q, k, v, mask)
    return _in_blocks(q, k, v, key_mask, min(length, max(SCORES // keys, 1)))


def _attend(q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array | None) -> jax.Array:
    scores = jnp.einsum("BTND,BSND->BNTS", q, k, preferred_element_type=jnp.float32) / math.sqrt(q.shape[-1])
    if mask is not None:
        scores = jnp.where(mask, scores, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(scores, -1).astype(v.dtype)
    return jnp.einsum("BNTS,BSND->BTND", weights, v, preferred_element_type=jnp.float32).astype(q.dtype)


def _in_blocks(q: jax.Array, k: jax.Array, v: jax.Array, key_mask: jax.Array | None, size: int) -> jax.Array:
    """The same, one head of one picture and `size` queries at a time, so that the scores never exist whole."""
    batch, length, heads, width = q.shape
    # The last block overlaps rather than being ragged.
    starts = jnp.array([min(i, length - size) for i in range(0, length, size)])
    bias = jnp.zeros((batch, k.shape[1])) if key_mask is None else jnp.where(key_mask, 0.0, jnp.finfo(jnp.float32).min)

    def by_head(x: jax.Array) -> jax.Array:
        return jnp.swapaxes(x, 1, 2).reshape(batch * heads, x.shape[1], -1)

    def head(arrays: tuple[jax.Array, jax.Array, jax.Array, jax.Array]) -> jax.Array:
        q, k, v, bias = arrays
        # One more value, which is always 1: its weighted sum is what the weights sum up to.
        v = jnp.concatenate([v, jnp.ones_like(v[:, :1])], -1)

        @jax.checkpoint  # under a gradient the scores are computed again, not kept
        def block(start: jax.Array) -> jax.Array:
            queries = lax.dynamic_slice_in_dim(q, start, size)
            scores = lax.dot_general(queries, k, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32)
            scores = scores / math.sqrt(width) + bias
            weights = jnp.exp(scores - scores.max(-1, keepdims=True)).astype(v.dtype)
            out = lax.dot_general(weights, v, (((1,), (0,)), ((), ())), preferred_element_type=jnp.float32)
            return (out[:, :width] / out[:, width:]).astype(q.dtype)

        if size == length:
            return block(starts[0])
        blocks = lax.map(block, starts)
        whole = blocks[:-1].reshape(-1, width)
        return jnp.concatenate([whole, blocks[-1, len(whole) - length :]])

    out = lax.map(head, (by_head(q), by_head(k), by_head(v), jnp.repeat(bias, heads, 0)))
    return jnp.swapaxes(out.reshape(batch, heads, length, width), 1, 2)
