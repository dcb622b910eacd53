"""Scaled dot-product attention, by cuDNN where it will have it, else in blocks of queries.

Neither holds all scores at once.
"""

from __future__ import annotations

import functools
import logging
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from sdjax.ops.strips import as_integers

# Of one head and one block of queries: 8 MB in float32, which stay in a CPU's last-level cache.
SCORES = 2**21
# Fewer queries than this are cheaper at once.
QUERIES = 1024
HOPPER = (9, 0)

logger = logging.getLogger(__name__)


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
    capability = cuda_capability()
    if capability is None or not cudnn_takes(q.shape, k.shape, q.dtype, key_mask is not None, capability):
        return plain(q, k, v, key_mask, causal)
    try:
        # The machine has such a GPU, but the program may be for its CPU: that is known when it is lowered. This alone
        # would not do, because JAX asks for cuDNN while both are traced, and raises where there is none.
        return lax.platform_dependent(
            cuda=lambda: with_cudnn(q, k, v, key_mask, causal), default=lambda: plain(q, k, v, key_mask, causal)
        )
    except (NotImplementedError, RuntimeError) as error:  # JAX's answers to a cuDNN that is missing or too old
        logger.warning("attention without cuDNN: %s", error)
        return plain(q, k, v, key_mask, causal)


def cuda_capability() -> tuple[int, int] | None:
    """The compute capability of the GPUs that programs here are for, (9, 0) for an H100; None without CUDA."""
    if jax.default_backend() != "gpu":
        return None
    device = jax.devices()[0]
    if "cuda" not in device.client.platform_version:
        return None  # AMD's are called "gpu" too
    major, minor = device.compute_capability.split(".")
    return int(major), int(minor)


def cudnn_takes(
    q_shape: tuple[int, ...],
    k_shape: tuple[int, ...],
    dtype: jax.typing.DTypeLike,
    masked: bool,
    capability: tuple[int, int],
) -> bool:
    """Whether cuDNN's attention is for these shapes on such a GPU, the gradient included.

    The rules are those of jax/_src/cudnn/fused_attention_stablehlo.py, which raises where they are broken.
    """
    length, keys, size = q_shape[1], k_shape[1], q_shape[3]
    if jnp.dtype(dtype) not in (jnp.bfloat16, jnp.float16):
        return False
    # A mask becomes a bias, of which it has the gradient only at even lengths.
    if masked and (length % 2 or keys % 2):
        return False
    return size % 8 == 0 and size <= (256 if capability >= HOPPER else 128)


def with_cudnn(q: jax.Array, k: jax.Array, v: jax.Array, key_mask: jax.Array | None, causal: bool) -> jax.Array:
    """`attention` by cuDNN's flash attention (Dao 2023)."""
    mask = None
    if key_mask is not None:
        shape = (q.shape[0], 1, q.shape[1], k.shape[1])  # it wants a bias for every query, but not for every head
        mask = jnp.broadcast_to(key_mask[:, None, None, :], shape)

    def fused(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        return jax.nn.dot_product_attention(q, k, v, mask=mask, is_causal=causal, implementation="cudnn")

    if q.shape[1] % 2 == 0 and k.shape[1] % 2 == 0:
        return fused(q, k, v)
    # JAX refuses the gradient at odd lengths, and a prompt has 77 tokens: it is the blocks' there.
    either = jax.custom_vjp(fused)
    either.defvjp(
        lambda q, k, v: jax.vjp(lambda q, k, v: plain(q, k, v, None, causal), q, k, v),
        lambda pull_back, gradient: pull_back(gradient),
    )
    return either(q, k, v)


def plain(q: jax.Array, k: jax.Array, v: jax.Array, key_mask: jax.Array | None, causal: bool) -> jax.Array:
    """`attention` in plain JAX, in blocks where there are many queries."""
    length, keys = q.shape[1], k.shape[1]
    if causal or length < QUERIES:
        mask = None if key_mask is None else key_mask[:, None, None, :]
        if causal:
            below = jnp.tril(jnp.ones((length, keys), bool))[None, None]
            mask = below if mask is None else mask & below
        return _attend(q, k, v, mask)
    size = min(length, max(SCORES // keys, 1))
    bias = None if key_mask is None else jnp.where(key_mask, 0.0, jnp.finfo(jnp.float32).min)
    if jax.default_backend() == "cpu":
        return _in_place(q, k, v, bias, size)
    return _in_blocks(q, k, v, bias, size)


def _attend(q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array | None) -> jax.Array:
    scores = jnp.einsum("BTND,BSND->BNTS", q, k, preferred_element_type=jnp.float32) / math.sqrt(q.shape[-1])
    if mask is not None:
        scores = jnp.where(mask, scores, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(scores, -1).astype(v.dtype)
    return jnp.einsum("BNTS,BSND->BTND", weights, v, preferred_element_type=jnp.float32).astype(q.dtype)


def _in_blocks(q: jax.Array, k: jax.Array, v: jax.Array, bias: jax.Array | None, size: int) -> jax.Array:
    """`size` queries at a time, so that the scores never exist whole, and on a CPU one head of one picture."""
    batch, length, heads, width = q.shape
    starts = _starts(length, size)

    def by_head(x: jax.Array) -> jax.Array:
        return jnp.swapaxes(x, 1, 2).reshape(batch * heads, x.shape[1], -1)

    def head(arrays: tuple[jax.Array, jax.Array, jax.Array, jax.Array | None]) -> jax.Array:
        q, k, v, bias = arrays
        v = jnp.concatenate([v, jnp.ones_like(v[:, :1])], -1)

        @jax.checkpoint  # under a gradient the scores are computed again, not kept
        def block(start: jax.Array) -> jax.Array:
            return _block(lax.dynamic_slice_in_dim(q, start, size), k, v, bias)

        if size == length:
            return block(starts[0])
        blocks = lax.map(block, starts)
        whole = blocks[:-1].reshape(-1, width)
        return jnp.concatenate([whole, blocks[-1, len(whole) - length :]])

    each = functools.partial(lax.map, head) if jax.default_backend() == "cpu" else jax.vmap(head)
    out = each((by_head(q), by_head(k), by_head(v), None if bias is None else jnp.repeat(bias, heads, 0)))
    return jnp.swapaxes(out.reshape(batch, heads, length, width), 1, 2)


@functools.partial(jax.custom_jvp, nondiff_argnums=(4,))
def _in_place(q: jax.Array, k: jax.Array, v: jax.Array, bias: jax.Array | None, size: int) -> jax.Array:
    """`_in_blocks` on a CPU, without turning the arrays round; see `sdjax.ops.strips` for why as integers."""
    batch, length, heads, width = q.shape
    starts, floats = _starts(length, size), functools.partial(lax.bitcast_convert_type, new_dtype=q.dtype)
    sources, ones = [as_integers(x) for x in (q, k, v)], as_integers(jnp.ones((k.shape[1], 1), v.dtype))

    def head(i: jax.Array, out: jax.Array) -> jax.Array:
        picture, own = i // heads, i % heads

        def part(x: jax.Array) -> jax.Array:
            return lax.dynamic_slice(x, (picture, 0, own, 0), (1, x.shape[1], 1, width)).reshape(-1, width)

        q, k, v = map(part, sources)
        k, v = floats(k), floats(jnp.concatenate([v, ones], 1))
        hidden = None if bias is None else lax.dynamic_index_in_dim(bias, picture, keepdims=False)

        def block(j: jax.Array, out: jax.Array) -> jax.Array:
            queries = floats(lax.dynamic_slice_in_dim(q, starts[j], size))
            result = as_integers(_block(queries, k, v, hidden))
            return lax.dynamic_update_slice(out, result[None, :, None], (picture, starts[j], own, 0))

        return lax.fori_loop(0, len(starts), block, out)

    # What is there at first does not matter, all of it is written.
    return floats(lax.fori_loop(0, batch * heads, head, jnp.broadcast_to(sources[0][:1, :1, :1, :1], q.shape)))


@_in_place.defjvp
def _in_place_jvp(size: int, primals: tuple[Any, ...], tangents: tuple[Any, ...]) -> tuple[jax.Array, jax.Array]:
    out, change = jax.jvp(functools.partial(_in_blocks, size=size), primals, tangents)
    return out, change


def _starts(length: int, size: int) -> jax.Array:
    """Of the blocks; the last one overlaps rather than being ragged."""
    return jnp.array([min(i, length - size) for i in range(0, length, size)])


def _block(q: jax.Array, k: jax.Array, v: jax.Array, bias: jax.Array | None) -> jax.Array:
    """(Q, D), (S, D), (S, D + 1), (S,) -> (Q, D). The last of v is always 1: its weighted sum is that of weights."""
    width = q.shape[-1]
    scores = lax.dot_general(q, k, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32)
    scores = scores / math.sqrt(width)
    if bias is not None:
        scores = scores + bias[None]
    weights = jnp.exp(scores - scores.max(-1, keepdims=True)).astype(v.dtype)
    out = lax.dot_general(weights, v, (((1,), (0,)), ((), ())), preferred_element_type=jnp.float32)
    return (out[:, :width] / out[:, width:]).astype(q.dtype)
