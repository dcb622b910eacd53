"""Scaled dot-product attention, by cuDNN where it will have it, else in blocks of queries.

Neither holds all scores at once.
"""

from __future__ import annotations

import logging
import math

import jax
import jax.numpy as jnp
from jax import lax

# 512 x 4096 float32 scores are 8 MB: they stay in a CPU's last-level cache (7x faster than all at once).
BLOCK = 512
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
    """`attention` in plain JAX, a block of queries at a time where they are many."""
    length = q.shape[1]
    mask = None if key_mask is None else key_mask[:, None, None, :]
    if causal:
        below = jnp.tril(jnp.ones((length, k.shape[1]), bool))[None, None]
        mask = below if mask is None else mask & below
    if length <= 2 * BLOCK or causal:
        return _attend(q, k, v, mask)
    # One head of one picture and one block of queries at a time; the last block overlaps rather than being ragged.
    starts = jnp.array([min(i, length - BLOCK) for i in range(0, length, BLOCK)])

    def block(start: jax.Array) -> jax.Array:
        return _attend(lax.dynamic_slice_in_dim(q, start, BLOCK, 1), k, v, mask)

    blocks = lax.map(block, starts)  # (blocks, B, BLOCK, N, D)
    whole = jnp.moveaxis(blocks[:-1], 0, 1).reshape(q.shape[0], -1, *q.shape[2:])
    return jnp.concatenate([whole, blocks[-1][:, whole.shape[1] - length :]], 1)


def _attend(q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array | None) -> jax.Array:
    scores = jnp.einsum("BTND,BSND->BNTS", q, k, preferred_element_type=jnp.float32) / math.sqrt(q.shape[-1])
    if mask is not None:
        scores = jnp.where(mask, scores, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(scores, -1).astype(v.dtype)
    return jnp.einsum("BNTS,BSND->BTND", weights, v, preferred_element_type=jnp.float32).astype(q.dtype)
